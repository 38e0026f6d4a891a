"""A checkpoint that the first version wrote loads, and goes on as a run that was never stopped."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from headstart.engine.checkpoint import Checkpoints
from headstart.engine.engine import Engine
from headstart.engine.forward import PackReader
from headstart.engine.loop import LoopPlan, Progress, take_step
from headstart.engine.optim import Schedule
from headstart.models.adapt import Lora, adapt
from headstart.models.attention import register
from headstart.objectives.tokens import nll
from tests.laws.test_memory import rows
from tests.twins import twin

GOLDEN = Path(__file__).parents[1] / "golden"
STEPS = 4  # that it was written after, of four rows each
PLAN = LoopPlan(Schedule(1e-2, 8, 0, "constant"), 10_000)


def build_engine() -> Engine:
    register()
    torch.manual_seed(0)
    adapted = adapt(twin("llama", torch.float32), Lora(1, 2.0, 0.0, ("q_proj",)), seed=0)
    return Engine(PackReader(adapted.model), adapted.trainable(), nll)


def take(engine: Engine, step: int) -> float:
    chosen = rows(16)[4 * (step % 4) : 4 * (step % 4) + 4]
    return take_step(engine, chosen, range(4), PLAN, step, 0.0).loss


def test_a_checkpoint_of_the_first_version_goes_on(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "step-000004", tmp_path / "step-000004")
    found, damaged = Checkpoints(tmp_path, run="golden").load_newest()
    assert not damaged
    anew, loaded = build_engine(), build_engine()
    losses = [take(anew, step) for step in range(STEPS)]
    loaded.load_state(found.tensors, found.values)
    progress = Progress(**found.values["progress"])
    assert (progress.step, progress.seen) == (STEPS, 16)
    assert progress.recent == pytest.approx(losses, rel=1e-5)
    for name, value in anew.state()[0].items():
        if not name.startswith("rng."):
            torch.testing.assert_close(found.tensors[name], value, rtol=1e-4, atol=1e-6)
    assert take(loaded, STEPS) == pytest.approx(take(anew, STEPS), rel=1e-5)
