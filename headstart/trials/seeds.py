"""The same run with several seeds: how much of what came out is luck."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from headstart.config import Config
from headstart.display import Display
from headstart.errors import DivergedError, Problem, UsageError
from headstart.files import write_atomic, write_json
from headstart.report.reasons import seeds_words
from headstart.report.trials import seeds_page
from headstart.report.words import VERDICTS, score_words
from headstart.trials.retell import retell
from headstart.trials.study import Outcome, Study, study_path


@dataclass(frozen=True)
class Spread:
    """Differences over seeds: their mean, standard deviation, and the 95% interval of the mean (Student's t)."""

    mean: float
    deviation: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Return the spread of two values or more."""
        mean, deviation = statistics.fmean(values), statistics.stdev(values)
        half = float(stats.t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))
        return Spread(mean, deviation, mean - half, mean + half)


@dataclass(frozen=True)
class Seeds:
    """Runs that differ in their seed alone."""

    path: Path
    outcomes: Sequence[Outcome]

    def to_json(self) -> dict[str, Any]:
        """Plain values; the spread is None where fewer than two runs came through."""
        whole = [outcome.result for outcome in self.outcomes if outcome.result]
        spread = Spread.of([result["difference"]["value"] for result in whole]) if len(whole) > 1 else None
        return {
            "runs": str(self.path),
            "metric": whole[0]["difference"]["metric"],
            "verdicts": [result["verdict"] for result in whole],
            "failed": len(self.outcomes) - len(whole),
            "spread": vars(spread) if spread else None,
            "seeds": [outcome.to_json() for outcome in self.outcomes],
            "page": str(self.path / "seeds.html"),
        }


def tune_seeds(config: Config, count: int, display: Display) -> Seeds:
    """Carry out a run with `count` seeds, from the one that is set on; each is proven on the same rows.

    None of them is chosen: the first is as good a model as any. Raises UsageError for fewer than two.
    """
    if count < 2:
        raise UsageError(Problem("usage.flag", "one seed has no spread", "--seeds", "--seeds 3"))
    path = study_path("seeds", config)
    study = Study(path, config, {"seeds": count})
    first = config.settings.seed
    with study.begun():
        display.title(f"the same run with {count} seeds")
        outcomes = []
        for seed in range(first, first + count):
            outcome = study.carry_out(f"seed-{seed}", {"seed": seed}, display, prove=True)
            display.line(f"  seed {seed}: {_told(outcome)}")
            outcomes.append(outcome)
        if not any(outcome.result for outcome in outcomes):
            cure = "lower optim.lr"
            raise DivergedError(Problem("numbers.not_finite", o.failed, o.run, cure) for o in outcomes)
        found = Seeds(path, outcomes)
        write_json(path / "seeds.json", found.to_json())
        write_atomic(path / "seeds.html", seeds_page(found.to_json()))
        for outcome in outcomes:
            if outcome.result:
                retell(Path(outcome.run), "seeds", found.to_json())
        return found


def _told(outcome: Outcome) -> str:
    if outcome.result is None:
        return f"failed: {outcome.failed}"
    metric = outcome.result["difference"]["metric"]
    return f"{VERDICTS[outcome.result['verdict']]}: {score_words(outcome.result, metric)}"


def say_seeds(display: Display, found: Seeds) -> None:
    """Say how much the seed matters."""
    display.title("over seeds")
    display.line(f"  {seeds_words(found.to_json())}", "bold")
    display.fact("page", str(found.path / "seeds.html"))
