"""Dropout (Srivastava et al., 2014) whose masks are drawn sixteen bits a value, a tensor at a time, and kept as bytes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

LEVELS = 1 << 16  # a probability is rounded to one of so many


def share(p: float) -> float:
    """Return what kept values are multiplied by, so that the mean stays: 1 over the probability to be kept."""
    kept = LEVELS - round(p * LEVELS)
    return LEVELS / kept if kept else 0.0


def draw_kept(shape: tuple[int, ...], p: float, device: torch.device) -> Tensor:
    """Return 1 for values that are kept and 0 for the others, uint8, each kept with a probability of 1 - p by itself.

    torch draws a number for each value, one after the other; a number of 64 bits is enough for four of them. It compares
    in place, and widens bytes, several values at a time; bools it would make, and widen, one by one.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=torch.uint8, device=device).bernoulli_(1 - p)
    count, dropped = math.prod(shape), round(p * LEVELS)
    if dropped == LEVELS:
        return torch.zeros(shape, dtype=torch.uint8)
    noise = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(1 << 63), None)
    return noise.view(torch.int16)[:count].ge_(dropped - LEVELS // 2).to(torch.uint8).view(shape)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        kept = draw_kept(tuple(x.shape), p, x.device)
        ctx.save_for_backward(kept)
        ctx.share = share(p)
        return (x * kept).mul_(ctx.share)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        return (gradient * kept).mul_(ctx.share), None


def dropout(x: Tensor, module: nn.Dropout) -> Tensor:
    """Return what a dropout module gives for x."""
    if not module.training or not module.p:
        return x
    return _Dropout.apply(x, module.p)  # type: ignore[no-any-return, no-untyped-call]
