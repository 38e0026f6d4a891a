"""Which trials there are and how long each is trained: grids, draws, and successive halving. Nothing is run here."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headstart.errors import Problem, UsageError

ETA = 3  # of so many trials one goes on (Li et al., "Hyperband", 2018)
DRAWN = 9  # trials where values are drawn and the user names no number
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, whole ones where both are; drawn by their logarithm where they are above zero."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}"


Over = Mapping[str, Sequence[str] | Range]


def parse_over(texts: Sequence[str]) -> dict[str, Sequence[str] | Range]:
    """Read `KEY=A,B,C` and `KEY=LOW..HIGH`. Raises UsageError with everything that can't be read so."""
    found: dict[str, Sequence[str] | Range] = {}
    problems = []
    for text in texts:
        key, _, given = (part.strip() for part in text.partition("="))
        values = _parse_range(given) if ".." in given else list(dict.fromkeys(v.strip() for v in given.split(",")))
        if not key or key in found or values is None or (not isinstance(values, Range) and "" in values):
            cure = "--over optim.lr=1e-4,3e-4, or from a range: --over optim.lr=1e-5..1e-3; each setting once"
            problems.append(Problem("usage.flag", f"no setting with values in {text!r}", "--over", cure))
        else:
            found[key] = values
    if problems or not texts:
        raise UsageError(problems or Problem("usage.flag", "nothing varies", "--over", "--over optim.lr=1e-4,3e-4"))
    return found


def _parse_range(text: str) -> Range | None:
    ends = text.split("..")
    for number in (int, float):
        try:
            low, high = map(number, ends)
        except ValueError:
            continue
        return Range(low, high) if math.isfinite(low) and math.isfinite(high) and low < high else None
    return None


@dataclass(frozen=True)
class Rung:
    """`trials` that are each trained for a `share` of a full run."""

    trials: int
    share: float


def plan_rungs(trials: int, budget: float | None = None, eta: int = ETA) -> list[Rung]:
    """Return the rungs of successive halving (Jamieson and Talwalkar, 2016): of each the best 1/eta go on to the next.

    On the last rung a trial is a full run. Rungs grow by eta, so that each takes as much as the others; with `budget`,
    in full runs, they grow by more, so that all of them take no more than that. Raises UsageError where it isn't enough.
    """
    counts = [max(1, trials // eta**rung) for rung in range(int(math.log(trials, eta) + 1e-9) + 1)]

    def rungs(growth: float) -> list[Rung]:
        return [Rung(count, growth ** (place - len(counts) + 1)) for place, count in enumerate(counts)]

    if budget is None or cost(rungs(eta)) <= budget + 1e-9:
        return rungs(eta)
    if budget <= counts[-1]:
        what = f"a budget of {budget:g} full runs, of which the last rung alone takes {counts[-1]}"
        raise UsageError(Problem("usage.flag", what, "--budget", f"--budget {counts[-1] + 1}, or fewer trials"))
    low, high = float(eta), 1e6  # the cost falls as the growth rises
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if cost(rungs(middle)) > budget else (low, middle)
    return rungs(high)


def cost(rungs: Sequence[Rung]) -> float:
    """Return what rungs take, in full runs."""
    return sum(rung.trials * rung.share for rung in rungs)


def promote(losses: Sequence[float | None], count: int) -> list[int]:
    """Return the numbers of the `count` trials of the least loss, the best first; of those alike the earlier one.

    Trials that failed (None) never go on.
    """
    ranked = sorted((loss, number) for number, loss in enumerate(losses) if loss is not None)
    return [number for _, number in ranked[:count]]


class Grid:
    """Every combination of the values, or `trials` of them drawn by `seed`, in their order."""

    def __init__(self, over: Mapping[str, Sequence[str]], trials: int | None, seed: int) -> None:
        every = [dict(zip(over, values, strict=True)) for values in itertools.product(*over.values())]
        if trials is not None and trials < len(every):
            chosen = sorted(random.Random(seed).sample(range(len(every)), trials))  # noqa: S311 (no secret)
            every = [every[number] for number in chosen]
        self.count = len(every)
        self._left = iter(every)

    def propose(self) -> Values:
        """Return the next combination."""
        return next(self._left)

    def tell(self, loss: float | None) -> None:
        """Take no note: a grid doesn't learn."""


class Drawn:
    """Values drawn from ranges and lists by Optuna's TPE (Bergstra et al., 2011), which learns from the trials before.

    The same seed and the same losses give the same values, so a sweep that goes on asks anew what it asked before.
    Raises UsageError where Optuna isn't installed.
    """

    def __init__(self, over: Over, trials: int | None, seed: int) -> None:
        try:
            import optuna
        except ImportError:
            cure = 'pip install "headstart[search]", or name values: --over KEY=A,B,C'
            raise UsageError(Problem("usage.flag", "a range is drawn from by optuna", "--over", cure)) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.count = trials or DRAWN
        self._space = {key: _distribution(optuna.distributions, values) for key, values in over.items()}
        self._study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
        self._failed = optuna.trial.TrialState.FAIL
        self._trial: Any = None

    def propose(self) -> Values:
        """Return what the sampler proposes."""
        self._trial = self._study.ask(self._space)
        return {key: _rounded(value) for key, value in self._trial.params.items()}

    def tell(self, loss: float | None) -> None:
        """Let the sampler learn from the loss."""
        if loss is None:
            self._study.tell(self._trial, state=self._failed)
        else:
            self._study.tell(self._trial, loss)


def find_proposals(over: Over, trials: int | None, seed: int) -> Grid | Drawn:
    """Return what says which trials there are: a grid, or draws where a value comes from a range."""
    listed = {key: values for key, values in over.items() if not isinstance(values, Range)}
    return Grid(listed, trials, seed) if len(listed) == len(over) else Drawn(over, trials, seed)


def _distribution(kinds: Any, values: Sequence[str] | Range) -> Any:
    if not isinstance(values, Range):
        return kinds.CategoricalDistribution(list(values))
    whole = isinstance(values.low, int) and isinstance(values.high, int)
    kind = kinds.IntDistribution if whole else kinds.FloatDistribution
    return kind(values.low, values.high, log=values.low > 0)


def _rounded(value: Any) -> Any:
    return float(f"{value:.2e}") if isinstance(value, float) else value
