"""Linear layers that read the same input, as one product: adapters folded in, gradients added up in place.

Where an adapter adds `s B A x` to `W x`, the one matrix `W + s B A` gives the same, and its gradients follow from the same
products: `dB = s dy^T (A x)`, `dA = s (dy B)^T x` (Hu et al., 2021, eq. 3). It is made once for each update of the adapter,
so no side branch is run. Without an adapter, layers that train become views of one matrix, and so do their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ADAPTER = "default"


@dataclass(frozen=True)
class Part:
    """A linear layer: `weight` [N, D], `bias` [N] or None, and of its adapter `a` [R, D], `b` [N, R] and their scale."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0


def read_linear(module: Any) -> Part | None:
    """Return a linear layer or one of PEFT's around it, as plain numbers; None where it computes anything else.

    Plain LoRA and rsLoRA without dropout are known. What is neither (DoRA, dropout, several adapters) keeps its own code.
    """
    if type(module) is nn.Linear:
        return Part(module.weight, module.bias)
    base = getattr(module, "base_layer", None)
    if type(base) is not nn.Linear or list(getattr(module, "lora_A", ())) != [ADAPTER]:
        return None
    a, b = module.lora_A[ADAPTER], module.lora_B[ADAPTER]
    plain = (
        type(module.lora_dropout[ADAPTER]) is nn.Identity
        and not module.lora_variant
        and not module.merged_adapters
        and not module.disable_adapters
        and list(module.active_adapters) == [ADAPTER]
        and a.bias is None
        and b.bias is None
        and a.weight.dtype == base.weight.dtype
    )
    if not plain:
        return None
    return Part(base.weight, base.bias, a.weight, b.weight, float(module.scaling[ADAPTER]))


class Product:
    """Linear layers [N1, D], [N2, D], ... as one [N, D], and what trains of them.

    It has a life: the matrix with the adapters in it is made anew once they, or the weights, have changed.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = list(parts)
        self.rows = [len(part.weight) for part in parts]
        self._adapted = [part for part in parts if part.a is not None]
        self._key: tuple[Any, ...] = ()
        self._weight: Tensor = parts[0].weight
        self._merged: Tensor | None = None
        self._bias: Tensor | None = None
        self._stacked: Tensor | None = None
        self._gradients: dict[str, Tensor] = {}

    @property
    def trigger(self) -> Tensor | None:
        """A parameter that trains, for autograd to know that a gradient is wanted; None where nothing trains."""
        return next((p for p in self._parameters() if p.requires_grad), None)

    def _parameters(self) -> list[Tensor]:
        found = [p for part in self.parts for p in (part.weight, part.bias, part.a, part.b)]
        return [p for p in found if p is not None]

    def refresh(self) -> tuple[Tensor, Tensor | None]:
        """Return the matrix [N, D] and the bias [N] as the layers and their adapters are now."""
        key = tuple((p.data_ptr(), p._version) for p in self._parameters())
        if key != self._key:
            with torch.no_grad():
                self._merge()
            self._key = tuple((p.data_ptr(), p._version) for p in self._parameters())
        return self._weight, self._bias

    def _merge(self) -> None:
        weights = [part.weight for part in self.parts]
        if self._adapted:
            if self._merged is None:
                self._merged = weights[0].new_empty(sum(self.rows), weights[0].shape[1])
            self._weight = self._merged
            for part, place in zip(self.parts, torch.split(self._weight, self.rows), strict=True):
                if part.a is None or part.b is None:
                    place.copy_(part.weight)
                else:
                    torch.addmm(part.weight, part.b, part.a, alpha=part.scale, out=place)
            self._stacked = torch.cat([part.a for part in self._adapted if part.a is not None])
        else:
            self._weight = weights[0].detach() if len(weights) == 1 else _as_views(weights)
        biases = [part.bias for part in self.parts]
        known = [b for b in biases if b is not None]
        self._bias = None
        if known:
            filled = [weights[0].new_zeros(n) if b is None else b for b, n in zip(biases, self.rows, strict=True)]
            self._bias = torch.cat([b.detach() for b in filled])

    def apply(self, inputs: Tensor) -> Tensor:
        """Return inputs [T, D] times the matrix, with the bias: [T, N], without gradients."""
        weight, bias = self.refresh()
        return torch.mm(inputs, weight.t()) if bias is None else torch.addmm(bias, inputs, weight.t())

    def add_to(self, sums: Tensor, inputs: Tensor, scale: float = 1.0) -> Tensor:
        """Return `sums` [T, N] plus `scale` times what the layers give for inputs [T, D]."""
        weight, bias = self.refresh()
        output = torch.addmm(sums, inputs, weight.t(), alpha=scale)
        return output if bias is None else output.add_(bias, alpha=scale)

    def backward(self, gradient: Tensor) -> Tensor:
        """Return the gradient of the inputs [T, D], given that of the outputs [T, N]."""
        return torch.mm(gradient, self._weight)

    def accumulate(self, gradient: Tensor, inputs: Tensor) -> None:
        """Add to the gradients of what trains, given the outputs' gradient [T, N] and the inputs [T, D]."""
        self._accumulate_bias(gradient)
        if self._adapted:
            self._accumulate_adapters(gradient, inputs)
        self._add("weight", [part.weight for part in self.parts], self.rows, gradient.t(), inputs)

    def _accumulate_bias(self, gradient: Tensor) -> None:
        for part, piece in zip(self.parts, torch.split(gradient, self.rows, 1), strict=True):
            if part.bias is not None and part.bias.requires_grad:
                add_gradient(part.bias, piece.sum(0))

    def _accumulate_adapters(self, gradient: Tensor, inputs: Tensor) -> None:
        stacked = self._stacked
        if stacked is None:
            raise RuntimeError("a product went backward before it went forward")
        narrow = torch.mm(inputs, stacked.t())
        ranks = [len(part.a) for part in self._adapted if part.a is not None]
        back = gradient.new_empty(len(gradient), sum(ranks))
        pieces = dict(zip(map(id, self.parts), torch.split(gradient, self.rows, 1), strict=True))
        columns = zip(self._adapted, torch.split(narrow, ranks, 1), torch.split(back, ranks, 1), strict=True)
        for part, known, place in columns:
            if part.b is None:
                continue
            piece = pieces[id(part)]
            if part.b.requires_grad:
                add_product(part.b, piece.t(), known, part.scale)
            torch.mm(piece, part.b, out=place).mul_(part.scale)
        self._add("a", [part.a for part in self._adapted if part.a is not None], ranks, back.t(), inputs)

    def _add(self, name: str, parameters: Sequence[Tensor], rows: Sequence[int], a: Tensor, b: Tensor) -> None:
        """Add `a b` to the gradients of those of parameters that train; where all do, as one product.

        The parameters lie one below the other, each with some `rows`.
        """
        if len(parameters) == 1 or not all(p.requires_grad for p in parameters):
            for parameter, piece in zip(parameters, torch.split(a, list(rows)), strict=True):
                if parameter.requires_grad:
                    add_product(parameter, piece, b)
            return
        kept = self._gradients.get(name)
        if kept is None:
            kept = self._gradients[name] = b.new_empty(sum(rows), b.shape[1])
        places = torch.split(kept, list(rows))
        if all(p.grad is None for p in parameters):
            torch.mm(a, b, out=kept)
            for parameter, place in zip(parameters, places, strict=True):
                parameter.grad = place
        elif all(
            p.grad is not None and p.grad.data_ptr() == place.data_ptr()
            for p, place in zip(parameters, places, strict=True)
        ):
            kept.addmm_(a, b)
        else:
            for parameter, piece in zip(parameters, torch.split(a, list(rows)), strict=True):
                add_product(parameter, piece, b)


def _as_views(weights: Sequence[Tensor]) -> Tensor:
    """Lay weights one below the other in one tensor, of which they become views; return it."""
    joined = torch.cat([weight.detach() for weight in weights])
    for weight, place in zip(weights, torch.split(joined, [len(weight) for weight in weights]), strict=True):
        weight.data = place
    return joined


def add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Add to a parameter's gradient in place."""
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)


def add_product(parameter: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """Add `scale a b` to a parameter's gradient, without a tensor of its size beside it."""
    if parameter.grad is None:
        parameter.grad = torch.mm(a, b)
        if scale != 1.0:
            parameter.grad.mul_(scale)
    else:
        parameter.grad.addmm_(a, b, alpha=scale)
