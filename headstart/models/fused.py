"""The parts of a transformer layer as functions with gradients of their own: few passes over memory, little kept for later.

T tokens, D model width, N outputs, F feed-forward width, H query heads, K key-value heads, d head width. What a backward
pass can make anew cheaply (norms, activations, attention weights) is not kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

from headstart.models.attend import Rule, attend_backward, attend_forward
from headstart.models.blocks import Cut
from headstart.models.dropout import draw_kept, share
from headstart.models.linear import Product, add_gradient
from headstart.models.native import suits

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@dataclass(frozen=True)
class Norm:
    """An RMS norm: x / rms(x) * (offset + weight) (Zhang and Sennrich, 2019; Gemma's has an offset of 1)."""

    weight: nn.Parameter
    eps: float
    offset: float = 0.0

    def scale(self) -> Tensor:
        """Return what a normed row is multiplied by, [D]."""
        weight = self.weight.detach()
        return weight if self.offset == 0.0 else weight + self.offset

    def apply(self, x: Tensor, inverse: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the normed rows of x [T, D], and 1 / rms(x), [T, 1], which may be known."""
        scale = self.scale()
        if scale.shape == x.shape[1:] and (native := suits(x, scale)):
            return native.norm(x, scale, self.eps, inverse)
        if inverse is None:
            norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            inverse = norm.square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()
        return torch.mul(x, inverse).mul_(scale), inverse

    def backward(self, x: Tensor, inverse: Tensor, gradient: Tensor, add: Tensor | None = None) -> Tensor:
        """Return the gradient of x, plus `add`; `gradient`, that of the normed rows, is used up.

        With y = x r w and r = (mean(x^2) + eps)^-1/2: dx = r (w dy) - x r^3 mean(x w dy).
        """
        if self.weight.requires_grad:
            add_gradient(self.weight, (gradient * x).mul_(inverse).sum(0))
        scale = self.scale()
        if native := suits(x, gradient, *([] if add is None else [add])):
            native.norm_back(x, scale, inverse, gradient, add)
            return gradient
        gradient.mul_(scale)
        mean = torch.linalg.vecdot(gradient, x)[:, None].div_(x.shape[-1])
        gradient.mul_(inverse).addcmul_(x, mean.mul_(inverse.pow(3)), value=-1)
        return gradient if add is None else gradient.add_(add)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, trigger: Tensor, norm: Norm) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        normed, inverse = norm.apply(flat)
        ctx.norm = norm
        ctx.save_for_backward(flat, inverse)
        return normed.view(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        flat, inverse = ctx.saved_tensors
        own = gradient.reshape(flat.shape).clone()
        return ctx.norm.backward(flat, inverse, own).view(gradient.shape), None, None


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """Return x [..., D], normed."""
    return _RmsNorm.apply(x, norm.weight, norm)  # type: ignore[no-any-return, no-untyped-call]


def _back(
    product: Product, gradient: Tensor, inputs: Tensor | None, narrow: Tensor | None, passes: bool
) -> Tensor | None:
    """Carry a gradient back through linear layers: to what trains, given their inputs, and, where it `passes`, to these."""
    d_inputs, back = product.backward(gradient) if passes else (None, None)
    if inputs is not None:
        product.accumulate(gradient, inputs, narrow, back)
    return d_inputs


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, trigger: Tensor | None, norm: Norm | None, product: Product) -> Tensor:
        normed, inverse = norm.apply(x) if norm else (x, None)
        output, narrow = product.apply(normed)
        ctx.norm, ctx.product = norm, product
        ctx.save_for_backward(x, inverse, narrow)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse, narrow = ctx.saved_tensors
        norm, product = ctx.norm, ctx.product
        passes = ctx.needs_input_grad[0] or bool(norm and norm.weight.requires_grad)
        inputs = None
        if ctx.needs_input_grad[1]:
            inputs = x if norm is None else norm.apply(x, inverse)[0]
        d_x = _back(product, gradient, inputs, narrow, passes)
        return d_x if norm is None or d_x is None else norm.backward(x, inverse, d_x), None, None, None


def project(x: Tensor, norm: Norm | None, product: Product) -> Tensor:
    """Norm x [T, D] where there is a norm, and put it through linear layers: [T, N]."""
    return _Project.apply(x, _trigger(product, norm.weight if norm else None), norm, product)  # type: ignore[no-any-return, no-untyped-call]


def _trigger(product: Product, *others: Tensor | None) -> Tensor | None:
    """Return a parameter that trains in one of these, so that autograd asks for its gradient."""
    found = product.trigger
    return found if found is not None else next((p for p in others if p is not None and p.requires_grad), None)


class _AddProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, x: Tensor, trigger: Tensor | None, product: Product, scale: float
    ) -> Tensor:
        output, narrow = product.add_to(residual, x, scale)
        ctx.product, ctx.scale = product, scale
        ctx.save_for_backward(x, narrow)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, narrow = ctx.saved_tensors
        scaled = gradient if ctx.scale == 1.0 else gradient * ctx.scale
        inputs = x if ctx.needs_input_grad[2] else None
        d_x = _back(ctx.product, scaled, inputs, narrow, ctx.needs_input_grad[1])
        return gradient, d_x, None, None, None


def add_product(residual: Tensor, x: Tensor, product: Product, scale: float = 1.0) -> Tensor:
    """Return `residual` [T, N] plus `scale` times what linear layers give for x [T, D]."""
    return _AddProduct.apply(residual, x, product.trigger, product, scale)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True)
class LayerNorm:
    """(x - mean(x)) / std(x) * weight + bias (Ba et al., 2016); some have no bias."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    eps: float

    def apply(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the normed rows of x [T, D], and their means and inverse deviations [T, 1]."""
        return torch.native_layer_norm(x, [x.shape[-1]], self.weight, self.bias, self.eps)

    def backward(self, gradient: Tensor, x: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
        """Return the gradient of x, given that of the normed rows, and add up those of weight and bias."""
        bias = self.bias
        wanted = [True, self.weight.requires_grad, bias is not None and bias.requires_grad]
        d_x, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
            gradient, x, [x.shape[-1]], mean, inverse, self.weight, bias, wanted
        )
        if wanted[1]:
            add_gradient(self.weight, d_weight)
        if bias is not None and wanted[2]:
            add_gradient(bias, d_bias)
        return d_x  # type: ignore[no-any-return]


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, x: Tensor, trigger: Tensor | None, product: Product, norm: LayerNorm, drop: float
    ) -> Tensor:
        branch, narrow = product.apply(x)
        kept = draw_kept(tuple(branch.shape), drop, branch.device) if drop else None
        if kept is not None:
            branch.mul_(kept)
        sums = torch.add(residual, branch, alpha=share(drop), out=branch)
        normed, mean, inverse = norm.apply(sums)
        ctx.product, ctx.norm, ctx.share = product, norm, share(drop)
        ctx.save_for_backward(x, narrow, kept, sums, mean, inverse)
        return normed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, narrow, kept, sums, mean, inverse = ctx.saved_tensors
        d_sums = ctx.norm.backward(gradient.contiguous(), sums, mean, inverse)
        d_branch = d_sums if kept is None else (d_sums * kept).mul_(ctx.share)
        inputs = x if ctx.needs_input_grad[2] else None
        d_x = _back(ctx.product, d_branch, inputs, narrow, ctx.needs_input_grad[1])
        return d_sums, d_x, None, None, None, None


def add_norm(residual: Tensor, x: Tensor, product: Product, norm: LayerNorm, drop: float) -> Tensor:
    """Put x [T, F] through linear layers, drop out, add `residual` [T, D] and norm: [T, D]."""
    trigger = _trigger(product, norm.weight, norm.bias)
    return _AddNorm.apply(residual, x, trigger, product, norm, drop)  # type: ignore[no-any-return, no-untyped-call]


class _Activated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, trigger: Tensor | None, product: Product, name: str) -> Tensor:
        wide, narrow = product.apply(x)
        ctx.product, ctx.name = product, name
        ctx.save_for_backward(x, narrow, wide)
        return activate(wide, name)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, narrow, wide = ctx.saved_tensors
        d_wide = _activation_gradient(gradient, wide, ctx.name)
        inputs = x if ctx.needs_input_grad[1] else None
        return _back(ctx.product, d_wide, inputs, narrow, ctx.needs_input_grad[0]), None, None, None


def activated(x: Tensor, product: Product, name: str) -> Tensor:
    """Put x [T, D] through linear layers and an activation: [T, F]."""
    return _Activated.apply(x, product.trigger, product, name)  # type: ignore[no-any-return, no-untyped-call]


def activate(gate: Tensor, name: str) -> Tensor:
    """Return the activation of a tensor."""
    if name == "silu":
        return F.silu(gate)
    if name == "relu":
        return F.relu(gate)
    return F.gelu(gate, approximate="tanh" if name == "gelu_tanh" else "none")


def _activation_gradient(gradient: Tensor, gate: Tensor, name: str) -> Tensor:
    if name == "silu":
        return torch.ops.aten.silu_backward(gradient, gate)  # type: ignore[no-any-return]
    if name == "relu":
        return gradient * (gate > 0)
    kind = "tanh" if name == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(gradient, gate, approximate=kind)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class GatedMlp:
    """down(act(gate(x)) * up(x)) (Shazeer, 2020): `wide` gives [gate | up], [T, 2F]; `gate_first` or up first."""

    wide: Product
    down: Product
    activation: str
    norm: Norm | None = None
    scale: float = 1.0


def _gate(wide: Tensor, activation: str) -> Tensor:
    """[gate | up] [T, 2F] -> act(gate) * up, [T, F]."""
    gate, up = wide.chunk(2, -1)
    if activation == "silu" and (native := suits(wide)):
        return native.gate(gate, up)
    return activate(gate, activation).mul_(up)


def _gate_back(wide: Tensor, gradient: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return the gradient of [gate | up], given that of what `_gate` gave, which is used up; and what `_gate` gave, anew."""
    d_wide = torch.empty_like(wide)
    (gate, up), (d_gate, d_up) = wide.chunk(2, -1), d_wide.chunk(2, -1)
    if activation == "silu" and (native := suits(wide, gradient)):
        native.gate_back(gate, up, gradient, d_gate, d_up)
        return d_wide, gradient
    active = activate(gate, activation)
    torch.mul(gradient, active, out=d_up)
    d_gate.copy_(_activation_gradient(gradient.mul_(up), gate, activation))
    return d_wide, active.mul_(up)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, t1: Tensor | None, t2: Tensor | None, t3: Tensor | None, mlp: GatedMlp, residual: bool
    ) -> Tensor:
        normed, inverse = mlp.norm.apply(x) if mlp.norm else (x, None)
        wide, narrow = mlp.wide.apply(normed)
        del normed
        hot = _gate(wide, mlp.activation)
        output, down_narrow = mlp.down.add_to(x, hot, mlp.scale) if residual else mlp.down.apply(hot)
        ctx.mlp, ctx.residual = mlp, residual
        ctx.save_for_backward(x, inverse, wide, narrow, down_narrow)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse, wide, narrow, down_narrow = ctx.saved_tensors
        mlp: GatedMlp = ctx.mlp
        scaled = gradient if mlp.scale == 1.0 else gradient * mlp.scale
        d_hot, back = mlp.down.backward(scaled)
        d_wide, hot = _gate_back(wide, d_hot, mlp.activation)
        if ctx.needs_input_grad[2]:
            mlp.down.accumulate(scaled, hot, down_narrow, back)
        del hot, d_hot
        inputs = None
        if ctx.needs_input_grad[1]:
            inputs = x if mlp.norm is None else mlp.norm.apply(x, inverse)[0]
        d_x, back = mlp.wide.backward(d_wide)
        if inputs is not None:
            mlp.wide.accumulate(d_wide, inputs, narrow, back)
        through = gradient if ctx.residual else None
        if mlp.norm is not None:
            d_x = mlp.norm.backward(x, inverse, d_x, through)
        elif through is not None:
            d_x.add_(through)
        return d_x, None, None, None, None, None


def gated_mlp(x: Tensor, mlp: GatedMlp, *, residual: bool) -> Tensor:
    """Put x [T, D] through norm and feed-forward; with `residual` x is added to what comes out."""
    norm = mlp.norm.weight if mlp.norm and mlp.norm.weight.requires_grad else None
    triggers = (mlp.wide.trigger, mlp.down.trigger, norm)
    return _Mlp.apply(x, *triggers, mlp, residual)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True)
class Heads:
    """How the columns of [T, N] are heads: H of queries, then K of keys, then K of values, each d wide."""

    queries: int
    groups: int
    width: int

    def split(self, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, N] -> [T, H, d], [T, K, d], [T, K, d], as views."""
        heads = columns.view(len(columns), -1, self.width)
        q, k, v = torch.split(heads, [self.queries, self.groups, self.groups], 1)
        return q, k, v

    def turned(self, columns: Tensor) -> Tensor:
        """[T, N] -> [T, H + K, d]: queries and keys, which rotary positions turn, as a view."""
        return columns.view(len(columns), -1, self.width)[:, : self.queries + self.groups]


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn heads [T, n, d] by their positions, in place (Su et al., 2021): the first r with the next r, as Llama does. cos, sin [T, r]."""
    if 2 * cos.shape[-1] <= heads.shape[-1] and (native := suits(heads, cos, sin)):
        native.turn(heads, cos, sin)
        return
    half = cos.shape[-1]
    first, second = heads[..., :half], heads[..., half : 2 * half]
    cos, sin = cos[:, None], sin[:, None]
    kept = first.clone()
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(kept, sin)


class _AttendColumns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        columns: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        chosen: Tensor | None,
        heads: Heads,
        blocks: Cut,
        rule: Rule,
    ) -> Tensor:
        q, k, v = heads.split(columns)
        if cos is not None and sin is not None:
            # In place: the product that made these columns keeps none of them.
            rotate_(heads.turned(columns), cos, sin)
        q = q if chosen is None else q[chosen]
        output = q.new_empty(q.shape)
        kept = attend_forward(q, k, v, blocks, rule, output)
        ctx.heads, ctx.blocks, ctx.rule = heads, blocks, rule
        ctx.save_for_backward(columns, cos, sin, chosen, kept)
        return output.view(len(q), -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        columns, cos, sin, chosen, kept = ctx.saved_tensors
        heads: Heads = ctx.heads
        d_columns = torch.empty_like(columns)
        q, k, v = heads.split(columns)
        d_q, d_k, d_v = heads.split(d_columns)
        wanted = gradient.view(-1, heads.queries, heads.width)
        if chosen is None:
            attend_backward(q, k, v, ctx.blocks, ctx.rule, kept, wanted, (d_q, d_k, d_v))
        else:
            d_chosen = torch.empty(wanted.shape, dtype=q.dtype)
            attend_backward(q[chosen], k, v, ctx.blocks, ctx.rule, kept, wanted, (d_chosen, d_k, d_v))
            d_q.zero_()[chosen] = d_chosen
        if cos is not None:
            rotate_(heads.turned(d_columns), cos, -sin)
        return d_columns, None, None, None, None, None, None


def attend_columns(
    columns: Tensor,
    turn: tuple[Tensor, Tensor] | None,
    heads: Heads,
    blocks: Cut,
    rule: Rule,
    chosen: Tensor | None = None,
) -> Tensor:
    """Attend within blocks: [T, N] -> [T, H d]; `columns` are used up.

    `turn` is cos and sin [T, r] of the rotary positions. With `chosen` [P] only these tokens ask, and the result is
    [P, H d]; `blocks` are then of their places in it.
    """
    cos, sin = turn or (None, None)
    return _AttendColumns.apply(columns, cos, sin, chosen, heads, blocks, rule)  # type: ignore[no-any-return, no-untyped-call]
