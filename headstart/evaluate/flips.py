"""Rows that one of two models, or of two states of one, gets right and the other doesn't."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headstart.evaluate.compare import has_groups, paired_p
from headstart.evaluate.graders.forms import Grader
from headstart.evaluate.measure import Measured, RowResult
from headstart.evaluate.metrics import exact_match, won

RIGHT_OR_WRONG = ("chat", "classification", "images", "multilabel", "tagging")
COMPARED = ("preference", "reward")
AHEAD = "the better answers ahead"


@dataclass(frozen=True)
class Flip:
    """A row that one of two models gets right and the other doesn't."""

    first: RowResult
    second: RowResult

    def to_json(self) -> dict[str, Any]:
        """The row with both answers."""
        row = {"where": self.second.where, "asked": self.second.asked, "reference": self.second.reference}
        return {**row, "a": self.first.answer, "b": self.second.answer}


@dataclass(frozen=True)
class Flips:
    """Rows that the second model fixed and broke, by what `by` says is right, of `rows` that both answered.

    `p` is how likely so uneven a count is by chance alone: McNemar's exact test, two-sided (McNemar, 1947); where `grouped`, by
    swaps of whole groups. It is 1 where no row flipped.
    """

    by: str
    fixed: Sequence[Flip]
    broken: Sequence[Flip]
    both_right: int
    rows: int
    p: float
    grouped: bool = False

    def to_json(self) -> dict[str, Any]:
        """The flips as plain values, every one with its row."""
        return {
            "by": self.by,
            "rows": self.rows,
            "both_right": self.both_right,
            "p": self.p,
            "fixed": [flip.to_json() for flip in self.fixed],
            "broken": [flip.to_json() for flip in self.broken],
        }


def find_flips(first: Measured, second: Measured, grader: Grader | None = None) -> Flips | None:
    """Return which rows flipped, by a grader or else by what an answer of the task must be; None where neither tells.

    Rows that were not answered, or not graded, are none of them.
    """
    by = AHEAD if second.task in COMPARED else "answers exactly right"
    by = f"{grader.name} at least {grader.least:g}" if grader else by
    fixed: list[Flip] = []
    broken: list[Flip] = []
    known: list[tuple[float, float, str]] = []
    for a, b in zip(first.own, second.own, strict=True):
        was, now = how_right(a, second.task, grader), how_right(b, second.task, grader)
        if was is None or now is None:
            continue
        known.append((was, now, b.group))
        if was != now:
            (fixed if now > was else broken).append(Flip(a, b))
    if not known:
        return None
    before, after, groups = zip(*known, strict=True)
    both = sum(was == now == 1 for was, now, _ in known)
    p = paired_p(np.array(before), np.array(after), groups)
    return Flips(by, fixed, broken, both, len(known), p, has_groups(groups))


def how_right(row: RowResult, task: str, grader: Grader | None = None) -> float | None:
    """Return 1 where a row was answered rightly, else 0; of answers that are compared the part of pairs in which the better is ahead.

    So a tie, as all rows are before an untouched model or head has learned, can be fixed and broken alike. None where it
    isn't known.
    """
    if grader:
        score = row.grades.get(grader.name)
        return None if score is None else float(score >= grader.least)
    if task in COMPARED:
        known = bool(row.found) and all(reference is not None for *_, reference in row.found)
        return won(row.truth, row.found) if known else None
    if task not in RIGHT_OR_WRONG or row.answer is None:
        return None
    if task == "multilabel":
        return float(set(row.truth) == set(row.found))
    return float(list(row.truth) == list(row.found)) if row.truth else exact_match(row.answer, row.reference)


def count_flips(before: Measured, after: Measured) -> dict[str, Any]:
    """Return how many rows a run put right (`fixed`) and wrong (`broken`), with the p of McNemar's exact test (1947).

    Of texts, numbers and embeddings, which are neither right nor wrong, and where no answer is ever right: on how
    many rows the loss fell and rose, with the p of the sign test.
    """
    found = find_flips(before, after)
    if found and (found.fixed or found.broken or found.both_right):
        counts = {"fixed": len(found.fixed), "broken": len(found.broken), "rows": found.rows}
        return {"metric": "right", **counts, "p": found.p, "grouped": found.grouped}
    lost = [np.array([row.nll for row in side.own]) for side in (before, after)]
    fell, rose = int((lost[1] < lost[0]).sum()), int((lost[1] > lost[0]).sum())
    groups = [row.group for row in after.own]
    p = paired_p(np.sign(lost[1] - lost[0]), np.zeros(len(groups)), groups)
    return {"metric": "loss", "fixed": fell, "broken": rose, "rows": len(groups), "p": p, "grouped": has_groups(groups)}
