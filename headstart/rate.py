"""`optim.lr: auto`: a few steps at each of several learning rates, from the same start, so that the run's own rows choose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from headstart.data.feed import Feed
from headstart.data.segments import Example
from headstart.display import Display
from headstart.engine.engine import Engine
from headstart.engine.loop import LoopPlan, take_step
from headstart.engine.optim import Schedule
from headstart.errors import DivergedError, Problem, UsageError
from headstart.evaluate.score import RowScores, score_rows
from headstart.job import Job

PART = 0.1  # of the run's steps, for all rates together
LEAST_STEPS, MOST_STEPS = 4, 50  # of a rate
TRIED = ((1 / 4, 1 / 2, 1.0, 2.0, 4.0), (1 / 3, 1.0, 3.0))  # times the usual rate; fewer where a run is short
# The steps are taken at the rates themselves. That longer runs want lower ones (Bjorck et al., "Scaling optimal LR across token
# horizons", 2024, a power of -0.32) didn't hold here: steps at rates that are higher by as much went past what is stable (docs/log.md).
CLEAR = 2.0  # standard errors by which another rate has to be better than the usual one
ROWS = 32  # that follow, to score on where none are watched


@dataclass(frozen=True)
class Tried:
    """A rate, and what a few steps at it left on rows that they don't train on."""

    rate: float
    scores: RowScores | None  # None: it diverged

    @property
    def loss(self) -> float:
        """The loss a target, in nats."""
        return self.scores.mean if self.scores else math.inf


def choose_rate(job: Job, display: Display) -> None:
    """Decide `optim.lr` of a job by trying, where the run is long enough; its engine is then as it was before.

    Raises UsageError for preferences that are held against the untouched model, which isn't scored yet.
    """
    if job.needs_reference:
        what = "`optim.lr` can't be auto: what answers are held against is known only once the run has begun"
        raise UsageError(Problem("config.bad_value", what, "optim.lr", "leave it out, or -s preference.objective=orpo"))
    settings = job.config.settings
    usual, total = float(settings.optim.lr or 0.0), job.layout.steps
    display.title("learning rate")
    multiples, steps = plan_probe(total)
    if not steps:
        what = f"a run of {total:,} steps is too short to try rates in {PART:.0%} of it"
        display.line(f"  {what}: {usual:g} is taken, the usual one")
        job.config = job.config.decide({"optim.lr": (usual, f"{what}; {job.config.source('optim.lr')[6:]}")})
        return
    rates = [float(f"{usual * multiple:.2e}") for multiple in multiples]
    found = try_rates(job, rates, steps, display)
    best, why = judge(found, usual)
    for tried in found:
        mark = "  chosen" if tried is best else ""
        display.line(f"  {tried.rate:<10g} loss {tried.loss:.4f} after {steps} steps{mark}")
    display.line(f"  {best.rate:g}: {why}")
    job.config = job.config.decide({"optim.lr": (best.rate, f"{len(rates)} rates tried for {steps} steps each: {why}")})


def plan_probe(total: int) -> tuple[Sequence[float], int]:
    """Return which multiples of the usual rate are tried, and for how many steps each; 0 where a run is too short."""
    for multiples in TRIED:
        steps = int(PART * total / len(multiples))
        if steps >= LEAST_STEPS:
            return multiples, min(steps, MOST_STEPS)
    return (), 0


def try_rates(job: Job, rates: Sequence[float], steps: int, display: Display) -> list[Tried]:
    """Take the run's first steps at each rate, a run of that length each, and score rows that they don't train on."""
    engine, settings = job.engine, job.config.settings
    prepared, budget = job.data.prepared, settings.engine.tokens_per_pack or 1
    watched = prepared.watch.examples or _following(job.new_feed(), prepared.train.examples, steps)
    start = {name: parameter.detach().clone() for name, parameter in engine.trainable.items()}
    state = engine.random_state()
    found = []
    for number, rate in enumerate(rates):
        torch.manual_seed(settings.seed)
        schedule = Schedule(rate, steps, max(1, steps // 10), settings.optim.schedule)
        plan = LoopPlan(schedule, budget)
        done = _train(engine, job.new_feed(), prepared.train.examples, plan)
        scores = score_rows(engine.reader, watched, budget) if done else None
        found.append(Tried(rate, scores if scores and math.isfinite(scores.mean) else None))
        engine.load_weights(start)
        engine.forget_moments()
        display.progress("trying rates", number + 1, len(rates))
    engine.clock.take()
    engine.set_random_state(state)
    return found


def _train(engine: Engine, feed: Feed, examples: Sequence[Example], plan: LoopPlan) -> bool:
    """Take the steps of a plan; return whether all of them were finite."""
    for step in range(plan.schedule.steps):
        rows, chosen = feed.next_examples(examples)
        try:
            take_step(engine, chosen, rows, plan, step, feed.epoch)
        except DivergedError:
            return False
    return True


def _following(feed: Feed, examples: Sequence[Example], steps: int) -> list[Example]:
    """Return rows that come behind the first steps."""
    for _ in range(steps):
        feed.next_rows()
    rows: list[int] = []
    while len(rows) < ROWS and (more := feed.next_rows()):
        rows += more
    return [examples[row] for row in rows]


def judge(found: Sequence[Tried], usual: float) -> tuple[Tried, str]:
    """Return the rate to take, and why: of those clearly better than the usual and not clearly worse than the best, the nearest to it.

    Clearly: by `CLEAR` standard errors of the paired difference over rows. The usual one rests on more runs.
    """
    near = sorted(found, key=lambda tried: (abs(math.log(tried.rate / usual)), tried.rate))
    own, best = near[0], min(found, key=lambda tried: (tried.loss, tried.rate))
    if best.scores is None:
        return own, "all diverged; it is the usual one"
    if best is own:
        return own, "none was better than the usual one"
    if not _clear(own, best):
        told = f"{best.loss:.4f} at {best.rate:g}, {own.loss:.4f} at the usual {own.rate:g}"
        return own, f"none was clearly better than the usual one ({told})"
    chosen = next(tried for tried in near if tried.scores and not _clear(tried, best) and _clear(own, tried))
    edge = ", the last that was tried" if chosen in (found[0], found[-1]) else ""
    if own.scores is None:
        return chosen, f"the usual {own.rate:g} diverged{edge}"
    return chosen, f"clearly less loss ({chosen.loss:.4f}, {own.loss:.4f} at the usual {own.rate:g}){edge}"


def _clear(worse: Tried, better: Tried) -> bool:
    """Tell whether what steps at a rate left is clearly worse than what those at another did."""
    if worse is better or worse.scores is None or better.scores is None:
        return worse.scores is None
    gap, error = paired(worse.scores, better.scores)
    return gap > CLEAR * error


def paired(first: RowScores, second: RowScores) -> tuple[float, float]:
    """Return by how much the second loss a target is lower, and the standard error of that over rows."""
    gaps = first.nll - second.nll
    targets = first.targets.sum()
    return float(gaps.sum() / targets), float(np.std(gaps, ddof=1) * math.sqrt(len(gaps)) / targets)
