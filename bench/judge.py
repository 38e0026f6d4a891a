"""What rounds say: rates, ratios, whether two contenders computed the same. Pure, on numbers alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

LOSS_TOLERANCE = 0.01


@dataclass(frozen=True)
class Round:
    """One process of one contender.

    `losses` per step (nats per target); `tokens` of each step, real ones alone: padding is never counted; `begin_s`, when
    the first step began, and `ends_s`, when each ended, on one clock; `peak_bytes` of resident memory up to the last
    step; `extra`: what only some contenders have to say.
    """

    losses: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()
    begin_s: float = 0.0
    ends_s: tuple[float, ...] = ()
    peak_bytes: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Real tokens a second from the end of the first step on: what is paid once is left out for all alike."""
        if len(self.ends_s) < 2:
            return self.whole_rate
        return sum(self.tokens[1:]) / (self.ends_s[-1] - self.ends_s[0])

    @property
    def whole_rate(self) -> float:
        """Real tokens a second from the start of the first step on."""
        return sum(self.tokens) / (self.ends_s[-1] - self.begin_s) if self.ends_s else 0.0

    def to_json(self) -> dict[str, Any]:
        """The round as plain values, its rates with it."""
        return {**asdict(self), "rate": self.rate, "whole_rate": self.whole_rate}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Round:
        """Read what a contender printed, or what `to_json` gave."""
        known = {name: values[name] for name in Round.__dataclass_fields__ if name in values}
        return Round(**{name: tuple(v) if isinstance(v, list) else v for name, v in known.items()})


@dataclass(frozen=True)
class Spread:
    """The median of what several rounds gave, the least and the most of it."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Return the spread of at least one value."""
        return Spread(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Bar:
    """What is to be reached: `limit`, from above (`at_least`) or from below."""

    limit: float
    at_least: bool = True

    def met(self, value: float) -> bool:
        """Tell whether a value reaches it; what isn't a number never does."""
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.limit:g}"


@dataclass(frozen=True)
class Agreement:
    """How far apart the losses of two contenders are at the worst step, as a part of the second's."""

    worst: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Tell whether they computed the same."""
        return self.worst <= self.tolerance


def agreement(ours: Sequence[float], theirs: Sequence[float], tolerance: float = LOSS_TOLERANCE) -> Agreement:
    """Compare losses step by step. Other numbers of steps, no steps, or a loss that isn't finite never agree."""
    if len(ours) != len(theirs) or not ours or not all(map(math.isfinite, (*ours, *theirs))):
        return Agreement(math.inf, tolerance)
    return Agreement(max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(ours, theirs, strict=True)), tolerance)


# --- what a pair of rounds is held against: each takes ours and theirs, and gives one number ---


def speed(ours: Round, theirs: Round) -> float:
    """Return how many times as many real tokens a second ours trains."""
    return ours.rate / theirs.rate


def epoch_speed(ours: Round, theirs: Round) -> float:
    """Return how many times as fast ours trains on the same rows, all steps and the reference before them counted."""
    seconds = [one.ends_s[-1] - one.begin_s + one.extra.get("reference_s", 0.0) for one in (ours, theirs)]
    return seconds[1] / seconds[0]


def memory(ours: Round, theirs: Round) -> float:
    """Return our peak memory as a part of theirs."""
    return ours.peak_bytes / theirs.peak_bytes


def share_of_ideal(ours: Round, theirs: Round) -> float:
    """Return the speed-up of shared over unshared rows as a part of the ratio of the tokens computed."""
    return speed(ours, theirs) / (sum(theirs.extra["computed"]) / sum(ours.extra["computed"]))


def loss_gap(ours: Round, theirs: Round) -> float:
    """Return how far apart the losses on held-out rows are after training, as a part of theirs."""
    return abs(ours.extra["eval_loss"] - theirs.extra["eval_loss"]) / theirs.extra["eval_loss"]


def share_of_products(ours: Round, theirs: Round) -> float:
    """Return the rate at which a LoRA step does the products it needs, as a part of the best one measured here.

    Needed are, for each token that is computed, the forward products and those of the input's gradient (2 operations a
    weight each), three of them for the adapter's own, and for each target the head's. Attention is not counted.
    """
    size, seconds = ours.extra["size"], ours.ends_s[-1] - ours.ends_s[0]
    per_token = 4 * size["linear"] + 6 * size["adapter"]
    needed = per_token * sum(ours.extra["computed"][1:]) + 4 * size["head"] * sum(ours.extra["targets"][1:])
    return float(needed / seconds / theirs.extra["best_flops"])


def planned_memory(ours: Round, _: Round) -> float:
    """Return how far the planned peak memory is from the measured one, as a part of it."""
    return abs(ours.extra["planned_bytes"] / ours.extra["run_peak_bytes"] - 1)


def planned_time(ours: Round, _: Round) -> float:
    """Return how far the planned time of training and scoring is from the measured one, as a part of it."""
    return abs(ours.extra["planned_s"] / ours.extra["taken_s"] - 1)


MEASURES = {
    f.__name__: f
    for f in (speed, epoch_speed, memory, share_of_ideal, loss_gap, share_of_products, planned_memory, planned_time)
}


def compare(measure: str, ours: Sequence[Round], theirs: Sequence[Round]) -> Spread:
    """Return the spread of a measure over pairs of rounds: each pair ran one after the other, so drift cancels."""
    return Spread.of([MEASURES[measure](a, b) for a, b in zip(ours, theirs, strict=True)])
