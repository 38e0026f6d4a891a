"""Inputs written otherwise: always alike, the answer stays, and what a model loses by it is seen."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from headstart.data.read import Where
from headstart.data.records import Document, Labelled, Record, Tagged
from headstart.evaluate.measure import Measured, RowResult
from headstart.evaluate.robust import VARIED, compare_varied, know_outside, mistype, reorder_fields, vary
from tests.conftest import conversation

ROWS: list[Record] = [
    conversation("Name: Ann Miller\nAge: 61, of Leeds.\nReason: dizzy since 3.5 days", "Ann Miller, dizzy."),
    Labelled(Where("f", 2), "Please transfer 36.5 pounds, now.", "transfer", pair="Where is it?"),
    Tagged(Where("f", 3), ("Maria", "lives", "in", "Madrid"), ("B-per", "O", "O", "B-loc")),
]


@pytest.mark.parametrize("name", VARIED)
def test_a_row_always_varies_alike_and_what_is_right_stays(name: str) -> None:
    for row in ROWS:
        varied = vary(row, name)
        assert varied == vary(replace(row), name)
        assert varied.where == row.where
        if isinstance(row, Labelled) and isinstance(varied, Labelled):
            assert varied.label == row.label
        elif isinstance(row, Tagged) and isinstance(varied, Tagged):
            assert varied.tags == row.tags
            assert len(varied.words) == len(row.words)
        else:
            assert varied.messages[-1] == row.messages[-1]  # type: ignore[union-attr]
    assert vary(Document(Where("f", 4), "Some text."), name) == Document(Where("f", 4), "Some text.")


def test_each_way_does_what_it_says() -> None:
    chance = random.Random(1)
    text = "Patients should always drink enough water before their examination " * 20
    wrong = mistype(text, chance)
    words = sum(a != b for a, b in zip(text.split(), wrong.split(), strict=True))
    long = sum(len(word) >= 4 for word in text.split())
    assert 0.08 < words / long < 0.22
    labelled = ROWS[1]
    assert vary(labelled, "no punctuation") == replace(
        labelled, text="Please transfer 36.5 pounds now", pair="Where is it"
    )
    fields = "a: 1\nb: 2\nc: 3\nd: 4"
    shuffled = reorder_fields(fields, chance)
    assert shuffled != fields
    assert sorted(shuffled.split("\n")) == fields.split("\n")
    assert (
        reorder_fields("One line.\nAnother: line\nAnd more\nand more", chance)
        == "One line.\nAnother: line\nAnd more\nand more"
    )
    assert vary(labelled, "white space").text.split() == labelled.text.split()  # type: ignore[union-attr]


def told(records: Sequence[Record], right: bool, sure: float = 0.9) -> Measured:
    rows = [
        RowResult(str(r.where), 1.0, 1.0, "", "yes", "yes" if right else "no", True, probability=sure) for r in records
    ]
    return Measured(rows, "classification")


def test_a_model_that_reads_capitals_only_is_seen_to_fail_on_lower_case() -> None:
    records = [Labelled(Where("f", n), f"WORD {n}", "yes") for n in range(40)]

    def measure(varied: Sequence[Record]) -> tuple[Sequence[int], Measured]:
        read = [n for n, row in enumerate(varied) if n % 2]  # of the others none fits into the model
        return read, told([varied[n] for n in read], all(row.content.isupper() for row in varied))

    found = {item.name: item.compared for item in compare_varied(records, told(records, True), measure)}
    assert "upper case" not in found  # nothing changes
    assert found["lower case"].direction == -1
    assert found["lower case"].difference.value == -1
    assert found["lower case"].rows == 20
    assert found["white space"].direction == 0


def test_confidence_tells_what_is_from_outside() -> None:
    rows = ROWS * 10
    assert know_outside(told(rows, True, 0.9), told(rows, True, 0.2)).value == 1
    assert know_outside(told(rows, True, 0.5), told(rows, True, 0.5)).value == 0.5
