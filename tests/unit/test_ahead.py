"""Steps laid out ahead of time are the steps that are taken, in their order, and the cursor is that of what was taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from headstart.data.feed import Feed
from headstart.data.forest import Pack, build_packs
from headstart.data.segments import Example
from headstart.engine import engine as engine_module
from headstart.engine import loop as loop_module
from headstart.engine.ahead import steps_of
from headstart.engine.clock import Clock
from headstart.engine.engine import Engine
from headstart.engine.forward import PackReader
from headstart.engine.loop import LoopPlan, Progress, train
from headstart.engine.optim import Schedule
from headstart.models.attention import register
from headstart.objectives.tokens import nll
from tests.conftest import example
from tests.laws.test_memory import SAID, _Hooks, build_engine
from tests.laws.test_memory import rows as long_rows
from tests.twins import twin

ROWS = [example([3 + n, *range(10, 20 + n % 5)], line=n) for n in range(10)]


class Layouts:
    """As much of an engine and its reader as lays out packs."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.reader, self.clock = self, Clock()

    def build_packs(self, examples: Sequence[Example], tokens_per_pack: int) -> list[Pack]:
        if any(item.where.line == 7 and item.segments[0].ids[0] == 99 for item in examples):
            raise OSError("a row can't be read")
        return build_packs(examples, tokens_per_pack)


def renumbered(item: Example, place: int) -> Example:
    """Vary a row by its place in the run, as what is masked does."""
    segment = item.segments[0]
    return replace(item, segments=(replace(segment, ids=np.append(segment.ids[:-1], np.int32(place % 90))),))


def feed(seen: int = 0) -> Feed:
    return Feed(len(ROWS), 3, 25, seed=4, seen=seen, vary=renumbered)


def taken(feed: Feed, rows: Sequence[Example], ahead: bool, stop_after: int = 99) -> list[tuple[Any, ...]]:
    """Return of each step its rows, the ids of its packs, and the feed's cursor while it is taken."""
    engine: Any = Layouts()
    steps: list[tuple[Any, ...]] = []
    for ready in steps_of(engine, feed, rows, lambda: 40, ahead=ahead):
        packs = ready.packs_within(40)
        assert (packs is not None) == ahead
        packs = engine.build_packs(ready.examples, 40) if packs is None else packs
        steps.append((ready.rows, [pack.ids.tolist() for pack in packs], feed.seen, feed.epoch))
        if len(steps) == stop_after:
            break
    return steps


def test_ahead_or_not_the_steps_and_the_cursor_are_the_same() -> None:
    by_hand, own = [], feed()
    while own.seen < own.total:
        numbers, chosen = own.next_examples(ROWS)
        packs = build_packs(chosen, 40)
        by_hand.append((numbers, [pack.ids.tolist() for pack in packs], own.seen, own.epoch))
    assert len(by_hand) == own.steps
    assert taken(feed(), ROWS, ahead=False) == by_hand
    assert taken(feed(), ROWS, ahead=True) == by_hand


@pytest.mark.parametrize("ahead", [False, True])
def test_a_run_that_stops_goes_on_with_the_step_after_the_last_that_was_taken(ahead: bool) -> None:
    first = feed()
    begun = taken(first, ROWS, ahead, stop_after=3)
    assert first.seen == 9  # and not that of the step that lay ready
    assert begun + taken(feed(seen=first.seen), ROWS, ahead) == taken(feed(), ROWS, ahead=False)


def test_nothing_is_left_at_the_end() -> None:
    assert taken(feed(seen=25), ROWS, ahead=True) == taken(feed(seen=25), ROWS, ahead=False) == []


def test_what_goes_wrong_ahead_is_told_when_its_step_is_due() -> None:
    order = [rows for rows, *_ in taken(feed(), ROWS, ahead=False)]
    broken = [replace(row, segments=(replace(row.segments[0], ids=row.segments[0].ids * 0 + 99),)) for row in ROWS]
    rows = [broken[n] if n == 7 else ROWS[n] for n in range(len(ROWS))]
    due = next(number for number, step in enumerate(order) if 7 in step)
    engine: Any = Layouts()
    own = Feed(len(ROWS), 3, 25, seed=4)
    steps = steps_of(engine, own, rows, lambda: 40, ahead=True)
    for _ in range(due):
        next(steps)
    assert own.seen == 3 * due
    with pytest.raises(OSError, match="can't be read"):
        next(steps)


def train_steps(engine: Engine, limit: int) -> _Hooks:
    """Take three steps of eight rows in packs of 120; from the second on, packs of more than `limit` tokens fail."""
    hooks, progress = _Hooks(engine), Progress()
    outputs = engine.reader.outputs

    def fail(pack: Pack) -> torch.Tensor:
        if len(pack) > limit and progress.step:
            raise RuntimeError(SAID)
        return outputs(pack)

    engine.reader.outputs = fail  # type: ignore[method-assign]
    torch.manual_seed(1)
    train(engine, Feed(16, 8, 24, seed=0), long_rows(), LoopPlan(Schedule(1e-2, 3), 120), progress, hooks)
    return hooks


@pytest.mark.parametrize("limit", [1 << 30, 60])
def test_a_run_with_steps_laid_out_ahead_is_the_run_without_also_where_memory_runs_out(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weights(ahead: bool) -> tuple[list[torch.Tensor], list[int], list[int]]:
        laid_out: list[int] = []
        engine = build_engine()
        layout = engine.reader.build_packs

        def count(examples: Sequence[Example], tokens: int) -> list[Pack]:
            laid_out.append(tokens)
            return layout(examples, tokens)

        engine.reader.build_packs = count  # type: ignore[method-assign]
        monkeypatch.setattr(loop_module, "steps_of", partial(steps_of, ahead=ahead))
        hooks = train_steps(engine, limit)
        return [p.detach() for p in engine.trainable.values()], [s.tokens_per_pack for s in hooks.steps], laid_out

    register()
    ours, theirs = weights(True), weights(False)
    assert all(torch.equal(a, b) for a, b in zip(ours[0], theirs[0], strict=True))
    assert ours[1] == theirs[1] == ([120, 60, 60] if limit == 60 else [120] * 3)
    # The third step lay ready in packs that were too large by then.
    assert sorted(theirs[2]) == ([60, 60, 120, 120] if limit == 60 else [120] * 3)
    assert sorted(ours[2]) == ([60, 60, 120, 120, 120] if limit == 60 else [120] * 3)


def test_packs_of_another_budget_are_not_used() -> None:
    engine: Any = Layouts()
    budgets = [40]
    steps = steps_of(engine, feed(), ROWS, lambda: budgets[-1], ahead=True)
    assert next(steps).packs_within(40) is not None
    budgets.append(20)  # while the second step lies ready
    stale, fresh = next(steps), next(steps)
    assert stale.packs_within(20) is None
    assert fresh.packs_within(20) is not None


def test_sums_that_stay_on_a_device_give_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does, done on the CPU: sums in tensors of double precision, read once."""

    def step() -> tuple[list[torch.Tensor], float, Any]:
        model = twin("llama", torch.float32)
        engine = Engine(PackReader(model), dict(model.named_parameters()), nll, clip=0.1)
        rows = [example(list(range(3, 9 + n)), [0.0] + [0.3 * n + 0.1] * (5 + n)) for n in range(6)]
        engine.forward_backward_all(build_packs(rows, 12))
        norm = engine.optim_step(1e-2)
        return [p.detach().clone() for p in model.parameters()], norm, engine.taken

    register()
    plain = step()
    monkeypatch.setattr(engine_module, "_number", lambda value: value.detach().double())
    kept = step()
    assert all(torch.equal(a, b) for a, b in zip(plain[0], kept[0], strict=True))
    assert plain[1:] == kept[1:]
    assert isinstance(kept[2].summed, float)


def test_every_number_of_a_pack_can_be_copied_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from headstart.engine.ahead import pin

    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self.clone())
    (pack,) = build_packs(ROWS, 1000)
    copy = pin(pack)
    arrays = [f.name for f in fields(pack) if isinstance(getattr(pack, f.name), np.ndarray)]
    assert len(pinned) == len(arrays)
    assert all((getattr(copy, name) == getattr(pack, name)).all() for name in arrays)
    assert len(copy) == len(pack)
