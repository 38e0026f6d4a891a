"""Inputs written otherwise: always alike, the answer stays, and what a model loses by it is seen."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from headstart.data.read import Where
from headstart.data.records import Document, Labelled, Record, Tagged
from headstart.evaluate.measure import Measured, RowResult
from headstart.evaluate.robust import (
    OUTSIDE,
    VARIED,
    affordable,
    find_robust,
    know_outside,
    mistype,
    reorder_fields,
    robust_result,
    vary,
    write_otherwise,
    write_variants,
)
from headstart.report.words import robust_lines, robust_words
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
    asked = conversation("Write the note:\n\nDoctor: hello\nPatient: hi", "A note.")
    assert vary(asked, "the first line last").messages[0].content == "Doctor: hello\nPatient: hi\n\nWrite the note:"  # type: ignore[union-attr]
    assert vary(labelled, "the first line last") == labelled
    longer = vary(labelled, "other text before it").text  # type: ignore[union-attr]
    assert longer.endswith(labelled.text)  # type: ignore[union-attr]
    assert len(longer) > 5 * len(labelled.text)  # type: ignore[union-attr]
    assert vary(labelled, "white space").text.split() == labelled.text.split()  # type: ignore[union-attr]


def told(records: Sequence[Record], right: bool, sure: float = 0.9) -> Measured:
    rows = [
        RowResult(str(r.where), 1.0, 1.0, "", "yes", "yes" if right else "no", True, probability=sure) for r in records
    ]
    return Measured(rows, "classification")


RECORDS: list[Record] = [Labelled(Where("f", n), f"WORD {n}", "yes") for n in range(40)]


def written(read: Callable[[str], bool]) -> dict[str, Measured]:
    """Return what a model makes of the rows written otherwise that is right where it can `read` them; of each way half are read."""
    ways = {name: rows[1::2] for name, rows in write_otherwise(RECORDS)}
    return {name: told(rows, all(read(row.texts[0]) for row in rows)) for name, rows in ways.items()}


def test_a_model_that_reads_capitals_only_is_seen_to_fail_on_lower_case() -> None:
    found = {item.name: item.compared for item in find_robust(told(RECORDS, True), written(str.isupper)).varied}
    assert "upper case" not in found  # nothing changes
    assert found["lower case"].direction == -1
    assert found["lower case"].difference.value == -1
    assert found["lower case"].rows == 20
    assert found["white space"].direction == 0


def test_a_run_tells_what_inputs_that_vary_cost_and_what_is_still_gained_on_them() -> None:
    def run(right: bool, sure: float, ways: dict[str, Measured]) -> Measured:
        ways = {
            **ways,
            OUTSIDE: told([replace(r, where=Where("general", n)) for n, r in enumerate(RECORDS)], True, 0.5),
        }
        beside = [replace(row, part=name, varied=True) for name, some in ways.items() for row in some.rows]
        return Measured([*told(RECORDS, right, sure).rows, *beside], "classification")

    nothing, capitals = written(lambda _: False), written(str.isupper)
    before, after = run(False, 0.5, nothing), run(True, 0.9, capitals)
    assert [row.where for row in after.own] == [str(row.where) for row in RECORDS]  # what a verdict rests on is as ever
    assert not after.parts()
    result = robust_result(before, after)
    assert result is not None
    lower, space = result["varied"]["lower case"], result["varied"]["white space"]
    assert (lower["untouched"]["value"], lower["varied"]["value"], lower["clean"]["value"]) == (0, 0, 1)
    assert (lower["direction"], lower["gain_direction"]) == (-1, 0)
    assert (space["untouched"]["value"], space["varied"]["value"], space["clean"]["value"]) == (0, 1, 1)
    assert (space["direction"], space["gain_direction"]) == (0, 1)
    assert {side: value["value"] for side, value in result["outside_auroc"].items()} == {"before": 0.5, "after": 1}
    said = robust_words(result)
    assert said.startswith("most is lost with lower case: accuracy 1.000 -> 0.000 (-1.000, ")
    ways = ["typing errors", "lower case", "a greeting before it", "other text before it", "white space"]
    assert list(result["varied"]) == ways
    assert result["varied"]["typing errors"]["rows"] < 8  # too few to tell
    assert "better than the untouched model in 1 of 4 ways" in said
    assert [line[-1] for line in robust_lines(result) if line[0] == "lower case"] == ["worse"]
    # Where no way is clearly worse, none is named.
    held = robust_result(run(False, 0.5, nothing), run(True, 0.9, {"white space": capitals["white space"]}))
    assert robust_words(held).startswith("it holds in all 1 ways")  # type: ignore[arg-type]
    # A run that was begun before rows were written otherwise goes on without.
    assert robust_result(told(RECORDS, False), after) is None


@pytest.mark.parametrize("tokens", [10**4, 2 * 10**4, 10**5, 10**6, 10**9])
def test_rows_are_written_otherwise_as_long_as_they_cost_a_tenth_of_training(tokens: int) -> None:
    # Forward and backward cost three times what scoring costs; rows are scored in each way, before and after.
    ways, rows = affordable(tokens, 100)
    cost, budget = ways * rows * 2 * 100, 0.1 * 3 * tokens
    assert cost <= budget
    assert rows >= 8  # fewer decide nothing
    assert (ways, rows) == (len(VARIED), 64) or budget - cost < max(2 * 100 * ways, 8 * 2 * 100)


def test_a_run_too_short_to_pay_for_it_writes_nothing_otherwise() -> None:
    assert affordable(1_000, 100)[0] == 0
    assert write_variants(RECORDS, 0, lambda _: pytest.fail("rows are encoded"), "yes") == []


def test_confidence_tells_what_is_from_outside() -> None:
    rows = ROWS * 10
    assert know_outside(told(rows, True, 0.9), told(rows, True, 0.2)).value == 1
    assert know_outside(told(rows, True, 0.5), told(rows, True, 0.5)).value == 0.5
