"""What a layer is made of, read from its parts: linear layers, norms, an activation, dropout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from headstart.models.attention import apart
from headstart.models.fused import ACTIVATIONS, GatedMlp, Heads, LayerNorm, Norm, activate
from headstart.models.layers import GatedLayer, PostNormLayer
from headstart.models.linear import Part, Product, read_linear
from headstart.models.whole import Whole

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
DROPS = ("drop_weights", "drop", "mlp_drop")  # where a layer of BERT's form may drop out


def read_gated(layer: nn.Module) -> GatedLayer | None:
    """Return a layer of Llama's form as fused functions, as far as its parts tell; None where it has other parts."""
    attention = next((m for m in layer.children() if hasattr(m, "o_proj")), None)
    feed_forward = next((m for m in layer.children() if hasattr(m, "down_proj")), None)
    if attention is None or feed_forward is None or _drops_out(layer):
        return None
    columns = _read_parts(attention, ("q_proj", "k_proj", "v_proj"), ("qkv_proj",))
    out = _read_parts(attention, ("o_proj",))
    mlp = _read_mlp(feed_forward)
    width = getattr(attention, "head_dim", None)
    norms = _read_norms(layer)
    if not columns or not out or mlp is None or not width or norms is None:
        return None
    heads = _read_heads(columns, out, int(width))
    if heads is None:
        return None
    before, after, mlp_before, mlp_after = norms
    scale = float(getattr(layer, "residual_multiplier", 1.0))
    own = [read_norm(getattr(attention, name, None)) for name in ("q_norm", "k_norm")]
    if any(hasattr(attention, name) for name in ("q_norm", "k_norm")) and None in own:
        return None
    mlp = replace(mlp, norm=mlp_before, scale=scale if mlp_after is None else 1.0)
    products = Product(columns), Product(out)
    whole = None
    if before and mlp_before and not any((after, mlp_after, *own)) and scale == 1.0 and mlp.activation == "silu":
        whole = Whole(*products, mlp, before, mlp_before, heads)
    return GatedLayer(
        plain=layer.forward,
        adapters=tuple(m for m in layer.modules() if hasattr(m, "lora_A")),
        columns=products[0],
        out=products[1],
        heads=heads,
        mlp=mlp,
        before=before,
        after=after,
        mlp_after=mlp_after,
        query_norm=own[0],
        key_norm=own[1],
        scale=scale,
        dropout=float(getattr(attention, "attention_dropout", 0.0) or 0.0),
        training=lambda: layer.training,
        whole=whole,
    )


def _drops_out(layer: nn.Module) -> bool:
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in layer.modules())


def _read_parts(module: nn.Module, *spellings: tuple[str, ...]) -> list[Part] | None:
    for names in spellings:
        if all(hasattr(module, name) for name in names):
            parts = [read_linear(getattr(module, name)) for name in names]
            return [part for part in parts if part] if all(parts) else None
    return None


def _read_mlp(module: nn.Module) -> GatedMlp | None:
    wide = _read_parts(module, ("gate_proj", "up_proj"), ("gate_up_proj",))
    down = _read_parts(module, ("down_proj",))
    act = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
    name = _read_activation(act) if act is not None else None
    if not wide or not down or name is None:
        return None
    return GatedMlp(Product(wide), Product(down), name)


def _read_activation(function: Any) -> str | None:
    """Return which activation a function is: seen from what it gives."""
    x = torch.linspace(-12, 12, 97)  # as far as clipped ones differ from plain ones
    with torch.no_grad():
        given = function(x)
        return next((name for name in ACTIVATIONS if torch.allclose(activate(x, name), given, atol=1e-6)), None)


def _read_heads(columns: list[Part], out: list[Part], width: int) -> Heads | None:
    total = sum(len(part.weight) for part in columns)
    queries = out[0].weight.shape[1]
    groups = (total - queries) // 2
    if queries % width or groups % width or queries + 2 * groups != total or (queries // width) % (groups // width):
        return None
    return Heads(queries // width, groups // width, width)


def _read_norms(layer: nn.Module) -> tuple[Norm | None, Norm | None, Norm | None, Norm | None] | None:
    """Return the norms before and after the attention, and before and after the feed-forward, as their names say."""
    names = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    found = [name for name in names if hasattr(layer, name)]
    norms = {name: read_norm(getattr(layer, name)) for name in found}
    if None in norms.values():
        return None
    first, second, third, fourth = (norms.get(name) for name in names)
    if found == list(names[:2]):
        return first, None, second, None
    if found in (list(names), [names[1], names[3]]):
        return first, second, third, fourth
    return None


def read_norm(module: Any) -> Norm | None:
    """Return an RMS norm as plain numbers; None where a module is anything else. What it gives decides."""
    eps = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
    own = dict(module.named_parameters()) if isinstance(module, nn.Module) else {}
    if eps is None or list(own) != ["weight"] or own["weight"].ndim != 1 or isinstance(module, nn.LayerNorm):
        return None
    weight = own["weight"]
    x = torch.linspace(-2, 3, 2 * len(weight), dtype=weight.dtype, device=weight.device).view(2, -1)
    with torch.no_grad():
        given = module(x)
        for offset in (0.0, 1.0):
            norm = Norm(weight, float(eps), offset)
            if alike(norm.apply(x)[0], given):
                return norm
    return None


def alike(ours: Tensor, theirs: Tensor) -> bool:
    """Tell whether two tensors are the same up to rounding."""
    return ours.shape == theirs.shape and apart(ours, theirs) < TOLERANCE.get(theirs.dtype, 0.0)


# --- BERT's form ---


def read_post_norm(layer: nn.Module, width: int) -> Iterator[PostNormLayer]:
    """Yield what a layer of six linear layers and two norms may be, of heads `width` wide."""
    linears = _linear_layers(layer)
    parts = [part for part in map(read_linear, linears) if part is not None]
    norms = [m for m in layer.modules() if type(m) is nn.LayerNorm and m.elementwise_affine]
    if len(parts) != len(linears) or len(parts) != 6 or len(norms) != 2:
        return
    heads = _read_heads(parts[:3], parts[3:4], width)
    activations = _find_activations(layer, linears)
    shapes = [tuple(part.weight.shape) for part in parts]
    inner = shapes[4][0]
    if heads is None or shapes[4] != (inner, shapes[3][0]) or shapes[5] != (shapes[3][0], inner):
        return
    first, second = (LayerNorm(norm.weight, norm.bias, norm.eps) for norm in norms)
    for activation in activations:
        yield PostNormLayer(
            plain=layer.forward,
            adapters=tuple(m for m in layer.modules() if hasattr(m, "lora_A")),
            columns=Product(parts[:3]),
            out=Product(parts[3:4]),
            heads=heads,
            turns=False,
            norm=first,
            wide=Product(parts[4:5]),
            down=Product(parts[5:]),
            activation=activation,
            mlp_norm=second,
        )


def _find_activations(layer: nn.Module, linears: Sequence[nn.Module]) -> set[str]:
    """Return the known activations among the modules of a layer that hold nothing and are nothing else that is known."""
    other = (nn.LayerNorm, nn.Dropout, nn.Identity, nn.ModuleList)
    inside = {id(module) for linear in linears for module in linear.modules()}
    empty = [
        module
        for module in layer.modules()
        if id(module) not in inside
        and not isinstance(module, other)
        and not any(True for _ in module.children())
        and not any(True for _ in module.parameters())
    ]
    return {name for module in empty if (name := _read_activation(module))}


def _linear_layers(layer: nn.Module) -> list[nn.Module]:
    """Return the linear layers in the order in which they were made, those of adapters as one with what they adapt."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in layer.modules():
        if id(module) not in inside and (isinstance(module, nn.Linear) or hasattr(module, "base_layer")):
            found.append(module)
            inside.update(map(id, module.modules()))
    return found


def place_dropouts(
    layer: nn.Module, found: PostNormLayer, plain: Callable[[], Tensor], ours: Callable[[PostNormLayer], Tensor]
) -> PostNormLayer | None:
    """Return a layer with its dropout where the plain one has it; None where that is nowhere known.

    Each module of dropout drops all for once, and none of the others anything: so where it stands is seen, not guessed.
    """
    modules = [m for m in layer.modules() if isinstance(m, nn.Dropout)]
    before = {m: (m.training, m.p if isinstance(m, nn.Dropout) else 0.0) for m in layer.modules()}
    layer.train()
    try:
        for module in modules:
            for other in modules:
                other.p = float(other is module)
            theirs = plain()
            places: list[dict[str, Any]] = [
                {},
                *({name: module} for name in DROPS),
                {"drop": module, "mlp_drop": module},
            ]
            fitting = next((place for place in places if alike(ours(replace(found, **place)), theirs)), None)
            if fitting is None:
                return None
            found = replace(found, **fitting)
    finally:
        for m, (training, p) in before.items():
            m.training = training
            if isinstance(m, nn.Dropout):
                m.p = p
    return found
