"""Inputs written otherwise: always alike, the answer stays, and what a model loses by it is seen."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from headstart.config import DataSettings
from headstart.data.read import Where
from headstart.data.records import Document, Labelled, Record, Tagged
from headstart.data.segments import Segmented
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
    spare_tokens,
    variant_reading,
    vary,
    write_variants,
)
from headstart.report.words import robust_lines, robust_words
from tests.conftest import conversation, example

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


RECORDS: dict[int, Record] = {n: Labelled(Where("f", n), f"WORD {n}", "yes") for n in range(40)}
WRITTEN = ["typing errors", "lower case", "a greeting before it", "other text before it", "white space"]


def read_half(records: Sequence[Record]) -> Segmented:
    """Return every second row: of the others none fits into the model."""
    half = list(records)[1::2]
    return Segmented([example([1, 2], line=n) for n in range(len(half))], half)


def measured(right: bool, sure: float, read: Callable[[str], bool], where: str = "") -> Measured:
    """Return what a model made of the rows and, where it can `read` all of a way, of those written otherwise; and text from outside."""
    outside = [Labelled(Where("general", n), "Some text.", "yes") for n in range(40)]
    rows = list(told(list(RECORDS.values()), right, sure).rows)
    for variant in write_variants(RECORDS, read_half, outside=Segmented([], outside)):
        if variant.name == OUTSIDE:
            rows += variant.mark(told(variant.rows.kept, True, 0.5).rows)
        else:
            readable = all(read(row.texts[0]) for row in variant.rows.kept)
            rows += variant.mark(told(variant.rows.kept, readable).rows)
    return Measured([replace(row, where=where) for row in rows] if where else rows, "classification")


def test_a_model_that_reads_capitals_only_is_seen_to_fail_on_lower_case() -> None:
    robust = find_robust(measured(True, 0.9, str.isupper))
    found = {item.name: item.compared for item in robust.varied}
    assert list(found) == WRITTEN  # upper case changes nothing
    assert found["lower case"].direction == -1
    assert found["lower case"].difference.value == -1
    assert found["lower case"].rows == 20
    assert found["white space"].direction == 0
    assert robust.outside is not None
    assert robust.outside.value == 1


def test_a_run_tells_what_inputs_that_vary_cost_and_what_is_still_gained_on_them() -> None:
    before, after = measured(False, 0.5, lambda _: False), measured(True, 0.9, str.isupper)
    assert [row.where for row in after.own] == [f"f:{n}" for n in RECORDS]  # what a verdict rests on is as ever
    assert not after.parts()
    result = robust_result(before, after)
    assert result is not None
    assert list(result["varied"]) == WRITTEN
    lower, space = result["varied"]["lower case"], result["varied"]["white space"]
    assert (lower["untouched"]["value"], lower["varied"]["value"], lower["clean"]["value"]) == (0, 0, 1)
    assert (lower["direction"], lower["gain_direction"]) == (-1, 0)
    assert (space["untouched"]["value"], space["varied"]["value"], space["clean"]["value"]) == (0, 1, 1)
    assert (space["direction"], space["gain_direction"]) == (0, 1)
    assert {side: value["value"] for side, value in result["outside_auroc"].items()} == {"before": 0.5, "after": 1}
    said = robust_words(result)
    assert said.startswith("most is lost with lower case: accuracy 1.000 -> 0.000 (-1.000, ")
    assert result["varied"]["typing errors"]["rows"] < 8  # too few to tell
    assert "better than the untouched model in 1 of 4 ways" in said
    assert [line[-1] for line in robust_lines(result) if line[0] == "lower case"] == ["worse"]
    held = robust_result(before, measured(True, 0.9, lambda _: True))
    assert robust_words(held).startswith("in none of 4 ways of writing is it clearly worse")  # type: ignore[arg-type]


def test_rows_of_too_few_groups_tell_nothing_of_inputs_that_vary() -> None:
    sides = [measured(False, 0.5, lambda _: False), measured(True, 0.9, str.isupper)]
    few = [Measured([replace(row, group=str(int(row.where[-1]) % 5)) for row in s.rows], s.task) for s in sides]
    result = robust_result(*few)
    assert result is not None
    lower = result["varied"]["lower case"]
    assert (lower["rows"], lower["grouped"], lower["direction"]) == (5, True, 0)
    assert robust_words(result).startswith("too few groups to tell what it loses where inputs are written otherwise")
    assert [line[1::5] for line in robust_lines(result) if line[0] == "lower case"] == [("5 groups", "needs 8 groups")]


def test_rows_that_stand_in_one_line_are_told_apart() -> None:
    """All rows of a JSON array on one line stand at `file.json:1`."""
    result = robust_result(
        measured(False, 0.5, lambda _: False, "f.json:1"), measured(True, 0.9, str.isupper, "f.json:1")
    )
    assert result is not None
    assert {name: part["clean"]["value"] for name, part in result["varied"].items()} == dict.fromkeys(WRITTEN, 1.0)


def test_what_was_not_written_otherwise_on_both_sides_is_not_compared() -> None:
    after = measured(True, 0.9, str.isupper)
    assert robust_result(told(list(RECORDS.values()), False), after) is None  # begun by an older version
    fewer = [row for row in after.rows if row.part != "lower case" or row.varied != 1]
    result = robust_result(Measured(fewer, after.task), after)  # begun with other settings
    assert result is not None
    assert list(result["varied"]) == [name for name in WRITTEN if name != "lower case"]


def test_what_gets_too_long_by_it_is_left_out_and_no_error() -> None:
    assert variant_reading(DataSettings(over_length="error")).over_length == "drop"
    assert variant_reading(DataSettings(over_length="cut")).over_length == "cut"


def test_of_each_way_the_first_rows_are_taken_that_it_changes() -> None:
    def read_all(records: Sequence[Record]) -> Segmented:
        return Segmented([example([1, 2], line=n) for n in range(len(records))], list(records))

    # Every second row is in small letters, which lower case doesn't change.
    mixed = {n: replace(row, text=row.text.lower() if n % 2 else row.text) for n, row in RECORDS.items()}  # type: ignore[call-arg, union-attr]
    changed = {name: [n for n, row in mixed.items() if vary(row, name) != row] for name in VARIED}
    assert changed["lower case"] == list(range(0, 40, 2))
    enough = {name: numbers[:8] for name, numbers in changed.items() if len(numbers) >= 8}
    variants = {variant.name: variant.numbers for variant in write_variants(mixed, read_all, ways=3, rows=8, least=8)}
    assert list(variants.items()) == list(enough.items())[:3]


@pytest.mark.parametrize("trained", [10**4, 2 * 10**4, 10**5, 10**6, 10**9])
def test_rows_are_written_otherwise_as_long_as_they_cost_a_tenth_of_training(trained: int) -> None:
    # Forward and backward cost three times what scoring costs; rows are scored in each way, before and after.
    ways, rows = affordable(spare_tokens(trained), 100)
    cost, budget = ways * rows * 2 * 100, 0.1 * 3 * trained
    assert cost <= budget
    assert rows >= 8  # fewer decide nothing
    assert (ways, rows) == (len(VARIED), 64) or budget - cost < max(2 * 100 * ways, 8 * 2 * 100)


def test_a_run_too_short_to_pay_for_it_writes_nothing_otherwise() -> None:
    assert affordable(spare_tokens(1_000), 100)[0] == 0
    assert affordable(-5.0, 100)[0] == 0
    assert write_variants(RECORDS, lambda _: pytest.fail("rows are encoded"), ways=0, outside=Segmented([], [])) == []


def test_confidence_tells_what_is_from_outside() -> None:
    rows = ROWS * 10
    assert know_outside(told(rows, True, 0.9), told(rows, True, 0.2)).value == 1
    assert know_outside(told(rows, True, 0.5), told(rows, True, 0.5)).value == 0.5
