"""Two sets of scores on the same rows -> the paired difference, its interval and a verdict."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
DRAWS_AT_ONCE = 1 << 21
LEVEL = 0.95
MIN_ROWS = 8
BINS = 10

Floats = NDArray[np.float64]
Draws = NDArray[np.int64]


def _as_it_is(ratio: Any) -> Any:
    return ratio


class Metric(ABC):
    """A metric over rows. `lower_is_better` tells its sense; `decides` whether a verdict may rest on it."""

    lower_is_better: bool = False
    decides: bool = True

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of rows."""

    @abstractmethod
    def over(self, draws: Draws) -> Floats:
        """Return the metric over each draw of rows, [B, N] -> [B]."""


@dataclass(frozen=True)
class Ratio(Metric):
    """The sum of `values` over the sum of `weights`, both [N], `transform`ed; 0 where nothing weighs anything."""

    values: Floats
    weights: Floats
    lower_is_better: bool = False
    transform: Callable[[Any], Any] = _as_it_is
    decides: bool = True

    def __len__(self) -> int:
        return len(self.values)

    def over(self, draws: Draws) -> Floats:
        """Return the metric over each draw of rows."""
        above, below = self.values[draws].sum(1), self.weights[draws].sum(1)
        found: Floats = self.transform(np.divide(above, below, out=np.zeros_like(above), where=below != 0))
        return found


@dataclass(frozen=True)
class ClassMetric(Metric):
    """What follows from how often each class is right, told and found: `macro_f1`, `weighted_f1` or `mcc`.

    As scikit-learn defines them (`f1_score`, `matthews_corrcoef`). `truth`, `found` [N]: the number of each row's class,
    and of the one that was told, of `classes`.
    """

    truth: Draws
    found: Draws
    classes: int
    name: str = "macro_f1"

    @staticmethod
    def of(truth: Sequence[str], found: Sequence[str], name: str = "macro_f1") -> ClassMetric:
        """Number the classes by name."""
        names = {name: number for number, name in enumerate(sorted({*truth, *found}))}
        return ClassMetric(np.array([names[t] for t in truth]), np.array([names[f] for f in found]), len(names), name)

    def __len__(self) -> int:
        return len(self.truth)

    def over(self, draws: Draws) -> Floats:
        """Return the metric over each draw of rows; classes that a draw doesn't meet don't count."""
        truth, found = self.truth[draws], self.found[draws]
        hits = self._count(truth, truth == found)
        true, told = self._count(truth, None), self._count(found, None)
        if self.name == "mcc":
            return _matthews(hits, true, told)
        met = true + told > 0
        f1 = np.divide(2 * hits, true + told, out=np.zeros_like(hits), where=met)
        scores: Floats = (f1 * true).sum(1) / true.sum(1) if self.name == "weighted_f1" else f1.sum(1) / met.sum(1)
        return scores

    def _count(self, numbers: Draws, kept: NDArray[np.bool_] | None) -> Floats:
        """Count each class in each draw, [B, N] -> [B, C]."""
        flat = numbers + np.arange(len(numbers))[:, None] * self.classes
        counted = np.bincount(flat[kept] if kept is not None else flat.ravel(), minlength=len(numbers) * self.classes)
        return counted.reshape(len(numbers), self.classes).astype(np.float64)


def _matthews(hits: Floats, true: Floats, told: Floats) -> Floats:
    """Return Matthews' correlation of several classes (Gorodkin, 2004) from counts [B, C]; 0 where it isn't defined."""
    total = true.sum(1)
    above = hits.sum(1) * total - (true * told).sum(1)
    below = np.sqrt((total**2 - (told**2).sum(1)) * (total**2 - (true**2).sum(1)))
    found: Floats = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    return found


@dataclass(frozen=True)
class SeveralF1(Metric):
    """The mean over classes of their F1 scores where a row has several: `truth`, `found` bool [N, C]."""

    truth: NDArray[np.bool_]
    found: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.truth)

    def over(self, draws: Draws) -> Floats:
        """Return the metric over each draw of rows; a class that a draw doesn't meet has an F1 of 0, as in scikit-learn."""
        rows = len(self.truth)
        flat = draws + np.arange(len(draws))[:, None] * rows
        times = np.bincount(flat.ravel(), minlength=len(draws) * rows).reshape(len(draws), rows).astype(np.float64)
        hits = times @ (self.truth & self.found)
        both = times @ self.truth + times @ self.found
        scores: Floats = np.divide(2 * hits, both, out=np.zeros_like(hits), where=both > 0).mean(1)
        return scores


@dataclass(frozen=True)
class Rank(Metric):
    """What follows from the order of `scores` [N]: `spearman` against `truth`, or `auroc` where truth is 0 or 1.

    As scipy and scikit-learn define them; 0 (for `auroc` 0.5) where a draw holds one value only.
    """

    truth: Floats
    scores: Floats
    name: str = "spearman"

    def __len__(self) -> int:
        return len(self.truth)

    def over(self, draws: Draws) -> Floats:
        """Return the metric over each draw of rows."""
        from scipy.stats import rankdata

        truth, ranks = self.truth[draws], rankdata(self.scores[draws], axis=1)
        if self.name == "auroc":
            positive = truth.sum(1)
            pairs = positive * (truth.shape[1] - positive)
            above = (ranks * truth).sum(1) - positive * (positive + 1) / 2
            found: Floats = np.divide(above, pairs, out=np.full_like(above, 0.5), where=pairs > 0)
            return found
        a, b = rankdata(truth, axis=1), ranks
        a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
        below = np.sqrt((a**2).sum(1) * (b**2).sum(1))
        correlation: Floats = np.divide((a * b).sum(1), below, out=np.zeros(len(a)), where=below > 0)
        return correlation


@dataclass(frozen=True)
class Calibration(Metric):
    """The expected calibration error (Guo et al., 2017): how far confidence lies from how often it is right, in ten bins.

    `confidence` [N] between 0 and 1, `right` [N] 0 or 1. No verdict rests on it: who knows nothing and says so has none.
    """

    confidence: Floats
    right: Floats
    lower_is_better: bool = True
    decides: bool = False

    def __len__(self) -> int:
        return len(self.right)

    def bins(self) -> Draws:
        """Return the bin of each row."""
        found: Draws = np.minimum((self.confidence * BINS).astype(np.int64), BINS - 1)
        return found

    def over(self, draws: Draws) -> Floats:
        """Return the metric over each draw of rows."""
        flat = self.bins()[draws] + np.arange(len(draws))[:, None] * BINS
        gap = (self.confidence - self.right)[draws]
        sums = np.bincount(flat.ravel(), weights=gap.ravel(), minlength=len(draws) * BINS)
        found: Floats = np.abs(sums.reshape(len(draws), BINS)).sum(1) / draws.shape[1]
        return found


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
    decides: bool = True

    @property
    def direction(self) -> int:
        """Return 1 where it got better for certain, -1 where worse, 0 where the interval holds zero or rows are few."""
        if self.rows < MIN_ROWS:
            return 0
        low, high = self.difference.low, self.difference.high
        sign = 1 if low > 0 else -1 if high < 0 else 0
        return -sign if self.lower_is_better else sign


def compare(name: str, before: Metric, after: Metric, seed: int = 0) -> Compared:
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
        before.decides,
    )


def compare_all(before: Mapping[str, Metric], after: Mapping[str, Metric]) -> list[Compared]:
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
    others_fell = any(item.direction < 0 for item in compared if item.name != primary and item.decides)
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


def _whole(metric: Metric) -> float:
    return float(metric.over(np.arange(len(metric))[None])[0])


def _resample(metrics: Sequence[Metric], seed: int) -> list[Floats]:
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
