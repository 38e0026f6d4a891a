"""An embedding in training: of its rows a step looks up few, so its gradient is kept of these alone, or in place."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

KEPT_GRADIENT = "headstart_gradient"  # an attribute of weights: memory for their gradient
LOOKED_UP = "headstart_looked_up"  # of weights that are looked up in and nothing else: where their gradient is kept


class RowGradient:
    """The gradient of those rows of a weight [V, D] that were looked up: `ids` [U], ascending, and `values` [U, D].

    Of all other rows it is zero. It has a life: gradients are added up in it until it is cleared.
    """

    def __init__(self, weight: Tensor) -> None:
        self.ids = torch.empty(0, dtype=torch.int64)
        self.values = weight.new_empty(0, weight.shape[1])

    def add(self, ids: Tensor, gradient: Tensor) -> None:
        """Add `gradient` [T, D] to the rows `ids` [T], in the order in which they stand, as in a gradient [V, D]."""
        known = len(self.ids)
        joined, places = torch.unique(torch.cat([self.ids, ids]), return_inverse=True)
        values = gradient.new_zeros(len(joined), gradient.shape[1])
        values[places[:known]] = self.values
        self.ids, self.values = joined, values.index_add_(0, places[known:], gradient)

    def clear(self) -> None:
        """Forget what was added."""
        self.ids, self.values = self.ids[:0], self.values[:0].clone()


def spread(ids: Tensor, values: Tensor, rows: int) -> Tensor:
    """Return [rows, D] that holds `values` [U, D] in its rows `ids` [U], and zeros."""
    whole = values.new_zeros(rows, values.shape[1])
    whole[ids] = values
    return whole


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight = weight
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        weight = ctx.weight
        ids, gradient = ids.reshape(-1), gradient.reshape(-1, gradient.shape[-1])
        rows = getattr(weight, LOOKED_UP, None)
        if rows is not None:
            rows.add(ids, gradient)
            return None, None
        if weight.grad is None:
            # In the memory of the step before, where there was one: new memory of this size costs more than clearing it.
            kept = getattr(weight, KEPT_GRADIENT, None)
            weight.grad = torch.zeros_like(weight) if kept is None else kept.zero_()
            setattr(weight, KEPT_GRADIENT, weight.grad)
        weight.grad.index_add_(0, ids, gradient)
        return None, None


def embed(ids: Tensor, weight: Tensor) -> Tensor:
    """Look up rows of `weight` [V, D]; their gradients are added in place, and no other [V, D] is made."""
    return _Embed.apply(ids, weight)  # type: ignore[no-any-return, no-untyped-call]
