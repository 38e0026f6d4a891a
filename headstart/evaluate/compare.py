"""Two sets of scores on the same rows -> the paired difference, its interval and a verdict."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard, TypeVar

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
SWAPS = 4_000
DRAWS_AT_ONCE = 1 << 21
LEVEL = 0.95
MIN_ROWS = 8
JACKKNIFE_MOST = 1_000  # rows of which each is left out once
BINS = 10

Floats = NDArray[np.float64]
Draws = NDArray[np.int64]


def _as_it_is(ratio: Any) -> Any:
    return ratio


class Metric(ABC):
    """A metric over rows, or over groups of rows where it is `grouped`: then its rows, in all that follows, are the groups.

    `lower_is_better` tells its sense; `decides` whether a verdict may rest on it; `span` how far apart two of its values can lie.
    """

    lower_is_better: bool = False
    decides: bool = True
    grouped: bool = False
    span: float = math.inf

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of rows."""

    @property
    def rows_that_count(self) -> float:
        """Return how many rows of like weight would say as much (Kish, 1965)."""
        return len(self)

    @abstractmethod
    def over(self, draws: Draws) -> Floats:
        """Return the metric over each draw of rows, [B, N] -> [B]."""

    @abstractmethod
    def joined(self, other: Any) -> Metric:
        """Return the metric over these rows and, behind them, those of another of its class."""


@dataclass(frozen=True)
class Ratio(Metric):
    """The sum of `values` over the sum of `weights`, both [N], `transform`ed; 0 where nothing weighs anything.

    `right` tells that each row is right or wrong, 1 or 0, and the metric is how many are right; where it is `grouped`, too,
    the value of a group is how many of its rows are right.
    """

    values: Floats
    weights: Floats
    lower_is_better: bool = False
    transform: Callable[[Any], Any] = _as_it_is
    decides: bool = True
    right: bool = False
    grouped: bool = False

    def __len__(self) -> int:
        return len(self.values)

    @property
    def rows_that_count(self) -> float:
        """Return how many rows of like weight would say as much: fewer where a few hold most of the tokens."""
        return float(self.weights.sum() ** 2 / (self.weights**2).sum()) if self.weights.any() else len(self)

    @property
    def level(self) -> float | None:
        """Return at what all rows stand; None where they differ."""
        rates = self.values[self.weights > 0] / self.weights[self.weights > 0]
        return float(rates[0]) if len(rates) and np.allclose(rates, rates[0], rtol=1e-12, atol=0) else None

    def over(self, draws: Draws) -> Floats:
        """Return the metric over each draw of rows."""
        above, below = self.values[draws].sum(1), self.weights[draws].sum(1)
        found: Floats = self.transform(np.divide(above, below, out=np.zeros_like(above), where=below != 0))
        return found

    def joined(self, other: Ratio) -> Ratio:
        """Return the metric over these rows and those of another."""
        return replace(self, values=_behind(self.values, other.values), weights=_behind(self.weights, other.weights))


@dataclass(frozen=True)
class ClassMetric(Metric):
    """What follows from how often each class is right, told and found: `macro_f1`, `weighted_f1` or `mcc`.

    As scikit-learn defines them (`f1_score`, `matthews_corrcoef`). `truth`, `found` [N]: the number of each row's class,
    and of the one that was told, of `classes`. `names` are those of the classes; without them numbers mean the same everywhere.
    """

    truth: Draws
    found: Draws
    classes: int
    name: str = "macro_f1"
    names: Sequence[str] = ()

    @staticmethod
    def of(truth: Sequence[str], found: Sequence[str], name: str = "macro_f1") -> ClassMetric:
        """Number the classes by name."""
        places = {name: number for number, name in enumerate(sorted({*truth, *found}))}
        numbers = [np.array([places[label] for label in side], np.int64) for side in (truth, found)]
        return ClassMetric(numbers[0], numbers[1], len(places), name, tuple(places))

    def __len__(self) -> int:
        return len(self.truth)

    @property
    def span(self) -> float:  # type: ignore[override]
        """A correlation goes from -1 to 1."""
        return 2.0 if self.name == "mcc" else 1.0

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

    def joined(self, other: ClassMetric) -> ClassMetric:
        """Return the metric over these rows and those of another, with the classes of both."""
        mine, theirs = _merge(self.names, other.names)
        classes = max(self.classes, other.classes, *(places.max(initial=-1) + 1 for places in (mine, theirs)))
        renamed = [
            _behind(mine[a] if len(mine) else a, theirs[b] if len(theirs) else b)
            for a, b in ((self.truth, other.truth), (self.found, other.found))
        ]
        return replace(self, truth=renamed[0], found=renamed[1], classes=int(classes), names=())

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
    """The mean over classes of their F1 scores where a row has several: `truth`, `found` bool [N, C], and the classes' `names`."""

    truth: NDArray[np.bool_]
    found: NDArray[np.bool_]
    names: Sequence[str] = ()
    span = 1.0

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

    def joined(self, other: SeveralF1) -> SeveralF1:
        """Return the metric over these rows and those of another, with the classes of both."""
        mine, theirs = _merge(self.names, other.names)
        classes = max(self.truth.shape[1], *(places.max(initial=-1) + 1 for places in (mine, theirs)))

        def spread(flags: NDArray[np.bool_], places: Draws) -> NDArray[np.bool_]:
            wide = np.zeros((len(flags), classes), np.bool_)
            wide[:, places if len(places) else slice(None)] = flags
            return wide

        sides = ((self.truth, other.truth), (self.found, other.found))
        truth, found = (np.concatenate([spread(a, mine), spread(b, theirs)]) for a, b in sides)
        return SeveralF1(truth, found)


@dataclass(frozen=True)
class Rank(Metric):
    """What follows from the order of `scores` [N]: `spearman` against `truth`, or `auroc` where truth is 0 or 1.

    As scipy and scikit-learn define them; 0 (for `auroc` 0.5) where a draw holds one value only.
    """

    truth: Floats
    scores: Floats
    name: str = "spearman"

    @property
    def span(self) -> float:  # type: ignore[override]
        """A correlation goes from -1 to 1."""
        return 2.0 if self.name == "spearman" else 1.0

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

    def joined(self, other: Rank) -> Rank:
        """Return the metric over these rows and those of another."""
        return replace(self, truth=_behind(self.truth, other.truth), scores=_behind(self.scores, other.scores))


@dataclass(frozen=True)
class Calibration(Metric):
    """The expected calibration error (Guo et al., 2017): how far confidence lies from how often it is right, in ten bins.

    `confidence` [N] between 0 and 1, `right` [N] 0 or 1. No verdict rests on it: who knows nothing and says so has none.
    """

    confidence: Floats
    right: Floats
    lower_is_better: bool = True
    decides: bool = False
    span = 1.0

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

    def joined(self, other: Calibration) -> Calibration:
        """Return the metric over these rows and those of another."""
        return replace(
            self, confidence=_behind(self.confidence, other.confidence), right=_behind(self.right, other.right)
        )


@dataclass(frozen=True)
class Clustered(Metric):
    """A metric whose rows are drawn and swapped by whole groups: its rows are the groups, `members` the rows of each."""

    metric: Metric
    members: Sequence[Draws]
    grouped = True

    @property
    def lower_is_better(self) -> bool:  # type: ignore[override]
        """The sense of the metric."""
        return self.metric.lower_is_better

    @property
    def decides(self) -> bool:  # type: ignore[override]
        """Tell whether a verdict may rest on the metric."""
        return self.metric.decides

    @property
    def span(self) -> float:  # type: ignore[override]
        """How far apart two values of the metric can lie."""
        return self.metric.span

    def __len__(self) -> int:
        return len(self.members)

    @property
    def rows_that_count(self) -> float:
        """Return how many groups of like size would say as much (Kish, 1965)."""
        sizes = np.array([len(rows) for rows in self.members], np.float64)
        return float(sizes.sum() ** 2 / (sizes**2).sum())

    def over(self, draws: Draws) -> Floats:
        """Return the metric over each draw of groups; those that come to the same number of rows go together."""
        largest = max(map(len, self.members))
        table = np.array([[*rows, *[-1] * (largest - len(rows))] for rows in self.members], np.int64)
        found = np.zeros(len(draws))
        at_once = max(1, DRAWS_AT_ONCE // (largest * draws.shape[1]))
        for start in range(0, len(draws), at_once):
            rows = table[draws[start : start + at_once]].reshape(len(draws[start : start + at_once]), -1)
            sizes = (rows >= 0).sum(1)
            for size in np.unique(sizes):
                some = np.flatnonzero(sizes == size)
                drawn = rows[some]
                found[start + some] = self.metric.over(drawn[drawn >= 0].reshape(len(some), size))
        return found

    def joined(self, other: Clustered) -> Clustered:
        """Return the metric over these groups and those of another."""
        behind = [rows + len(self.metric) for rows in other.members]
        return Clustered(self.metric.joined(other.metric), [*self.members, *behind])


def cluster(metric: Metric, groups: Sequence[str]) -> Metric:
    """Return a metric whose rows of one group stand or fall together, since they aren't independent; "" is no group.

    An interval is then over groups: drawn whole (the cluster bootstrap; Davison and Hinkley, 1997). A ratio over groups is one over
    their sums.
    """
    numbers: dict[str | int, int] = {}
    of = np.array([numbers.setdefault(group or row, len(numbers)) for row, group in enumerate(groups)], np.int64)
    if len(numbers) == len(groups):
        return metric
    if isinstance(metric, Ratio):
        values, weights = (np.bincount(of, s, len(numbers)).astype(np.float64) for s in (metric.values, metric.weights))
        return replace(metric, values=values, weights=weights, grouped=True)
    order = np.argsort(of, kind="stable")
    return Clustered(metric, np.split(order, np.flatnonzero(np.diff(of[order])) + 1))


A = TypeVar("A", Floats, Draws)


def _behind(first: A, second: A) -> A:
    joined: A = np.concatenate([first, second])
    return joined


def _merge(first: Sequence[str], second: Sequence[str]) -> tuple[Draws, Draws]:
    """Return the number of each class of the first and of the second among those of both."""
    places = {name: number for number, name in enumerate(sorted({*first, *second}))}
    return np.array([places[n] for n in first], np.int64), np.array([places[n] for n in second], np.int64)


@dataclass(frozen=True)
class Interval:
    """A value with the bounds between which it lies with 95% confidence; infinite ones where nothing is known of them."""

    value: float
    low: float
    high: float

    def hull(self, low: float, high: float) -> Interval:
        """Return the interval that holds other bounds, too."""
        return Interval(self.value, min(self.low, low), max(self.high, high))

    def to_json(self) -> dict[str, float | None]:
        """The three numbers by name; None for a bound of which nothing is known."""
        low, high = (bound if math.isfinite(bound) else None for bound in (self.low, self.high))
        return {"value": self.value, "low": low, "high": high}


@dataclass(frozen=True)
class Compared:
    """One metric before and after, and their difference (after minus before), over `rows` rows, or groups where it is `grouped`.

    `p` is how often a difference as large comes about where nothing changed: by swaps of before and after.
    """

    name: str
    before: Interval
    after: Interval
    difference: Interval
    lower_is_better: bool
    rows: int
    decides: bool = True
    p: float = 0.0
    grouped: bool = False

    @property
    def direction(self) -> int:
        """Return 1 where it got better for certain, -1 where worse, 0 where that can't be told.

        It is certain where the interval is clear of zero and no chance: a few rows that all changed in one way would make
        an interval that holds no zero, and prove little.
        """
        if self.rows < MIN_ROWS or self.p > 1 - LEVEL:
            return 0
        low, high = self.difference.low, self.difference.high
        sign = 1 if low > 0 else -1 if high < 0 else 0
        return -sign if self.lower_is_better else sign

    def fell(self, share: float) -> bool:
        """Tell whether it got worse for certain, at a `share` of the usual chance of being wrong."""
        return self.direction < 0 and self.p <= (1 - LEVEL) * share

    @property
    def rows_needed(self) -> int | None:
        """Return about how many rows, or groups, would decide, if the difference is what it seems; None where it is decided or none.

        An interval narrows with the root of the rows.
        """
        if self.rows < MIN_ROWS:
            return MIN_ROWS
        low, value, high = self.difference.low, self.difference.value, self.difference.high
        if self.direction or not value:
            return None
        return math.ceil(self.rows * max(1.0, (value - low if value > 0 else high - value) / abs(value)) ** 2) + 1

    def to_json(self) -> dict[str, Any]:
        """The difference as the result file holds it: with what it is over, and how sure it is."""
        over = {"rows": self.rows, "grouped": self.grouped}
        return {**self.difference.to_json(), **over, "direction": self.direction, "p": self.p}


def compare(name: str, before: Metric, after: Metric, seed: int = 0) -> Compared:
    """Compare two metrics over the same rows in the same order, by the bootstrap (Efron, 1979); what is right or wrong by counts.

    Rows are drawn with both of their scores, so that the pairing counts. Raises ValueError where the rows differ in
    number.
    """
    if len(before) != len(after):
        raise ValueError(f"{name}: {len(before)} rows before and {len(after)} after")
    rows = len(before)
    if _counted(before) and _counted(after):
        first, second, difference, p = _compare_right(before.values, after.values)
    elif (
        isinstance(before, Ratio)
        and isinstance(after, Ratio)
        and after.right
        and not before.right
        and before.level is not None
    ):
        p = _swap(before, after, seed) if after.grouped else paired_p(before.values, after.values, ())
        first, second, difference = _compare_tied(before.level, interval(after, seed))
    else:
        samples = _resample([before, after], seed)
        count = min(before.rows_that_count, after.rows_that_count)
        first, second = (_of_draws(m, s, count) for m, s in zip((before, after), samples, strict=True))
        difference = _of_pairs(before, after, samples[1] - samples[0], count)
        if isinstance(before, Ratio) and _grouped_right(after):
            difference = _with_counts_of(before, after, difference)
        p = _swap(before, after, seed)
    first, second, difference = (_if_known(item, rows) for item in (first, second, difference))
    return Compared(name, first, second, difference, before.lower_is_better, rows, before.decides, p, before.grouped)


def interval(metric: Metric, seed: int = 0) -> Interval:
    """Return a metric by itself with its interval: what `compare` gives for either side."""
    found = (
        _wilson(metric.values)
        if _counted(metric)
        else _of_draws(metric, _resample([metric], seed)[0], metric.rows_that_count)
    )
    return _if_known(found, len(metric))


def tell_metric(metric: Metric) -> dict[str, Any]:
    """Return a metric by itself as plain values: with its interval, and what it is over."""
    return {**interval(metric).to_json(), "rows": len(metric), "grouped": metric.grouped}


def _if_known(found: Interval, rows: int) -> Interval:
    """Return an interval over rows, or groups; of a single one, whose draws are all the same, no bounds are known."""
    return Interval(found.value, -math.inf, math.inf) if rows < 2 and found.low == found.high else found


def _counted(metric: Metric) -> TypeGuard[Ratio]:
    """Tell whether each row is right or wrong, so that nothing needs to be drawn."""
    return isinstance(metric, Ratio) and metric.right and not metric.grouped


def _grouped_right(metric: Metric) -> TypeGuard[Ratio]:
    """Tell whether rows are groups of what is right or wrong."""
    return isinstance(metric, Ratio) and metric.right and metric.grouped


def _of_draws(metric: Metric, samples: Floats, rows: float) -> Interval:
    """Return the interval of a metric by its draws.

    Where rows in groups are right or wrong, draws of few groups hardly vary, or not at all: so it is at least as wide as if
    rows were independent and, where the draws don't vary, as if each group were one row.
    """
    found = _interval(whole(metric), samples, _levels(rows))
    if not _grouped_right(metric):
        return found
    count = len(metric) if found.low == found.high else int(metric.weights.sum())
    return found.hull(*_wilson_bounds(found.value, count))


def _of_pairs(before: Metric, after: Metric, samples: Floats, rows: float) -> Interval:
    """Return the interval of the difference by its draws, as wide as intervals that fall short in different cases.

    Where a few rows changed much, quantiles of draws lie too near on the side of these: BCa (Efron, 1987) moves them, here from
    where the expanded ones are. Of metrics that are no ratio, where a single row of a rare class decides much, draws that miss it vary
    too little: Student's interval over the jackknife doesn't follow from draws.
    """
    from scipy.special import ndtri, stdtrit

    value, count = whole(after) - whole(before), len(after)
    found = _interval(value, samples, _levels(rows))
    if rows < 2 or count > JACKKNIFE_MOST:  # the skew of a mean falls with the root of the rows
        return found
    others = np.arange(count - 1) + (np.arange(count - 1) >= np.arange(count)[:, None])  # all rows but one
    left = after.over(others) - before.over(others)
    pulls = left.mean() - left
    squares = float((pulls**2).sum())
    if not squares:
        return found
    below = float((samples < value).mean() + (samples == value).mean() / 2)
    bias = float(ndtri(min(max(below, 0.5 / len(samples)), 1 - 0.5 / len(samples))))
    skew = float((pulls**3).sum()) / (6 * squares**1.5)
    moved = _interval(value, samples, [_moved(z, bias, skew) for z in _normal_levels(rows)])
    found = found.hull(moved.low, moved.high)
    if isinstance(after, Ratio):
        return found
    half = float(stdtrit(rows - 1, (1 + LEVEL) / 2)) * math.sqrt(squares * (count - 1) / count)
    return found.hull(max(value - half, -after.span), min(value + half, after.span))


def _moved(z: float, bias: float, skew: float) -> float:
    """Return the level at which BCa takes the quantile that belongs at the normal's `z`."""
    from scipy.special import ndtr

    room = 1 - skew * (bias + z)
    return float(ndtr(bias + (bias + z) / room)) if room > 0 else float(z > 0)


def _with_counts_of(before: Ratio, after: Ratio, difference: Interval) -> Interval:
    """Return the interval of the difference where rows in groups are right or wrong: as `_of_draws` has it."""
    changes, rows = after.values - before.values, float(after.weights.sum())
    more, less = float(changes.clip(min=0).sum()), float(-changes.clip(max=0).sum())
    share = len(after) / rows if difference.low == difference.high else 1.0
    counted = paired_difference(more * share, less * share, round(rows * share))
    return difference.hull(counted.low, counted.high)


def compare_all(before: Mapping[str, Metric], after: Mapping[str, Metric]) -> list[Compared]:
    """Compare the metrics that both have."""
    return [compare(name, metric, after[name]) for name, metric in before.items() if name in after]


def verdict(compared: Sequence[Compared], primary: str) -> str:
    """Return `better`, `worse`, `no_gain` or `not_measured`.

    `better` needs the primary metric's interval clear of zero on the good side and no other metric's clear of it on the
    bad side; `worse` needs the primary clear on the bad side, or another while the primary is not better. Fewer than
    `MIN_ROWS` rows decide nothing, of any metric.

    Where nothing changed, `better` comes about in at most 2.5 of 100 runs, and so does `worse`: half of its chance is the
    primary metric's, and the others share the other half (Bonferroni).
    """
    if all(item.name != primary or item.rows < MIN_ROWS for item in compared):
        return "not_measured"
    first = next(item for item in compared if item.name == primary)
    others = [item for item in compared if item.name != primary and item.decides]
    if first.direction > 0:
        return "no_gain" if any(item.direction < 0 for item in others) else "better"
    fell = first.fell(0.5 if others else 1) or any(item.fell(0.5 / len(others)) for item in others)
    return "worse" if fell else "no_gain"


def to_json(compared: Sequence[Compared]) -> Mapping[str, Any]:
    """Return before, after and difference by metric, as the result file holds them."""
    return {
        "before": {item.name: item.before.to_json() for item in compared},
        "after": {item.name: item.after.to_json() for item in compared},
        "differences": {item.name: item.to_json() for item in compared},
    }


def _interval(value: float, samples: Floats, levels: Sequence[float]) -> Interval:
    low, high = np.quantile(samples, levels)
    return Interval(value, float(low), float(high))


def _levels(rows: float) -> tuple[float, float]:
    """Return the levels of the expanded percentile interval (Hesterberg, 2015).

    Draws of few rows vary too little, and their quantiles are those of a normal where Student's belong: so the quantiles
    are taken further out, and of a mean of normal values the interval is that of the t-test.
    """
    from scipy.special import ndtr

    if rows < 2:  # nothing is known of how rows vary
        return 0.0, 1.0
    low, high = ndtr(_normal_levels(rows))
    return float(low), float(high)


def _normal_levels(rows: float) -> tuple[float, float]:
    """Return how far out a normal's quantiles are taken for so many rows of like weight, two or more."""
    from scipy.special import stdtrit

    far = math.sqrt(rows / (rows - 1)) * float(stdtrit(rows - 1, (1 + LEVEL) / 2))
    return -far, far


def _compare_right(before: Floats, after: Floats) -> tuple[Interval, Interval, Interval, float]:
    """Compare rows that are right or wrong, 1 or 0, [N]: before, after, difference, p.

    Where few rows change, draws of them hardly vary, or not at all. So the intervals are Wilson's (1927), that of the
    difference is Agresti and Min's (2005) for pairs, and p is that of McNemar's exact test.
    """
    fixed, broken = int((after > before).sum()), int((after < before).sum())
    difference = paired_difference(fixed, broken, len(before))
    return _wilson(before), _wilson(after), difference, sign_test(fixed, broken)


def _compare_tied(level: float, rate: Interval) -> tuple[Interval, Interval, Interval]:
    """Compare a rate with rows that all stood at `level`, as ties at 0.5: nothing is open but the rate, so the difference is as sure."""
    gap = Interval(rate.value - level, rate.low - level, rate.high - level)
    return Interval(level, level, level), rate, gap


def paired_difference(more: float, less: float, rows: int) -> Interval:
    """Return by how much more often `more` came about than `less`, of `rows` pairs, as a part of them (Agresti and Min, 2005)."""
    from scipy.special import ndtri

    changed, gap, count = more + less + 1, more - less, rows + 2  # half a row more of each of four kinds
    half = float(ndtri((1 + LEVEL) / 2)) * math.sqrt(changed - gap**2 / count) / count
    middle, value = gap / count, gap / rows
    return Interval(value, max(-1.0, min(value, middle - half)), min(1.0, max(value, middle + half)))


def _wilson(right: Floats) -> Interval:
    rate = float(right.mean())
    return Interval(rate, *_wilson_bounds(rate, len(right)))


def _wilson_bounds(rate: float, rows: int) -> tuple[float, float]:
    """Return the bounds of a rate over rows (Wilson, 1927)."""
    from scipy.special import ndtri

    z = float(ndtri((1 + LEVEL) / 2))
    middle, half = rate + z**2 / (2 * rows), z * math.sqrt(rate * (1 - rate) / rows + (z / (2 * rows)) ** 2)
    low, high = ((middle + side * half) / (1 + z**2 / rows) for side in (-1, 1))
    return max(0.0, min(rate, low)), min(1.0, max(rate, high))


def has_groups(groups: Sequence[str]) -> bool:
    """Tell whether any group holds several rows."""
    named = [group for group in groups if group]
    return len(set(named)) < len(named)


def paired_p(before: Floats, after: Floats, groups: Sequence[str], seed: int = 0) -> float:
    """Return how likely so uneven a change of rows, [N], is by chance: the sign test; of rows in groups by swaps of whole groups."""
    ones = np.ones(len(before))
    first, second = (cluster(Ratio(side, ones), groups) for side in (before, after))
    if len(first) == len(before):
        return sign_test(int((after > before).sum()), int((after < before).sum()))
    return _swap(first, second, seed)


def sign_test(more: int, less: int) -> float:
    """Return how likely so uneven a count is by chance, two-sided: of rows fixed and broken McNemar's exact test (1947)."""
    from scipy.stats import binomtest

    return float(binomtest(more, more + less).pvalue) if more + less else 1.0


def whole(metric: Metric) -> float:
    """Return a metric over all of its rows."""
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


def _swap(before: Metric, after: Metric, seed: int) -> float:
    """Return how often chance alone makes a difference as large: the permutation test of pairs (Fisher, 1935).

    Where nothing changed, each row might as well have had its two scores the other way round. Of rows that are right or
    wrong this is McNemar's exact test.
    """
    rows = len(before)
    both = before.joined(after)
    generator = np.random.default_rng([seed, 1])
    own = np.arange(rows)
    seen, at_once = abs(whole(after) - whole(before)), max(1, DRAWS_AT_ONCE // rows)
    as_large = 1  # the rows as they are
    for start in range(0, SWAPS, at_once):
        swapped = rows * generator.integers(0, 2, (min(at_once, SWAPS - start), rows))
        found = both.over(own + rows - swapped) - both.over(own + swapped)
        as_large += int((np.abs(found) >= seen - 1e-12 - 1e-9 * seen).sum())
    return as_large / (SWAPS + 1)
