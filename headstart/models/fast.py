"""`speed_up` takes a model and gives a model: layers that are known by their structure run as fused functions.

What a layer is made of is read from its parts (linear layers, RMS norms, an activation), how it puts them together is
tried: its output must equal the plain layer's on a small forest, else it stays as it is. So an architecture that was never
seen gains too, where its layers have a form that is known. Only packs go the fast way; any other call runs the plain code.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from headstart.models.attention import PROBE_FOREST, Asked, Forest, run_decoder
from headstart.models.dropout import dropout
from headstart.models.embedding import LOOKED_UP, embed
from headstart.models.fused import project, rms_norm
from headstart.models.layers import FusedLayer, GatedLayer, PostNormLayer, is_off
from headstart.models.linear import Product, read_linear
from headstart.models.native import find
from headstart.models.structure import alike, place_dropouts, read_gated, read_norm, read_post_norm
from headstart.models.whole import Spare, Whole

PROBE_CHOSEN = [2, 6, 7, 11, 14]


@dataclass(frozen=True)
class Sped:
    """What `speed_up` found: how many layers run fused, of how many; norms and linear layers outside of these; kernels in C."""

    layers: int = 0
    of: int = 0
    norms: int = 0
    linears: int = 0
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.layers} of {self.of} layers fused" + ", kernels compiled" * self.compiled


def speed_up(model: Any) -> Sped:
    """Let a model that reads packs compute its known layers fused, and add up gradients in place, from now on.

    What it computes stays the same, up to float rounding.
    """
    calls = _watch_layers(model)
    fast = {layer: found for layer, call in calls.items() if (found := _fit(layer, *call)) is not None}
    last = list(calls)[-1] if calls else None
    for layer, found in fast.items():
        layer.forward = found
    if last in fast and last is not None:
        last.forward = replace(fast[last], last=True)
        if not _chooses_rightly(model):
            last.forward = fast[last]
    inside = {id(module) for layer in fast for module in layer.modules()}
    outside = [module for module in model.modules() if id(module) not in inside]
    norms = sum(_speed_up_norm(module) for module in outside)
    linears = sum(_speed_up_linear(module) for module in outside if module is not model.get_output_embeddings())
    _speed_up_embedding(model)
    for module in outside:
        _speed_up_dropout(module)
    if fast and model.device.type == "cpu":
        _leave_file(model)
        spare = Spare()
        for whole in _wholes(model):
            whole.forget()  # weights that lie elsewhere since
            whole.spare = spare
    compiled = model.device.type == "cpu" and find() is not None
    return Sped(len(fast), len(calls), norms, linears, compiled)


def _leave_file(model: Any) -> None:
    """Copy what isn't laid into the matrix of a product: as long as one weight is read from a file, all of it stays in memory.

    What shares memory in any other way than as a whole stays where it is.
    """
    sharing: dict[int, list[Tensor]] = {}
    for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
        sharing.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    for tensors in sharing.values():
        first = tensors[0]
        alike = all((t.dtype, t.shape, t.stride()) == (first.dtype, first.shape, first.stride()) for t in tensors)
        if alike and 0 < first.nbytes == first.untyped_storage().nbytes():
            copy = first.detach().clone()
            for tensor in tensors:
                tensor.data = copy


def slow_down(model: Any) -> None:
    """Take out what `speed_up` put in."""
    for module in model.modules():
        vars(module).pop("forward", None)
    for parameter in model.parameters():
        vars(parameter).pop(LOOKED_UP, None)


def let_go(model: Any) -> None:
    """Have layers give back the memory that they keep for the next pack, for what is about to fill much of its own."""
    for whole in _wholes(model):
        whole.spare.let_go()


def _wholes(model: Any) -> Iterator[Whole]:
    """Yield the layers that may run as a whole."""
    for module in model.modules():
        found = vars(module).get("forward")
        if isinstance(found, GatedLayer) and found.whole is not None:
            yield found.whole


# What a layer is called with, what it gives, and whether that is all that it gives.
Call = tuple[tuple[Any, ...], dict[str, Any], Tensor, bool]


def _probe(model: Any, chosen: Tensor | None = None) -> tuple[Tensor, Forest]:
    device = model.device
    ids = torch.tensor([(7 * i + 3) % model.config.get_text_config().vocab_size for i in range(16)], device=device)
    lengths, parents, depths = PROBE_FOREST
    positions = torch.tensor(depths, device=device)
    forest = Forest(lengths, parents, positions, chosen)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return run_decoder(model, ids, positions, forest), forest
    finally:
        model.train(training)


def _watch_layers(model: Any) -> dict[nn.Module, tuple[Call, Forest]]:
    """Return what each layer is called with and what it gives, on a small forest."""
    calls: dict[nn.Module, Call] = {}
    layers = [module for modules in _stacks(model) for module in modules]

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        several = isinstance(output, tuple)
        calls[layer] = (args, kwargs, output[0] if several else output, not several)

    handles = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    try:
        _, forest = _probe(model)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: (calls[layer], forest) for layer in layers if layer in calls}


def _stacks(model: Any) -> Iterator[nn.ModuleList]:
    """Yield the lists of layers of a model: lists of modules of one class that hold an attention."""
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) and all(any(True for _ in m.children()) for m in module):
            yield module


def _fit(layer: nn.Module, call: Call, forest: Forest) -> FusedLayer | None:
    """Return the form of a layer that gives what the layer gave; None where none does."""
    args, kwargs, theirs, alone = call
    asked = next((forest.asked[id(m)] for m in layer.modules() if id(m) in forest.asked), None)
    if asked is None or not alone:
        return None
    x = args[0] if args else kwargs["hidden_states"]

    def run(tried: FusedLayer) -> Tensor:
        return tried.run(x[0], forest, kwargs.get("position_embeddings"))

    with torch.no_grad():
        found = next((tried for tried in _forms(layer, asked) if alike(run(tried), theirs[0])), None)
        if isinstance(found, PostNormLayer):
            return place_dropouts(layer, found, lambda: layer(*args, **kwargs)[0], run)
    return found


def _forms(layer: nn.Module, asked: Asked) -> Iterator[FusedLayer]:
    """Yield what a layer may be."""
    gated = read_gated(layer)
    if gated is not None:
        for turns, scale in itertools.product((True, False), {gated.scale, 1.0}):
            yield replace(gated, turns=turns, asked=asked, scale=scale)
    for found in read_post_norm(layer, asked.width):
        yield replace(found, asked=asked)


def _chooses_rightly(model: Any) -> bool:
    """Tell whether a last layer that computes chosen tokens alone gives their states."""
    chosen = torch.tensor(PROBE_CHOSEN, device=model.device)
    try:
        return alike(_probe(model, chosen)[0], _probe(model)[0][chosen])
    except (ValueError, RuntimeError):
        return False


def _speed_up_norm(module: nn.Module) -> bool:
    norm = read_norm(module)
    if norm is not None:
        module.forward = lambda x: rms_norm(x, norm)
    return norm is not None


def _speed_up_linear(module: Any) -> bool:
    part = read_linear(module)
    if part is None or not any(p.requires_grad for p in (part.weight, part.bias, part.a, part.b) if p is not None):
        return False
    product, plain = Product([part]), module.forward
    adapted = part.a is not None

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if adapted and is_off(module):
            return plain(x, *args, **kwargs)  # type: ignore[no-any-return]
        return project(x.reshape(-1, x.shape[-1]), None, product).view(*x.shape[:-1], -1)

    module.forward = forward
    return True


def _speed_up_dropout(module: Any) -> None:
    if type(module) is nn.Dropout:
        vars(module)["forward"] = lambda x: dropout(x, module)


def _speed_up_embedding(model: Any) -> None:
    """Have an embedding that trains add up its gradients in place; Gemma's, which scales, keeps its scale."""
    module = model.get_input_embeddings()
    plain = type(module) is nn.Embedding and module.max_norm is None and not module.scale_grad_by_freq
    if plain and module.weight.requires_grad:
        module.forward = lambda ids: embed(ids, module.weight)
        if sum(p is module.weight for other in model.modules() for p in other.parameters(recurse=False)) == 1:
            setattr(module.weight, LOOKED_UP, None)
