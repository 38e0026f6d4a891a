"""How a pack is cut for attention: blocks of queries and the keys they see, or tiles, where rows are short and share nothing."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

QUERIES_AT_ONCE, QUERIES_LEAST = 64, 16
STEP = 8  # blocks are of whole steps, so that threads can share them evenly
TILE_WASTE = 2.0  # times the scores that are seen, which tiles may have at most

Ints = NDArray[np.int64]


class Block(NamedTuple):
    """Queries [begin, end) of a pack, the runs of keys that they see, and what to add to the scores of keys [low, high).

    `mask` is 0 where a query sees a key and -inf elsewhere, [end - begin, high - low]; None where each sees all of them.
    """

    begin: int
    end: int
    keys: tuple[tuple[int, int], ...]
    mask: Tensor | None = None
    low: int = 0
    high: int = 0

    def to(self, device: torch.device) -> Block:
        """Return the same on a device."""
        return self if self.mask is None else self._replace(mask=self.mask.to(device))

    def hide(self, scores: Tensor) -> None:
        """Leave of scores [K, G n, m] those that are seen."""
        if self.mask is not None:
            scores.view(-1, self.end - self.begin, scores.shape[-1])[..., self.low : self.high] += self.mask


class Table:
    """Blocks as kernels in C read them: `fields` [B, 8], `runs` of keys [R, 2], `places` [B] in what dropout keeps, of one head.

    Their masks lie turned: keys by queries.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        turned = [None if block.mask is None else block.mask.t().contiguous() for block in blocks]
        self._masks = turned  # which are read where they lie
        counts = np.array([len(block.keys) for block in blocks], np.int64)
        self.runs = np.array([run for block in blocks for run in block.keys], np.int64).reshape(-1, 2)
        seen = [sum(end - begin for begin, end in block.keys) for block in blocks]
        self.fields = np.empty((len(blocks), 8), np.int64)
        columns = blocks, seen, counts.cumsum() - counts, counts, turned
        for row, block, m, first, runs, mask in zip(self.fields, *columns, strict=True):
            place = 0 if mask is None else mask.data_ptr()
            row[:] = block.begin, block.end, m, first, runs, block.low, block.high, place
        scores = (self.fields[:, 1] - self.fields[:, 0]) * self.fields[:, 2]
        self._reached = scores.cumsum()
        self._edges: dict[int, Ints] = {}
        self.places = self._reached - scores

    def edges(self, parts: int) -> Ints:
        """Return where the blocks are cut into parts of about as many scores, [parts + 1]."""
        if parts not in self._edges:  # every layer asks
            shares = np.arange(1, parts) * (self._reached.max(initial=0) / parts)
            found = [[0], np.searchsorted(self._reached, shares), [len(self.fields)]]
            self._edges[parts] = np.concatenate(found).astype(np.int64)
        return self._edges[parts]


class Blocks(list[Block]):
    """The blocks of a pack, in the order of their queries."""

    @functools.cached_property
    def table(self) -> Table:
        """The blocks as kernels read them, as long as these are there."""
        return Table(self)


@dataclass(frozen=True)
class Nodes:
    """A forest as arrays: `start`, `length`, `parent` [N] of nodes, `positions` [T] and `owner` [T] (its node) of tokens."""

    start: Ints
    length: Ints
    parent: Ints
    positions: Ints
    owner: Ints

    @staticmethod
    def of(length: Sequence[int], parent: Sequence[int], positions: Ints) -> Nodes:
        """Return the nodes that lie one behind the other."""
        lengths = np.asarray(length, np.int64)
        owner = np.repeat(np.arange(len(lengths)), lengths)
        return Nodes(np.cumsum(lengths) - lengths, lengths, np.asarray(parent, np.int64), positions, owner)

    def path(self, node: int) -> list[int]:
        """Return a node and its ancestors, from the root on."""
        found = []
        while node >= 0:
            found.append(node)
            node = int(self.parent[node])
        return found[::-1]


def block_size(nodes: Nodes) -> int:
    """Return how many queries a block should have at most: of short rows that share nothing, no more than the longest row has.

    What rows of one block see of each other is computed and hidden.
    """
    longest = int(nodes.length.max(initial=0))
    if (nodes.parent >= 0).any():
        return QUERIES_AT_ONCE
    return min(QUERIES_AT_ONCE, max(QUERIES_LEAST, -(-longest // STEP) * STEP))


def cut_blocks(
    nodes: Nodes,
    window: int = 0,
    causal: bool = True,
    size: int = QUERIES_AT_ONCE,
    chosen: Ints | None = None,
) -> Blocks:
    """Cut a pack into blocks of at most `size` queries. `window` is how many last positions are seen, 0 for all.

    With `chosen` [P], ascending, only these tokens are queries, and a block's `begin` and `end` are places among them.

    Raises ValueError for a window that looks both ways: architectures don't agree on what it means.
    """
    places = _places(nodes, window, causal, chosen)
    counts = np.bincount(nodes.owner[places], minlength=len(nodes.start))
    cuts = _cuts(counts, nodes.parent, size)
    return Blocks(_build_block(nodes, places[begin:end], begin, window, causal) for begin, end in cuts)


def _places(nodes: Nodes, window: int, causal: bool, chosen: Ints | None) -> Ints:
    """Return the tokens that are queries. Raises ValueError for a window that looks both ways."""
    if window and not causal:
        raise ValueError("a window that looks both ways is not known here")
    return np.arange(len(nodes.owner)) if chosen is None else chosen


def _cuts(counts: Ints, parents: Ints, size: int) -> list[tuple[int, int]]:
    """Cut nodes of many queries; put those of few together where they see the same beside themselves: siblings, or roots."""
    cuts: list[tuple[int, int]] = []
    open_parent = None  # of the block that may still grow
    end = 0
    for length, parent in zip(counts.tolist(), parents.tolist(), strict=True):
        begin, end = end, end + length
        if cuts and length < size and open_parent == parent and end - cuts[-1][0] <= size and cuts[-1][1] == begin:
            cuts[-1] = (cuts[-1][0], end)
            continue
        even = -(-length // max(1, -(-length // size)))
        step = max(STEP, -(-even // STEP) * STEP)
        edges = [*range(begin, end, step), end]
        cuts += zip(edges, edges[1:], strict=False)
        open_parent = parent if length < size else None
    return [cut for cut in cuts if cut[1] > cut[0]]


def _build_block(nodes: Nodes, places: Ints, begin: int, window: int, causal: bool) -> Block:
    end = begin + len(places)
    owners = range(int(nodes.owner[places[0]]), int(nodes.owner[places[-1]]) + 1)
    paths = {node: nodes.path(node) for node in owners}
    visible = sorted({node for path in paths.values() for node in path})
    stops = [int(nodes.start[node] + nodes.length[node]) for node in visible]
    stops = [min(stop, int(places[-1]) + 1) for stop in stops] if causal else stops
    keys = np.concatenate([np.arange(nodes.start[node], stop) for node, stop in zip(visible, stops, strict=True)])
    sees = np.zeros((len(owners), len(nodes.start)), np.bool_)
    for row, path in enumerate(paths.values()):
        sees[row, path] = True
    seen = sees[nodes.owner[places] - owners[0]][:, nodes.owner[keys]]
    distance = nodes.positions[places, None] - nodes.positions[None, keys]
    if causal:
        seen &= distance >= 0
    if window:
        seen &= distance < window
    used = seen.any(0)
    keys, seen = keys[used], seen[:, used]
    breaks = np.flatnonzero(np.diff(keys) != 1) + 1
    runs = tuple((int(run[0]), int(run[-1]) + 1) for run in np.split(keys, breaks))
    partly = np.flatnonzero(~seen.all(0))
    if not len(partly):
        return Block(begin, end, runs)
    low, high = int(partly[0]), int(partly[-1]) + 1
    mask = np.ascontiguousarray(np.where(seen[:, low:high], np.float32(0), np.float32(-math.inf)))
    return Block(begin, end, runs, torch.from_numpy(mask), low, high)


@dataclass(frozen=True)
class Tiles:
    """Rows that share nothing, several to a tile of `n` queries and `m` keys: B tiles, one product for all of them.

    `queries` [B n] and `keys` [B m] are the tokens in their slots, 0 where there is none, queries by their places among those that
    ask; `empty` are the slots of queries without a token. `asked` [P] and `held` [T] are the slots of the tokens; `unseen` are tokens that are nobody's key.
    `mask` [B, n, m] is 0 where a query sees a key and -inf elsewhere, and 0 for slots of queries without a token.
    """

    n: int
    m: int
    queries: Tensor
    keys: Tensor
    empty: Tensor
    asked: Tensor
    held: Tensor
    unseen: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.mask)

    def to(self, device: torch.device) -> Tiles:
        """Return the same on a device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in TENSORS})

    def hide(self, scores: Tensor) -> None:
        """Leave of scores [K B, G n, m] those that are seen."""
        scores.view(-1, len(self), scores.shape[1] // self.n, self.n, self.m).add_(self.mask[:, None])


TENSORS = ("queries", "keys", "empty", "asked", "held", "unseen", "mask")
Cut = Blocks | Tiles


def lay_tiles(nodes: Nodes, window: int, causal: bool, size: int, chosen: Ints | None = None) -> Tiles | None:
    """Return a pack as tiles of at most `size` keys; the rest is as in `cut_blocks`.

    None where rows share tokens, where one is longer than a tile, and where there would be one tile, or most of them empty. Where
    few tokens ask, tiles may be as empty as if all did: blocks would hold their queries against the keys of many rows.
    """
    places = _places(nodes, window, causal, chosen)
    if (nodes.parent >= 0).any() or nodes.length.max(initial=0) > size:
        return None
    counts = np.bincount(nodes.owner[places], minlength=len(nodes.length))
    lengths = np.where(counts > 0, nodes.length, 0)
    tile = _fill(lengths, size)
    tokens = np.flatnonzero(counts[nodes.owner] > 0)
    asked, n, _ = _slots(tile, counts, nodes.owner[places])
    slots, m, sizes = _slots(tile, lengths, nodes.owner[tokens])
    count = len(sizes)
    if count < 2 or count * n * m > TILE_WASTE * (sizes * sizes).sum():
        return None
    queries, keys = np.full(count * n, -1), np.full(count * m, -1)
    queries[asked], keys[slots] = np.arange(len(places)), tokens
    held = np.full(len(nodes.owner), -1)
    held[tokens] = slots
    rows, others = places[queries].reshape(count, n, 1), keys.reshape(count, 1, m)
    seen = (nodes.owner[rows] == nodes.owner[others]) & (others >= 0)
    if causal:
        distance = nodes.positions[rows] - nodes.positions[others]
        seen &= (distance >= 0) & (distance < (window or math.inf))
    seen |= queries.reshape(rows.shape) < 0
    arrays = {
        "queries": queries.clip(0),
        "keys": keys.clip(0),
        "empty": np.flatnonzero(queries < 0),
        "asked": asked,
        "held": held.clip(0),
        "unseen": np.flatnonzero(held < 0),
        "mask": np.where(seen, np.float32(0), np.float32(-math.inf)),
    }
    return Tiles(n=n, m=m, **{name: torch.from_numpy(array) for name, array in arrays.items()})


def _fill(lengths: Ints, size: int) -> Ints:
    """Return the tile of each row: the longest rows first, each to where it leaves the least room. Empty rows need none: 0."""
    tile = np.zeros(len(lengths), np.int64)
    with_room: list[list[int]] = [[] for _ in range(size + 1)]  # the tiles that have so many slots left
    tiles = 0
    for row in np.argsort(-lengths, kind="stable")[: np.count_nonzero(lengths)].tolist():
        length = int(lengths[row])
        room = next((room for room in range(length, size + 1) if with_room[room]), size)
        if not with_room[room]:
            with_room[room].append(tiles)
            tiles += 1
        tile[row] = with_room[room].pop()
        with_room[room - length].append(tile[row])
    return tile


def _slots(tile: Ints, counts: Ints, owner: Ints) -> tuple[Ints, int, Ints]:
    """Lay what rows have `counts` of, `owner` by `owner`, into their tiles, row behind row.

    Return the slot of each in all tiles, how many slots a tile has, and how many of them are filled in each.
    """
    filled = np.bincount(tile, counts).astype(np.int64)
    order = np.argsort(tile, kind="stable")
    laid, width = counts[order], int(filled.max())
    first = np.empty(len(tile), np.int64)
    first[order] = np.cumsum(laid) - laid + (np.arange(len(filled)) * width - np.cumsum(filled) + filled)[tile[order]]
    first -= np.cumsum(counts) - counts
    return first[owner] + np.arange(len(owner)), width, filled
