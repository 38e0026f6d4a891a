"""When things happen: steps, evaluations, checkpoints, the best model, the end."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from headstart.data.feed import Feed
from headstart.data.segments import Example
from headstart.engine.engine import Engine
from headstart.engine.optim import Schedule
from headstart.errors import DivergedError, Problem


@dataclass(frozen=True)
class LoopPlan:
    """What the loop needs to know. Cadences are in steps, 0 for never; `patience` is in evaluations."""

    schedule: Schedule
    tokens_per_pack: int
    eval_every: int = 0
    save_every: int = 0
    patience: int = 0


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint. `best_value` is the lowest loss on the watched rows."""

    step: int = 0
    seen: int = 0
    tokens_seen: int = 0
    row_tokens_seen: int = 0
    targets_seen: float = 0.0
    train_s: float = 0.0
    best_step: int | None = None
    best_value: float | None = None
    worse_evals: int = 0
    end: str = ""

    def to_json(self) -> dict[str, Any]:
        """The progress as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class StepRecord:
    """What one step did. `loss` is per target; `tokens` count shared prefixes once, `row_tokens` each time."""

    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    row_tokens: int
    targets: float
    packs: int
    step_s: float
    rows: Sequence[int] = field(repr=False, default=())


class Hooks(Protocol):
    """What the loop calls. Nothing here may change what the steps compute."""

    def on_step(self, record: StepRecord) -> None:
        """Take note of a step."""

    def watch(self) -> float:
        """Return the loss on the watched rows."""

    def keep_best(self, progress: Progress) -> None:
        """Keep the weights as they are: the best so far."""

    def save(self, progress: Progress) -> None:
        """Write a checkpoint."""

    def should_stop(self) -> bool:
        """Tell whether the run was asked to stop."""


def train(
    engine: Engine, feed: Feed, examples: Sequence[Example], plan: LoopPlan, progress: Progress, hooks: Hooks
) -> str:
    """Take steps until the rows are used up (`finished`), nothing gets better (`patience`) or one asks (`stopped`)."""
    while feed.seen < feed.total:
        rows, chosen = feed.next_examples(examples)
        record = take_step(engine, chosen, rows, plan, progress.step, feed.epoch)
        _advance(progress, record, feed)
        hooks.on_step(record)
        last = feed.seen >= feed.total
        if plan.eval_every and (progress.step % plan.eval_every == 0 or last):
            _judge(progress, hooks.watch(), hooks)
        out_of_patience = bool(plan.patience) and progress.worse_evals >= plan.patience
        stop = hooks.should_stop()
        progress.end = "finished" if last else "patience" if out_of_patience else ""
        if progress.end or stop or (plan.save_every and progress.step % plan.save_every == 0):
            hooks.save(progress)
        if progress.end:
            return progress.end
        if stop:
            return "stopped"
    return progress.end or "finished"


def take_step(
    engine: Engine, examples: Sequence[Example], rows: Sequence[int], plan: LoopPlan, step: int, epoch: float
) -> StepRecord:
    """Take one optimizer step on `examples`.

    Raises DivergedError, with the weights untouched, where its numbers are not finite; it names the rows.
    """
    begun = time.perf_counter()
    packs = engine.reader.build_packs(examples, plan.tokens_per_pack)
    sums = engine.forward_backward_all(packs)
    lr = plan.schedule.lr(step)
    try:
        grad_norm = engine.optim_step(lr)
    except DivergedError as error:
        where = ", ".join(str(example.where) for example in examples)
        raise DivergedError(
            Problem(p.code, f"step {step + 1}: {p.what}", where, p.cure) for p in error.problems
        ) from None
    return StepRecord(
        step=step + 1,
        epoch=epoch,
        loss=sums.loss / sums.count,
        lr=lr,
        grad_norm=grad_norm,
        tokens=sums.tokens,
        row_tokens=sums.row_tokens,
        targets=sums.count,
        packs=len(packs),
        step_s=time.perf_counter() - begun,
        rows=rows,
    )


def _advance(progress: Progress, record: StepRecord, feed: Feed) -> None:
    progress.step = record.step
    progress.seen = feed.seen
    progress.tokens_seen += record.tokens
    progress.row_tokens_seen += record.row_tokens
    progress.targets_seen += record.targets
    progress.train_s += record.step_s


def _judge(progress: Progress, value: float, hooks: Hooks) -> None:
    if not math.isfinite(value):
        what = f"step {progress.step}: the loss on the watched rows is {value}"
        raise DivergedError(Problem("numbers.not_finite", what, "", "lower optim.lr; the last checkpoint is whole"))
    if progress.best_value is None or value < progress.best_value:
        progress.best_step, progress.best_value, progress.worse_evals = progress.step, value, 0
        hooks.keep_best(progress)
    else:
        progress.worse_evals += 1
