"""Attention over a forest: each node sees itself and its ancestors. One function for nearly every architecture.

transformers calls the function that `attn_implementation` names, with the keyword arguments of the model's forward; so a
model is packed by calling it with `forest=`. Whether an architecture passes it on, and mixes tokens nowhere else, is
not looked up in a list but tried (`can_pack`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

IMPLEMENTATION = "headstart_forest"
FIRST_POSITION = "headstart_first_position"  # an attribute of models: what the first position of a row is called
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}


class Reading(Protocol):
    """What says which keys the tokens of a forward see, where that is more than a forest: keys kept from before."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, softcap: float | None
    ) -> Tensor:
        """Attend in the next layer. `query` [1, H, T, d], `key` and `value` [1, K, T, d] -> [1, T, H, d]."""


class Forest:
    """The nodes of a pack as attention needs them: lengths, ancestors, positions, and masks made once a pack."""

    def __init__(self, length: Sequence[int], parent: Sequence[int], positions: Tensor) -> None:
        self.lengths = list(length)
        self.ancestors: list[list[int]] = []
        for node, above in enumerate(parent):
            if above >= node:
                raise ValueError(f"node {node} stands before its parent {above}")
            self.ancestors.append([*self.ancestors[above], above] if above >= 0 else [])
        self._positions = torch.split(positions, self.lengths)
        self._masks: dict[tuple[int, int], Tensor | None] = {}
        self.windows: set[int] = set()

    def mask(self, node: int, window: int, causal: bool) -> Tensor | None:
        """Return which keys the tokens of a node see, bool [n, a + n]; None where plain causality or all says it.

        `window` is the number of last positions that are seen, 0 for all.
        """
        self.windows.add(window)
        if not causal:
            if window:
                raise ValueError("a window that looks both ways is not known here")
            return None
        if (node, window) not in self._masks:
            self._masks[node, window] = self._build_mask(node, window)
        return self._masks[node, window]

    def _build_mask(self, node: int, window: int) -> Tensor | None:
        query = self._positions[node]
        last = int(query[-1]) if len(query) else 0
        within = not window or last < window
        if within and not self.ancestors[node]:
            return None
        key = torch.cat([self._positions[a] for a in (*self.ancestors[node], node)])
        distance = query[:, None] - key[None, :]
        seen = distance >= 0
        return seen if within else seen & (distance < window)


def forest_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 (transformers passes it; the forest says what it would)
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    forest: Forest | Reading | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within `forest`. `query` [1, H, T, d], `key` and `value` [1, K, T, d] -> ([1, T, H, d], None).

    Raises ValueError without a forest: this function reads packs only.
    """
    if forest is None:
        raise ValueError("forest attention was called without a forest")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not isinstance(forest, Forest):
        return forest.attend(query, key, value, scale, sliding_window or 0, softcap), None
    # split, and not slices: the gradient of a split is one concatenation, that of each slice a whole tensor of zeros.
    queries = torch.split(query, forest.lengths, dim=2)
    keys = torch.split(key, forest.lengths, dim=2)
    values = torch.split(value, forest.lengths, dim=2)
    attended = []
    for node, ancestors in enumerate(forest.ancestors):
        seen = (*ancestors, node)
        k = torch.cat([keys[n] for n in seen], dim=2) if ancestors else keys[node]
        v = torch.cat([values[n] for n in seen], dim=2) if ancestors else values[node]
        mask = forest.mask(node, sliding_window or 0, causal)
        attended.append(attend(queries[node], k, v, mask, causal, scale, dropout, softcap))
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous(), None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Attend from `q` [1, H, n, d] to `k` and `v` [1, K, a + n, d], as `mask` [n, a + n] or plain causality says."""
    if softcap is not None:
        return _softcapped(q, k, v, mask, causal, scale, dropout, softcap)
    return _fused(q, k, v, mask, causal, scale, dropout)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, dropout: float) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    if grouped and mask is not None and q.device.type != "cpu":
        # Elsewhere grouped heads under a mask would fall back to the slowest kernel.
        k, v, grouped = _repeat(k, q), _repeat(v, q), False
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal and mask is None, scale=scale, enable_gqa=grouped
    )


def _softcapped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, dropout: float, softcap: float
) -> Tensor:
    scores = q @ _repeat(k, q).transpose(-1, -2) * scale
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None and causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(q.dtype), dropout, training=dropout > 0)
    return weights @ _repeat(v, q)


def _repeat(heads: Tensor, query: Tensor) -> Tensor:
    return heads.repeat_interleave(query.shape[1] // heads.shape[1], dim=1)


def register() -> None:
    """Make `attn_implementation="headstart_forest"` known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, forest_attention)


def can_pack(model: Any, *, share: bool = True) -> bool:
    """Tell whether `model` computes the same for rows in a forest as for each alone: tried on rows that share a prefix.

    Without `share` each row is a root of its own, which models that look both ways can read. False for architectures
    that don't pass the forest on to their attention, and for those that mix the tokens of a row elsewhere (recurrence,
    convolution, attention in chunks).
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"} or getattr(config, "attention_chunk_size", None):
        return False
    ids = [(7 * i + 3) % config.vocab_size for i in range(16)]
    if share:  # a root of 3 tokens with children of 4 and 5, and a root of 4
        rows = [ids[:7], ids[:3] + ids[7:12], ids[12:]]
        places = [[*range(7)], [0, 1, 2, *range(7, 12)], [*range(12, 16)]]
        lengths, parents, depths = [3, 4, 5, 4], [-1, 0, 0, -1], [*range(7), *range(3, 8), *range(4)]
    else:
        rows = [ids[:7], ids[7:12], ids[12:]]
        places = [[*range(7)], [*range(7, 12)], [*range(12, 16)]]
        lengths, parents, depths = [7, 5, 4], [-1, -1, -1], [*range(7), *range(5), *range(4)]
    positions = torch.tensor(depths, device=model.device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            # RoBERTa and its kin count positions from behind their padding.
            for first in dict.fromkeys((0, (getattr(config, "pad_token_id", None) or 0) + 1)):
                setattr(model, FIRST_POSITION, first)
                forest = Forest(lengths, parents, positions)
                packed = run_decoder(model, torch.tensor(ids, device=model.device), positions, forest)
                # The rows of the trial are shorter than any real window, so only its coming along shows that it is kept.
                if _has_window(config, kinds) and forest.windows == {0}:
                    return False
                if _alike(model, packed, rows, places):
                    return True
    except (ValueError, TypeError, RuntimeError, IndexError):
        return False
    finally:
        model.train(training)
    setattr(model, FIRST_POSITION, 0)
    return False


def _alike(model: Any, packed: Tensor, rows: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> bool:
    """Tell whether rows have the same states in a pack as each by itself."""
    for row, place in zip(rows, places, strict=True):
        row_ids = torch.tensor(row, device=model.device)
        alone = run_decoder(model, row_ids, torch.arange(len(row), device=model.device), None)
        error = (packed[list(place)] - alone).abs().max() / alone.abs().max().clamp_min(1e-9)
        if not float(error) < PROBE_TOLERANCE.get(alone.dtype, 0.1):
            return False
    return True


def _has_window(config: Any, kinds: set[str]) -> bool:
    if kinds:
        return "sliding_attention" in kinds
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)


def run_decoder(
    model: Any, ids: Tensor, positions: Tensor, forest: Forest | Reading | None, types: Tensor | None = None
) -> Tensor:
    """Run the layers of a model on a pack, or on one plain row where `forest` is None.

    `ids`, `positions` and, of pairs of texts, `types` [T] -> hidden states [T, D], after the last norm and before the head.

    Raises ValueError where the architecture doesn't let its attention be chosen.
    """
    use_attention(model, packed=forest is not None)
    extra: dict[str, Any] = {} if forest is None else {"forest": forest}
    if types is not None:
        extra["token_type_ids"] = types[None]
    if forest is not None or int(positions[0]):
        extra["position_ids"] = (positions + getattr(model, FIRST_POSITION, 0))[None]
    output = model.base_model(input_ids=ids[None], use_cache=False, **extra)
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


def use_attention(model: Any, *, packed: bool) -> None:
    """Switch a model between forest attention and its own. Raises ValueError where it can't be switched."""
    current = model.config._attn_implementation
    if packed == (current == IMPLEMENTATION):
        return
    if packed:
        model.headstart_plain_attention = current
    model.set_attn_implementation(IMPLEMENTATION if packed else _plain_implementation(model))
    if packed and model.config._attn_implementation != IMPLEMENTATION:
        raise ValueError(f"{type(model).__name__} does not let its attention be chosen")


def _plain_implementation(model: Any) -> str:
    """Return the attention of transformers that computes what the architecture asks for."""
    if getattr(model.config, "attn_logit_softcapping", None):
        return "eager"
    return str(getattr(model, "headstart_plain_attention", "sdpa"))
