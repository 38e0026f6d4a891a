"""Kernels in C = the same in double precision by autograd; where they can't be had, functions of torch take their place."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headstart.models import native
from headstart.models.attend import Rule, attend
from headstart.models.attention import register
from headstart.models.blocks import Nodes, cut_blocks
from headstart.models.fast import speed_up
from headstart.models.fused import GatedMlp, Norm, gated_mlp, rms_norm, rotate_
from headstart.models.linear import Part, Product
from tests.laws.test_attend import dense, forests, roots
from tests.laws.test_fast import step, trained
from tests.laws.test_packing import assert_same

needs_compiler = pytest.mark.skipif(native.find_compiler() is None, reason="there is no C compiler here")


def kernels() -> native.Native:
    found = native.find()
    assert found is not None
    return found


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def assert_close_to_double(ours: Tensor, theirs: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """Compare values and gradients with those that are computed of the same inputs in double precision."""
    torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-6)
    wanted = torch.randn(theirs.shape)
    mine = torch.autograd.grad(ours, inputs, wanted)
    others = torch.autograd.grad(theirs, inputs, wanted.double())
    for own, other in zip(mine, others, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(
    nodes=forests(),
    size=st.sampled_from([8, 16, 64]),
    window=st.sampled_from([0, 0, 5]),
    causal=st.booleans(),
    heads=st.sampled_from([(6, 3, 4), (4, 4, 5), (3, 1, 16)]),
)
def test_attention_equals_dense(
    nodes: Nodes, size: int, window: int, causal: bool, heads: tuple[int, int, int]
) -> None:
    torch.manual_seed(0)
    window *= causal
    h, k, d = heads
    columns = torch.randn(len(nodes.owner), h + 2 * k, d, requires_grad=True)  # as they lie in a layer
    parts = columns.split([h, k, k], 1)
    ours = attend(*parts, cut_blocks(nodes, window, causal, size), Rule(0.7, native=kernels()))
    theirs = dense(*(part.double() for part in parts), nodes, window, causal, Rule(0.7))
    assert_close_to_double(ours, theirs, (columns,))


@needs_compiler
@pytest.mark.parametrize("number", [1, 2, 5])
def test_attention_is_the_same_however_its_blocks_are_shared_out(number: int, threads: None) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(number)
    nodes = Nodes.of(
        [40, 90, 70, 33],
        [-1, 0, 0, -1],
        torch.cat([torch.arange(40), torch.arange(40, 130), torch.arange(40, 110), torch.arange(33)]).numpy(),
    )
    q, k, v = (torch.randn(233, n, 8, requires_grad=True) for n in (4, 2, 2))
    ours = attend(q, k, v, cut_blocks(nodes, size=16), Rule(1.0, native=kernels()))
    theirs = dense(q.double(), k.double(), v.double(), nodes, 0, True, Rule(1.0))
    assert_close_to_double(ours, theirs, (q, k, v))


@needs_compiler
@pytest.mark.parametrize("nodes", [roots([9, 20, 5]), roots([40])], ids=["short", "long"])
def test_dropout_of_weights_is_that_of_torch(nodes: Nodes) -> None:
    """The same mask, drawn from the same state, drops the same weights of the same heads."""
    blocks = cut_blocks(nodes, size=16)
    inputs = tuple(torch.randn(len(nodes.owner), n, 8, requires_grad=True) for n in (4, 2, 2))
    sides = []
    for of in (None, kernels()):
        torch.manual_seed(7)
        attended = attend(*inputs, blocks, Rule(1.0, dropout=0.4, native=of))
        torch.manual_seed(8)
        sides.append((attended, *torch.autograd.grad(attended, inputs, torch.randn(attended.shape))))
    for ours, theirs in zip(*sides, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@needs_compiler
def test_scores_that_are_far_apart_or_no_numbers_come_out_as_from_torch() -> None:
    nodes = roots([6])
    q, k, v = torch.ones(6, 1, 1), torch.tensor([0.0, 60.0, -300.0, 1e30, 88.0, -88.0]).view(6, 1, 1), torch.arange(6.0)
    attended = attend(q, k, v.view(6, 1, 1), cut_blocks(nodes, causal=False), Rule(1.0, native=kernels()))
    assert attended.flatten().tolist() == [3.0] * 6
    k[3] = math.nan  # which every row of these blocks meets, be it that it's hidden from some
    attended = attend(q, k, v.view(6, 1, 1), cut_blocks(nodes), Rule(1.0, native=kernels()))
    assert attended.isnan().all()


FLAGS = native._processor().split() if sys.platform == "linux" else []
needs_wide_registers = pytest.mark.skipif(
    "avx2" not in FLAGS, reason="this processor's registers are too narrow for products of our own to pay"
)
OF_EIGHT = "avx2" in FLAGS and "avx512f" not in FLAGS
of_eight = pytest.mark.skipif(
    not OF_EIGHT, reason="where registers don't hold eight numbers, a BLAS makes these products"
)
of_others = pytest.mark.skipif(OF_EIGHT, reason="where registers hold eight numbers, our own kernels make this product")


@needs_compiler
@needs_wide_registers
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("turned", [False, True], ids=["as it lies", "turned"])
@pytest.mark.parametrize("sizes", [(64, 32, 192), (131, 576, 192), (77, 2080, 384)], ids=str)
@pytest.mark.parametrize("base", ["none", "row", "rows"])
def test_products_equal_those_of_torch(
    number: int, turned: bool, sizes: tuple[int, int, int], base: str, threads: None
) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(number)
    m, k, n = sizes
    a = torch.randn(m, k + 3)[:, :k]  # rows with gaps between them
    b = torch.randn(n, k).t() if turned else torch.randn(k, n)
    assert kernels().multiplies(a, b)
    rows = torch.randn(n if base == "row" else (m, n))
    theirs = a.double() @ b.double() + (0 if base == "none" else rows.double())
    ours = native.product(a, b, None if base == "none" else rows)
    # The i-th of k sums of normal numbers is about sqrt(i), and rounded by a half of 2^-23 of it at most: 2.4e-8 k in all, as a
    # deviation; of some ten thousand, none is ten times that.
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=2.4e-7 * k)


@needs_compiler
@of_eight
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(16, 17, 192), (77, 131, 576), (200, 700, 192), (64, 300, 4160)], ids=str)
@pytest.mark.parametrize("added", [False, True], ids=["new", "added"])
def test_products_of_what_lies_by_columns_equal_those_of_torch(
    number: int, sizes: tuple[int, int, int], added: bool, threads: None
) -> None:
    """As the gradient of a weight is made: in its place, of the outputs' gradient, turned, and the inputs."""
    torch.manual_seed(0)
    torch.set_num_threads(number)
    m, k, n = sizes
    a, b = torch.randn(k, m + 5)[:, :m].t(), torch.randn(k, n)
    assert kernels().multiplies(a, b)
    place = torch.randn(m, n)
    theirs = a.double() @ b.double() + added * place.double()
    ours = native.product(a, b, place if added else None, place)
    assert ours is place
    torch.testing.assert_close(place.double(), theirs, rtol=0, atol=2.4e-7 * k)  # as above


@needs_compiler
@pytest.mark.parametrize("left", ["few tokens", "turned inputs", "odd columns"])
def test_products_by_columns_that_do_not_fit_are_left_to_torch(left: str) -> None:
    k, n = 15 if left == "few tokens" else 64, 65 if left == "odd columns" else 64
    a, b = torch.randn(k, 64).t(), torch.randn(n, k).t() if left == "turned inputs" else torch.randn(k, n)
    assert not kernels().multiplies(a, b)
    assert torch.equal(native.product(a, b), a @ b)


@needs_compiler
@needs_wide_registers
def test_a_product_of_many_columns_does_not_depend_on_the_number_of_threads(threads: None) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(100, 1600), torch.randn(320, 1600).t()
    found = []
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        assert kernels().multiplies(a, b)
        found.append(native.product(a, b))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_compiler
@pytest.mark.parametrize(
    "sizes",
    [
        *((15, 64, 64), (64, 65, 64), (64, 64, 65)),
        *(pytest.param(sizes, marks=of_others) for sizes in ((63, 64, 64), (64, 2048, 2048))),
    ],
    ids=str,
)
def test_products_that_do_not_fit_are_left_to_torch(sizes: tuple[int, int, int]) -> None:
    m, k, n = sizes
    a, b = torch.randn(m, k), torch.randn(k, n)
    assert not kernels().multiplies(a, b)
    assert torch.equal(native.product(a, b), a @ b)
    place = torch.zeros(m, n)
    native.product(a, b, place, place)
    assert torch.equal(place, a @ b)
    with torch.autocast("cpu", torch.bfloat16):
        assert native.product(torch.randn(64, 64), torch.randn(64, 64)).dtype == torch.bfloat16


@needs_compiler
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms_equal_their_formula(offset: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 33, requires_grad=True)
    norm = Norm(nn.Parameter(torch.randn(33), requires_grad=False), 1e-5, offset)
    assert native.suits(x) is not None
    wide = x.double()
    theirs = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (norm.weight.double() + offset)
    assert_close_to_double(rms_norm(x, norm), theirs, (x,))


@needs_compiler
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
def test_gated_layers_equal_their_formula(normed: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 12, requires_grad=True)
    gate, up, down = (nn.Parameter(torch.randn(shape)) for shape in ((20, 12), (20, 12), (12, 20)))
    weight = nn.Parameter(torch.randn(12), requires_grad=False)
    norm = Norm(weight, 1e-5) if normed else None
    doubles = [p.detach().double().requires_grad_() for p in (gate, up, down)]
    wide = Product([Part(gate, None), Part(up, None)])
    ours = gated_mlp(x, GatedMlp(wide, Product([Part(down, None)]), "silu", norm), residual=True)
    inner = x.double()
    if normed:
        inner = inner / (inner.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    theirs = x + (nn.functional.silu(inner @ doubles[0].t()) * (inner @ doubles[1].t())) @ doubles[2].t()
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    wanted = torch.randn(7, 12)
    ours.backward(wanted)
    d_x, x.grad = x.grad, None
    theirs.backward(wanted.double())
    for mine, other in ((d_x, x.grad), *((p.grad, q.grad) for p, q in zip((gate, up, down), doubles, strict=True))):
        torch.testing.assert_close(mine.double(), other.double(), rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("of", ["attention", "gated"])
def test_a_gradient_that_lies_nowhere_as_a_whole_is_read_rightly(of: str) -> None:
    """That of a sum is one number, expanded."""
    torch.manual_seed(0)
    if of == "attention":
        inputs = tuple(torch.randn(9, n, 4, requires_grad=True) for n in (4, 2, 2))
        out = attend(*inputs, cut_blocks(roots([5, 4])), Rule(1.0, native=kernels()))
    else:
        inputs = (torch.randn(7, 12, requires_grad=True),)
        parts = [Part(torch.randn(shape), None) for shape in ((20, 12), (20, 12), (12, 20))]
        norm = Norm(nn.Parameter(torch.randn(12), requires_grad=False), 1e-5)
        out = gated_mlp(inputs[0], GatedMlp(Product(parts[:2]), Product(parts[2:]), "silu", norm), residual=True)
    expanded = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    for ours, theirs in zip(expanded, torch.autograd.grad(out, inputs, torch.ones(out.shape)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("of", [None, pytest.param("kernels", marks=needs_compiler)], ids=["torch", "kernels"])
def test_where_no_token_asks_nothing_comes_out_and_gradients_are_zero(of: str | None) -> None:
    q, k, v = (torch.randn(tokens, n, 4, requires_grad=True) for tokens, n in ((0, 4), (9, 2), (9, 2)))
    blocks = cut_blocks(roots([5, 4]), chosen=torch.zeros(0, dtype=torch.long).numpy())
    attended = attend(q, k, v, blocks, Rule(1.0, native=kernels() if of else None))
    assert attended.shape == (0, 4, 4)
    d_q, d_k, d_v = torch.autograd.grad(attended, (q, k, v), torch.zeros(0, 4, 4))
    assert d_q.shape == q.shape
    assert not d_k.any()
    assert not d_v.any()


@needs_compiler
@pytest.mark.parametrize("value", [-1e30, -90.0, -30.0, -1e-3, 0.0, 1e-3, 30.0, 90.0, 1e4])
def test_gates_are_right_at_their_ends(value: float) -> None:
    gate = torch.full((1, 16), value)
    theirs = gate.double().requires_grad_()
    out = nn.functional.silu(theirs)
    out.sum().backward()
    assert theirs.grad is not None
    assert kernels().gate(gate, torch.ones(1, 16))[0].tolist() == pytest.approx(out[0].tolist(), rel=1e-6, abs=1e-30)
    gradient, d_gate, d_up = torch.ones(1, 16), torch.empty(1, 16), torch.empty(1, 16)
    kernels().gate_back(gate, torch.ones(1, 16), gradient, d_gate, d_up)
    assert d_gate[0].tolist() == pytest.approx(theirs.grad[0].tolist(), rel=1e-6, abs=1e-30)
    assert d_up[0].tolist() == pytest.approx(out[0].tolist(), rel=1e-6, abs=1e-30)


@needs_compiler
def test_turns_equal_their_formula_and_touch_nothing_else() -> None:
    torch.manual_seed(0)
    columns = torch.randn(5, 4, 12)
    angles = torch.randn(5, 8)
    cos, sin = angles.cos()[:, :4], angles.sin()[:, :4].contiguous()  # one of them a view
    turned = columns.clone()
    rotate_(turned[:, :3], cos, sin)
    first, second = columns[:, :3, :4], columns[:, :3, 4:8]
    torch.testing.assert_close(turned[:, :3, :4], first * cos[:, None] - second * sin[:, None])
    torch.testing.assert_close(turned[:, :3, 4:8], second * cos[:, None] + first * sin[:, None])
    assert torch.equal(turned[:, :3, 8:], columns[:, :3, 8:])
    assert torch.equal(turned[:, 3], columns[:, 3])


@needs_compiler
def test_other_types_and_views_are_left_to_torch() -> None:
    assert native.suits(torch.zeros(2, 3)) is not None
    assert native.suits(torch.zeros(2, 3, dtype=torch.float64)) is None
    assert native.suits(torch.zeros(2, 3), torch.zeros(3, 2).t()) is None


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)


def broken_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")


@pytest.mark.parametrize("how", [without_compiler, broken_compiler])
def test_without_kernels_layers_are_fused_and_give_the_same(how: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    model, parameters = trained("llama", torch.float32, lora=None)
    plain = step(model, parameters, 60)
    how(monkeypatch)
    native.find.cache_clear()
    try:
        sped = speed_up(model)
        assert str(sped) == "2 of 2 layers fused"
        assert_same(step(model, parameters, 60), plain, 1e-4)
    finally:
        native.find.cache_clear()


@needs_compiler
def test_kernels_are_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADSTART_HOME", str(tmp_path))
    monkeypatch.setattr(native, "find", native.find.__wrapped__)
    first = native.find()
    assert first is not None
    (library,) = (tmp_path / "native").iterdir()
    made = library.stat().st_mtime_ns
    assert native.find() is not None
    assert [path.stat().st_mtime_ns for path in (tmp_path / "native").iterdir()] == [made]


@needs_compiler
def test_a_damaged_library_is_compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADSTART_HOME", str(tmp_path / "first"))
    monkeypatch.setattr(native, "find", native.find.__wrapped__)
    assert native.find() is not None
    (library,) = (tmp_path / "first" / "native").iterdir()
    damaged = tmp_path / "second" / "native" / library.name  # what is loaded under a path stays so
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(library.read_bytes()[:100])
    monkeypatch.setenv("HEADSTART_HOME", str(tmp_path / "second"))
    assert native.find() is not None
    assert damaged.stat().st_size == library.stat().st_size


@needs_compiler
def test_heads_that_lie_otherwise_are_refused() -> None:
    q, k, v = (torch.randn(4, 3, 2).transpose(1, 2) for _ in range(3))
    with pytest.raises(ValueError, match="side by side"):
        attend(q, k, v, cut_blocks(roots([4])), Rule(1.0, native=kernels()))
