"""Kernels for a whole pack give what blocks of queries give; on the CPU, where FlexAttention runs uncompiled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from headstart.data.forest import build_packs
from headstart.engine.engine import Engine
from headstart.engine.forward import PackReader
from headstart.models import attention_gpu
from headstart.models.attention import Forest, forest_attention, register
from headstart.models.attention_gpu import Call, choose_kernel, flex, kernels_agree, window_sides
from headstart.objectives.tokens import nll
from tests.laws.test_packing import assert_same, grads, rows
from tests.twins import twin
from tests.unit.test_sight import positions_of

DEEP = [70, 40, 33, 21, 90], [-1, 0, 0, 1, -1]  # three levels and a root of its own
ROOTS = [70, 40, 1, 90], [-1, -1, -1, -1]


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


@pytest.fixture
def flex_here(monkeypatch: pytest.MonkeyPatch) -> CompileCounter:
    """Let FlexAttention run on the CPU, gradients too, traced but not compiled; return what counts its graphs."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    torch._dynamo.reset()
    counter = CompileCounter()
    kernel = torch.compile(flex, backend=counter, fullgraph=True, recompile_limit=attention_gpu.MOST_VARIANTS)
    monkeypatch.setattr(attention_gpu, "flex_kernel", lambda: kernel)
    return counter


def attended(
    kernel: str, forest: tuple[list[int], list[int]], heads: tuple[int, int] = (4, 2), **how: Any
) -> list[Tensor]:
    """Return the output of attention and its gradients."""
    torch.manual_seed(0)
    tokens = sum(forest[0])
    inputs = [
        torch.randn(1, n, tokens, 16, dtype=torch.float64, requires_grad=True) for n in (heads[0], *heads[1:] * 2)
    ]
    made = Forest(*forest, positions_of(*forest), kernel=kernel)
    output, _ = forest_attention(torch.nn.Identity(), *inputs, None, forest=made, **how)
    direction = torch.randn_like(output)
    return [output.detach(), *torch.autograd.grad((output * direction).sum(), inputs)]


@pytest.mark.usefixtures("flex_here")
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    ("forest", "how"),
    [
        (DEEP, {}),
        (DEEP, {"sliding_window": 9, "scaling": 0.3}),
        (DEEP, {"sliding_window": 75}),
        (ROOTS, {}),
        (ROOTS, {"is_causal": False}),
    ],
    ids=str,
)
def test_flex_gives_what_blocks_give(
    forest: tuple[list[int], list[int]], how: dict[str, Any], softcap: float | None, heads: tuple[int, int]
) -> None:
    ours = attended("flex", forest, heads, softcap=softcap, **how)
    theirs = attended("blocks", forest, heads, softcap=softcap, **how)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        # FlexAttention makes the gradient of its scores in float32.
        assert (a - b).norm() / b.norm() < 1e-6


@pytest.mark.usefixtures("flex_here")
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_a_model_under_flex_has_the_loss_and_the_gradients_of_blocks(name: str) -> None:
    def step(kernel: str) -> tuple[float, dict[str, Tensor]]:
        model = twin(name)
        reader = PackReader(model)
        reader.kernel = kernel
        (pack,) = build_packs([*rows(0), *rows(1)], 10_000)
        assert len(pack) > attention_gpu.BLOCK
        return Engine(reader, dict(model.named_parameters()), nll).forward_backward(pack).loss, grads(model)

    assert_same(step("flex"), step("blocks"), 1e-5)


def test_no_pack_is_compiled_for_by_itself(flex_here: CompileCounter) -> None:
    for window in (None, 5):
        for softcap in (None, 2.0, 3.0):
            for lengths in ([100, 50, 30], [300, 20, 21, 90], [64, 65], [257, 1, 1, 1], [20] * 40, [128, 128]):
                attended("flex", (lengths, [-1] + [0] * (len(lengths) - 1)), sliding_window=window, softcap=softcap)
    # With and without a window, and for each soft cap: what differs from layer to layer or from model to model.
    assert flex_here.frame_count == 6


@pytest.mark.usefixtures("flex_here")
def test_under_autocast_kernels_compute_in_its_type() -> None:
    query = torch.randn(1, 4, sum(DEEP[0]), 16)  # rotary embeddings leave queries and keys in float32
    key, value = torch.randn(1, 2, sum(DEEP[0]), 16), torch.randn(1, 2, sum(DEEP[0]), 16, dtype=torch.bfloat16)
    forest = Forest(*DEEP, positions_of(*DEEP), kernel="flex")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output, _ = forest_attention(torch.nn.Identity(), query, key, value, None, forest=forest)
        forest.kernel = "blocks"
        theirs, _ = forest_attention(torch.nn.Identity(), query, key, value, None, forest=forest)
    assert output.dtype == theirs.dtype == torch.bfloat16
    assert (output - theirs).float().norm() / theirs.float().norm() < 0.02


def by_rows(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scale: float, causal: bool, window: int
) -> Tensor:
    """Attend as kernels over rows of varying length do, [T, H, d] in and out, row by row and query by query."""
    left, right = window_sides(window, causal)
    output = []
    for begin, end in zip(ends.tolist(), ends.tolist()[1:], strict=False):
        assert end - begin <= longest
        for place in range(begin, end):
            low = begin if left < 0 else max(begin, place - left)
            high = end if right < 0 else min(end, place + right + 1)
            groups = query.shape[1] // key.shape[1]
            k, v = (t[low:high].repeat_interleave(groups, 1).transpose(0, 1) for t in (key, value))
            output.append(F.scaled_dot_product_attention(query[place][:, None], k, v, scale=scale)[:, 0])
    return torch.stack(output)


@pytest.mark.parametrize(
    "how", [{}, {"sliding_window": 9, "scaling": 0.3}, {"sliding_window": 1}, {"is_causal": False}]
)
def test_rows_of_varying_length_are_handed_over_as_they_are(
    how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_gpu, "find_varlen", lambda: by_rows)
    for a, b in zip(attended("varlen", ROOTS, **how), attended("blocks", ROOTS, **how), strict=True):
        assert a.shape == b.shape
        # With a window of 1 nothing is weighed, and the gradient of queries and keys is 0 but for rounding.
        assert (a - b).norm() < 1e-12 * b.norm().clamp_min(1)


def test_rows_of_varying_length_have_no_window_that_looks_both_ways() -> None:
    with pytest.raises(ValueError, match="looks both ways"):
        window_sides(2, causal=False)


BEST = Call("cuda", torch.bfloat16, tokens=4096, roots=False, head_dim=64)


@pytest.mark.parametrize(
    ("changes", "kernel"),
    [
        ({}, "flex"),
        ({"roots": True}, "varlen"),
        ({"roots": True, "window": 128}, "varlen"),
        ({"roots": True, "softcap": 50.0}, "flex"),
        ({"roots": True, "varlen": False}, "flex"),
        ({"roots": True, "dtype": torch.float32}, "flex"),
        ({"roots": True, "head_dim": 260}, "flex"),
        ({"roots": True, "head_dim": 8}, "varlen"),
        ({"window": 128, "softcap": 50.0}, "flex"),
        ({"flex": False}, "blocks"),
        ({"roots": True, "flex": False, "varlen": False}, "blocks"),
        ({"device": "cpu"}, "blocks"),
        ({"device": "mps"}, "blocks"),
        ({"dropout": 0.1}, "blocks"),
        ({"roots": True, "dropout": 0.1}, "blocks"),
        ({"dtype": torch.float64}, "blocks"),
        ({"head_dim": 8}, "blocks"),
        ({"tokens": 128}, "blocks"),
    ],
    ids=str,
)
def test_the_kernel_is_chosen_by_device_and_pack(changes: dict[str, Any], kernel: str) -> None:
    assert choose_kernel(replace(BEST, **changes)) == kernel


def test_the_cpu_stays_with_blocks() -> None:
    assert PackReader(twin("llama")).kernel == "blocks"
    for a, b in zip(attended("auto", DEEP), attended("blocks", DEEP), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("flex_here")
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_kernels_are_tried_on_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = twin(name, torch.float32).train()
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    monkeypatch.setattr(attention_gpu, "choose_kernel", lambda _: "flex")
    before = torch.get_rng_state()
    for share in (True, False):
        assert kernels_agree(model, share=share, precision=contextlib.nullcontext)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert not any(parameter.grad is not None for parameter in model.parameters())


def _forgets_ancestors(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def broken(kernel: str, forest: Forest, *rest: Any) -> Tensor:
        lengths = forest.nodes.length.tolist()
        roots = Forest(lengths, [-1] * len(lengths), forest.positions, kernel=kernel)
        return original(kernel, roots, *rest)

    return broken


def _wrong_gradient(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def broken(kernel: str, forest: Forest, query: Tensor, key: Tensor, *rest: Any) -> Tensor:
        return original(kernel, forest, query, key.detach(), *rest)

    return broken


def _fails(_original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def broken(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no compiler")

    return broken


@pytest.mark.usefixtures("flex_here")
@pytest.mark.parametrize("how", [_forgets_ancestors, _wrong_gradient, _fails])
def test_a_kernel_that_gives_something_else_is_not_used(
    how: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_gpu, "choose_kernel", lambda _: "flex")
    monkeypatch.setattr(attention_gpu, "run_kernel", how(attention_gpu.run_kernel))
    reader = PackReader(twin("llama", torch.float32))
    assert not reader.try_kernels()
    assert reader.kernel == "blocks"
