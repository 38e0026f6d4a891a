"""Answers: prompts in, token ids out: the likeliest token at each place, or one drawn by numbers that are given beforehand.
Either way the same model always gives the same.

All prompts for whose keys and values there is room are in flight together, a token each at every step; one that is done
leaves at once, and others come in. An architecture that can't read a forest goes through transformers' own `generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headstart.data.prefixes import PrefixTree, build_prefixes
from headstart.models.attention import can_pack, use_attention
from headstart.models.decode import Cache, Node, Row, token_bytes
from headstart.models.fast import let_go
from headstart.models.head import Head, read_head

PROMPTS_AT_ONCE = 16  # and the next: through transformers' own generate
TOKENS_AT_ONCE = 8192
ROWS_AT_ONCE = 128  # in flight: twice as many would not go through the weights any faster
KEPT_BYTES = 1 << 30  # of keys and values, or a quarter of the model's own bytes if that is more
KEEP_ONCE = 2048  # tokens that a shared node must save: at every step it costs each layer some small operations
COME_IN = 4  # new prompts come in when this part of the room is free: each time what is kept is laid anew

OnBatch = Callable[[int, int], None]
Draws = NDArray[np.float64]


@dataclass(frozen=True)
class Answer:
    """The ids of an answer, its stop token left out, and whether the model stopped by itself.

    `logprobs`: how likely the model found each of `ids`; None where it isn't known. `stop` is the token that ended it.
    """

    ids: list[int]
    stopped: bool
    logprobs: list[float] | None = field(default=None, compare=False)
    stop: int | None = field(default=None, compare=False)


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    limits: Sequence[int],
    length: int,
    on_batch: OnBatch | None = None,
    *,
    tokens_at_once: int | None = None,
    head: Head | None = None,
    draws: Draws | None = None,
) -> list[Answer]:
    """Answer `prompts` (token ids) with the likeliest token at each place, up to a stop token or each one's limit.

    With `draws` [prompts, the highest limit], numbers from 0 to below 1, each token is drawn by its number instead: what a
    prompt is answered then follows from the model and its own numbers alone, not from what else is in flight.

    Prompt and answer together stay within `length`, the most tokens that the model can place. `on_batch(done, total)` is
    called with every token that rows in flight are given. `head` is what a reader of packs found, which is tried anew where it is left out.
    `tokens_at_once` bounds the tokens whose keys and values are kept, but for a
    prompt that is longer by itself; left out, it follows from `KEPT_BYTES`.
    """
    model.eval()
    let_go(model)
    limits = [max(1, min(limit, length - len(prompt))) for limit, prompt in zip(limits, prompts, strict=True)]
    head = _find_head(model, max(map(len, prompts), default=0) + max(limits, default=0), head)
    if head is None:
        return _generate_padded(model, prompts, stop_ids, limits, length, on_batch, draws)
    with torch.no_grad():
        flight = _Flight(model, head, prompts, limits, stop_ids, tokens_at_once or tokens_kept(model), draws)
        while flight.advance():
            if on_batch:
                on_batch(flight.done, len(prompts))
    return [Answer(asked.ids, asked.stop is not None, asked.logprobs, asked.stop) for asked in flight.asked]


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Choose from logits [R, V], which are used up, the next token of each row, [R], and tell its log-probability, [R]."""
    highest, ids = logits.max(-1, keepdim=True)
    return ids[:, 0], -logits.sub_(highest).exp_().sum(-1).log_()


def drawn(logits: Tensor, draws: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Draw from logits [R, V] the next token of each row by a number in [0, 1), and tell its log-probability, both [R].

    The token is the first up to which the probabilities sum to more than the number. They are summed on the host: a GPU
    would not always sum them alike.
    """
    probabilities = logits.softmax(-1).cpu().double()
    below = probabilities.cumsum(-1)
    wanted = torch.tensor(draws, dtype=torch.float64)[:, None] * below[:, -1:]
    ids = torch.searchsorted(below, wanted, right=True).clamp_(max=below.shape[1] - 1)
    return ids[:, 0], probabilities.gather(1, ids)[:, 0].log()


def _find_head(model: Any, longest: int, known: Head | None = None) -> Head | None:
    """Return the head of a model whose rows can go through together, `known` or tried; None for others."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        # Its positions are turned differently in a forward that holds a longer row.
        if kind.get("rope_type") == "longrope" and longest > kind.get("original_max_position_embeddings", 0):
            return None
    if known is not None:
        return known
    if not can_pack(model):
        return None
    try:
        return read_head(model)
    except ValueError:
        return None


def tokens_kept(model: Any) -> int:
    """Return for how many tokens keys and values may be kept. It doesn't follow from what memory happens to be free."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return int(max(KEPT_BYTES, weights // 4) // token_bytes(model))


@dataclass(eq=False)
class _Asked:
    """A prompt, where it stands in the tree of prefixes, and what was answered so far."""

    row: Row
    limit: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop: int | None = None
    draws: Sequence[float] | None = None


def _build_nodes(tree: PrefixTree, prompts: Sequence[Sequence[int]]) -> list[Node]:
    """Return the nodes of a tree of prefixes; long ones are kept once, and so is what they hang on."""
    kept = [(prefix.end - prefix.begin) * (len(prefix.prompts) - 1) >= KEEP_ONCE for prefix in tree.nodes]
    for number in reversed(range(len(kept))):
        if kept[number] and tree.nodes[number].parent >= 0:
            kept[tree.nodes[number].parent] = True
    nodes: list[Node] = []
    for prefix, here in zip(tree.nodes, kept, strict=True):
        ids = prompts[prefix.prompts[0]][prefix.begin : prefix.end]
        nodes.append(Node(ids, nodes[prefix.parent] if prefix.parent >= 0 else None, here))
    return nodes


class _Flight:
    """All prompts on their way: some wait, some are in flight, some are done."""

    def __init__(
        self,
        model: Any,
        head: Head,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        stop_ids: Sequence[int],
        tokens: int,
        draws: Draws | None = None,
    ) -> None:
        tree = build_prefixes(prompts)
        nodes = _build_nodes(tree, prompts)
        self.asked = []
        for number, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            above = nodes[tree.above[number]] if tree.above[number] >= 0 else None
            own = prompt[above.first + len(above.ids) :] if above else prompt
            row = Row(Node(own, above), limit)
            self.asked.append(_Asked(row, limit, draws=None if draws is None else draws[number].tolist()))
        self.done = 0
        self._by_row = {asked.row: asked for asked in self.asked}
        self._waiting = [self.asked[number].row for number in tree.order(limits)]
        self._cache = Cache(model)
        self._head = head
        self._stop_ids = frozenset(stop_ids)
        self._tokens = tokens

    def advance(self) -> bool:
        """Give every row in flight a token, or let waiting rows in. Returns whether anything was left to do."""
        if new := self._next_in():
            self._take(new, self._cache.read(new))
        elif rows := self._cache.rows:
            self._take(rows, self._cache.step([self._by_row[row].ids[-1] for row in rows]))
        else:
            return False
        return True

    def _next_in(self) -> list[Row]:
        """Take from those that wait what there is room for, once that is worth laying anew what is kept."""
        flying = self._cache.rows
        if not self._waiting or (flying and self._cache.tokens_with([]) > self._tokens * (1 - 1 / COME_IN)):
            return []
        new: list[Row] = []
        while self._waiting and len(flying) + len(new) < ROWS_AT_ONCE:
            if (flying or new) and self._cache.tokens_with([*new, self._waiting[0]]) > self._tokens:
                break
            new.append(self._waiting.pop(0))
        return new

    def _take(self, rows: Sequence[Row], hidden: Tensor) -> None:
        """Choose the next token of rows from their hidden states [r, D], and let those go that are done."""
        size = self._head.rows_at_once
        parts = [rows[begin : begin + size] for begin in range(0, len(rows), size)]
        chosen = [
            self._choose(part, self._head.logits(states))
            for part, states in zip(parts, torch.split(hidden, size), strict=True)
        ]
        ids = torch.cat([ids for ids, _ in chosen]).tolist()
        logprobs = torch.cat([logprobs for _, logprobs in chosen]).tolist()
        done = []
        for row, id_, logprob in zip(rows, ids, logprobs, strict=True):
            asked = self._by_row[row]
            if id_ in self._stop_ids:
                asked.stop = id_
            else:
                asked.ids.append(id_)
                asked.logprobs.append(logprob)
            if asked.stop is not None or len(asked.ids) == asked.limit:
                done.append(row)
        self.done += len(done)
        self._cache.drop(done, self._waiting)

    def _choose(self, rows: Sequence[Row], logits: Tensor) -> tuple[Tensor, Tensor]:
        asked = [self._by_row[row] for row in rows]
        draws = [one.draws[len(one.ids)] for one in asked if one.draws is not None]
        return drawn(logits, draws) if draws else likeliest(logits)


def _generate_padded(
    model: Any,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    limits: Sequence[int],
    length: int,
    on_batch: OnBatch | None,
    draws: Draws | None,
) -> list[Answer]:
    """Answer with transformers' own generate: prompts of like limit and length together, padded on the left."""
    use_attention(model, packed=False)
    order = sorted(range(len(prompts)), key=lambda index: (limits[index], len(prompts[index])))
    answers: dict[int, Answer] = {}
    for batch in _batches(order, prompts, limits, length):
        few = None if draws is None else draws[batch]
        new = _generate_batch(model, [prompts[index] for index in batch], stop_ids, limits[batch[-1]], few)
        answers.update(
            (index, cut_at_stop(ids[: limits[index]], stop_ids)) for index, ids in zip(batch, new, strict=True)
        )
        if on_batch:
            on_batch(len(answers), len(order))
    return [answers[index] for index in range(len(prompts))]


def _batches(
    order: Sequence[int], prompts: Sequence[Sequence[int]], limits: Sequence[int], length: int
) -> list[list[int]]:
    """Cut an order into batches: at most `PROMPTS_AT_ONCE` and `TOKENS_AT_ONCE`, each within `length`, padded."""
    batches: list[list[int]] = []
    for index in order:
        batch = [*(batches[-1] if batches else []), index]
        width = max(len(prompts[i]) for i in batch) + max(limits[i] for i in batch)
        if (
            len(batch) > 1
            and len(batch) <= PROMPTS_AT_ONCE
            and width * len(batch) <= TOKENS_AT_ONCE
            and width <= length
        ):
            batches[-1] = batch
        else:
            batches.append([index])
    return batches


def _generate_batch(
    model: Any, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], max_new_tokens: int, draws: Draws | None
) -> list[list[int]]:
    from transformers import GenerationConfig, LogitsProcessorList

    pad = stop_ids[0]
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,  # what is left out is taken from the model's own config
        no_repeat_ngram_size=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids),
        pad_token_id=pad,
    )

    def draw(so_far: Tensor, logits: Tensor) -> Tensor:
        """Leave of the logits only those of the tokens that are drawn."""
        numbers = [] if draws is None else draws[:, so_far.shape[1] - width].tolist()
        chosen, _ = drawn(logits, numbers)
        return torch.full_like(logits, -torch.inf).scatter(1, chosen[:, None].to(logits.device), 0.0)

    steer = LogitsProcessorList([] if draws is None else [draw])
    with torch.no_grad():
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=steer)
    new: list[list[int]] = output[:, width:].tolist()
    return new


def cut_at_stop(ids: Sequence[int], stop_ids: Sequence[int]) -> Answer:
    """Return what stands before the first stop token."""
    for place, id_ in enumerate(ids):
        if id_ in stop_ids:
            return Answer(list(ids[:place]), True, stop=id_)
    return Answer(list(ids), False)
