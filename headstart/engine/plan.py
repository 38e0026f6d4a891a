"""What a run will need: measured on the model itself before step 1, and not guessed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from headstart import machine
from headstart.data.feed import Feed
from headstart.data.forest import Pack
from headstart.data.segments import Example, lengths_of
from headstart.engine.engine import Engine
from headstart.engine.forward import Reader
from headstart.engine.memory import Growth, measure_growth

FORWARD_COST = 0.4  # of a token forward, against forward and backward
STEPS_LAID_OUT = 64
ROWS_LAID_OUT = 128
TIMED_S, TIMED_MOST = 1.0, 5  # a pack that is quick is timed until so long has passed, but not more often
MEMORY_SHARE = 0.9
STATES_PER_WEIGHT = 3  # gradient and AdamW's two moments


@dataclass(frozen=True)
class Layout:
    """How the rows of a run fall into packs: over all steps, from at most `STEPS_LAID_OUT` of them laid out.

    `most_packs` is how many a step has at most, `data_s` how long laying out a step takes, `words` how many different tokens
    the rows hold.
    """

    steps: int
    row_tokens: int
    tokens: int
    targets: int
    packs: int
    worst: Pack
    usual: Pack
    most_packs: int = 1
    data_s: float = 0.0
    words: int = 0

    @property
    def shared_frac(self) -> float:
        """The part of all tokens that is not computed, because rows share it."""
        return 1 - self.tokens / self.row_tokens


@dataclass(frozen=True)
class Estimate:
    """What a run will take: bytes of memory at the worst moment and by phase, seconds by phase, bytes of disk.

    `memory_bytes` is the most of what was foreseen and of what the rehearsal filled; `product_rate` is the best rate
    (operations a second) of a product of the model's, 0 where it isn't made of any.
    """

    memory_bytes: int
    memory_free_bytes: int
    train_s: float
    eval_s: float
    save_s: float
    disk_bytes: int
    phases_bytes: Mapping[str, int]
    rehearsed_bytes: int
    product_rate: float

    @property
    def total_s(self) -> float:
        """Seconds from the first score to the result."""
        return self.train_s + self.eval_s + self.save_s

    def to_json(self) -> dict[str, Any]:
        """The estimate as plain values."""
        return {**asdict(self), "total_s": self.total_s}


def lay_out(reader: Reader, examples: Sequence[Example], feed: Feed, tokens_per_pack: int) -> Layout:
    """Lay out the first steps of a run as they will be taken, and count up to all of them."""
    trial = Feed(feed.rows, feed.batch_size, feed.total, feed.seed, vary=feed.vary)
    steps: list[list[Pack]] = []
    rows = 0
    begun = time.perf_counter()
    for _ in range(min(STEPS_LAID_OUT, trial.steps)):
        numbers, chosen = trial.next_examples(examples)
        rows += len(numbers)
        steps.append(reader.build_packs(chosen, tokens_per_pack))
    data_s = (time.perf_counter() - begun) / len(steps)
    packs = [pack for step in steps for pack in step]
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
        most_packs=max(map(len, steps)),
        data_s=data_s,
        words=_count_words([pack.ids for pack in packs], int(lengths_of(examples).sum())),
    )


def _count_words(packs: Sequence[NDArray[Any]], tokens: int) -> int:
    """Return how many different tokens there are among so many, given some: their number grows as a power (Heaps, 1978)."""
    half = max(1, len(packs) // 2)
    first, seen = np.concatenate(packs[:half]), np.concatenate(packs)
    some, all_seen = len(np.unique(first)), len(np.unique(seen))
    if len(seen) >= tokens or len(seen) == len(first):
        return all_seen
    power = math.log(all_seen / some) / math.log(len(seen) / len(first))
    return int(all_seen * (tokens / len(seen)) ** power + 0.5)


@dataclass(frozen=True)
class Scoring:
    """How rows that are scored fall into packs: all tokens, from some of them laid out, and the largest pack."""

    tokens: int
    worst: Pack

    def within(self, training: Pack) -> bool:
        """Tell whether the largest pack can't fill more than `training` does, which goes backward too."""
        return len(self.worst) <= len(training) and len(self.worst.sources) <= len(training.sources)


def lay_out_scoring(reader: Reader, examples: Sequence[Example], tokens_per_pack: int) -> Scoring | None:
    """Lay out some rows as they will be scored, with the longest, and count up to all; None where there are none."""
    if not len(examples):
        return None
    some = [examples[index] for index in range(min(len(examples), ROWS_LAID_OUT))]
    packs = reader.build_packs(some, tokens_per_pack)
    lengths = lengths_of(examples)
    longest = reader.build_packs([examples[int(lengths.argmax())]], tokens_per_pack)
    scale = float(lengths.sum()) / max(1, sum(example.token_count for example in some))
    return Scoring(round(sum(map(len, packs)) * scale), max([*packs, *longest], key=len))


@dataclass(frozen=True)
class Memory:
    """The most bytes of each phase of a run, with what the process holds anyway (`used_bytes`).

    `growth` is that of a training step with the tokens of its largest pack; `fixed_bytes` are gradients and moments.
    """

    used_bytes: int
    fixed_bytes: int
    growth: Growth
    tokens: int
    others: Mapping[str, int]

    def phases(self, tokens: int | None = None) -> dict[str, int]:
        """Return the bytes of each phase, with packs of at most `tokens` (None: as they are)."""
        training = self.fixed_bytes + self.growth.bytes_at(tokens or self.tokens)
        return {name: self.used_bytes + value for name, value in {"training": training, **self.others}.items()}

    def peak(self, tokens: int | None = None) -> int:
        """Return the most bytes of any phase."""
        return max(self.phases(tokens).values())

    def planned(self, rehearsed_bytes: int) -> int:
        """Return the most bytes of any phase, given what the rehearsal of the worst step filled.

        What is foreseen of training takes the waste of small packs for that of large ones, and is mostly high; a rehearsal is
        a few passes, after which the allocator still keeps more, and is low. The truth is taken to lie midway.
        """
        foreseen = self.phases()
        midway = (foreseen.pop("training") + rehearsed_bytes) // 2
        return max(rehearsed_bytes, midway, *foreseen.values())


def measure_memory(engine: Engine, layout: Layout, scoring: Scoring | None, others: Mapping[str, int]) -> Memory:
    """Tell what each phase will fill, from the same work on less (`engine.memory`). No weight changes.

    A training step holds gradients, both moments and what its largest pack fills; scoring holds the moments and a pack
    forward; `others` are phases beside these, with what each fills for a while.
    """
    reader, device = engine.reader, engine.reader.device.type
    state = engine.random_state()
    head = getattr(reader, "head", None)
    for parameter in reader.model.parameters():
        parameter.detach().sum()  # weights in a mapped file are in memory from now on

    several = layout.most_packs > 1
    growth = measure_growth(engine.rehearse, layout.worst, device, head=head, begin=engine.discard, added=several)
    trained = sum(p.numel() * p.element_size() for p in engine.trainable.values() if p.grad is not None)
    trained += sum(rows.bytes_of(layout.words) for rows in engine.rows.values())
    engine.discard()
    moments = (STATES_PER_WEIGHT - 1) * trained
    others = {name: moments + value for name, value in others.items()}
    if scoring is not None:
        forward = measure_growth(reader.forward, scoring.worst, device, head=head)
        others["scoring"] = moments + forward.bytes_at(len(scoring.worst))
    engine.set_random_state(state)
    machine.trim_memory()
    used = machine.device_used_bytes(device)
    # Of a step with a single pack the gradients come into being while it goes backward, and are seen there.
    held = STATES_PER_WEIGHT if several else STATES_PER_WEIGHT - 1
    return Memory(used, held * trained, growth, len(layout.worst), others)


@dataclass(frozen=True)
class Pace:
    """Seconds, as measured: of training a token and of scoring one, of a step beside its packs; and bytes at the most."""

    train_s: float
    forward_s: float
    step_s: float
    peak_bytes: int


def rehearse(engine: Engine, layout: Layout, scoring: Scoring | None) -> Pace:
    """Take the worst step before the first: the largest pack, a usual one, the optimizer, the largest to be scored.

    No weight is changed, but all that a step fills is filled, so that what doesn't fit fails here. The first pass isn't
    timed, since it also pays for memory that is touched for the first time; of several, the quickest counts. To score goes
    forward quicker than training, which makes gradients of the losses on its way; of two packs the quicker counts, by its
    tokens.
    """
    device = engine.reader.device.type
    state = engine.random_state()
    machine.begin_peak(device)
    _timed(engine.rehearse, layout.worst, device)
    taken: list[float] = []
    while sum(taken) < TIMED_S and len(taken) < TIMED_MOST:
        if layout.most_packs == 1:
            engine.discard()
        taken.append(_timed(engine.rehearse, layout.usual, device))
    step_s = engine.rehearse_optim_step(layout.words)
    scored = [scoring.worst if scoring else layout.usual, layout.usual]
    forward_s = min(_timed(engine.reader.forward, pack, device) / len(pack) for pack in scored)
    train_s = min(taken) / len(layout.usual)
    engine.set_random_state(state)
    engine.clock.take()  # what was rehearsed isn't training's time
    return Pace(train_s, forward_s, step_s, machine.peak_since(device))


def _timed(work: Callable[[Pack], Any], pack: Pack, device: str) -> float:
    begun = time.perf_counter()
    work(pack)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun
