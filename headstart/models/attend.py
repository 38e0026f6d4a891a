"""Attention by matrix products: the queries of a pack in blocks, each against the keys that any of them sees.

On a CPU this runs nearer to the rate of the products than the fused kernels do, and it reads any forest alike: a long row is
cut into blocks of queries, short rows that stand beside each other share one. What a block's queries don't see is masked,
where there is such a thing at all. The weights are made anew in the backward pass, so nothing of size [T, T] is kept.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

QUERIES_AT_ONCE = 64
_depth = [0]  # of `one_by_one`
STEP = 8  # blocks are of whole steps, so that threads can share them evenly

Ints = NDArray[np.int64]


@contextlib.contextmanager
def one_by_one() -> Iterator[None]:
    """Mark operations as those of single blocks: how many there are depends on the pack, and what they fill is small."""
    _depth[0] += 1
    try:
        yield
    finally:
        _depth[0] -= 1


def in_blocks() -> bool:
    """Tell whether operations are those of single blocks."""
    return bool(_depth[0])


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


def cut_blocks(
    nodes: Nodes,
    window: int = 0,
    causal: bool = True,
    size: int = QUERIES_AT_ONCE,
    chosen: Ints | None = None,
) -> list[Block]:
    """Cut a pack into blocks of at most `size` queries. `window` is how many last positions are seen, 0 for all.

    With `chosen` [P], ascending, only these tokens are queries, and a block's `begin` and `end` are places among them.

    Raises ValueError for a window that looks both ways: architectures don't agree on what it means.
    """
    if window and not causal:
        raise ValueError("a window that looks both ways is not known here")
    places = np.arange(len(nodes.owner)) if chosen is None else chosen
    counts = np.bincount(nodes.owner[places], minlength=len(nodes.start))
    cuts = _cuts(counts, nodes.parent, size)
    return [_build_block(nodes, places[begin:end], begin, window, causal) for begin, end in cuts]


def _cuts(counts: Ints, parents: Ints, size: int) -> list[tuple[int, int]]:
    """Cut nodes of many queries; put those of few together where they see the same beside themselves: siblings, or roots."""
    cuts: list[tuple[int, int]] = []
    open_parent = None  # of the block that may still grow
    end = 0
    for length, parent in zip(counts.tolist(), parents.tolist(), strict=True):
        begin, end = end, end + length
        if length < size and open_parent == parent and end - cuts[-1][0] <= size and cuts[-1][1] == begin:
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
    mask = np.where(seen[:, low:high], np.float32(0), np.float32(-math.inf))
    return Block(begin, end, runs, torch.from_numpy(mask), low, high)


@dataclass(frozen=True)
class Rule:
    """How scores become weights: times `scale`, bent by `softcap` where there is one, dropped out."""

    scale: float
    softcap: float | None = None
    dropout: float = 0.0


def in_one_type(*heads: Tensor) -> list[Tensor]:
    """Return queries, keys and values in the type that they are computed in: that of autocast, else of the values.

    Autocast doesn't look into functions of ours, and rotary embeddings leave queries and keys wider than values.
    """
    value = heads[-1]
    dtype = value.dtype
    if torch.is_autocast_enabled(value.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(value.device.type)
    return [part.to(dtype) for part in heads]


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block], rule: Rule) -> Tensor:
    """Attend within blocks. `q` [T, H, d], `k` and `v` [T, K, d] -> [T, H, d], with gradients."""
    return _Attend.apply(q, k, v, blocks, rule)  # type: ignore[no-any-return, no-untyped-call]


class _Attend(torch.autograd.Function):
    """`attend`, with what each block needs made anew in the backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block], rule: Rule) -> Tensor:
        q = q * rule.scale
        output = q.new_empty(q.shape)
        kept = attend_forward(q, k, v, blocks, rule, output)
        ctx.blocks, ctx.rule = blocks, rule
        ctx.save_for_backward(q, k, v, kept)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, kept = ctx.saved_tensors
        gradients = tuple(t.new_empty(t.shape) for t in (q, k, v))
        attend_backward(q, k, v, ctx.blocks, ctx.rule, kept, gradient, gradients)
        gradients[0].mul_(ctx.rule.scale)
        return *gradients, None, None


def attend_forward(
    q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Block], rule: Rule, output: Tensor
) -> Tensor | None:
    """Write what `attend` gives into `output` [T, H, d], of queries that are scaled already.

    Return what was kept under dropout, block by block, bool.
    """
    kept = None
    if rule.dropout:
        kept = torch.empty(sum(_scores(block, q.shape[1]) for block in blocks), dtype=torch.bool, device=q.device)
    with one_by_one():
        shares = _shares(k)
        keys, values = _spread(k, shares), _spread(v, shares)
        for block, place in zip(blocks, _places(kept, blocks, q.shape[1]), strict=True):
            queries, every = _by_group(q[block.begin : block.end], k.shape[1], shares)
            weights, _ = _weights(queries, _pick(keys[::every], block), block, rule)
            if place is not None:
                weights, drawn = torch.native_dropout(weights, rule.dropout, True)
                place.copy_(drawn.flatten())
            attended = torch.bmm(weights, _pick(values[::every], block))
            _put(output[block.begin : block.end], attended, k.shape[1])
    return kept


def _scores(block: Block, heads: int) -> int:
    """Return how many scores a block has, of all heads."""
    return heads * (block.end - block.begin) * sum(end - begin for begin, end in block.keys)


def _places(kept: Tensor | None, blocks: Sequence[Block], heads: int) -> Sequence[Tensor | None]:
    """Return the part of `kept` that belongs to each block; None where nothing is dropped out."""
    return [None] * len(blocks) if kept is None else torch.split(kept, [_scores(block, heads) for block in blocks])


def attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Sequence[Block],
    rule: Rule,
    kept: Tensor | None,
    gradient: Tensor,
    gradients: tuple[Tensor, ...],
) -> None:
    """Write the gradients of the scaled q, of k and v into `gradients`, given that of what `attend` gave."""
    with one_by_one():
        groups, shares = k.shape[1], _shares(k)
        keys, values = _spread(k, shares), _spread(v, shares)
        d_keys, d_values = (t.new_zeros(t.shape) for t in (keys, values))
        for block, place in zip(blocks, _places(kept, blocks, q.shape[1]), strict=True):
            queries, every = _by_group(q[block.begin : block.end], groups, shares)
            wanted, _ = _by_group(gradient[block.begin : block.end], groups, shares)
            key = _pick(keys[::every], block)
            weights, slope = _weights(queries, key, block, rule)
            d_weights = torch.bmm(wanted, _pick(values[::every], block).transpose(1, 2))
            dropped = weights
            if place is not None:
                share = 1 / (1 - rule.dropout)
                dropped = (weights * place.view(weights.shape)).mul_(share)
                d_weights.mul_(place.view(weights.shape)).mul_(share)
            _add(d_values[::every], block, dropped, wanted)
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            if slope is not None:
                d_scores.mul_(slope)
            _add(d_keys[::every], block, d_scores, queries)
            _put(gradients[0][block.begin : block.end], torch.bmm(d_scores, key), groups)
        for place, sums in zip(gradients[1:], (d_keys, d_values), strict=True):
            torch.sum(sums.view(groups, shares, *sums.shape[1:]), 1, out=place.transpose(0, 1))


def _shares(k: Tensor) -> int:
    """Return into how many parts the queries of a group of heads are cut, so that all threads have the same to do."""
    threads, groups = torch.get_num_threads(), k.shape[1]
    if k.device.type != "cpu" or groups >= 4 * threads:
        return 1
    return min(STEP, threads // math.gcd(groups, threads))


def _spread(k: Tensor, shares: int) -> Tensor:
    """[T, K, d] -> [K * shares, T, d]: keys or values, as often as there are parts of queries that read them."""
    return k.transpose(0, 1).repeat_interleave(shares, 0) if shares > 1 else k.transpose(0, 1)


def _by_group(part: Tensor, groups: int, shares: int) -> tuple[Tensor, int]:
    """[n, H, d] -> [K * shares, H / K * n / shares, d]: the queries of all heads that read the same keys, in equal parts.

    Where they can't be cut evenly there is one part. Also returns which of the spread keys are theirs: each, or every n-th.
    """
    n, heads, width = part.shape
    rows = n * (heads // groups)
    queries = part.view(n, groups, heads // groups, width).permute(1, 2, 0, 3)
    if rows % shares:
        return queries.reshape(groups, rows, width), shares
    return queries.reshape(groups * shares, rows // shares, width), 1


def _put(place: Tensor, part: Tensor, groups: int) -> None:
    """Write what `_by_group` took apart into a place [n, H, d]."""
    n, heads, width = place.shape
    place.view(n, groups, heads // groups, width).copy_(
        part.view(groups, heads // groups, n, width).permute(2, 0, 1, 3)
    )


def _pick(keys: Tensor, block: Block) -> Tensor:
    """Return the keys or values [K, m, d] that a block sees, of all [K, T, d]."""
    if len(block.keys) == 1:
        ((begin, end),) = block.keys
        return keys[:, begin:end]
    return torch.cat([keys[:, begin:end] for begin, end in block.keys], 1)


def _add(sums: Tensor, block: Block, weights: Tensor, part: Tensor) -> None:
    """Add weights^T part, [K, m, d], to where a block's keys lie in `sums` [K, T, d]."""
    # Not baddbmm_: into a slice that does one product after the other.
    added = torch.bmm(weights.transpose(1, 2), part)
    place = 0
    for begin, end in block.keys:
        sums[:, begin:end] += added[:, place : place + end - begin]
        place += end - begin


def _weights(queries: Tensor, keys: Tensor, block: Block, rule: Rule) -> tuple[Tensor, Tensor | None]:
    """Return the attention weights [..., m] of a block, and the slope of the soft cap where there is one."""
    scores = torch.bmm(queries, keys.transpose(1, 2))
    slope = None
    if rule.softcap is not None:
        scores.div_(rule.softcap).tanh_()
        slope = 1 - scores.square()
        scores.mul_(rule.softcap)
    if block.mask is not None:
        n = block.end - block.begin
        scores.view(-1, n, scores.shape[-1])[..., block.low : block.high] += block.mask
    return torch.softmax(scores, -1), slope
