"""The head in chunks = dense logits: values and gradients, with biases, scales and soft caps."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from headstart.models import head as head_module
from headstart.models import native
from headstart.models.head import Head


def dense(head: Head, hidden: torch.Tensor, sources: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return head.logits(hidden).log_softmax(-1)[sources, ids]


@pytest.mark.parametrize("kind", ["linear", "wrapped"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, None), (1.0, 2.0), (0.5, 1.5)])
def test_chunks_equal_dense(
    kind: str, bias: bool, scale: float, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "LOGITS_AT_ONCE", 11 * 3)  # three hidden states at once, so 3 + 3 + 1
    monkeypatch.setattr(head_module, "COLUMNS_AT_ONCE", 4)  # and four words at once, so 4 + 4 + 3
    torch.manual_seed(0)
    linear = nn.Linear(5, 11, bias=bias, dtype=torch.float64)
    head = Head(linear if kind == "linear" else _Wrapped(linear), scale, softcap)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    # Some hidden states predict nothing, one predicts several tokens, one the same token twice.
    sources = torch.tensor([0, 1, 1, 1, 3, 3, 6])
    ids = torch.tensor([2, 3, 10, 0, 4, 4, 9])
    weights = torch.randn(7, dtype=torch.float64)
    found = []
    for compute in (head.logprobs, lambda *args: dense(head, *args)):
        hidden.grad = None
        linear.zero_grad()
        logprobs = compute(hidden, sources, ids)
        (logprobs * weights).sum().backward()
        found.append([logprobs.detach(), hidden.grad.clone(), *(p.grad.clone() for p in linear.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sources", [[0, 1, 1, 1, 3, 3, 6], [3, 4, 5], [0, 2, 6], []], ids=str)
def test_where_chunks_begin_is_known_without_asking_the_device(
    sources: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "LOGITS_AT_ONCE", 11 * 3)
    head, hidden, places = Head(nn.Linear(5, 11)), torch.randn(7, 5), torch.tensor(sources, dtype=torch.long)
    told = head.for_targets(len(hidden), places.numpy()).chunks(hidden, places, places)
    asked = head.chunks(hidden, places, places)
    assert len(told) == len(asked) == 3
    for ours, theirs in zip(told, asked, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_products_are_left_to_the_kernels_by_a_fast_head_alone(
    fast: bool, frozen: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "COLUMNS_AT_ONCE", 192)
    monkeypatch.setattr(head_module, "LOGITS_AT_ONCE", 320 * 70)  # 70 + 70 + 60 hidden states
    found = native.find()
    asked = []
    monkeypatch.setattr(native, "find", lambda: asked.append(1) or found)
    torch.manual_seed(0)
    linear = nn.Linear(64, 320, bias=bias).requires_grad_(not frozen)
    hidden, wanted = torch.randn(200, 64, requires_grad=True), torch.randn(250)
    sources, ids = torch.randint(200, (250,)).sort().values, torch.randint(320, (250,))
    exact, copy = hidden.detach().double().requires_grad_(), deepcopy(linear).double()
    ours = Head(linear, fast=fast).logprobs(hidden, sources, ids)
    theirs = dense(Head(copy), exact, sources, ids)
    ours.backward(wanted)
    theirs.backward(wanted.double())
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    for mine, other in zip((hidden, *linear.parameters()), (exact, *copy.parameters()), strict=True):
        if mine.requires_grad:
            torch.testing.assert_close(mine.grad.double(), other.grad, rtol=1e-4, atol=1e-5)
    assert bool(asked) is fast


class _Wrapped(nn.Module):
    """A head that isn't a plain linear layer, as when an adapter sits on it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    @property
    def weight(self) -> nn.Parameter:
        return self.linear.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden)


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_a_frozen_head_gets_no_gradient_and_gives_the_same(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "COLUMNS_AT_ONCE", 4)
    linear = nn.Linear(5, 11, dtype=torch.float64).requires_grad_(False)
    hidden = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    sources, ids = torch.tensor([0, 1, 1, 3]), torch.tensor([10, 2, 3, 0])
    head, weights = Head(linear, scale), torch.tensor([1.0, 0.5, 2.0, -1.0], dtype=torch.float64)
    (ours,) = torch.autograd.grad((head.logprobs(hidden, sources, ids) * weights).sum(), hidden)
    (theirs,) = torch.autograd.grad((dense(head, hidden, sources, ids) * weights).sum(), hidden)
    torch.testing.assert_close(ours, theirs)
    head.logprobs(hidden, sources, ids).sum().backward()
    assert linear.weight.grad is None


def test_large_logits_stay_finite() -> None:
    linear = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1e4, 0.0], [-1e4, 0.0], [0.0, 0.0]]))
    logprobs = Head(linear).logprobs(torch.tensor([[1.0, 0.0]]), torch.tensor([0, 0]), torch.tensor([0, 2]))
    assert logprobs.tolist() == [0.0, -1e4]
