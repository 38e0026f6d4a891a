"""What a run knew, for another that goes on from it: its rows by what they were for, and which of them are learned again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from headstart.data.feed import Keys, digest_of, hashes_of
from headstart.data.labels import Labels
from headstart.data.records import Record

if TYPE_CHECKING:
    from headstart.data.prepare import Formed

Digests = NDArray[np.uint64]


@dataclass(frozen=True)
class Old:
    """A run's rows by what they were for, and what it made of those of its proof: a metric's name -> its difference.

    `formed` are its files.
    """

    name: str
    train: Sequence[Record]
    watch: Sequence[Record]
    proof: Sequence[Record]
    formed: Sequence[Formed] = ()
    gains: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Known:
    """What a model learned before: the rows of the runs that it comes from, how many of them are learned again beside each
    new one (`weight`), and what the model tells (`labels`).
    """

    olds: Sequence[Old] = ()
    weight: float = 0.0
    labels: Labels | None = None

    @property
    def held(self) -> list[Record]:
        """The rows that were held out then: they are never trained on."""
        return [record for old in self.olds for part in (old.watch, old.proof) for record in part]

    @property
    def trained(self) -> list[Record]:
        """The rows that were trained on then: they can't be held out any more."""
        return [record for old in self.olds for record in old.train]

    @property
    def held_digests(self) -> Digests:
        """The hashes of what was held out."""
        return Keys.of(self.held).digests

    @property
    def trained_digests(self) -> Digests:
        """The hashes of what was trained on."""
        return Keys.of(self.trained).digests

    def replayed(self, own: int, held: Sequence[Sequence[Record]], seed: int) -> list[list[Record]]:
        """Return which rows of each run are learned again beside `own` new ones, none of which is held out (`held`, in parts).

        They follow from seed and content alone: those of the least hashes, of all runs together, each once.
        """
        without = {digest for part in (*held, self.held) for digest in hashes_of(part)}
        pool: dict[str, tuple[int, Record]] = {}
        for number, old in enumerate(self.olds):
            for digest, record in zip(hashes_of(old.train), old.train, strict=True):
                if digest not in without:
                    pool.setdefault(digest, (number, record))
        wanted = max(1, round(self.weight * own)) if self.weight else 0
        chosen = sorted(pool, key=lambda digest: digest_of(f"{seed} {digest}"))[:wanted]
        found: list[list[Record]] = [[] for _ in self.olds]
        for number, record in (pool[digest] for digest in chosen):
            found[number].append(record)
        return found


UNKNOWN = Known()  # of a model that comes from no run, or from one that isn't mixed in
