"""Inputs written otherwise: always alike, the answer stays, and what a model loses by it is seen."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from headstart.config import DataSettings
from headstart.data.read import Where
from headstart.data.records import Document, Labelled, Message, Preference, Record, Related, Tagged
from headstart.data.segments import Segmented
from headstart.evaluate.measure import Measured, RowResult, own_reference
from headstart.evaluate.robust import (
    OF_TEXT,
    OUTSIDE,
    VARIED,
    Variant,
    affordable,
    find_robust,
    know_outside,
    mistype,
    reorder_fields,
    reword,
    robust_result,
    spare_tokens,
    variant_reading,
    vary,
    ways_of,
    write_variants,
)
from headstart.report.words import robust_lines, robust_words
from tests.conftest import conversation, example

ROWS: list[Record] = [
    conversation("Name: Ann Miller\nAge: 61, of Leeds.\nReason: dizzy since 3.5 days", "Ann Miller, dizzy."),
    Labelled(Where("f", 2), "Please transfer 36.5 pounds, now.", "transfer", pair="Where is it?"),
    Tagged(Where("f", 3), ("Maria", "lives", "in", "Madrid"), ("B-per", "O", "O", "B-loc")),
    Document(Where("f", 4), "A note.\nSize: 3 cm.\nSite: left lung, below.\nPlan: Another scan."),
]
PAIR = Preference(
    Where("f", 5),
    (
        Message("system", "Answer the user, please."),
        Message("user", "Identify where she says that it hurts, Doctor?\nName: Ann\nAge: 61\nSex: f\nTown: Leeds"),
    ),
    (Message("assistant", "In the Lung.", True), Message("assistant", "Nowhere, at all.", True)),
    (1.0, 0.0),
    group="Where?",
)


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
        elif isinstance(row, Document) and isinstance(varied, Document):
            assert len(varied.content.split()) == len(
                row.content.split()
            )  # nothing is put before what is predicted itself
            assert (varied != row) == (name in OF_TEXT)
        else:
            assert varied.messages[-1] == row.messages[-1]  # type: ignore[union-attr]
    related = Related(Where("f", 6), ("Some text.", "Another text."))
    assert vary(related, name) == related


@pytest.mark.parametrize("name", VARIED)
def test_of_preferences_the_prompt_of_the_user_varies_and_nothing_else(name: str) -> None:
    varied = vary(PAIR, name)
    assert isinstance(varied, Preference)
    assert varied == replace(PAIR, prompt=varied.prompt)
    if name == "the task in other words":  # which the system may tell as well
        assert [m.content for m in varied.prompt] == [
            "Reply to the user, please.",
            "Point out where she says that it hurts, Doctor?\nName: Ann\nAge: 61\nSex: f\nTown: Leeds",
        ]
    else:
        assert varied.prompt[0] == PAIR.prompt[0]
    assert varied.prompt[1] == replace(PAIR.prompt[1], content=varied.prompt[1].content)
    # As a question of a conversation that says the same would be written.
    asked = conversation(PAIR.prompt[1].content, "An answer.")
    if name not in ("typing errors", "white space", "fields in another order"):  # which follow from all of a row
        assert varied.prompt[1].content == vary(asked, name).messages[0].content  # type: ignore[union-attr]
    assert varied != PAIR


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
    worded = vary(asked, "the task in other words").messages  # type: ignore[union-attr]
    assert worded[0].content == "Compose the note:\n\nDoctor: hello\nPatient: hi"
    assert worded[1].content == "A note."
    assert reword("Summarize the dialogue, then list its text.\nlist: text", chance) == (
        "Sum up the conversation, then enumerate its passage.\nlist: text"
    )
    for other in (
        "Schreibe den Text.",
        "Answer yes or no.",
        "great, complete waste of time",
        "List of texts",
    ):  # no task in words that are known
        assert reword(other, chance) == other
    assert vary(replace(labelled, text="List my cards"), "the task in other words").text == "List my cards"  # type: ignore[union-attr]
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
    one = {**held, "varied": {"white space": held["varied"]["white space"]}}  # type: ignore[index]
    assert robust_words(one).startswith(
        "not with white space is it clearly worse than on the rows as they are; better than the untouched model there"
    )


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


def test_of_rows_that_can_be_written_in_few_ways_more_are_paid_for() -> None:
    # Of 80 rows, eight in each of ten ways or 26 in each of three.
    assert (affordable(8_000, 100), affordable(8_000, 100, 3)) == ((10, 8), (3, 26))
    assert [len(ways_of(row)) for row in (*ROWS, PAIR)] == [10, 9, 3, 6, 10]


@pytest.mark.parametrize(
    ("before", "after", "least"), [((2.0, 2.5), (1.0, 2.4), "lower case"), ((2.0, 2.5), (1.9, 1.0), "typing errors")]
)
def test_of_text_that_is_predicted_itself_it_is_told_what_was_gained_on_it(
    before: tuple[float, ...], after: tuple[float, ...], least: str
) -> None:
    """Text with errors costs more bits whoever reads it: of that nothing is lost by the model."""

    def measured(bits: tuple[float, ...]) -> Measured:
        sides = {"": 1.0, "typing errors": bits[0], "lower case": bits[1]}
        return Measured([RowResult(f"f:{n}", size * 100 * math.log(2) * (1 + n / 50), 100.0, bytes=100, part=name, varied=n if name else None)
                for name, size in sides.items() for n in range(10)], "causal")  # fmt: skip

    result = robust_result(measured(before), measured(after))
    assert result is not None
    said, lines = robust_words(result), {line[0]: line for line in robust_lines(result)}
    # The mean of 1 + n / 50 over ten rows is 1.09.
    first, second = ((b * 1.09, a * 1.09) for b, a in zip(before, after, strict=True))
    sides = dict(zip(lines, (first, second), strict=True))
    was, now = sides[least]
    assert said.startswith(f"least is gained with {least}: bits per byte {was:.3f} -> {now:.3f} ({now - was:+.3f}, ")
    assert said.endswith("better than the untouched model in 2 of 2 ways of writing")
    for name, (was, now) in sides.items():
        assert lines[name][2:5] == (f"{was:.3f}", f"{now:.3f}", "1.090")
        assert lines[name][5].startswith(f"{now - was:+.3f} [")
        assert lines[name][6] == "better"


def test_a_row_that_is_cut_is_still_known_for_what_it_is() -> None:
    """Also where all rows stand in one line of a file."""

    def cut(records: Sequence[Record]) -> Segmented:
        kept = [replace(row, text=row.text[:6]) for row in records[1::2]]  # type: ignore[call-arg, union-attr]
        return Segmented([example([1, 2], line=row.where.line) for row in kept], kept)

    rows: dict[int, Record] = {n: replace(row, where=Where("f", 1)) for n, row in RECORDS.items()}
    found = {variant.name: variant for variant in write_variants(rows, cut)}
    assert found["lower case"].numbers == [*range(1, 40, 2)]
    kept = found["lower case"].rows.kept
    assert [row.text for row in kept] == [f"word {n}"[:6] for n in range(1, 40, 2)]
    assert {row.where for row in (*kept, *found["lower case"].rows.examples)} == {Where("f", 1)}


def test_answers_to_a_prompt_written_otherwise_are_held_against_what_the_untouched_model_gave_them_then() -> None:
    rows: dict[int, Record] = {n: replace(PAIR, where=Where("f", n)) for n in range(3)}
    variants = write_variants(rows, lambda some: Segmented([example([1, 2])] * len(some), list(some)), ways=2, rows=2)
    first, second = variants

    def gave(where: str, *values: float) -> RowResult:
        return RowResult(where, 1.0, 1.0, truth=[1.0, 0.0], found=[(value, 2, None) for value in values])

    def score(variants: Sequence[Variant], task: str = "preference") -> Measured:
        """Return what a model gave the chosen and the rejected answer of each row: other numbers in each way."""
        found = [gave(str(row.where), -float(n), -9.0) for n, row in rows.items()]
        for place, variant in enumerate(variants):
            numbers = zip(variant.rows.kept, variant.numbers, strict=True)
            found += variant.mark([gave(str(row.where), 10.0 * place - n, -8.0) for row, n in numbers])
        return Measured(found, task)

    before = own_reference(score(variants))
    assert first.references(before) == [[0.0, -8.0], [-1.0, -8.0]]
    assert second.references(before) == [[10.0, -8.0], [9.0, -8.0]]
    assert all(reference == value for row in before.rows for value, _, reference in row.found)
    # Where the untouched model didn't score the very same rows there is none: what it gave to the rows as they are would be wrong.
    assert first.references(None) == []
    assert first.references(score([second])) == []
    assert replace(first, numbers=[0, 2]).references(before) == []
    assert first.references(score(variants, "reward")) == []


def test_a_run_too_short_to_pay_for_it_writes_nothing_otherwise() -> None:
    assert affordable(spare_tokens(1_000), 100)[0] == 0
    assert affordable(-5.0, 100)[0] == 0
    assert write_variants(RECORDS, lambda _: pytest.fail("rows are encoded"), ways=0, outside=Segmented([], [])) == []


def test_confidence_tells_what_is_from_outside() -> None:
    rows = ROWS * 10
    assert know_outside(told(rows, True, 0.9), told(rows, True, 0.2)).value == 1
    assert know_outside(told(rows, True, 0.5), told(rows, True, 0.5)).value == 0.5
