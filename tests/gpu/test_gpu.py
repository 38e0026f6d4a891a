"""The same laws on a GPU; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from headstart.data.forest import build_packs
from headstart.display import Display
from headstart.engine.forward import PackReader
from headstart.evaluate.score import score_rows
from headstart.models.attention import can_pack, register
from headstart.tune import tune
from tests.laws.test_packing import rows
from tests.twins import PACKED, twin

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("name", PACKED)
def test_packed_on_the_gpu_equals_one_by_one_on_the_cpu(name: str) -> None:
    register()
    examples = rows()
    theirs = score_rows(PackReader(twin(name, torch.float32)), examples, 1, None)
    model = twin(name, torch.float32).to("cuda")
    assert can_pack(model)
    ours = score_rows(PackReader(model), examples, 10_000)
    assert ours.nll == pytest.approx(theirs.nll, rel=1e-3)
    assert len(build_packs(examples, 10_000)) == 1


def test_a_run_in_bfloat16_gains(small_data: Path, tiny_model: Path, tmp_path: Path) -> None:
    settings = {"steps": 20, "batch_size": 4, "optim.lr": 2e-2, "eval.generate": 2, "data.held_out": 16}
    with (tmp_path / "said.txt").open("w") as file:
        run = tune(
            small_data,
            model=str(tiny_model),
            out=tmp_path / "run",
            settings=settings,
            display=Display(file, live=False),
        )
    assert run.result["environment"]["device"] == "cuda"
    assert run.result["verdict"] == "better"
