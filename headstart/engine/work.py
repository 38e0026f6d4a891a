"""What a step needs to compute, counted, and the best rate at which this machine multiplies matrices.

Counted are operations that the mathematics asks for (a multiplication and an addition are two). What is made anew to save
memory is not needed work, nor is padding, of which there is none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headstart.data.forest import Pack
from headstart.data.segments import Example
from headstart.engine.forward import EmbeddingReader, PackReader, Reader, TokenReader
from headstart.engine.memory import scaled
from headstart.models.native import plain_product, product

# Of a pack that shows what is computed; rounded up they are more than its sources, where all are targets.
PROBE_TOKENS = 63.5
RATE_S = 0.1  # for each shape that is timed, and each way
RATE_SHAPES = 3
RATE_ROWS = 1024


@dataclass(frozen=True)
class Product:
    """A linear layer: `rows` are the `tokens` of a pack, its `sources` or its `segments`; of what a gradient is needed."""

    inputs: int
    outputs: int
    rows: str
    input_gradient: bool
    weight_gradient: bool

    @property
    def per_row(self) -> int:
        """Operations for each row: forward, and again for each gradient that is needed."""
        return 2 * self.inputs * self.outputs * (1 + self.input_gradient + self.weight_gradient)


@dataclass(frozen=True)
class Attention:
    """An attention layer: the width of all its query heads together, its window (0: none), and if a gradient goes through."""

    width: int
    window: int
    gradient: bool

    @property
    def per_pair(self) -> int:
        """Operations for each pair of a query and a key that it sees.

        Forward two products (scores, and what they weigh), 2 x width each. Backward four: of the values, the weights, the
        queries and the keys.
        """
        return 4 * self.width + 8 * self.width * self.gradient


@dataclass(frozen=True)
class Shape:
    """What a model computes with, as `read_shape` finds it."""

    products: Sequence[Product]
    attention: Sequence[Attention]
    causal: bool

    def operations(self, pack: Pack) -> float:
        """Return the operations that training on a pack needs: forward and backward.

        A linear layer [R, I] -> [R, O] needs 2RIO operations forward, 2RIO for the gradient of its input where something
        below it trains, and 2RIO for that of its weight where it trains itself. So an adapter's own products are counted
        thrice, those of the weights that it stands on twice. The head is applied to sources of targets alone. Attention
        needs 4W operations a pair forward and 8W backward (`Attention.per_pair`), for the pairs that are seen (`pairs`).
        Norms, activations, rotations and the optimizer are left out: they are no products.
        """
        rows = {"tokens": len(pack), "sources": len(pack.sources), "segments": len(pack.begins)}
        linear = sum(product.per_row * rows[product.rows] for product in self.products)
        seen = {window: pairs(pack, window, causal=self.causal) for window in {a.window for a in self.attention}}
        return float(linear + sum(layer.per_pair * seen[layer.window] for layer in self.attention))


def pairs(pack: Pack, window: int = 0, *, causal: bool = True) -> int:
    """Return how many pairs of a query and a key a pack has: a token sees its own node's earlier tokens, itself, and all
    tokens of its ancestors, of these at most the last `window` (0: all). Not causal: all tokens of its own node.
    """
    if not causal:
        return int((pack.length**2).sum())
    total = 0
    ends = np.zeros(len(pack.length), np.int64)  # tokens from the root to the end of a node
    for node, above in enumerate(pack.parent):
        before = ends[above] if above >= 0 else 0
        ends[node] = before + pack.length[node]
        seen = np.arange(before + 1, ends[node] + 1)
        total += int((np.minimum(seen, window) if window else seen).sum())
    return total


def probe_pack(reader: Reader, examples: Sequence[Example]) -> Pack:
    """Return a short pack in which tokens, sources and segments are of different numbers.

    Long rows are cut down, since plain layers keep several times what fused ones do.
    """
    twos = [[examples[i] for i in range(n, min(n + 2, len(examples)))] for n in range(min(8, len(examples)))]
    packs = [reader.build_packs(two, 1 << 30)[0] for two in twos]
    long = [p for p in packs if len(p) > PROBE_TOKENS and not any(p.images)]
    short = [scaled(p, PROBE_TOKENS / len(p), len(p.begins) + 1) for p in long]
    apart = [p for p in (*short, *packs) if len({1, len(p), len(p.sources), len(p.begins)}) == 4]
    return min(apart or short or packs, key=len)


def read_shape(reader: Reader, pack: Pack) -> Shape | None:
    """Return what a reader's model computes with; None where that isn't linear layers and attention (convolutions, experts).

    A pack goes through once, without being learned from, to see which layers run, on how many rows, and which of their
    inputs need a gradient. `pack` must not have as many sources or segments as tokens.
    """
    model = reader.model
    if any(p.ndim > 2 for p in model.parameters()) or not pack.ids.size:
        return None
    found: list[Product] = []
    rows = {len(pack.begins): "segments", len(pack.sources): "sources", len(pack): "tokens"}
    writes = isinstance(reader, PackReader) and not isinstance(reader, TokenReader)
    own_head: Any = reader.head.module if writes else None  # type: ignore[attr-defined]

    def note(module: Any, inputs: tuple[Any, ...], _: Any) -> None:
        count = inputs[0].numel() // inputs[0].shape[-1]
        if module is not own_head and count in rows:
            wide, tall = _sizes(module)
            found.append(Product(wide, tall, rows[count], inputs[0].requires_grad, module.weight.requires_grad))

    hooks = [m.register_forward_hook(note) for m in model.modules() if _is_linear(m)]
    state = torch.get_rng_state()
    try:
        reader.train()
        reader.outputs(pack)
    finally:
        torch.set_rng_state(state)
        for hook in hooks:
            hook.remove()
    if own_head is not None and _is_linear(own_head):
        trained = any(p.requires_grad for p in model.parameters())
        found.append(Product(*_sizes(own_head), "sources", trained, own_head.weight.requires_grad))
    return Shape(found, _attention(model), _is_causal(reader))


def _is_linear(module: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (torch.nn.Linear, Conv1D))


def _sizes(module: Any) -> tuple[int, int]:
    outputs, inputs = module.weight.shape
    return (inputs, outputs) if isinstance(module, torch.nn.Linear) else (outputs, inputs)


def _is_causal(reader: Reader) -> bool:
    if reader.packs and not isinstance(reader, EmbeddingReader):
        return reader.packing == "forest"
    return reader.packing == "forest" or (isinstance(reader, PackReader) and not isinstance(reader, TokenReader))


def _attention(model: Any) -> list[Attention]:
    config = model.config.get_text_config()
    heads = int(config.num_attention_heads)
    width = heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    layers = int(config.num_hidden_layers)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    window = int(getattr(config, "sliding_window", None) or 0)
    everywhere = window if getattr(config, "layer_types", None) is None else 0
    lowest = _lowest_trained_layer(model)
    return [
        Attention(width, window if kind == "sliding_attention" else everywhere, number >= lowest)
        for number, kind in enumerate(kinds)
    ]


def _lowest_trained_layer(model: Any) -> int:
    """Return the first layer through whose attention a gradient goes: something trains before its scores.

    Matrices outside of layers (embeddings) come before all of them.
    """
    layers = next((m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList)), None)
    inside: dict[int, int] = {}
    for number, layer in enumerate(layers or ()):
        inside.update((id(p), number + 1) for p in layer.parameters())
        inside.update((id(p), number) for p in _before_scores(layer))
    trained = [p for p in model.base_model.parameters() if p.requires_grad and (id(p) in inside or p.ndim > 1)]
    return min((inside.get(id(p), 0) for p in trained), default=1 << 30)


def _before_scores(layer: Any) -> list[Any]:
    """Return the parameters of a layer that make queries, keys and values: those of its attention but the last projection."""
    attention = next((m for m in layer.modules() if "attention" in type(m).__name__.lower()), layer)
    linear = [name for name, module in attention.named_modules() if _is_linear(module)]
    last = linear[-1].partition(".")[0] if linear else ""
    return [p for name, p in attention.named_parameters() if name.partition(".")[0] != last]


def best_rate(shape: Shape, rows: int, dtype: torch.dtype, device: str, *, fast: bool) -> float:
    """Return the best rate of a product that the model is made of, in operations a second: the ceiling of any step.

    The largest of its shapes are timed, `rows` x inputs x outputs, by torch and, of what is `fast` on a CPU, by the kernels; the best
    counts. It takes about a second at most.
    """
    sizes = sorted({(p.inputs, p.outputs) for p in shape.products if p.rows == "tokens"}, key=lambda s: -s[0] * s[1])
    ways = [plain_product, product] if fast and device == "cpu" else [plain_product]
    return max((_rate(way, rows, *size, dtype, device) for size in sizes[:RATE_SHAPES] for way in ways), default=0.0)


def _rate(way: Callable[..., Tensor], rows: int, inputs: int, outputs: int, dtype: torch.dtype, device: str) -> float:
    a = torch.randn(rows, inputs, dtype=dtype, device=device)
    b = torch.randn(outputs, inputs, dtype=dtype, device=device).t()
    out = torch.empty(rows, outputs, dtype=dtype, device=device)
    best, left = float("inf"), RATE_S
    for _ in range(32):
        taken = _time_product(way, a, b, out)
        best, left = min(best, taken), left - taken
        if left < 0:
            break
    return 2.0 * rows * inputs * outputs / best


def _time_product(way: Callable[..., Tensor], a: Tensor, b: Tensor, out: Tensor) -> float:
    if a.device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        way(a, b, None, out)
        end.record()
        end.synchronize()
        return max(float(begin.elapsed_time(end)) / 1000, 1e-9)
    begun = time.perf_counter()
    way(a, b, None, out)
    return max(time.perf_counter() - begun, 1e-9)
