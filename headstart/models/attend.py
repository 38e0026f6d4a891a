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
from typing import Any

import torch
from torch import Tensor

from headstart.models.blocks import STEP, Block, Cut, Tiles
from headstart.models.dropout import draw_kept, share
from headstart.models.native import Inputs, Native

_depth = [0]  # of `one_by_one`


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


@dataclass(frozen=True)
class Rule:
    """How scores become weights: times `scale`, bent by `softcap` where there is one, dropped out; by which kernels, if any."""

    scale: float
    softcap: float | None = None
    dropout: float = 0.0
    native: Native | None = None


def in_one_type(*heads: Tensor) -> list[Tensor]:
    """Return queries, keys and values in the type that they are computed in: that of autocast, else of the values.

    Autocast doesn't look into functions of ours, and rotary embeddings leave queries and keys wider than values.
    """
    value = heads[-1]
    dtype = value.dtype
    if torch.is_autocast_enabled(value.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(value.device.type)
    return [part.to(dtype) for part in heads]


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Cut, rule: Rule) -> Tensor:
    """Attend within blocks. `q` [T, H, d], `k` and `v` [T, K, d] -> [T, H, d], with gradients."""
    return _Attend.apply(q, k, v, blocks, rule)  # type: ignore[no-any-return, no-untyped-call]


class _Attend(torch.autograd.Function):
    """`attend`, with what each block needs made anew in the backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Cut, rule: Rule) -> Tensor:
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
        return *gradients, None, None


def attend_forward(q: Tensor, k: Tensor, v: Tensor, blocks: Cut, rule: Rule, output: Tensor) -> Tensor | None:
    """Write what `attend` gives into `output` [T, H, d].

    Return what was kept under dropout, block by block, uint8.
    """
    if isinstance(blocks, Tiles):
        return _tiles_forward(q, k, v, blocks, rule, output)
    kept = None
    if rule.dropout:
        kept = draw_kept((sum(_scores(block, q.shape[1]) for block in blocks),), rule.dropout, q.device)
    if rule.native is not None:
        with one_by_one():
            rule.native.attend(Inputs(q, k, v, blocks.table, rule.scale, kept, share(rule.dropout)), output)
        return kept
    with one_by_one():
        shares = _shares(k)
        keys, values = _spread(k, shares), _spread(v, shares)
        for block, place in zip(blocks, _places(kept, blocks, q.shape[1]), strict=True):
            queries, every = _by_group(q[block.begin : block.end], k.shape[1], shares)
            weights, _ = _weights(queries * rule.scale, _pick(keys[::every], block), block, rule)
            attended = torch.bmm(_dropped(weights, place, rule), _pick(values[::every], block))
            _put(output[block.begin : block.end], attended, k.shape[1])
    return kept


def _dropped(weights: Tensor, kept: Tensor | None, rule: Rule) -> Tensor:
    """Return weights after dropout, given what was kept of them."""
    return weights if kept is None else (weights * kept.view(weights.shape)).mul_(share(rule.dropout))


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
    blocks: Cut,
    rule: Rule,
    kept: Tensor | None,
    gradient: Tensor,
    gradients: tuple[Tensor, ...],
) -> None:
    """Write the gradients of q, k and v into `gradients`, given that of what `attend` gave."""
    if isinstance(blocks, Tiles):
        _tiles_backward(q, k, v, blocks, rule, kept, gradient, gradients)
        return
    if rule.native is not None:
        with one_by_one():
            inputs = Inputs(q, k, v, blocks.table, rule.scale, kept, share(rule.dropout))
            rule.native.attend_back(inputs, gradient.contiguous(), gradients)
        return
    with one_by_one():
        groups, shares = k.shape[1], _shares(k)
        keys, values = _spread(k, shares), _spread(v, shares)
        d_keys, d_values = (t.new_zeros(t.shape) for t in (keys, values))
        for block, place in zip(blocks, _places(kept, blocks, q.shape[1]), strict=True):
            queries, every = _by_group(q[block.begin : block.end], groups, shares)
            queries = queries * rule.scale
            wanted, _ = _by_group(gradient[block.begin : block.end], groups, shares)
            key = _pick(keys[::every], block)
            weights, slope = _weights(queries, key, block, rule)
            d_weights = torch.bmm(wanted, _pick(values[::every], block).transpose(1, 2))
            _add(d_values[::every], block, _dropped(weights, place, rule), wanted)
            d_weights = _dropped(d_weights, place, rule)
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            if slope is not None:
                d_scores.mul_(slope)
            _add(d_keys[::every], block, d_scores, queries)
            _put(gradients[0][block.begin : block.end], torch.bmm(d_scores, key).mul_(rule.scale), groups)
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


def _weights(queries: Tensor, keys: Tensor, block: Block | Tiles, rule: Rule) -> tuple[Tensor, Tensor | None]:
    """Return the attention weights [..., m] of a block, and the slope of the soft cap where there is one."""
    scores = torch.bmm(queries, keys.transpose(1, 2))
    slope = None
    if rule.softcap is not None:
        scores.div_(rule.softcap).tanh_()
        slope = 1 - scores.square()
        scores.mul_(rule.softcap)
    block.hide(scores)
    return torch.softmax(scores, -1), slope


# --- tiles: all rows at once ---


def _tiles_forward(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, rule: Rule, output: Tensor) -> Tensor | None:
    groups, kept = k.shape[1], None
    if rule.dropout:
        kept = draw_kept((q.shape[1] * len(tiles) * tiles.n * tiles.m,), rule.dropout, q.device)
    with one_by_one():
        queries, keys, values = _tile_queries(q, groups, tiles), _tile_keys(k, tiles), _tile_keys(v, tiles)
        queries.mul_(rule.scale)
        weights, _ = _weights(queries, keys, tiles, rule)
        attended = torch.bmm(_dropped(weights, kept, rule), values)
        torch.index_select(_by_slot(attended, groups, tiles), 0, tiles.asked, out=output)
    return kept


def _tiles_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tiles,
    rule: Rule,
    kept: Tensor | None,
    gradient: Tensor,
    gradients: tuple[Tensor, ...],
) -> None:
    with one_by_one():
        groups = k.shape[1]
        queries, keys, values = _tile_queries(q, groups, tiles), _tile_keys(k, tiles), _tile_keys(v, tiles)
        queries.mul_(rule.scale)
        wanted = _tile_queries(gradient, groups, tiles, only=True)
        weights, slope = _weights(queries, keys, tiles, rule)
        d_weights = _dropped(torch.bmm(wanted, values.transpose(1, 2)), kept, rule)
        d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        if slope is not None:
            d_scores.mul_(slope)
        d_queries = torch.bmm(d_scores, keys).mul_(rule.scale)
        gradients[0].copy_(_by_slot(d_queries, groups, tiles).index_select(0, tiles.asked))
        turned = (d_scores.transpose(1, 2), queries), (_dropped(weights, kept, rule).transpose(1, 2), wanted)
        for place, (left, right) in zip(gradients[1:], turned, strict=True):
            held = torch.bmm(left, right).view(groups, len(tiles) * tiles.m, -1)
            place.copy_(held.index_select(1, tiles.held).transpose(0, 1))
            if len(tiles.unseen):
                place.index_fill_(0, tiles.unseen, 0.0)


def _tile_keys(k: Tensor, tiles: Tiles) -> Tensor:
    """[T, K, d] -> [K B, m, d]: keys or values in their slots."""
    slots = k.transpose(0, 1).index_select(1, tiles.keys)
    return slots.view(-1, tiles.m, k.shape[-1])


def _tile_queries(q: Tensor, groups: int, tiles: Tiles, *, only: bool = False) -> Tensor:
    """[P, H, d] -> [K B, G n, d]: queries in their slots, those of the G heads that read the same keys together.

    Slots without a token hold any query, or with `only` zeros.
    """
    slots = q.transpose(0, 1).index_select(1, tiles.queries)
    if only and len(tiles.empty):
        slots.index_fill_(1, tiles.empty, 0.0)
    spread = slots.view(groups, -1, len(tiles), tiles.n, q.shape[-1]).transpose(1, 2)
    return spread.reshape(groups * len(tiles), -1, q.shape[-1])


def _by_slot(part: Tensor, groups: int, tiles: Tiles) -> Tensor:
    """[K B, G n, d] -> [B n, H, d], as a view or a copy."""
    spread = part.view(groups, len(tiles), -1, tiles.n, part.shape[-1])
    return spread.permute(1, 3, 0, 2, 4).reshape(len(tiles) * tiles.n, -1, part.shape[-1])
