"""A layer of Llama's form as one call of the kernels each way, where only adapters train.

What fused functions do one behind the other, bit for bit, without Python between them: after each large product Python is out of
the caches, which takes longer than what it does.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headstart.models.attend import Rule, one_by_one
from headstart.models.blocks import Blocks
from headstart.models.fused import GatedMlp, Heads, Norm
from headstart.models.linear import Product
from headstart.models.native import Attention, Layer, Native, cut_parts, suits


class Whole:
    """A layer as the kernels are told of it: products, norms and heads. It is told anew once these have changed."""

    def __init__(
        self, columns: Product, out: Product, mlp: GatedMlp, before: Norm, mlp_norm: Norm, heads: Heads
    ) -> None:
        self._parts = columns, out, mlp, before, mlp_norm, heads
        self.products = columns, out, mlp.wide, mlp.down
        self._norms = before, mlp_norm
        self.heads = heads
        self.layer = Layer(eps=before.eps, mlp_eps=mlp_norm.eps)
        self._attention = Attention(heads=heads.queries, groups=heads.groups, width=heads.width, share=1.0)
        self.layer.attention = ctypes.addressof(self._attention)
        self._keys: list[Any] = []
        self._fits = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Whole:
        return Whole(*copy.deepcopy(self._parts, memo))  # what the copy is made of lies elsewhere

    def fits(self, native: Native) -> bool:
        """Tell whether the kernels compute all of it; take over what has changed."""
        keys: list[Any] = []
        for product in self.products:
            product.refresh()
            keys.append(product.key)
        keys += [(norm.weight.data_ptr(), norm.weight.requires_grad) for norm in self._norms]
        if keys != self._keys:
            self._keys = keys
            told = [product.tell(native) for product in self.products]
            alike = all(
                suits(norm.weight) and not norm.offset and not norm.weight.requires_grad for norm in self._norms
            )
            biased = any(product.biased for product in self.products[1::2])
            self._fits = None not in told and alike and not biased
            if self._fits:
                for name, linear in zip(("columns", "out", "wide", "down"), told, strict=True):
                    setattr(self.layer, name, linear)
                self.layer.scale, self.layer.mlp_scale = (norm.weight.data_ptr() for norm in self._norms)
        return self._fits

    @property
    def trigger(self) -> Tensor | None:
        """A parameter that trains, for autograd to know that a gradient is wanted; None where nothing trains."""
        return next((found for product in self.products if (found := product.trigger) is not None), None)

    def tell(self, tokens: int, cos: Tensor, sin: Tensor, blocks: Blocks, scale: float) -> None:
        """Take over which pack it is about."""
        table, layer, attention = blocks.table, self.layer, self._attention
        attention.count, attention.threads, attention.scale = len(table.fields), torch.get_num_threads(), scale
        attention.blocks, attention.runs = table.fields.ctypes.data, table.runs.ctypes.data
        attention.places = table.places.ctypes.data
        layer.parts, edges = cut_parts(table, self.heads.groups)
        layer.edges, layer.threads = edges.ctypes.data, attention.threads
        layer.tokens, layer.r = tokens, cos.shape[1]
        layer.cos, layer.cos_step, layer.sin, layer.sin_step = (
            cos.data_ptr(),
            cos.stride(0),
            sin.data_ptr(),
            sin.stride(0),
        )


class _RunWhole(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        trigger: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        whole: Whole,
        native: Native,
        blocks: Blocks,
        scale: float,
    ) -> Tensor:
        whole.tell(x.shape[0], cos, sin, blocks, scale)
        kept, *works = _room(native.layer_floats(whole.layer, back=False), x)
        output = torch.empty_like(x)
        native.layer(whole.layer, x, output, kept, *works)
        ctx.whole, ctx.native, ctx.blocks, ctx.scale = whole, native, blocks, scale
        ctx.save_for_backward(x, cos, sin, kept)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, cos, sin, kept = ctx.saved_tensors
        whole: Whole = ctx.whole
        whole.tell(x.shape[0], cos, sin, ctx.blocks, ctx.scale)
        for product in whole.products:
            product.make_gradients()
        _, *works = _room([0, *ctx.native.layer_floats(whole.layer, back=True)[1:]], x)
        d_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        ctx.native.layer_back(whole.layer, x, gradient.contiguous(), d_x, kept, *works)
        return d_x, *(None,) * 7


def _room(floats: Sequence[int], x: Tensor) -> list[Tensor]:
    """Return memory for what a layer keeps, works in, and its attention works in."""
    kept, works = (x.new_empty(n) for n in floats[:2])
    with one_by_one():
        return [kept, works, x.new_empty(floats[2])]


def run_whole(
    x: Tensor, turn: tuple[Tensor, Tensor], whole: Whole, native: Native, blocks: Blocks, rule: Rule
) -> Tensor:
    """Run a layer that `fits` on a pack, [T, D]; `turn` is cos and sin [T, r] of the rotary positions."""
    cos, sin = turn
    return _RunWhole.apply(x.contiguous(), whole.trigger, cos, sin, whole, native, blocks, rule.scale)  # type: ignore[no-any-return, no-untyped-call]
