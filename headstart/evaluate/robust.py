"""Does a model hold when inputs vary? The same rows with typing errors, in another case, without punctuation, and so on."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from headstart.data.feed import content_hash
from headstart.data.records import Conversation, Label, Labelled, Record, Tagged
from headstart.evaluate.compare import Compared, Interval, Rank, compare, interval
from headstart.evaluate.guard import general_forms
from headstart.evaluate.measure import PRIMARY, Measured

VARIABLE = ("chat", "classification", "multilabel", "regression", "tagging")  # tasks whose rows have an input
TYPED_WRONG = 0.15  # of words of four letters or more
WORD = re.compile(r"[^\W\d_]{4,}")
FIELD = re.compile(r"\s*[\w ]{1,40}: *\S")
GREETING = "Hello, I hope that you are well. I have something for you to look at.\n"

Vary = Callable[[str, random.Random], str]


@dataclass(frozen=True)
class Robust:
    """How a model fares where inputs vary, and how well its confidence tells text from outside the job (None: not measured)."""

    varied: Sequence[Varied]
    outside: Interval | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        outside = self.outside.to_json() if self.outside else "not measured"
        return {"varied": {item.name: item.to_json() for item in self.varied}, "outside_auroc": outside}


def mistype(text: str, chance: random.Random) -> str:
    """Swap two letters of a word in seven, leave one out or write one twice."""

    def wrong(found: re.Match[str]) -> str:
        word = found.group()
        if chance.random() >= TYPED_WRONG:
            return word
        at = chance.randrange(len(word) - 1)
        ways = (word[at + 1] + word[at], word[at + 1], word[at] * 2 + word[at + 1])
        return word[:at] + chance.choice(ways) + word[at + 2 :]

    return WORD.sub(wrong, text)


def drop_punctuation(text: str, _: random.Random) -> str:
    """Leave out what ends sentences and clauses, but not what stands within numbers and words."""
    return re.sub(r"[.,;:!?]+(?=\s|$)", "", text)


def space_out(text: str, chance: random.Random) -> str:
    """Write two or three spaces in place of some, and begin and end with white space."""
    return f"\n{re.sub(' ', lambda _: ' ' * chance.choice((1, 1, 2, 3)), text)}  \n"


def reorder_fields(text: str, chance: random.Random) -> str:
    """Put the lines of `name: value` into another order; a text that isn't made of such lines stays as it is."""
    lines = text.split("\n")
    places = [number for number, line in enumerate(lines) if FIELD.match(line)]
    if len(places) < 2 or len(places) < len(lines) // 2:
        return text
    for place, line in zip(places, chance.sample([lines[p] for p in places], len(places)), strict=True):
        lines[place] = line
    return "\n".join(lines)


VARIED: dict[str, Vary] = {
    "typing errors": mistype,
    "lower case": lambda text, _: text.lower(),
    "upper case": lambda text, _: text.upper(),
    "no punctuation": drop_punctuation,
    "white space": space_out,
    "a greeting before it": lambda text, _: GREETING + text,
    "fields in another order": reorder_fields,
}
OF_WORDS = ("typing errors", "lower case", "upper case")  # what keeps words apart as they are


def vary(record: Record, name: str) -> Record:
    """Return a row whose input is written otherwise; what follows from it stays. The same row always varies alike."""
    chance = random.Random(f"{name} {content_hash(record)}")  # noqa: S311
    change = VARIED[name]
    if isinstance(record, Labelled):
        pair = None if record.pair is None else change(record.pair, chance)
        return replace(record, text=change(record.text, chance), pair=pair)
    if isinstance(record, Tagged) and name in OF_WORDS:
        return replace(record, words=tuple(change(word, chance) for word in record.words))
    if isinstance(record, Conversation):
        turns = [replace(m, content=change(m.content, chance)) if m.role == "user" else m for m in record.messages]
        return replace(record, messages=tuple(turns))
    return record


@dataclass(frozen=True)
class Varied:
    """How a model fares on rows that are written otherwise, against the same rows as they are."""

    name: str
    compared: Compared

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        found = self.compared
        sides = {"clean": found.before, "varied": found.after, "difference": found.difference}
        told = {name: side.to_json() for name, side in sides.items()}
        return {"metric": found.name, **told, "rows": found.rows, "direction": found.direction, "p": found.p}


def compare_varied(
    records: Sequence[Record], clean: Measured, measure: Callable[[Sequence[Record]], tuple[Sequence[int], Measured]]
) -> list[Varied]:
    """Measure rows in each way in which their input varies, and compare with `clean`, the same rows as they are.

    Rows that a way doesn't change are left out; a way that changes none isn't there. `measure` returns which of the rows
    that it was given could be read (longer ones may not), and what the model did on these.
    """
    found = []
    for name in VARIED:
        varied = [vary(record, name) for record in records]
        changed = [n for n, (a, b) in enumerate(zip(records, varied, strict=True)) if a != b]
        if not changed:
            continue
        read, measured = measure([varied[n] for n in changed])
        before = Measured([clean.rows[changed[n]] for n in read], clean.task).metrics()
        after = measured.metrics()
        metric = next((m for m in PRIMARY[clean.task] if m in before and m in after), None)
        if metric is not None:
            found.append(Varied(name, compare(metric, before[metric], after[metric])))
    return found


def general_rows(label: Label) -> list[Record]:
    """Return the guard's texts and questions as rows to label: text from outside of any job."""
    rows = [record for formed in general_forms() for record in formed.formatted.examples]
    return [Labelled(row.where, row.texts[0], label) for row in rows]


def know_outside(inside: Measured, outside: Measured) -> Interval:
    """Return how well confidence tells the job's rows from others, as AUROC: 0.5 is chance, 1 is always."""
    sides = [[row.probability or 0.0 for row in side.rows] for side in (inside, outside)]
    truth = np.repeat([1.0, 0.0], [len(side) for side in sides])
    metric = Rank(truth, np.array([*sides[0], *sides[1]]), "auroc")
    return interval(metric)
