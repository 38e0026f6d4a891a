"""`speed_up` takes a model and gives a model: layers that are known by their structure run as fused functions.

What a layer is made of is read from its parts (linear layers, RMS norms, an activation), how it puts them together is
tried: its output must equal the plain layer's on a small forest, else it stays as it is. So an architecture that was never
seen gains too, where its layers have a form that is known. Only packs go the fast way; any other call runs the plain code.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from headstart.models.attention import PROBE_FOREST, Asked, Forest, Reading, apart, run_decoder
from headstart.models.fused import (
    ACTIVATIONS,
    GatedMlp,
    Heads,
    Norm,
    activate,
    add_product,
    attend_columns,
    embed,
    gated_mlp,
    project,
    rms_norm,
    rotate_,
)
from headstart.models.linear import Part, Product, read_linear

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
PROBE_CHOSEN = [2, 6, 7, 11, 14]


@dataclass(frozen=True)
class Sped:
    """What `speed_up` found: how many layers run fused, of how many; norms and linear layers outside of these."""

    layers: int = 0
    of: int = 0
    norms: int = 0
    linears: int = 0

    def __str__(self) -> str:
        return f"{self.layers} of {self.of} layers fused"


@dataclass(frozen=True)
class FastLayer:
    """A layer as fused functions: attention and feed-forward, each behind a norm, before one, or both, and a residual.

    `turns`: rotary positions; `scale`: what both branches are multiplied by; `last`: only the chosen tokens of a forest
    are computed behind the attention.
    """

    plain: Callable[..., Any]
    adapters: tuple[Any, ...]
    columns: Product
    out: Product
    heads: Heads
    mlp: GatedMlp
    before: Norm | None
    after: Norm | None
    mlp_after: Norm | None
    query_norm: Norm | None
    key_norm: Norm | None
    scale: float = 1.0
    dropout: float = 0.0
    turns: bool = True
    last: bool = False
    asked: Asked | None = None
    training: Callable[[], bool] = field(default=lambda: False)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the layer, [1, T, D] -> [1, T, D]: fused where it is called with a forest, else as it was."""
        forest: Forest | Reading | None = kwargs.get("forest")
        cached = kwargs.get("past_key_values") is not None
        if forest is None or cached or self.asked is None or any(_is_off(module) for module in self.adapters):
            return self.plain(hidden_states, *args, **kwargs)
        return self.run(hidden_states[0], forest, kwargs.get("position_embeddings"))[None]

    def run(self, x: Tensor, forest: Forest | Reading, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """Run the layer on a pack, [T, D]; the last one gives the chosen tokens alone, [P, D]."""
        columns = self._normed_heads(project(x, self.before, self.columns))
        half = self._half(turn) if self.turns else None
        chosen = forest.chosen if self.last and isinstance(forest, Forest) else None
        attended = self._attend(columns, half, forest, chosen)
        x = x if chosen is None else x[chosen]
        if self.after is None:
            x = add_product(x, attended, self.out, self.scale)
        else:
            x = torch.add(x, rms_norm(project(attended, None, self.out), self.after), alpha=self.scale)
        if self.mlp_after is None:
            return gated_mlp(x, self.mlp, residual=True)
        return torch.add(x, rms_norm(gated_mlp(x, self.mlp, residual=False), self.mlp_after), alpha=self.scale)

    def _attend(
        self,
        columns: Tensor,
        turn: tuple[Tensor, Tensor] | None,
        forest: Forest | Reading,
        chosen: Tensor | None,
    ) -> Tensor:
        """[T, N] -> [T, H d], or [P, H d] of chosen tokens."""
        if self.asked is None:
            raise RuntimeError("a layer runs before it was seen what its attention asks for")
        rule, window, causal = self.asked
        if isinstance(forest, Forest):
            forest.asked[id(self)] = self.asked
            rule = replace(rule, dropout=self.dropout if self.training() else 0.0)
            blocks = forest.blocks(window, causal, chosen=chosen is not None)
            return attend_columns(columns, turn, self.heads, blocks, rule, chosen)
        if turn is not None:
            rotate_(self.heads.turned(columns), *turn)
        # Keys and values are kept, and queries need not be kept with them.
        q, k, v = (heads.transpose(0, 1).contiguous()[None] for heads in self.heads.split(columns))
        return forest.attend(q, k, v, rule.scale, window, rule.softcap)[0].flatten(1)

    def _normed_heads(self, columns: Tensor) -> Tensor:
        if self.query_norm is None or self.key_norm is None:
            return columns
        q, k, v = self.heads.split(columns)
        normed = [_norm_heads(q, self.query_norm), _norm_heads(k, self.key_norm), v]
        return torch.cat([heads.flatten(1) for heads in normed], 1)

    @staticmethod
    def _half(turn: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        if turn is None:
            return None
        cos, sin = (part[0, :, : part.shape[-1] // 2] for part in turn)
        return cos, sin


def _norm_heads(heads: Tensor, norm: Norm) -> Tensor:
    """Norm [T, n, d]: each head by itself, or all of a token as one, as the norm's width says."""
    whole = norm.weight.shape[0] != heads.shape[-1]
    return rms_norm(heads.flatten(1), norm).view(heads.shape) if whole else rms_norm(heads, norm)


def _is_off(module: Any) -> bool:
    return bool(module._disable_adapters or module.merged_adapters)


# --- what a layer is made of ---


def read_layer(layer: nn.Module) -> FastLayer | None:
    """Return a layer as fused functions, as far as its parts tell; None where they aren't of a known form."""
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
    return FastLayer(
        plain=layer.forward,
        adapters=tuple(m for m in layer.modules() if hasattr(m, "lora_A")),
        columns=Product(columns),
        out=Product(out),
        heads=heads,
        mlp=replace(mlp, norm=mlp_before, scale=scale if mlp_after is None else 1.0),
        before=before,
        after=after,
        mlp_after=mlp_after,
        query_norm=own[0],
        key_norm=own[1],
        scale=scale,
        dropout=float(getattr(attention, "attention_dropout", 0.0) or 0.0),
        training=lambda: layer.training,
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
    x = torch.linspace(-4, 4, 33)
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
            if _alike(norm.apply(x, norm.inverse(x)), given):
                return norm
    return None


def _alike(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and apart(ours, theirs) < TOLERANCE.get(theirs.dtype, 0.0)


# --- putting it in ---


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
    _speed_up_embedding(model.get_input_embeddings())
    return Sped(len(fast), len(calls), norms, linears)


def slow_down(model: Any) -> None:
    """Take out what `speed_up` put in."""
    for module in model.modules():
        vars(module).pop("forward", None)


Call = tuple[tuple[Any, ...], dict[str, Any], Tensor]


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
        calls[layer] = (args, kwargs, output[0] if isinstance(output, tuple) else output)

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


def _fit(layer: nn.Module, call: Call, forest: Forest) -> FastLayer | None:
    """Return the form of a layer that gives what the layer gave; None where none does."""
    (args, kwargs, theirs), found = call, read_layer(layer)
    asked = next((forest.asked[id(m)] for m in layer.modules() if id(m) in forest.asked), None)
    if found is None or asked is None or isinstance(layer(*args, **kwargs), tuple):
        return None
    x = args[0] if args else kwargs["hidden_states"]
    with torch.no_grad():
        for turns, scale in itertools.product((True, False), {found.scale, 1.0}):
            tried = replace(found, turns=turns, asked=asked, scale=scale)
            if _alike(tried.run(x[0], forest, kwargs.get("position_embeddings")), theirs[0]):
                return tried
    return None


def _chooses_rightly(model: Any) -> bool:
    """Tell whether a last layer that computes chosen tokens alone gives their states."""
    chosen = torch.tensor(PROBE_CHOSEN, device=model.device)
    try:
        return _alike(_probe(model, chosen)[0], _probe(model)[0][chosen])
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
        if adapted and _is_off(module):
            return plain(x, *args, **kwargs)  # type: ignore[no-any-return]
        return project(x.reshape(-1, x.shape[-1]), None, product).view(*x.shape[:-1], -1)

    module.forward = forward
    return True


def _speed_up_embedding(module: Any) -> None:
    """Have an embedding that trains add up its gradients in place; Gemma's, which scales, keeps its scale."""
    plain = type(module) is nn.Embedding and module.max_norm is None and not module.scale_grad_by_freq
    if plain and module.weight.requires_grad:
        module.forward = lambda ids: embed(ids, module.weight)
