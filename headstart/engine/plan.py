"""What a run will need: measured on the model itself before step 1, and not guessed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headstart import machine
from headstart.data.feed import Feed
from headstart.data.forest import Pack, build_packs
from headstart.data.segments import Example, lengths_of
from headstart.engine.engine import Engine
from headstart.engine.forward import Reader

PROBE_TOKENS = 64
FORWARD_COST = 0.4  # of a token forward, against forward and backward
STEPS_LAID_OUT = 64
MEMORY_SHARE = 0.9
STATES_PER_WEIGHT = 3  # gradient and AdamW's two moments


@dataclass(frozen=True)
class Layout:
    """How the rows of a run fall into packs: over all steps, from at most `STEPS_LAID_OUT` of them laid out."""

    steps: int
    row_tokens: int
    tokens: int
    targets: int
    packs: int
    worst: Pack
    usual: Pack

    @property
    def shared_frac(self) -> float:
        """The part of all tokens that is not computed, because rows share it."""
        return 1 - self.tokens / self.row_tokens


@dataclass(frozen=True)
class Estimate:
    """What a run will take: bytes of memory at the worst moment, seconds by phase, bytes of disk."""

    memory_bytes: int
    memory_free_bytes: int
    train_s: float
    eval_s: float
    disk_bytes: int

    @property
    def total_s(self) -> float:
        """Seconds from the first score to the last."""
        return self.train_s + self.eval_s

    def to_json(self) -> dict[str, Any]:
        """The estimate as plain values."""
        return {**asdict(self), "total_s": self.total_s}


def lay_out(reader: Reader, examples: Sequence[Example], feed: Feed, tokens_per_pack: int) -> Layout:
    """Lay out the first steps of a run as they will be taken, and count up to all of them."""
    trial = Feed(feed.rows, feed.batch_size, feed.total, feed.seed, vary=feed.vary)
    packs: list[Pack] = []
    rows = 0
    for _ in range(min(STEPS_LAID_OUT, trial.steps)):
        numbers, chosen = trial.next_examples(examples)
        rows += len(numbers)
        packs += reader.build_packs(chosen, tokens_per_pack)
    longest = examples[int(lengths_of(examples).argmax())]
    packs_of_longest = reader.build_packs(feed.varied([longest]), tokens_per_pack)
    scale = feed.total / rows
    return Layout(
        steps=feed.steps,
        row_tokens=round(sum(pack.row_tokens for pack in packs) * scale),
        tokens=round(sum(map(len, packs)) * scale),
        targets=round(sum(float(np.count_nonzero(pack.weights)) for pack in packs) * scale),
        packs=round(len(packs) * scale),
        worst=max([*packs, *packs_of_longest], key=len),
        usual=sorted(packs, key=len)[len(packs) // 2],
    )


@dataclass(frozen=True)
class Kept:
    """The bytes that a pack keeps for its backward pass: for each token, and whatever its length."""

    per_token: float
    always: float


def probe_memory(engine: Engine, examples: Sequence[Example]) -> Kept:
    """Return what packs keep for their backward pass, measured on two short ones.

    Counted are the storages that autograd saves, so nothing large has to be run to know what something large needs.
    """
    by_length = sorted(examples, key=lambda example: abs(example.token_count - PROBE_TOKENS))
    short = build_packs(by_length[:1], 1, one_row=True)[0]
    longer = min(examples, key=lambda example: abs(example.token_count - 4 * PROBE_TOKENS))
    long = build_packs([longer], 1, one_row=True)[0]
    kept = _kept_bytes(engine, short)
    if len(long) < 2 * len(short):
        return Kept(kept / len(short), 0.0)
    per_token = (_kept_bytes(engine, long) - kept) / (len(long) - len(short))
    return Kept(per_token, max(0.0, kept - per_token * len(short)))


def _kept_bytes(engine: Engine, pack: Pack) -> int:
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in engine.reader.model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        engine.rehearse(pack)
    return sum(kept.values())


def estimate_memory(engine: Engine, kept: Kept, tokens: int) -> int:
    """Return the most memory that training on packs of `tokens` will fill, with what is filled already."""
    reader = engine.reader
    trained = sum(p.numel() * p.element_size() for p in engine.trainable.values())
    used = machine.device_used_bytes(reader.device.type)
    return int(used + trained * STATES_PER_WEIGHT + kept.always + kept.per_token * tokens + reader.head_bytes)


def rehearse(engine: Engine, layout: Layout) -> float:
    """Run the worst pack forward and backward, then a usual one twice; return the least seconds per token of that.

    Nothing is updated.

    The worst pack shows that it fits. It isn't timed, since the first pass also pays for memory that is touched for the
    first time.
    """
    engine.rehearse(layout.worst)
    taken = []
    for _ in range(2):
        begun = time.perf_counter()
        engine.rehearse(layout.usual)
        taken.append(time.perf_counter() - begun)
    return min(taken) / len(layout.usual)


def estimate_generation_s(
    forward_s: float, *, prompt_tokens: int, new_tokens: int, batches: int, at_once: int
) -> float:
    """Return about how long answering takes: the prompts once, then each new token as one narrow pass a batch.

    `new_tokens` is what an answer has on average; `batches` go through one after the other, `at_once` prompts in each.
    """
    # A pass of one token a row reads every weight for little work, which costs about as much as forty tokens of a pack.
    return forward_s * (prompt_tokens + batches * new_tokens * (at_once + 40))
