"""Which tokens of a pack see each other, in three numbers a token and no table of T x T.

A forest is walked once, parents before children. A token's `place` is its number in that walk, `end` the number behind
the last token below its node. A query sees a key of its own node up to itself, and of every ancestor, exactly where

    place[key] <= place[query] < end[key]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 128  # tokens of a side of the blocks that FlexAttention skips or computes

Ints = NDArray[np.int32]


def walk(lengths: Sequence[int], parents: Sequence[int]) -> Ints:
    """Return of each token its place in a walk of the forest, that of its node's first token, and `end`, [3, T]."""
    below = list(lengths)
    for node in reversed(range(len(below))):
        if parents[node] >= 0:
            below[parents[node]] += below[node]
    begin: list[int] = []
    free: list[int] = []  # of each node, where the next below it begins
    roots = 0  # where the next root begins
    for length, size, parent in zip(lengths, below, parents, strict=True):
        place = free[parent] if parent >= 0 else roots
        if parent >= 0:
            free[parent] += size
        else:
            roots += size
        begin.append(place)
        free.append(place + length)
    first = np.repeat(np.array(begin, np.int32), lengths)
    starts = np.repeat(np.cumsum([0, *lengths[:-1]], dtype=np.int32), lengths)
    place_in_node = np.arange(len(first), dtype=np.int32) - starts
    end = np.repeat(np.array(begin, np.int32) + np.array(below, np.int32), lengths)
    return np.stack([first + place_in_node, first, end]).astype(np.int32)


def longest_row(lengths: Sequence[int], parents: Sequence[int]) -> int:
    """Return the most tokens from a root to the end of a node."""
    ends: list[int] = []
    for length, parent in zip(lengths, parents, strict=True):
        ends.append(length + (ends[parent] if parent >= 0 else 0))
    return max(ends)


def row_ends(lengths: Sequence[int]) -> Tensor:
    """Return where rows end in a pack that shares nothing, from 0 on (`cu_seqlens`), int32 [N + 1]."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@dataclass(frozen=True)
class Sight:
    """Which keys a query sees: `begin[key] <= place[query] < end[key]`, and `position[key] >= earliest[query]`.

    Each is int32 [T]; the latter two are None where there is no window.
    """

    begin: Tensor
    place: Tensor
    end: Tensor
    position: Tensor | None = None
    earliest: Tensor | None = None

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Tell which of the queries see which of the keys: numbers of tokens in, bool out."""
        seen = (self.begin[key] <= self.place[query]) & (self.place[query] < self.end[key])
        if self.position is None or self.earliest is None:
            return seen
        return seen & (self.position[key] >= self.earliest[query])


def build_sight(walked: Tensor, positions: Tensor, window: int, causal: bool) -> Sight:
    """Return who sees whom; `walked` as `walk` gives it, `positions` [T], both on the device.

    Both ways, a token sees all of its node. Raises ValueError for a window that looks both ways.
    """
    place, first, end = walked.unbind()
    if not causal:
        if window:
            raise ValueError("a window that looks both ways is not known here")
        return Sight(first, place, end)
    if not window:
        return Sight(place, place, end)
    position = positions.to(torch.int32)
    return Sight(place, place, end, position, position - (window - 1))


def find_blocks(sight: Sight) -> tuple[Tensor, Tensor]:
    """Return the blocks of queries and keys in which some see each other, and those in which all do, bool [B, B].

    From the least and the greatest number of each block alone, so the first may hold blocks in which none does; in the
    order of a walk, as packs have it, and without a window it is exact.
    """
    place_low, place_high = _edges(sight.place)
    begin_low, begin_high = _edges(sight.begin)
    end_low, end_high = _edges(sight.end)
    some = (begin_low <= place_high[:, None]) & (place_low[:, None] < end_high)
    every = (begin_high <= place_low[:, None]) & (place_high[:, None] < end_low)
    if sight.position is not None and sight.earliest is not None:
        position_low, position_high = _edges(sight.position)
        earliest_low, earliest_high = _edges(sight.earliest)
        some = some & (position_high >= earliest_low[:, None])
        every = every & (position_low >= earliest_high[:, None])
    if len(sight.place) % BLOCK:  # the last block is not whole
        every[-1, :] = False
        every[:, -1] = False
    return some, every


def _edges(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest value of each block, [B] each."""
    missing = -len(values) % BLOCK
    blocks = torch.cat([values, values[-1:].expand(missing)]).view(-1, BLOCK)
    return blocks.amin(1), blocks.amax(1)
