"""Are the intervals and verdicts what they say? Simulated rows whose truth is known: `python -m bench.coverage`.

Of each case many data sets are drawn. Told is how often the interval of the difference holds the truth (95% is right), and, where
nothing changed, how often the difference was called better or worse, and how often the verdict was (at most 5%).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from headstart.evaluate import compare as compare_module
from headstart.evaluate.compare import ClassMetric, Metric, Ratio, compare, compare_all, verdict

Pair = tuple[dict[str, Metric], dict[str, Metric]]
Draw = Callable[[np.random.Generator, int, float], Pair]
POPULATION = 1_000_000
SIZES = (8, 16, 24, 40, 100, 400)


def mean(values: np.ndarray) -> Ratio:
    return Ratio(np.asarray(values, float), np.ones(len(values)), right=values.dtype == bool)


def draw_normal(chance: np.random.Generator, rows: int, gain: float) -> Pair:
    """Scores of rows that differ a lot from each other, and change a little."""
    before = chance.normal(0, 1, rows)
    return {"score": mean(before)}, {"score": mean(before + gain + chance.normal(0, 0.7, rows))}


def draw_skewed(chance: np.random.Generator, rows: int, gain: float) -> Pair:
    """Changes of which a few are large: exponential, around the gain."""
    before = chance.normal(0, 1, rows)
    if gain == 0:  # nothing changed: as often up as down
        return {"score": mean(before)}, {"score": mean(before + chance.laplace(0, 0.7, rows))}
    return {"score": mean(before)}, {"score": mean(before + gain + chance.exponential(0.7, rows) - 0.7)}


def draw_errors(chance: np.random.Generator, rows: int, gain: float) -> Pair:
    """Errors of which a few are far larger than the rest, before and after."""
    each = chance.lognormal(0, 1, rows)
    sides = (mean(each * level * chance.lognormal(0, 0.35, rows)) for level in (1, 1 - gain))
    before, after = (replace(side, lower_is_better=True) for side in sides)
    return {"mae": before}, {"mae": after}


def draw_loss(chance: np.random.Generator, rows: int, gain: float) -> Pair:
    """Losses per token of answers of very uneven length."""
    tokens = np.ceil(chance.lognormal(3.5, 0.8, rows))
    each = chance.lognormal(0.5, 0.4, rows)
    changed = each * (1 - gain) * chance.lognormal(0, 0.1, rows) / math.exp(0.005)
    if gain == 0:  # exchangeable: both sides vary alike
        each, changed = (each * chance.lognormal(0, 0.1, rows) for _ in range(2))
    sides = (Ratio(tokens * each, tokens, lower_is_better=True), Ratio(tokens * changed, tokens, lower_is_better=True))
    return {"nll": sides[0]}, {"nll": sides[1]}


def draw_right(chance: np.random.Generator, rows: int, gain: float) -> Pair:
    """Rows that are right or wrong; as many as the gain, and a tenth both ways, change."""
    before = chance.random(rows) < 0.5
    turn = chance.random(rows)
    after = np.where(before, turn >= 0.1, turn < 0.1 + 2 * gain)
    return {"accuracy": mean(before)}, {"accuracy": mean(after)}


def draw_classes(chance: np.random.Generator, rows: int, gain: float) -> Pair:
    """Four uneven classes: accuracy, macro F1 and Matthews' correlation of the same answers."""
    truth = chance.choice(4, rows, p=[0.4, 0.3, 0.2, 0.1])

    def told(right: float) -> dict[str, Metric]:
        found = np.where(chance.random(rows) < right, truth, chance.integers(0, 4, rows))
        names = ("macro_f1", "weighted_f1", "mcc")
        return {"accuracy": mean(found == truth), **{name: ClassMetric(truth, found, 4, name) for name in names}}

    return told(0.6), told(0.6 + gain)


CASES: dict[str, tuple[Draw, float]] = {
    "mean, normal": (draw_normal, 0.2),
    "mean, skewed": (draw_skewed, 0.2),
    "mean of errors": (draw_errors, 0.2),
    "loss per token": (draw_loss, 0.1),
    "right or wrong": (draw_right, 0.1),
    "classes": (draw_classes, 0.15),
}


@dataclass
class Tally:
    covered: int = 0
    called: int = 0
    verdicts: int = 0


def truth_of(draw: Draw, gain: float) -> dict[str, float]:
    """Return the true difference of each metric, from very many rows."""
    before, after = draw(np.random.default_rng(1), POPULATION, gain)
    whole = np.arange(POPULATION)[None]
    return {name: float(after[name].over(whole)[0] - before[name].over(whole)[0]) for name in before}


def simulate(draw: Draw, gain: float, rows: int, trials: int, seed: int = 0) -> dict[str, Tally]:
    """Draw data sets with the gain and without one, and count."""
    truths = truth_of(draw, gain)
    chance = np.random.default_rng(seed)
    tallies = {name: Tally() for name in truths}
    for trial in range(trials):
        before, after = draw(chance, rows, gain)
        for name, truth in truths.items():
            found = compare(name, before[name], after[name], seed=trial).difference
            tallies[name].covered += found.low <= truth <= found.high
        nothing = compare_all(*draw(chance, rows, 0.0))
        for item in nothing:
            tallies[item.name].called += item.direction != 0
            tallies[item.name].verdicts += verdict(nothing, item.name) in ("better", "worse")
    return tallies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    given = parser.parse_args()
    compare_module.RESAMPLES = given.resamples
    print(f"{'case':<16}{'metric':<13}{'rows':>6}{'covers':>10}{'called':>10}{'verdict':>10}")
    for case in given.cases:
        for rows in given.sizes:
            for name, tally in simulate(*CASES[case], rows, given.trials).items():
                shares = [count / given.trials for count in (tally.covered, tally.called, tally.verdicts)]
                print(f"{case:<16}{name:<13}{rows:>6}" + "".join(f"{share:>10.1%}" for share in shares), flush=True)


if __name__ == "__main__":
    main()
