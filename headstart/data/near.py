"""Texts that say nearly the same: each is a set of shingles (three words in a row, hashed), compared by Jaccard similarity.

Rows like an earlier one are found by MinHash with LSH: `BANDS` x `BAND_ROWS` permutations, buckets by sorting, what
shares a bucket verified on the shingles themselves (Broder 1997; Leskovec, Rajaraman and Ullman, ch. 3). Two texts that
agree in 0.8 share a bucket with a probability of 1 - (1 - 0.8^5)^20 = 0.9996. Rows like a held-out one are found
without chance: held-out rows are few, so their shingles are an index.

Of a text only the `KEPT` shingles with the least hashes are kept: at most 1 KiB, and the comparison is exact up to that
many. What a twentieth of all rows say (a prompt's fixed words) doesn't tell rows apart and isn't compared.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

THRESHOLD = 0.8
WORDS = 3  # in a shingle
KEPT = 256
BANDS, BAND_ROWS = 20, 5
FIRST = 4  # of a bucket, with which the others in it are compared; so a bucket of n costs n and not n * n
COMMON, COMMON_LEAST, SAMPLE = 0.05, 10, 10_000
PART = 1 << 17  # shingles that are worked on at once
WHOLE = np.uint32(0xFFFFFFFF)
# Words, of scripts that write no spaces the characters, and signs; points and commas say nothing.
WORD = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
    r"|[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"
    r"|[^\w\s.,;:!?\"'()\u2018-\u201f\u2026\u3001\u3002]"
)

Ints = NDArray[np.int64]


def once_each(values: NDArray[Any]) -> NDArray[Any]:
    """Return each of many numbers once, ascending; by sorting, which takes a fiftieth of what `np.unique` does."""
    ordered = np.sort(values)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])] if len(ordered) else ordered


Hashes = NDArray[np.uint32]


class Likeness(NamedTuple):
    """For each row the number of a row like it, or -1, and their Jaccard similarity."""

    other: Ints
    share: NDArray[np.float64]


@dataclass(frozen=True)
class Shingles:
    """Shingles of rows: `hashes` [S], of each row distinct and rising, up to `ends` [N]; all up to `limits` [N] are there."""

    hashes: Hashes
    ends: Ints
    limits: Hashes

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def counts(self) -> Ints:
        """The shingles of each row."""
        return np.diff(self.ends, prepend=0)

    def parts(self) -> Iterator[tuple[int, int]]:
        """Yield ranges of rows with about `PART` shingles."""
        begin = 0
        while begin < len(self):
            done = int(self.ends[begin - 1]) if begin else 0
            end = max(begin + 1, int(np.searchsorted(self.ends, done + PART, side="right")))
            yield begin, end
            begin = end

    def take(self, rows: Ints) -> tuple[Hashes, Ints]:
        """Return the shingles of some rows, one behind the other, and for each the place of its row among them."""
        counts = self.counts[rows]
        before = np.cumsum(counts) - counts
        places = np.repeat(self.ends[rows] - counts - before, counts) + np.arange(int(counts.sum()))
        return self.hashes[places], np.repeat(np.arange(len(rows)), counts)


class Shingler:
    """Texts on their way to shingles; they come in parts."""

    def __init__(self) -> None:
        self._hashes, self._counts, self._limits = array("I"), array("q"), array("I")

    def add(self, texts: Sequence[str]) -> None:
        """Add texts."""
        rows, hashes = _hash_shingles(texts)
        order = once_each((rows << 32) | hashes)  # by row, then by hash
        rows, hashes = order >> 32, order & 0xFFFFFFFF
        counts = np.bincount(rows, minlength=len(texts))
        rank = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        limits = np.full(len(texts), WHOLE)
        last = (rank == KEPT - 1) & (counts[rows] > KEPT)
        limits[rows[last]] = hashes[last]
        self._hashes.frombytes(hashes[rank < KEPT].astype(np.uint32).tobytes())
        self._counts.frombytes(np.minimum(counts, KEPT).astype(np.int64).tobytes())
        self._limits.frombytes(limits.tobytes())

    def finish(self, rows: Ints | None = None) -> Shingles:
        """Return the shingles of all texts, or of some rows, without those that many of these share; nothing stays here."""
        ends = np.cumsum(np.frombuffer(self._counts, np.int64))
        found = Shingles(np.frombuffer(self._hashes, np.uint32), ends, np.frombuffer(self._limits, np.uint32))
        self._hashes, self._counts, self._limits = array("I"), array("q"), array("I")
        return _without_common(found, np.arange(len(found)) if rows is None else rows)


def shingle(texts: Iterable[str], size: int = 4096) -> Shingler:
    """Take texts, in parts."""
    shingler = Shingler()
    rest = iter(texts)
    while part := list(islice(rest, size)):
        shingler.add(part)
    return shingler


class Distinct(NamedTuple):
    """Which rows are the first to say what they say, in their order, and for each row the place of its first among them."""

    rows: Ints
    places: Ints

    @staticmethod
    def of(digests: NDArray[np.uint64]) -> Distinct:
        """Tell rows apart by the hash of what they say."""
        _, firsts, numbers = np.unique(digests, return_index=True, return_inverse=True)
        order = np.argsort(firsts)
        places = np.empty(len(order), np.int64)
        places[order] = np.arange(len(order))
        return Distinct(firsts[order], places[numbers])


def _hash_shingles(texts: Sequence[str]) -> tuple[Ints, Ints]:
    """Return every shingle of texts as a hash of 32 bits, with the number of its text; at least one of each."""
    words = [_words(text) for text in texts]
    counts = np.fromiter(map(len, words), np.int64, len(words))
    flat = np.fromiter((crc32(word.encode()) for word in chain.from_iterable(words)), np.uint64, int(counts.sum()))
    rows = np.repeat(np.arange(len(words)), counts)
    starts = np.flatnonzero(rows[: -(WORDS - 1)] == rows[WORDS - 1 :])
    mixed = np.zeros(len(starts), np.uint64)
    for place in range(WORDS):
        mixed = _mix(mixed + flat[starts + place])
    return rows[starts], (mixed >> np.uint64(32)).astype(np.int64)


def _words(text: str) -> list[str]:
    words = WORD.findall(text.casefold())
    return words + [""] * (WORDS - len(words)) if words else [text, *[""] * (WORDS - 1)]


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread each bit over all (the finalizer of SplitMix64)."""
    values = (values + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _without_common(shingles: Shingles, rows: Ints) -> Shingles:
    """Return some rows without what a `COMMON` part of them says; one that says nothing else becomes a shingle, of all it says."""
    sample = rows[:: max(1, -(-len(rows) // SAMPLE))]
    values, seen = np.unique(shingles.take(sample)[0], return_counts=True)
    least = min(max(COMMON_LEAST, COMMON * len(rows)), max(3, len(rows)))
    common = values[seen * len(rows) >= least * len(sample)]
    kept, counts = array("I"), array("q")
    for begin in range(0, len(rows), PART // KEPT):
        part = rows[begin : begin + PART // KEPT]
        hashes, places = shingles.take(part)
        stays = ~_among(hashes, common)
        firsts = np.flatnonzero(np.diff(places, prepend=-1))
        only = firsts[np.bincount(places[stays], minlength=len(part)) == 0]
        whole = _mix(np.add.reduceat(hashes.astype(np.uint64), firsts)) >> np.uint64(32)
        hashes[only], stays[only] = whole[places[only]], True
        kept.frombytes(hashes[stays].tobytes())
        counts.frombytes(np.bincount(places[stays], minlength=len(part)).astype(np.int64).tobytes())
    ends = np.cumsum(np.frombuffer(counts, np.int64))
    return Shingles(np.frombuffer(kept, np.uint32), ends, shingles.limits[rows])


def _among(hashes: Hashes, known: Hashes) -> NDArray[np.bool_]:
    """Tell which hashes are among `known`, which rise."""
    if not len(known):
        return np.zeros(len(hashes), np.bool_)
    places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    found: NDArray[np.bool_] = known[places] == hashes
    return found


def jaccard(shingles: Shingles, first: Ints, second: Ints) -> NDArray[np.float64]:
    """Return the Jaccard similarity of pairs of rows: of rows over `KEPT` shingles, an estimate from those with the least hashes."""
    limits = np.minimum(shingles.limits[first], shingles.limits[second])
    keys = []
    for rows in (first, second):
        hashes, pairs = shingles.take(rows)
        within = hashes <= limits[pairs]
        keys.append((pairs[within] << 32) | hashes[within])
    both = np.sort(np.concatenate(keys))
    shared = np.bincount(both[1:][both[1:] == both[:-1]] >> 32, minlength=len(first))
    whole = np.bincount(both >> 32, minlength=len(first)) - shared
    share: NDArray[np.float64] = shared / np.maximum(whole, 1)
    return share


def _verify(shingles: Shingles, first: Ints, second: Ints) -> NDArray[np.float64]:
    size = max(1, PART // KEPT)
    parts = [jaccard(shingles, first[n : n + size], second[n : n + size]) for n in range(0, len(first), size)]
    return np.concatenate([*parts, np.zeros(0)])


# --- rows like an earlier row ---


def find_alike(shingles: Shingles, threshold: float = THRESHOLD) -> Likeness:
    """Find for each row an earlier one that agrees with it in `threshold`, if there is one."""
    other, share = np.full(len(shingles), -1, np.int64), np.zeros(len(shingles))
    for keys in _band_keys(shingles):
        first, second = _candidates(keys, other < 0)
        shares = _verify(shingles, first, second)
        like = shares >= threshold
        # The earliest stays: of several for one row, the last written is the first of the bucket.
        first, second, shares = first[like][::-1], second[like][::-1], shares[like][::-1]
        other[second], share[second] = first, shares
    return Likeness(other, share)


def _band_keys(shingles: Shingles) -> NDArray[np.uint32]:
    """Return uint32 [BANDS, N]: of each band the hash of its `BAND_ROWS` minima (permutations x -> a x + b, high bits)."""
    random = np.random.default_rng(0)
    factors = random.integers(1 << 62, size=(2, BANDS, BAND_ROWS), dtype=np.uint64) | np.uint64(1)
    keys = np.zeros((BANDS, len(shingles)), np.uint32)
    for begin, end in shingles.parts():
        hashes = shingles.take(np.arange(begin, end))[0].astype(np.uint64)
        starts = np.cumsum(shingles.counts[begin:end]) - shingles.counts[begin:end]
        for band in range(BANDS):
            key = np.zeros(end - begin, np.uint64)
            for a, b in zip(*factors[:, band], strict=True):
                key = _mix(key + np.minimum.reduceat((hashes * a + b) >> np.uint64(32), starts))
            keys[band, begin:end] = key >> np.uint64(32)
    return keys


def _candidates(keys: NDArray[np.uint32], wanted: NDArray[np.bool_]) -> tuple[Ints, Ints]:
    """Return pairs of rows in one bucket, of which the second is `wanted`: with the `FIRST` of its bucket, and the one before."""
    order = np.argsort(keys, kind="stable")
    places = np.arange(len(order))
    begins = np.maximum.accumulate(np.where(np.diff(keys[order].astype(np.int64), prepend=-1) != 0, places, 0))
    firsts, seconds = [], []
    for partner in [*(begins + offset for offset in range(FIRST)), np.maximum(places - 1, begins + FIRST)]:
        pairs = (partner < places) & wanted[order]
        firsts.append(order[partner[pairs]])
        seconds.append(order[pairs])
    return np.concatenate(firsts), np.concatenate(seconds)


# --- rows like a held-out row ---


def find_leaks(shingles: Shingles, held: NDArray[np.bool_], threshold: float = THRESHOLD) -> Likeness:
    """Find for each row that isn't `held` the held-out one that it agrees with most, where that is in `threshold`."""
    other, share = np.full(len(shingles), -1, np.int64), np.zeros(len(shingles))
    rows = np.flatnonzero(held)
    if not len(rows) or held.all():
        return Likeness(other, share)
    hashes, places = shingles.take(rows)
    order = np.argsort(hashes, kind="stable")
    index, owners = hashes[order], rows[places[order]]
    for begin, end in shingles.parts():
        own, places = shingles.take(np.arange(begin, end))
        hits = np.bincount(places[_among(own, index)], minlength=end - begin)
        # In sketches of long rows fewer may be in common than is asked of the whole; what is let through is verified.
        likely = begin + np.flatnonzero((hits >= threshold / 2 * shingles.counts[begin:end]) & ~held[begin:end])
        first, second = _sharing(shingles, likely, index, owners, threshold / 2)
        shares = _verify(shingles, first, second)
        best = np.lexsort((-first, shares))  # the best is written last, of equals the earliest
        best = best[shares[best] >= threshold]
        other[second[best]], share[second[best]] = first[best], shares[best]
    return Likeness(other, share)


def _sharing(shingles: Shingles, rows: Ints, index: Hashes, owners: Ints, least: float) -> tuple[Ints, Ints]:
    """Return pairs (held-out row, row) that share a `least` part of the row's shingles."""
    firsts, seconds = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for row in rows.tolist():
        own, _ = shingles.take(np.array([row]))
        low, high = np.searchsorted(index, own, side="left"), np.searchsorted(index, own, side="right")
        found, counts = np.unique(
            np.concatenate([owners[a:b] for a, b in zip(low, high, strict=True)]), return_counts=True
        )
        found = found[counts >= least * len(own)]
        firsts.append(found)
        seconds.append(np.full(len(found), row))
    return np.concatenate(firsts), np.concatenate(seconds)


def find_near_leaks(shingles: Shingles, distinct: Distinct, held: NDArray[np.bool_]) -> Likeness:
    """Find for each row that isn't `held` a held-out one that says nearly the same; one that says the very same is no near one.

    `shingles` are those of the `distinct` rows.
    """
    first = np.full(len(shingles), -1, np.int64)  # of what is held out, the first row that is
    rows = np.flatnonzero(held)[::-1]
    first[distinct.places[rows]] = rows
    found = find_leaks(shingles, first >= 0)
    other = np.where(found.other >= 0, first[found.other], -1)
    return Likeness(other[distinct.places], found.share[distinct.places])
