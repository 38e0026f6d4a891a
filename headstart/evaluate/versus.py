"""Models on the same rows: what each scored, the paired differences, and the rows that one gets right and the other doesn't."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headstart.evaluate.compare import Compared, compare_all, to_json
from headstart.evaluate.graders.forms import Grader
from headstart.evaluate.graders.rows import pair_grades
from headstart.evaluate.measure import PER_TOKEN, Measured, RowResult
from headstart.evaluate.metrics import exact_match
from headstart.evaluate.robust import Robust

EXAMPLES = 5  # flips of a kind that are shown


@dataclass(frozen=True)
class Evaluated:
    """A model on the rows of some data: what it did on each, and its metrics with their intervals."""

    model: str
    measured: Measured
    metrics: Mapping[str, Mapping[str, float]]
    notes: Sequence[str] = ()
    robust: Robust | None = None

    def to_json(self) -> dict[str, Any]:
        """The metrics and rows as plain values."""
        return {**self.summary(), "rows": self.measured.to_json()}

    def summary(self) -> dict[str, Any]:
        """The same without the rows."""
        robust = self.robust.to_json() if self.robust else "not measured"
        return {"model": self.model, "metrics": dict(self.metrics), "robust": robust, "notes": list(self.notes)}


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

    `p` is how likely so uneven a count is by chance alone: McNemar's exact test, two-sided (McNemar, 1947).
    """

    by: str
    fixed: Sequence[Flip]
    broken: Sequence[Flip]
    both_right: int
    rows: int

    @property
    def p(self) -> float:
        """The p-value; 1 where no row flipped."""
        from scipy.stats import binomtest

        flipped = len(self.fixed) + len(self.broken)
        return float(binomtest(len(self.fixed), flipped).pvalue) if flipped else 1.0

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


@dataclass(frozen=True)
class Pair:
    """Two models on the same rows: each metric of both with the difference (second minus first), and what flipped."""

    a: str
    b: str
    compared: Sequence[Compared]
    flips: Flips | None

    def to_json(self) -> dict[str, Any]:
        """The differences and flips as plain values."""
        flips = self.flips.to_json() if self.flips else None
        return {"a": self.a, "b": self.b, "differences": to_json(self.compared)["differences"], "flips": flips}


@dataclass(frozen=True)
class Versus:
    """Several models on the same rows: each one against the first, and where the settings of their runs differ.

    `settings` holds for each setting that differs its value in each model's run, None where a model isn't of one.
    """

    models: Sequence[Evaluated]
    pairs: Sequence[Pair]
    settings: Mapping[str, Sequence[Any]]

    @property
    def rows(self) -> int:
        """How many rows they were scored on."""
        return len(self.models[0].measured.rows)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "models": [model.summary() for model in self.models],
            "rows": self.rows,
            "pairs": [pair.to_json() for pair in self.pairs],
            "settings": {key: list(values) for key, values in self.settings.items()},
        }


def build_versus(
    models: Sequence[Evaluated], settings: Mapping[str, Sequence[Any]], graders: Sequence[Grader] = ()
) -> Versus:
    """Compare each model with the first. A row that one of them wasn't graded on has no grade on any."""
    paired = pair_grades([model.measured for model in models])
    others = zip(models[1:], paired[1:], strict=True)
    pairs = [
        Pair(models[0].model, other.model, _compare(paired[0], measured), find_flips(paired[0], measured, graders))
        for other, measured in others
    ]
    return Versus(models, pairs, settings)


def _compare(first: Measured, second: Measured) -> list[Compared]:
    before, after = first.metrics(), second.metrics()
    if [row.targets for row in first.rows] != [row.targets for row in second.rows]:
        # Other tokenizers cut other tokens; a loss per token compares only over the same ones.
        before = {name: metric for name, metric in before.items() if name not in PER_TOKEN}
    return compare_all(before, after)


def find_flips(first: Measured, second: Measured, graders: Sequence[Grader] = ()) -> Flips | None:
    """Return which rows flipped, by the first grader or else by what an answer of the task must be; None where neither is.

    Rows that were not answered, or not graded, are none of them.
    """
    if graders:
        by = f"{graders[0].name} at least {graders[0].least:g}"
        right = _by_grade(graders[0])
    elif second.task in ("chat", "classification", "images", "multilabel", "tagging"):
        by, right = "answers exactly right", _by_reference
    else:
        return None
    fixed: list[Flip] = []
    broken: list[Flip] = []
    both = rows = 0
    for a, b in zip(first.own, second.own, strict=True):
        was, now = right(a), right(b)
        if was is None or now is None:
            continue
        rows += 1
        both += was and now
        if was != now:
            (fixed if now else broken).append(Flip(a, b))
    return Flips(by, fixed, broken, both, rows) if rows else None


def _by_grade(grader: Grader) -> Callable[[RowResult], bool | None]:
    def right(row: RowResult) -> bool | None:
        score = row.grades.get(grader.name)
        return None if score is None else score >= grader.least

    return right


def _by_reference(row: RowResult) -> bool | None:
    if row.answer is None:
        return None
    return list(row.truth) == list(row.found) if row.truth else bool(exact_match(row.answer, row.reference))
