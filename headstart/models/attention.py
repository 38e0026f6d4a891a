"""Attention over a forest: each node sees itself and its ancestors. One function for nearly every architecture.

transformers calls the function that `attn_implementation` names, with the keyword arguments of the model's forward; so a
model is packed by calling it with `forest=`. Whether an architecture passes it on, and mixes tokens nowhere else, is
not looked up in a list but tried (`can_pack`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from headstart.models.attend import Rule, attend, in_one_type, one_by_one
from headstart.models.attention_gpu import Prepared, attend_whole
from headstart.models.blocks import Blocks, Cut, Ints, Nodes, block_size, cut_blocks, lay_tiles

IMPLEMENTATION = "headstart_forest"
FIRST_POSITION = "headstart_first_position"  # an attribute of models: what the first position of a row is called
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
# Lengths, parents and positions of a small forest to try models on: a root of 3 tokens with children of 4 and 5, a root of 4.
PROBE_FOREST = [3, 4, 5, 4], [-1, 0, 0, -1], [*range(7), *range(3, 8), *range(4)]


class Reading(Protocol):
    """What says which keys the tokens of a forward see, where that is more than a forest: keys kept from before."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, softcap: float | None
    ) -> Tensor:
        """Attend in the next layer. `query` [1, H, T, d], `key` and `value` [1, K, T, d] -> [1, T, H, d]."""


class Asked(NamedTuple):
    """What an attention module asks for: how its scores become weights, what it sees, how wide its heads are."""

    rule: Rule
    window: int
    causal: bool
    width: int


class OnHost(NamedTuple):
    """Positions [T] and chosen tokens [P] of a pack as arrays."""

    positions: Ints
    chosen: Ints | None = None


class Forest:
    """The nodes of a pack as attention needs them; what follows from them is made once a pack.

    `chosen` are the places [P] of the tokens whose last states are wanted. `kernel` is `blocks`, of queries, or what computes
    a whole pack at once: `flex`, `varlen`, or what suits, `auto`. `on_host` is what else is read from the tensors; to read
    from a GPU is to wait for it. `asked` is what each module that attends asked for, by its id.
    """

    def __init__(
        self,
        length: Sequence[int],
        parent: Sequence[int],
        positions: Tensor,
        chosen: Tensor | None = None,
        kernel: str = "blocks",
        *,
        on_host: OnHost | None = None,
    ) -> None:
        for node, above in enumerate(parent):
            if above >= node:
                raise ValueError(f"node {node} stands before its parent {above}")
        if on_host is None:
            on_host = OnHost(positions.cpu().numpy(), None if chosen is None else chosen.cpu().numpy())
        self.nodes = Nodes.of(length, parent, on_host.positions)
        self.positions = positions
        self.chosen = chosen
        self.kernel = kernel
        self.prepared: Prepared | None = None
        self._chosen = on_host.chosen
        self.asked: dict[int, Asked] = {}
        self._blocks: dict[tuple[int, bool, bool, bool], Cut] = {}

    def blocks(self, window: int, causal: bool, *, chosen: bool = False, tiles: bool = True) -> Cut:
        """Return the pack, or its chosen tokens, cut into blocks of queries, or with `tiles` into these, where that serves.

        `window` is the number of last positions that are seen, 0 for all.
        """
        key = (window, causal, chosen, tiles)
        if key not in self._blocks:
            device = self.positions.device
            with one_by_one():
                wanted = self.nodes, window, causal, block_size(self.nodes), self._chosen if chosen else None
                laid = lay_tiles(*wanted) if tiles else None
                cut = laid.to(device) if laid else Blocks(block.to(device) for block in cut_blocks(*wanted))
                self._blocks[key] = cut
        return self._blocks[key]


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
    asked = forest.asked[id(module)] = Asked(
        Rule(scale, softcap, dropout), sliding_window or 0, causal, query.shape[-1]
    )
    if forest.kernel != "blocks":
        whole = attend_whole(forest, query, key, value, asked)
        if whole is not None:
            return whole, None
    q, k, v = (heads[0].transpose(0, 1) for heads in in_one_type(query, key, value))
    return attend(q, k, v, forest.blocks(asked.window, causal), asked.rule)[None], None


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
    if share:
        rows = [ids[:7], ids[:3] + ids[7:12], ids[12:]]
        places = [[*range(7)], [0, 1, 2, *range(7, 12)], [*range(12, 16)]]
        lengths, parents, depths = PROBE_FOREST
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
                if _has_window(config, kinds) and not any(asked.window for asked in forest.asked.values()):
                    return False
                if _alike(model, packed, rows, places):
                    return True
    except (ValueError, TypeError, RuntimeError, IndexError):
        return False
    finally:
        model.train(training)
    setattr(model, FIRST_POSITION, 0)
    return False


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Return how far two tensors are apart at most, as a part of the largest value of the second."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-9))


def _alike(model: Any, packed: Tensor, rows: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> bool:
    """Tell whether rows have the same states in a pack as each by itself."""
    for row, place in zip(rows, places, strict=True):
        row_ids = torch.tensor(row, device=model.device)
        alone = run_decoder(model, row_ids, torch.arange(len(row), device=model.device), None)
        if not apart(packed[list(place)], alone) < PROBE_TOLERANCE.get(alone.dtype, 0.1):
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

    `ids`, `positions` and, of pairs of texts, `types` [T] -> hidden states [T, D], after the last norm and before the head;
    of a forest with `chosen` tokens theirs alone, [P, D].

    Raises ValueError where the architecture doesn't let its attention be chosen.
    """
    use_attention(model, packed=forest is not None)
    extra: dict[str, Any] = {} if forest is None else {"forest": forest}
    if types is not None:
        extra["token_type_ids"] = types[None]
    if forest is not None or int(positions[0]):
        extra["position_ids"] = (positions + getattr(model, FIRST_POSITION, 0))[None]
    output = model.base_model(input_ids=ids[None], use_cache=False, **extra)
    hidden: Tensor = output.last_hidden_state.squeeze(0)
    chosen = forest.chosen if isinstance(forest, Forest) else None
    # A last layer that computes what is wanted alone has chosen already.
    return hidden if chosen is None or len(hidden) < len(ids) else hidden[chosen]


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
