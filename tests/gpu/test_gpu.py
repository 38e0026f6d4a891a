"""The same laws on a GPU; skipped where there is none."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from headstart.data.feed import Feed
from headstart.data.forest import build_packs
from headstart.data.segments import Example
from headstart.display import Display
from headstart.engine.ahead import steps_of
from headstart.engine.engine import Engine
from headstart.engine.forward import PackReader
from headstart.evaluate.score import score_rows
from headstart.models import attention_gpu
from headstart.models.attention import Forest, can_pack, forest_attention, register
from headstart.objectives.tokens import nll
from headstart.tune import tune
from tests.conftest import example
from tests.laws.test_kernels import DEEP, ROOTS
from tests.laws.test_packing import grads, rows
from tests.twins import PACKED, twin
from tests.unit.test_sight import positions_of

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


def attended(
    kernel: str, forest: tuple[list[int], list[int]], dtype: torch.dtype, heads: tuple[int, int] = (4, 2), **how: Any
) -> list[Tensor]:
    """Return the output of attention on the GPU and its gradients, as float32."""
    torch.manual_seed(0)
    tokens, (queries, keys) = sum(forest[0]), heads
    inputs = [torch.randn(1, n, tokens, 64).to("cuda", dtype).requires_grad_(True) for n in (queries, keys, keys)]
    made = Forest(*forest, positions_of(*forest).to("cuda"), kernel=kernel)
    output, _ = forest_attention(torch.nn.Identity(), *inputs, None, forest=made, **how)
    direction = torch.randn(output.shape).to("cuda", dtype)
    return [x.float() for x in (output.detach(), *torch.autograd.grad((output * direction).sum(), inputs))]


LONG = [1500, 700, 300, 40, 2000], [-1, 0, 1, 0, -1]
HOWS: list[dict[str, Any]] = [{}, {"sliding_window": 9}, {"sliding_window": 600}, {"softcap": 20.0}]


def assert_alike(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() / b.norm() < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize("forest", [DEEP, ROOTS, LONG], ids=["deep", "roots", "long"])
def test_flex_gives_what_blocks_give(
    forest: Any, how: dict[str, Any], heads: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    assert attention_gpu.has_flex()
    theirs = attended("blocks", forest, torch.float32, heads, **how)
    assert_alike(attended("flex", forest, dtype, heads, **how), theirs, tolerance)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("how", [{}, {"sliding_window": 9}, {"sliding_window": 1}, {"is_causal": False}], ids=str)
def test_rows_of_varying_length_give_what_blocks_give(how: dict[str, Any], heads: tuple[int, int]) -> None:
    if attention_gpu.find_varlen() is None:
        pytest.skip("needs attention over rows of varying length")
    ours = attended("varlen", ROOTS, torch.bfloat16, heads, **how)
    theirs = attended("blocks", ROOTS, torch.float32, heads, **how)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() < 2e-2 * b.norm().clamp_min(1)


def small_model(dropout: float = 0.0) -> Any:
    """Return a model with heads that are wide enough for every kernel."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        attention_dropout=dropout,
    )
    return transformers.LlamaForCausalLM(config).to("cuda")


def long_rows(count: int = 24) -> list[Example]:
    chance = np.random.default_rng(0)
    prefix = chance.integers(3, 97, 200).tolist()
    return [example([*prefix, *chance.integers(3, 97, 30 + n).tolist()], line=n) for n in range(count)]


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("share", [True, False])
def test_a_model_has_the_loss_and_the_gradients_of_blocks(share: bool, bfloat16: bool) -> None:
    register()

    def step(kernels: bool) -> tuple[float, dict[str, Tensor]]:
        model = small_model()
        reader = PackReader(model, bfloat16=bfloat16)
        if kernels:
            assert reader.try_kernels()
            assert reader.kernel == "auto"
        (pack,) = build_packs(long_rows(), 100_000, share=share)
        return Engine(reader, dict(model.named_parameters()), nll).forward_backward(pack).loss, grads(model)

    ours, theirs = step(True), step(False)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-2 if bfloat16 else 1e-4)
    for name, gradient in theirs[1].items():
        assert (ours[1][name] - gradient).norm() / gradient.norm() < (0.1 if bfloat16 else 5e-3), name


def test_no_pack_is_compiled_for_by_itself() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    attention_gpu.flex_kernel.cache_clear()
    for lengths in ([100, 50, 30], [300, 20, 21, 90], [64, 65], [257, 1, 1, 1], [20] * 40, [128, 128]):
        attended("flex", (lengths, [-1] + [0] * (len(lengths) - 1)), torch.bfloat16)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_step_waits_for_the_gpu_once() -> None:
    register()
    model = small_model()
    reader = PackReader(model, bfloat16=True)
    assert reader.try_kernels()
    engine = Engine(reader, dict(model.named_parameters()), nll)
    steps = steps_of(engine, Feed(24, 8, 240, seed=0), long_rows(), lambda: 600)
    for _ in range(2):  # what is made at the first time is not counted
        engine.forward_backward_all(next(steps).packs or ())
        engine.optim_step(1e-3)
    packs = next(steps).packs or ()
    assert len(packs) > 1
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            engine.forward_backward_all(packs)
            before = sum("synchroniz" in str(warning.message) for warning in told)
            engine.optim_step(1e-3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert before == 0
    assert sum("synchroniz" in str(warning.message) for warning in told) == 1
    assert isinstance(engine.taken.summed, float)


def test_steps_laid_out_ahead_are_those_laid_out_when_due() -> None:
    register()

    def run(ahead: bool) -> list[float]:
        model = small_model()
        reader = PackReader(model)
        engine = Engine(reader, dict(model.named_parameters()), nll)
        losses = []
        for ready in steps_of(engine, Feed(24, 8, 48, seed=0), long_rows(), lambda: 600, ahead=ahead):
            packs = ready.packs_within(600)
            assert (packs is not None) == ahead
            engine.forward_backward_all(packs or build_packs(ready.examples, 600))
            engine.optim_step(1e-3)
            losses.append(engine.taken.loss)
        return losses

    assert run(True) == pytest.approx(run(False), rel=1e-4)
