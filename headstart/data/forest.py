"""Segments -> packs: a forest of shared prefixes, laid out flat, within a budget of tokens.

A pack holds the real tokens of one micro-batch. Segments that begin alike share the nodes of what they begin with, so
that it is computed once; a token sees the earlier tokens of its own node and all of its ancestors. Prefixes are shared
in blocks of `BLOCK` tokens: shorter ones save less than a further node costs.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.data.segments import Example, Image, Segment

BLOCK = 8

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Pack:
    """The tokens of one micro-batch as nodes of a forest, and what is predicted from which of them.

    `ids`, `positions`, `types` [T]: tokens, the place of each in its row, and which text of a pair it is of. `start`, `length`, `parent` [N]: the nodes, a
    parent before its children, -1 for a root. `sources` [P]: places in [T] from which something is predicted.
    `target_sources`, `target_ids`, `weights`, `target_segments` [L]: for each target its place in `sources`, its token, its
    weight (float32) and the number of its segment in the pack, in the order of `sources`. `begins`, `ends`,
    `segment_rows`, `segment_numbers`, `labels` [S]: of each segment the places of its first and last token, the number of
    its row in the call that built the pack, its number in that row, and what it is held against (its class, or [S, C]);
    `images` what is seen in place of tokens. `row_tokens`: tokens of the rows, each counted whole; T is less where prefixes
    are shared.
    """

    ids: Ints
    positions: Ints
    types: Ints
    start: Ints
    length: Ints
    parent: Ints
    sources: Ints
    target_sources: Ints
    target_ids: Ints
    weights: NDArray[np.float32]
    target_segments: Ints
    begins: Ints
    ends: Ints
    segment_rows: Ints
    segment_numbers: Ints
    labels: NDArray[Any]
    row_tokens: int
    images: tuple[Image | None, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def target_rows(self) -> Ints:
        """The number of each target's row, [L]."""
        return self.segment_rows[self.target_segments]


@dataclass(frozen=True, slots=True)
class _Item:
    """A segment on its way into a pack: its row, that row's number, its number there, and its place in the sorted order."""

    example: Example
    row: int
    number: int
    rank: int

    @property
    def segment(self) -> Segment:
        return self.example.segments[self.number]

    @property
    def label(self) -> int | NDArray[Any]:
        """What the segment is held against: what its row is, or what stands for it alone."""
        label = self.example.label
        return label[self.number] if isinstance(label, np.ndarray) and label.ndim == 2 else label


def build_packs(
    examples: Sequence[Example],
    tokens_per_pack: int,
    *,
    share: bool = True,
    one_row: bool = False,
    whole_rows: bool = False,
) -> list[Pack]:
    """Lay out the segments of `examples` in packs of at most `tokens_per_pack` tokens, shared prefixes counted once.

    A segment that is longer than the budget gets a pack of its own. `share=False` gives each segment a root of its
    own; `one_row` gives it a pack of its own too, for models that can't read a forest. With `whole_rows` all segments of a
    row lie in one pack, whatever the budget.
    """
    places = [(row, number) for row, example in enumerate(examples) for number in range(len(example.segments))]
    keys = {place: examples[place[0]].segments[place[1]] for place in places}
    places.sort(key=lambda place: (keys[place].first, keys[place].ids.astype(">i4").tobytes()))
    items = [_Item(examples[row], row, number, rank) for rank, (row, number) in enumerate(places)]
    if one_row:
        return [_lay_out([item], [0]) for item in items]
    if not share:
        common = [0] * len(items)
        return [_lay_out([items[rank] for rank in ranks], common) for ranks in _fill_up(items, tokens_per_pack)]
    common = [0] + [_common(a.segment, b.segment) for a, b in zip(items, items[1:], strict=False)]
    units: dict[int, list[int]] = {}
    for item in items:
        units.setdefault(item.row if whole_rows else item.rank, []).append(item.rank)
    packs = _distribute(items, list(units.values()), common, tokens_per_pack)
    return [_lay_out([items[rank] for rank in ranks], common) for ranks in packs]


def _common(a: Segment, b: Segment) -> int:
    """Return the length of the prefix that two segments share, in whole blocks."""
    if a.first != b.first:
        return 0
    n = min(len(a), len(b))
    differ = np.flatnonzero(a.ids[:n] != b.ids[:n])
    shared = int(differ[0]) if len(differ) else n
    return shared - shared % BLOCK


def _fill_up(items: Sequence[_Item], budget: int) -> list[list[int]]:
    """Put items that share nothing into packs, the longest first, each where it leaves the least room."""
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # of each pack: what is left, and its number; in order
    for item in sorted(items, key=lambda item: (-len(item.segment), item.rank)):
        size = len(item.segment)
        place = bisect.bisect_left(rooms, (size, -1))
        room, number = rooms.pop(place) if place < len(rooms) else (max(budget, size), len(packs))
        if number == len(packs):
            packs.append([])
        bisect.insort(packs[number], item.rank)
        bisect.insort(rooms, (room - size, number))
    return packs


def _distribute(
    items: Sequence[_Item], units: Sequence[Sequence[int]], common: Sequence[int], budget: int
) -> list[list[int]]:
    """Put units of items into packs, the longest first, each where it adds the fewest tokens and leaves the least room.

    A unit is the ranks of the items that stay together. `common[r]` is what the items of rank r-1 and r share; two ranks
    further apart share the least of what lies between. So only the neighbours of an item in a pack decide what it adds.
    """
    packs: list[list[int]] = []
    sizes: list[int] = []
    lengths = [len(item.segment) for item in items]
    for unit in sorted(units, key=lambda unit: (-sum(lengths[rank] for rank in unit), unit[0])):
        best: tuple[int, int] | None = None
        for number, ranks in enumerate(packs):
            added = _added(ranks, unit, lengths, common)
            room = budget - sizes[number] - added
            if room >= 0 and (best is None or (added, room) < best[:2]):
                best, chosen = (added, room), number
        if best is None:
            packs.append(list(unit))
            sizes.append(_added([], unit, lengths, common))
        else:
            packs[chosen] = sorted([*packs[chosen], *unit])
            sizes[chosen] += best[0]
    return packs


def _added(ranks: Sequence[int], unit: Sequence[int], lengths: Sequence[int], common: Sequence[int]) -> int:
    """Return how many tokens a unit adds to a pack that holds `ranks`: each item what no other shares with it."""
    if len(unit) == 1:
        return lengths[unit[0]] - _shared_with(ranks, unit[0], common)
    here, added = list(ranks), 0
    for rank in unit:
        added += lengths[rank] - _shared_with(here, rank, common)
        bisect.insort(here, rank)
    return added


def _shared_with(ranks: Sequence[int], rank: int, common: Sequence[int]) -> int:
    place = bisect.bisect_left(ranks, rank)
    before = min(common[ranks[place - 1] + 1 : rank + 1]) if place else 0
    after = min(common[rank + 1 : ranks[place] + 1]) if place < len(ranks) else 0
    return max(before, after)


class _Layout:
    """A pack that grows node by node."""

    def __init__(self) -> None:
        self.ids: list[NDArray[np.int32]] = []
        self.positions: list[Ints] = []
        self.types: list[NDArray[np.int32]] = []
        self.start: list[int] = []
        self.parent: list[int] = []
        self.tokens = 0

    def add(self, segment: Segment, begin: int, end: int, parent: int) -> int:
        """Append tokens [begin, end) of a segment as a node and return its number."""
        self.ids.append(segment.ids[begin:end])
        self.positions.append(segment.first + np.arange(begin, end, dtype=np.int64))
        self.types.append(np.zeros(end - begin, np.int32) if segment.types is None else segment.types[begin:end])
        self.start.append(self.tokens)
        self.parent.append(parent)
        self.tokens += end - begin
        return len(self.start) - 1

    def path(self, node: int) -> Ints:
        """Return the places of the tokens from the root to the end of `node`."""
        parts = []
        while node >= 0:
            parts.append(np.arange(self.start[node], self.start[node] + len(self.ids[node])))
            node = self.parent[node]
        return np.concatenate(parts[::-1])


def _lay_out(items: Sequence[_Item], common: Sequence[int]) -> Pack:
    layout = _Layout()
    shared = [0] + [min(common[a.rank + 1 : b.rank + 1]) for a, b in zip(items, items[1:], strict=False)]
    leaves: dict[int, int] = {}
    pending = [(0, len(items), 0, -1)]
    while pending:
        low, high, depth, parent = pending.pop()
        if high - low == 1:
            end = len(items[low].segment)
            leaves[low] = layout.add(items[low].segment, depth, end, parent) if end > depth else parent
            continue
        least = min(shared[low + 1 : high])
        if least > depth:
            node = layout.add(items[low].segment, depth, least, parent)
            pending.append((low, high, least, node))
            continue
        cuts = [low, *(place for place in range(low + 1, high) if shared[place] <= depth), high]
        # Last in, first out: the groups go on the stack backwards, so that nodes stand in sorted order.
        pending += [(a, b, depth, parent) for a, b in zip(cuts, cuts[1:], strict=False)][::-1]
    return _finish(layout, items, leaves)


def _finish(layout: _Layout, items: Sequence[_Item], leaves: dict[int, int]) -> Pack:
    places, ids, weights, owners, begins, ends = [], [], [], [], [], []
    for number, item in enumerate(items):
        path = layout.path(leaves[number])
        begins.append(path[0])
        ends.append(path[len(item.segment) - 1])
        targets = np.flatnonzero(item.segment.weights)
        here = item.segment.targets
        places.append(path[targets - 1] if here is None else path[targets])
        ids.append((item.segment.ids if here is None else here)[targets].astype(np.int64))
        weights.append(item.segment.weights[targets])
        owners.append(np.full(len(targets), number, np.int64))
    order = np.argsort(np.concatenate(places), kind="stable")
    sources, target_sources = np.unique(np.concatenate(places)[order], return_inverse=True)
    return Pack(
        ids=np.concatenate(layout.ids).astype(np.int64),
        positions=np.concatenate(layout.positions),
        types=np.concatenate(layout.types).astype(np.int64),
        start=np.array(layout.start, np.int64),
        length=np.array([len(part) for part in layout.ids], np.int64),
        parent=np.array(layout.parent, np.int64),
        sources=sources.astype(np.int64),
        target_sources=target_sources.astype(np.int64),
        target_ids=np.concatenate(ids)[order],
        weights=np.concatenate(weights)[order],
        target_segments=np.concatenate(owners)[order],
        begins=np.array(begins, np.int64),
        ends=np.array(ends, np.int64),
        segment_rows=np.array([item.row for item in items], np.int64),
        segment_numbers=np.array([item.number for item in items], np.int64),
        labels=np.array([item.label for item in items]),
        row_tokens=sum(len(item.segment) for item in items),
        images=tuple(item.example.image for item in items),
    )
