"""Linear layers that read the same input, as one product: adapters beside the weights, gradients added up in place.

An adapter adds `s B (A x)` to `W x`. What it makes of the input, `A x` [T, R], is kept, since its gradients are made of it:
`dB = s dy^T (A x)`, `dA = (s dy B)^T x` (Hu et al., 2021, eq. 3); the input's gradient is `dy W + (s dy B) A`. Everything is added
into what the large products wrote, so neither a second copy of the weights nor a second tensor of the outputs' size is
made. Layers that read the same input become views of one matrix, and so do the gradients of weights that train.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headstart.models.native import Adapters, Linear, Native, product, suits

ADAPTER = "default"
NARROW = 64  # columns at most


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

    It has a life: what it is made of is taken over anew once layers or adapters have changed.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = list(parts)
        self.rows = [len(part.weight) for part in parts]
        self._ranks = [0 if part.a is None else len(part.a) for part in parts]
        self._key: tuple[Any, ...] = ()
        self._weight: Tensor = parts[0].weight
        self._bias: Tensor | None = None
        self._adapters: Adapters | None = None
        self._stacked: tuple[Any, Tensor] | None = None
        self._gradients: dict[str, Tensor] = {}

    @property
    def trigger(self) -> Tensor | None:
        """A parameter that trains, for autograd to know that a gradient is wanted; None where nothing trains."""
        return next((p for p in self._parameters() if p.requires_grad), None)

    @property
    def key(self) -> tuple[Any, ...]:
        """What differs once what kernels are told has changed, after `refresh`: sizes suit a number of threads."""
        train = [p.requires_grad for part in self.parts for p in (part.weight, part.bias) if p is not None]
        return *self._key, *train, torch.get_num_threads()

    def tell(self, native: Native) -> Linear | None:
        """Return what kernels are told of the layers; None where they don't compute them, or more trains than adapters."""
        n, k = self._weight.shape
        trained = any(p is not None and p.requires_grad for part in self.parts for p in (part.weight, part.bias))
        known = (
            suits(self._weight) and self._weight.is_contiguous() and native.suits_size(k, n) and native.suits_size(n, k)
        )
        if trained or not known or (any(self._ranks) and self._adapters is None):
            return None
        return Linear(self._weight, self._bias, self._adapters)

    def _parameters(self) -> list[Tensor]:
        found = [p for part in self.parts for p in (part.weight, part.bias, part.a, part.b)]
        return [p for p in found if p is not None]

    def refresh(self) -> None:
        """Take over what changed in the layers and their adapters."""
        key = self._state()
        if key != self._key:
            with torch.no_grad():
                self._lay()
            self._key = self._state()

    def _state(self) -> tuple[Any, ...]:
        """Return what differs once what is laid has changed, or adapters lie elsewhere."""
        laid = [(p.data_ptr(), p._version) for part in self.parts for p in (part.weight, part.bias) if p is not None]
        return *laid, *(p.data_ptr() for part in self.parts for p in (part.a, part.b) if p is not None)

    def _lay(self) -> None:
        """Lay weights and biases one below the other, and say where adapters lie."""
        weights = [part.weight for part in self.parts]
        if len(weights) == 1:
            self._weight = weights[0].detach()
        elif not _are_views(weights, self._weight):
            self._weight = _as_views(weights)
        columns = [0, *itertools.accumulate(self.rows)]
        found = [
            (part.a, part.b, column, part.scale)
            for part, column in zip(self.parts, columns, strict=False)
            if part.a is not None and part.b is not None
        ]
        native = suits(*(t for a, b, *_ in found for t in (a, b))) if found else None
        self._adapters = native.read_adapters(found) if native else None
        biases = [part.bias for part in self.parts]
        known = [b for b in biases if b is not None]
        self._bias = None
        if known:
            filled = [weights[0].new_zeros(n) if b is None else b for b, n in zip(biases, self.rows, strict=True)]
            self._bias = torch.cat([b.detach() for b in filled])

    def apply(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what the layers give for inputs [T, D], [T, N], and what adapters make of these, [T, R], for `backward`."""
        self.refresh()
        output = product(inputs, self._weight.t(), self._bias)
        return output, self._add_adapters(output, inputs, 1.0)

    def add_to(self, sums: Tensor, inputs: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor | None]:
        """Return `sums` [T, N] plus `scale` times what the layers give for inputs [T, D], and as `apply` what `backward` needs."""
        self.refresh()
        weight = self._weight.t()
        output = product(inputs, weight, sums) if scale == 1.0 else torch.addmm(sums, inputs, weight, alpha=scale)
        if self._bias is not None:
            output.add_(self._bias, alpha=scale)
        return output, self._add_adapters(output, inputs, scale)

    def _add_adapters(self, output: Tensor, inputs: Tensor, scale: float) -> Tensor | None:
        if not any(self._ranks):
            return None
        if self._adapters and (native := suits(inputs, output)):
            return native.adapt(self._adapters, inputs, output, scale)
        narrow = torch.mm(inputs, self._stack().t())
        for b, own, place, known in self._by_adapter(output, narrow):
            place.addmm_(known, b.detach().t(), alpha=scale * own)
        return narrow

    def _by_adapter(self, wide: Tensor, narrow: Tensor) -> Iterator[tuple[Tensor, float, Tensor, Tensor]]:
        """Yield each adapter's B and scale, its layer's columns of [T, N], and its own of [T, R]."""
        columns = torch.split_with_sizes(wide, self.rows, 1), torch.split_with_sizes(narrow, self._ranks, 1)
        for part, place, known in zip(self.parts, *columns, strict=True):
            if part.b is not None:
                yield part.b, part.scale, place, known

    def backward(self, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the gradient of the inputs [T, D], given that of the outputs [T, N], and this behind each B, [T, R]."""
        d_inputs = product(gradient, self._weight)
        return d_inputs, self._back(gradient, d_inputs)

    def _back(self, gradient: Tensor, d_inputs: Tensor | None = None) -> Tensor | None:
        """Return the outputs' gradient [T, N] behind each adapter's B, scaled: [T, R]; add what it is behind A to `d_inputs`."""
        if not any(self._ranks):
            return None
        if self._adapters and (native := suits(gradient, *([] if d_inputs is None else [d_inputs]))):
            return native.adapt_back(self._adapters, gradient, d_inputs)
        back = gradient.new_empty(len(gradient), sum(self._ranks))
        for b, scale, piece, place in self._by_adapter(gradient, back):
            torch.addmm(place, piece, b.detach(), beta=0.0, alpha=scale, out=place)
        if d_inputs is not None:
            d_inputs.addmm_(back, self._stack())
        return back

    def _stack(self) -> Tensor:
        """Return the A of adapters one below the other, [R, D]; laid anew once they have changed."""
        narrow = [part.a.detach() for part in self.parts if part.a is not None]
        state = [(a.data_ptr(), a._version) for a in narrow]
        if self._stacked is None or self._stacked[0] != state:
            self._stacked = state, torch.cat(narrow)
        return self._stacked[1]

    def accumulate(self, gradient: Tensor, inputs: Tensor, narrow: Tensor | None, back: Tensor | None = None) -> None:
        """Add to the gradients of what trains, given that of the outputs [T, N], the inputs, and what `apply` made of these.

        `back` is the gradient behind each B where `backward` gave it.
        """
        self._accumulate_bias(gradient)
        back = self._back(gradient) if back is None else back
        if narrow is not None and back is not None:
            self._accumulate_adapters(gradient, inputs, narrow, back)
        weights = [part.weight for part in self.parts]
        if any(weight.requires_grad for weight in weights):
            self._add("weight", weights, self.rows, gradient.t(), inputs)

    def _accumulate_adapters(self, gradient: Tensor, inputs: Tensor, narrow: Tensor, back: Tensor) -> None:
        if self._adapters and (native := suits(gradient, inputs, narrow, back)):
            native.adapt_sum(self._adapters, gradient, inputs, narrow, back)
        else:
            for b, scale, piece, known in self._by_adapter(gradient, narrow):
                if b.requires_grad:
                    add_product(b, piece.t(), known, scale)
            adapted = [part.a for part in self.parts if part.a is not None]
            self._add("a", adapted, [len(a) for a in adapted], back.t(), inputs)

    def _accumulate_bias(self, gradient: Tensor) -> None:
        if self._bias is None:
            return
        for part, piece in zip(self.parts, torch.split_with_sizes(gradient, self.rows, 1), strict=True):
            if part.bias is not None and part.bias.requires_grad:
                add_gradient(part.bias, piece.sum(0))

    def _add(self, name: str, parameters: Sequence[Tensor], rows: Sequence[int], a: Tensor, b: Tensor) -> None:
        """Add `a b` to the gradients of those of parameters that train; where all do, as one product.

        The parameters lie one below the other, each with some `rows`.
        """
        if len(parameters) == 1 or not all(p.requires_grad for p in parameters):
            for parameter, piece in zip(parameters, torch.split_with_sizes(a, list(rows)), strict=True):
                if parameter.requires_grad:
                    add_product(parameter, piece, b)
            return
        kept = self._gradients.get(name)
        if kept is None:
            kept = self._gradients[name] = b.new_empty(sum(rows), b.shape[1])
        places = torch.split_with_sizes(kept, list(rows))
        if all(p.grad is None for p in parameters):
            product(a, b, None, kept)
            for parameter, place in zip(parameters, places, strict=True):
                parameter.grad = place
        elif all(
            p.grad is not None and p.grad.data_ptr() == place.data_ptr()
            for p, place in zip(parameters, places, strict=True)
        ):
            product(a, b, kept, kept)
        else:
            for parameter, piece in zip(parameters, torch.split_with_sizes(a, list(rows)), strict=True):
                add_product(parameter, piece, b)


def _as_views(weights: Sequence[Tensor]) -> Tensor:
    """Lay weights one below the other in one tensor, of which they become views; return it."""
    joined = torch.cat([weight.detach() for weight in weights])
    for weight, place in zip(weights, torch.split(joined, [len(weight) for weight in weights]), strict=True):
        weight.data = place
    return joined


def _are_views(weights: Sequence[Tensor], joined: Tensor) -> bool:
    """Tell whether weights are views of a tensor, one below the other."""
    if len(joined) != sum(map(len, weights)):
        return False
    places = torch.split(joined, [len(weight) for weight in weights])
    return all(weight.data_ptr() == place.data_ptr() for weight, place in zip(weights, places, strict=True))


def add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Add to a parameter's gradient in place."""
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)


def add_product(parameter: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """Add `scale a b` to a parameter's gradient, without a tensor of its size beside it but where it is narrow."""
    if b.shape[1] <= NARROW < len(a) and a.dtype == torch.float32 and a.device.type == "cpu":
        turned = torch.mm(b.t(), a.t()).t()  # which a BLAS makes in half the time
        if parameter.grad is None:
            parameter.grad = torch.mul(turned, scale, out=torch.empty_like(parameter))
        else:
            parameter.grad.add_(turned, alpha=scale)
    elif parameter.grad is None:
        parameter.grad = product(a, b)
        if scale != 1.0:
            parameter.grad.mul_(scale)
    elif scale == 1.0:
        product(a, b, parameter.grad, parameter.grad)
    else:
        parameter.grad.addmm_(a, b, alpha=scale)
