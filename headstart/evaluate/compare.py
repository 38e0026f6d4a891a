"""Two sets of scores on the same rows -> the paired difference, its interval and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
DRAWS_AT_ONCE = 1 << 21
LEVEL = 0.95
MIN_ROWS = 8

Floats = NDArray[np.float64]
Draws = NDArray[np.int64]


def _as_it_is(ratio: Any) -> Any:
    return ratio


@dataclass(frozen=True)
class Metric:
    """A metric over rows: the sum of `values` over the sum of `weights`, both [N], `transform`ed.

    `lower_is_better` tells its sense.
    """

    values: Floats
    weights: Floats
    lower_is_better: bool = False
    transform: Callable[[Any], Any] = _as_it_is

    def __len__(self) -> int:
        return len(self.values)

    def over(self, draws: Draws) -> Floats:
        """Return the metric over each draw of rows, [B, N] -> [B]."""
        found: Floats = self.transform(self.values[draws].sum(1) / self.weights[draws].sum(1))
        return found


@dataclass(frozen=True)
class MacroF1:
    """The mean over classes of their F1 scores, as scikit-learn's `f1_score(average="macro")` defines it.

    `truth`, `found` [N]: the number of each row's class, and of the one that was told, of `classes`.
    """

    truth: Draws
    found: Draws
    classes: int
    lower_is_better: bool = False

    @staticmethod
    def of(truth: Sequence[str], found: Sequence[str]) -> MacroF1:
        """Number the classes by name."""
        names = {name: number for number, name in enumerate(sorted({*truth, *found}))}
        return MacroF1(np.array([names[t] for t in truth]), np.array([names[f] for f in found]), len(names))

    def __len__(self) -> int:
        return len(self.truth)

    def over(self, draws: Draws) -> Floats:
        """Return the metric over each draw of rows, [B, N] -> [B]; classes that a draw doesn't meet don't count."""
        truth, found = self.truth[draws], self.found[draws]
        hits = self._count(truth, truth == found)
        both = self._count(truth, None) + self._count(found, None)
        met = both > 0
        f1 = np.divide(2 * hits, both, out=np.zeros_like(hits), where=met)
        scores: Floats = f1.sum(1) / met.sum(1)
        return scores

    def _count(self, numbers: Draws, kept: NDArray[np.bool_] | None) -> Floats:
        """Count each class in each draw, [B, N] -> [B, C]."""
        flat = numbers + np.arange(len(numbers))[:, None] * self.classes
        counted = np.bincount(flat[kept] if kept is not None else flat.ravel(), minlength=len(numbers) * self.classes)
        return counted.reshape(len(numbers), self.classes).astype(np.float64)


@dataclass(frozen=True)
class Interval:
    """A value with the bounds between which it lies with 95% confidence."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """The three numbers by name."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Compared:
    """One metric before and after on `rows` rows, and their difference (after minus before)."""

    name: str
    before: Interval
    after: Interval
    difference: Interval
    lower_is_better: bool
    rows: int

    @property
    def direction(self) -> int:
        """Return 1 where it got better for certain, -1 where worse, 0 where the interval holds zero or rows are few."""
        if self.rows < MIN_ROWS:
            return 0
        low, high = self.difference.low, self.difference.high
        sign = 1 if low > 0 else -1 if high < 0 else 0
        return -sign if self.lower_is_better else sign


def compare(name: str, before: Metric | MacroF1, after: Metric | MacroF1, seed: int = 0) -> Compared:
    """Compare two metrics over the same rows in the same order, by the percentile bootstrap (Efron, 1979).

    Rows are drawn with both of their scores, so that the pairing counts. Raises ValueError where the rows differ in
    number.
    """
    if len(before) != len(after):
        raise ValueError(f"{name}: {len(before)} rows before and {len(after)} after")
    first, second = _resample([before, after], seed)
    return Compared(
        name,
        _interval(_whole(before), first),
        _interval(_whole(after), second),
        _interval(_whole(after) - _whole(before), second - first),
        before.lower_is_better,
        len(before),
    )


def compare_all(before: Mapping[str, Metric | MacroF1], after: Mapping[str, Metric | MacroF1]) -> list[Compared]:
    """Compare the metrics that both have."""
    return [compare(name, metric, after[name]) for name, metric in before.items() if name in after]


def verdict(compared: Sequence[Compared], primary: str) -> str:
    """Return `better`, `worse`, `no_gain` or `not_measured`.

    `better` needs the primary metric's interval clear of zero on the good side and no other metric's clear of it on the
    bad side; `worse` needs the primary clear on the bad side, or another while the primary is not better. Fewer than
    `MIN_ROWS` rows decide nothing, of any metric.
    """
    directions = {item.name: item.direction for item in compared}
    if all(item.name != primary or item.rows < MIN_ROWS for item in compared):
        return "not_measured"
    others_fell = any(direction < 0 for name, direction in directions.items() if name != primary)
    if directions[primary] > 0:
        return "no_gain" if others_fell else "better"
    return "worse" if directions[primary] < 0 or others_fell else "no_gain"


def to_json(compared: Sequence[Compared]) -> Mapping[str, Any]:
    """Return before, after and difference by metric, as the result file holds them."""
    return {
        "before": {item.name: item.before.to_json() for item in compared},
        "after": {item.name: item.after.to_json() for item in compared},
        "differences": {
            item.name: {**item.difference.to_json(), "rows": item.rows, "direction": item.direction}
            for item in compared
        },
    }


def _interval(value: float, samples: Floats) -> Interval:
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def _whole(metric: Metric | MacroF1) -> float:
    return float(metric.over(np.arange(len(metric))[None])[0])


def _resample(metrics: Sequence[Metric | MacroF1], seed: int) -> list[Floats]:
    """Return the metrics over `RESAMPLES` draws of rows, each draw the same for all of them."""
    rows = len(metrics[0])
    generator = np.random.default_rng(seed)
    samples: list[list[Floats]] = [[] for _ in metrics]
    at_once = max(1, DRAWS_AT_ONCE // rows)
    for start in range(0, RESAMPLES, at_once):
        draws = generator.integers(0, rows, (min(at_once, RESAMPLES - start), rows))
        for metric, found in zip(metrics, samples, strict=True):
            found.append(metric.over(draws))
    return [np.concatenate(found) for found in samples]
