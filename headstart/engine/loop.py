"""When things happen: steps, evaluations, checkpoints, the best model, the end; and what is done when memory runs out."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch

from headstart.data.feed import Feed
from headstart.data.forest import Pack
from headstart.data.segments import Example
from headstart.engine.ahead import steps_of
from headstart.engine.clock import PHASES
from headstart.engine.engine import Engine, PackTooLargeError
from headstart.engine.numbers import BAD_IN_A_ROW, RECENT, is_spike
from headstart.engine.optim import Schedule
from headstart.engine.work import Shape
from headstart.errors import DivergedError, Problem, ResourceError
from headstart.faults import reach
from headstart.models.fast import let_go

WRONG_IN_A_ROW = 2  # evaluations after which a run ends: one alone may be a bad patch that it comes out of


@dataclass(frozen=True)
class LoopPlan:
    """What the loop needs to know. Cadences are in steps, 0 for never; `patience` is in evaluations.

    With the `shape` of the model, what a step needs to compute is counted. `not_finite` is what becomes of a step
    whose numbers are not finite: it is left out (`skip`), the weights go back to the last checkpoint as well (`rollback`),
    or the run ends (`stop`).
    """

    schedule: Schedule
    tokens_per_pack: int
    eval_every: int = 0
    save_every: int = 0
    patience: int = 0
    shape: Shape | None = None
    not_finite: str = "stop"


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint. `best_value` is the lowest loss on the watched rows of a sound model.

    Seconds are those of all sessions of a run; `data_s` to `optimizer_s` are parts of `train_s`. `operations` are those
    that training needed, `energy_j` the joules of the processor, where they are told. `tokens_per_pack` is what the packs were cut down to where memory ran out, and at `smaller_at`.
    `bad_steps` are those left out since their numbers were not finite, the last `bad_in_a_row` of them without another
    between; `recent` are the last losses, which tell a spike. `untouched` is what was watched before the first step, `signs`
    are those that were told since, each once, and `wrong_evals` evaluations in a row were of a model that surely went wrong.
    `watch_s`, a part of `eval_s`, is what it took to look at answers. `due` is an evaluation of this step that was broken off.
    """

    step: int = 0
    seen: int = 0
    tokens_seen: int = 0
    row_tokens_seen: int = 0
    targets_seen: float = 0.0
    operations: float = 0.0
    train_s: float = 0.0
    data_s: float = 0.0
    forward_s: float = 0.0
    backward_s: float = 0.0
    optimizer_s: float = 0.0
    reference_s: float = 0.0
    eval_s: float = 0.0
    save_s: float = 0.0
    energy_j: float | None = None
    tokens_per_pack: int | None = None
    smaller_at: list[int] = field(default_factory=list)
    best_step: int | None = None
    best_value: float | None = None
    worse_evals: int = 0
    bad_steps: list[int] = field(default_factory=list)
    bad_in_a_row: int = 0
    spikes: list[int] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    watch_s: float = 0.0
    untouched: dict[str, float] = field(default_factory=dict)
    signs: list[dict[str, Any]] = field(default_factory=list)
    wrong_evals: int = 0
    due: bool = False
    end: str = ""

    def to_json(self) -> dict[str, Any]:
        """The progress as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class StepRecord:
    """What one step did. `loss` is per target; `tokens` count shared prefixes once, `row_tokens` each time.

    `data_s` to `optimizer_s` are parts of `step_s`; on CUDA the last of them may be told with the next step. `tokens_per_pack`
    is the budget that the step was taken with: less than before where memory ran out. `told` is what the objective watches.
    """

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
    data_s: float = 0.0
    forward_s: float = 0.0
    backward_s: float = 0.0
    optimizer_s: float = 0.0
    operations: float = 0.0
    tokens_per_pack: int = 0
    spike: bool = False
    told: Mapping[str, float] = field(default_factory=dict)
    rows: Sequence[int] = field(repr=False, default=())


class Watched(NamedTuple):
    """The loss on the watched rows, and why the model surely goes wrong: empty where it doesn't, None where nobody looked."""

    loss: float
    wrong: str | None = None


class Hooks(Protocol):
    """What the loop calls. Nothing here may change what the steps compute."""

    def on_step(self, record: StepRecord) -> None:
        """Take note of a step."""

    def use_smaller_packs(self, tokens_per_pack: int, said: str) -> None:
        """Remember that memory ran out, and how large packs are from now on."""

    def on_bad_step(self, step: int, error: DivergedError) -> None:
        """Take note of a step that was left out."""

    def roll_back(self) -> int | None:
        """Set weights and moments to those of the last checkpoint, and return its step; None where there is none."""

    def watch(self) -> Watched | None:
        """Return the loss on the watched rows, and whether it goes wrong whatever the loss says.

        None where that was broken off, since the run was asked to stop.
        """

    def keep_best(self, progress: Progress) -> bool:
        """Keep the weights as they are: the best so far. Return whether they could be kept."""

    def save(self, progress: Progress) -> None:
        """Write a checkpoint."""

    def should_stop(self) -> bool:
        """Tell whether the run was asked to stop."""


def train(
    engine: Engine, feed: Feed, examples: Sequence[Example], plan: LoopPlan, progress: Progress, hooks: Hooks
) -> str:
    """Take steps until the rows are used up (`finished`), nothing gets better (`patience`), it goes wrong (`wrong`), or one asks
    (`stopped`).
    """

    def allowed() -> int:
        return progress.tokens_per_pack or plan.tokens_per_pack

    if progress.due and (end := _settle(feed, plan, progress, hooks)):
        return end
    for ready in steps_of(engine, feed, examples, allowed):
        budget = allowed()
        try:
            record = take_step(
                engine,
                ready.examples,
                ready.rows,
                plan,
                progress.step,
                feed.epoch,
                budget,
                hooks,
                packs=ready.packs_within(budget),
                begun=ready.begun,
            )
        except DivergedError as error:
            _leave_out(error, engine, plan, progress, feed, hooks)
        else:
            if record.tokens_per_pack < budget:
                progress.tokens_per_pack = record.tokens_per_pack
                progress.smaller_at.append(record.step)
            record = replace(record, spike=is_spike(record.loss, progress.recent))
            _advance(progress, record, feed)
            hooks.on_step(record)
        reach("step.told")
        if end := _settle(feed, plan, progress, hooks):
            return end
    return progress.end or "finished"


def _settle(feed: Feed, plan: LoopPlan, progress: Progress, hooks: Hooks) -> str:
    """Do what is due after a step; return how training ends there, and nothing where it goes on.

    An evaluation can take longer than a run is given to stop in: it is then broken off, and made anew when the run goes on. The
    checkpoint of its step is there by then, and stays the one that is gone on from.
    """
    last = feed.seen >= feed.total
    saved = progress.due
    if plan.eval_every and (progress.step % plan.eval_every == 0 or last):
        watched = hooks.watch()
        progress.due = watched is None
        if watched is not None:
            _judge(progress, watched, hooks)
    stop = hooks.should_stop()
    out_of_patience = bool(plan.patience) and progress.worse_evals >= plan.patience
    goes_wrong = progress.wrong_evals >= WRONG_IN_A_ROW
    ended = "finished" if last else "wrong" if goes_wrong else "patience" if out_of_patience else ""
    progress.end = "" if progress.due else ended
    if not saved and (progress.end or stop or (plan.save_every and progress.step % plan.save_every == 0)):
        hooks.save(progress)
    return progress.end or ("stopped" if stop else "")


def take_step(
    engine: Engine,
    examples: Sequence[Example],
    rows: Sequence[int],
    plan: LoopPlan,
    step: int,
    epoch: float,
    budget: int | None = None,
    hooks: Hooks | None = None,
    *,
    packs: Sequence[Pack] | None = None,
    begun: float | None = None,
) -> StepRecord:
    """Take one optimizer step on `examples`, in packs of at most `budget` tokens (as planned where it is None).

    They may lie in such `packs` already, and the step may have `begun` with waiting for these.

    Raises DivergedError, with the weights untouched, where its numbers are not finite; it names the rows. Raises
    ResourceError where the memory isn't enough for a single row.
    """
    begun = time.perf_counter() if begun is None else begun
    packs, budget = _add_gradient(engine, examples, budget or plan.tokens_per_pack, hooks, packs)
    reach("step.gradient")
    lr = plan.schedule.lr(step)
    try:
        grad_norm = engine.optim_step(lr)
    except DivergedError as error:
        where = ", ".join(str(example.where) for example in examples)
        raise DivergedError(
            Problem(p.code, f"step {step + 1}: {p.what}", where, p.cure) for p in error.problems
        ) from None
    reach("step.updated")
    sums = engine.taken
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
        operations=sum(map(plan.shape.operations, packs)) if plan.shape else 0.0,
        tokens_per_pack=budget,
        step_s=time.perf_counter() - begun,
        spike=False,
        told=sums.means,
        rows=rows,
        **{f"{phase}_s": seconds for phase, seconds in engine.clock.take().items()},
    )


def _add_gradient(
    engine: Engine, examples: Sequence[Example], budget: int, hooks: Hooks | None, packs: Sequence[Pack] | None
) -> tuple[Sequence[Pack], int]:
    """Add the gradient of a whole step; return its packs, and the budget that they were laid out in.

    Where the memory runs out, what was added is forgotten and the step is begun anew in packs of half the size, from the
    same random state: it is then the very step that it would have been with such packs.
    """
    state = engine.random_state()
    while True:
        if packs is None:
            with engine.clock.phase("data"):
                packs = engine.reader.build_packs(examples, budget)
        try:
            engine.forward_backward_all(packs)
            return packs, budget
        except PackTooLargeError as error:
            rows, said = error.rows, str(error)
        # Here, where nothing holds what the pack had filled any more.
        engine.discard()
        engine.set_random_state(state)
        _free(engine)
        longest = max(map(len, packs))
        if len(rows) == 1:
            where = str(examples[rows[0]].where)
            cure = f"-s engine.checkpointing=on, -s data.max_length={max(1, longest // 2)}, or a smaller model"
            raise ResourceError(Problem("memory.exhausted", f"one row alone is too much: {said}", where, cure))
        budget, packs = max(1, min(budget, longest) // 2), None
        if hooks:
            hooks.use_smaller_packs(budget, said)


def _leave_out(
    error: DivergedError, engine: Engine, plan: LoopPlan, progress: Progress, feed: Feed, hooks: Hooks
) -> None:
    """Go on without a step whose numbers are not finite, as the plan says. Raises DivergedError where that says no.

    The step counts, and its rows are used up: where the run is stopped and goes on, it comes to the same.
    """
    progress.bad_in_a_row += 1
    if plan.not_finite == "stop":
        raise error
    if progress.bad_in_a_row >= BAD_IN_A_ROW:
        first = f"{BAD_IN_A_ROW} steps in a row were not finite; the last of them: "
        raise DivergedError(Problem(p.code, first + p.what, p.where, p.cure) for p in error.problems) from None
    if plan.not_finite == "rollback" and hooks.roll_back() is None:
        raise error
    progress.step += 1
    progress.seen = feed.seen
    progress.bad_steps.append(progress.step)
    engine.clock.take()
    hooks.on_bad_step(progress.step, error)


def _free(engine: Engine) -> None:
    gc.collect()
    let_go(engine.reader.model)  # smaller packs would lie in the memory of the one that was too large
    if engine.reader.device.type == "cuda":
        torch.cuda.empty_cache()


def _advance(progress: Progress, record: StepRecord, feed: Feed) -> None:
    progress.step = record.step
    progress.seen = feed.seen
    progress.bad_in_a_row = 0
    progress.recent = [*progress.recent, record.loss][-RECENT:]
    if record.spike:
        progress.spikes.append(record.step)
    progress.tokens_seen += record.tokens
    progress.row_tokens_seen += record.row_tokens
    progress.targets_seen += record.targets
    progress.operations += record.operations
    progress.train_s += record.step_s
    for phase in PHASES:
        setattr(progress, f"{phase}_s", getattr(progress, f"{phase}_s") + getattr(record, f"{phase}_s"))


def _judge(progress: Progress, watched: Watched, hooks: Hooks) -> None:
    value = watched.loss
    if not math.isfinite(value):
        what = f"step {progress.step}: the loss on the watched rows is {value}"
        raise DivergedError(Problem("numbers.not_finite", what, "", "lower optim.lr; the last checkpoint is whole"))
    if watched.wrong is not None:
        progress.wrong_evals = progress.wrong_evals + 1 if watched.wrong else 0
    if progress.wrong_evals or (progress.best_value is not None and value >= progress.best_value):
        progress.worse_evals += 1
    elif hooks.keep_best(progress):
        progress.best_step, progress.best_value, progress.worse_evals = progress.step, value, 0
