"""The order of rows: which are held out, and which come in which step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from headstart.data.records import Record
from headstart.data.segments import Example
from headstart.errors import DataError, Problem

WATCH_FRAC = 0.25
WATCH_MIN, WATCH_MAX = 8, 64
HELD_OUT_MIN = 5


def content_hash(record: Record) -> str:
    """Return a hash of what a row says: equal for equal rows, wherever they stand."""
    return f"{digest_of(record.content):016x}"


def digest_of(text: str) -> int:
    """Return a hash of a text, of 64 bits."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def hashes_of(records: Sequence[Record]) -> list[str]:
    """Return the hash of each record; of records on disk it is known."""
    known = getattr(records, "hashes", None)
    return known if known is not None else [content_hash(record) for record in records]


@dataclass(frozen=True)
class Keys:
    """What decides where rows go: `digests` uint64 [N], the hash of what each says, and `sides` float64 [N] in [0, 1)."""

    digests: NDArray[np.uint64]
    sides: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.digests)

    @staticmethod
    def of(records: Sequence[Record]) -> Keys:
        """Return the keys of records."""
        hashes = hashes_of(records)
        sides = [_side(record.group, digest) for record, digest in zip(records, hashes, strict=True)]
        return Keys(np.array([int(digest, 16) for digest in hashes], np.uint64), np.array(sides, np.float64))


def choose_held_out(count: int) -> float:
    """Return the part of `count` rows that is held out where the user didn't say."""
    return 0.2 if count < 150 else 0.1 if count < 2_000 else 0.05 if count < 10_000 else 0.02


def split_rows(records: Sequence[Record], held_out: float) -> tuple[list[Record], list[Record]]:
    """Split rows into those to train on and those held out, as `split_sides` says."""
    held = split_sides(np.array([side_of(record) for record in records], np.float64), held_out)
    return (
        [record for record, aside in zip(records, held, strict=True) if not aside],
        [record for record, aside in zip(records, held, strict=True) if aside],
    )


def split_sides(sides: NDArray[np.float64], held_out: float) -> NDArray[np.bool_]:
    """Tell which rows are held out, by a hash of their content or their group.

    `held_out` is a part below 1 or a number of rows. Under a part, a row's side never changes when rows are added; equal
    rows and rows of one group are always on the same side. Where a part gives fewer than `HELD_OUT_MIN` rows (of
    few rows: half of them), those with the least hashes are taken.

    Raises DataError where one of the sides would be empty.
    """
    count = len(sides)
    least = min(HELD_OUT_MIN, count // 2)
    wanted = max(least, round(held_out * count)) if held_out < 1 else int(held_out)
    limit = held_out if held_out < 1 else 0.0
    if (sides < limit).sum() < min(wanted, least) or held_out >= 1:
        limit = math.nextafter(float(np.sort(sides)[wanted - 1]), 2.0) if 0 < wanted <= count else 2.0
    held: NDArray[np.bool_] = sides < limit
    aside = int(held.sum())
    if not 0 < aside < count:
        cure = "add rows, hold out fewer (data.held_out), or give rows to score on (--eval-data)"
        raise DataError(Problem("split.too_small", f"of {count} rows, {aside} would be held out", "", cure))
    return held


def side_of(record: Record) -> float:
    """Return a number between 0 and 1 that follows from what a row says, or from its group: the side that it is on."""
    return _side(record.group, content_hash(record))


def _side(group: str | None, digest: str) -> float:
    return _unit_hash(group if group is not None else digest)


def split_watch(count: int) -> int:
    """Return how many of `count` held-out rows are watched during training; the others are left for the proof.

    The best checkpoint is chosen on the watched rows, so that the rows that decide the verdict decided nothing before.
    """
    if count < 2 * WATCH_MIN:
        return 0
    return min(WATCH_MAX, max(WATCH_MIN, int(count * WATCH_FRAC)))


def _unit_hash(text: str) -> float:
    return (digest_of(text) >> 11) / (1 << 53)


@dataclass
class Feed:
    """Rows in steps: a new permutation for each epoch, exactly `batch_size` rows a step, the last step what is left.

    Steps run across the ends of epochs, so that every step but the last has its full size. `seen` is the cursor. `vary`
    changes a row each time that it is seen, by its place in the run: what is masked, how an image is cut.
    """

    rows: int
    batch_size: int
    total: int
    seed: int
    seen: int = 0
    vary: Callable[[Example, int], Example] | None = None
    _current: tuple[int, NDArray[np.int64]] | None = field(default=None, init=False, repr=False)

    @property
    def steps(self) -> int:
        """Steps from the first row to the last."""
        return math.ceil(self.total / self.batch_size)

    @property
    def epoch(self) -> float:
        """How often each row was seen, on average."""
        return self.seen / self.rows

    def next_examples(self, examples: Sequence[Example]) -> tuple[list[int], list[Example]]:
        """Return the numbers of the rows of the next step and the rows as they are seen there; move the cursor."""
        begin = self.seen
        rows = self.next_rows()
        return rows, self.varied([examples[row] for row in rows], begin)

    def varied(self, examples: Sequence[Example], begin: int = 0) -> list[Example]:
        """Return rows as they are seen from a place in the run on."""
        if self.vary is None:
            return list(examples)
        return [self.vary(example, begin + number) for number, example in enumerate(examples)]

    def next_rows(self) -> list[int]:
        """Return the numbers of the rows of the next step and move the cursor; empty at the end."""
        end = min(self.seen + self.batch_size, self.total)
        chosen = [int(self._order(place // self.rows)[place % self.rows]) for place in range(self.seen, end)]
        self.seen = end
        return chosen

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if self._current is None or self._current[0] != epoch:
            self._current = (epoch, np.random.default_rng((self.seed, epoch)).permutation(self.rows))
        return self._current[1]
