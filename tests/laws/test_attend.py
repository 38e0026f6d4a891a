"""Attention in blocks = dense attention in which each token sees its own path, on any forest; and its gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from headstart.models.attend import Rule, attend
from headstart.models.blocks import Nodes, Tiles, block_size, cut_blocks, lay_tiles


@st.composite
def forests(draw: st.DrawFn) -> Nodes:
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=7))
    parents = [draw(st.integers(-1, node - 1)) for node in range(len(lengths))]
    ends: list[int] = []
    positions: list[int] = []
    for length, parent in zip(lengths, parents, strict=True):
        first = 0 if parent < 0 else ends[parent]
        ends.append(first + length)
        positions += range(first, first + length)
    return Nodes.of(lengths, parents, np.array(positions))


def roots(lengths: list[int]) -> Nodes:
    """Rows that share nothing."""
    return Nodes.of(lengths, [-1] * len(lengths), np.concatenate([np.arange(n) for n in lengths]))


def dense(q: Tensor, k: Tensor, v: Tensor, nodes: Nodes, window: int, causal: bool, rule: Rule) -> Tensor:
    """The same with all scores at once, and who sees whom written down token by token."""
    seen = torch.zeros(len(q), len(k), dtype=torch.bool)
    for i, owner in enumerate(nodes.owner):
        path = nodes.path(int(owner))
        for j, other in enumerate(nodes.owner):
            distance = int(nodes.positions[i] - nodes.positions[j])
            seen[i, j] = other in path and not (causal and (distance < 0 or (window and distance >= window)))
    k, v = (heads.repeat_interleave(q.shape[1] // k.shape[1], 1) for heads in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v)


def assert_same_with_gradients(ours: Tensor, theirs: Tensor, inputs: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(ours, theirs)
    wanted = torch.randn_like(theirs)
    sides = (torch.autograd.grad(side, inputs, wanted) for side in (ours, theirs))
    for mine, other in zip(*sides, strict=True):
        torch.testing.assert_close(mine, other)


@settings(max_examples=60, deadline=None)
@given(
    nodes=forests(),
    size=st.sampled_from([8, 16, 64]),
    window=st.sampled_from([0, 0, 5]),
    softcap=st.sampled_from([None, 2.0]),
    heads=st.sampled_from([(6, 3), (4, 4), (2, 1)]),
    part=st.booleans(),
)
def test_blocks_equal_dense(
    nodes: Nodes, size: int, window: int, softcap: float | None, heads: tuple[int, int], part: bool
) -> None:
    torch.manual_seed(0)
    tokens = len(nodes.owner)
    q, k, v = (
        torch.randn(tokens, n, 4, dtype=torch.float64, requires_grad=True) for n in (heads[0], heads[1], heads[1])
    )
    rule = Rule(0.7, softcap)
    chosen = np.arange(tokens)[:: 3 if part else 1]
    blocks = cut_blocks(nodes, window, True, size, chosen)
    assert all(block.end - block.begin <= size for block in blocks)
    ours = attend(q[torch.from_numpy(chosen)], k, v, blocks, rule)
    theirs = dense(q, k, v, nodes, window, True, rule)[torch.from_numpy(chosen)]
    assert_same_with_gradients(ours, theirs, (q, k, v))


def test_tokens_that_look_both_ways_see_their_own_row() -> None:
    nodes = Nodes.of([3, 9, 20], [-1, -1, -1], np.array([*range(3), *range(9), *range(20)]))
    q, k, v = (torch.randn(32, 2, 4, dtype=torch.float64) for _ in range(3))
    rule = Rule(0.5)
    ours = attend(q, k, v, cut_blocks(nodes, causal=False, size=16), rule)
    torch.testing.assert_close(ours, dense(q, k, v, nodes, 0, False, rule))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=2, max_size=9),
    causal=st.booleans(),
    heads=st.sampled_from([(6, 3), (4, 4)]),
    part=st.booleans(),
    data=st.data(),
)
def test_tiles_equal_dense(
    lengths: list[int], causal: bool, heads: tuple[int, int], part: bool, data: st.DataObject
) -> None:
    """Rows that share nothing go all at once, those of which few tokens or none ask too."""
    nodes = roots(lengths)
    chosen = np.array(data.draw(st.sets(st.integers(0, sum(lengths) - 1), min_size=1).map(sorted))) if part else None
    window = data.draw(st.sampled_from([0, 4])) if causal else 0
    tiles = lay_tiles(nodes, window, causal, 16, chosen)
    assume(tiles is not None)
    assert isinstance(tiles, Tiles)
    q, k, v = (torch.randn(sum(lengths), n, 4, dtype=torch.float64, requires_grad=True) for n in (*heads, heads[1]))
    rule, asked = Rule(0.7, 2.0), slice(None) if chosen is None else torch.from_numpy(chosen)
    ours, theirs = attend(q[asked], k, v, tiles, rule), dense(q, k, v, nodes, window, causal, rule)[asked]
    assert_same_with_gradients(ours, theirs, (q, k, v))


@pytest.mark.parametrize(("lengths", "size"), [([3, 12], 16), ([11, 20, 5], 24), ([4, 100], 64)])
def test_short_rows_share_a_block_only_up_to_the_longest(lengths: list[int], size: int) -> None:
    nodes = Nodes.of(lengths, [-1] * len(lengths), np.concatenate([np.arange(n) for n in lengths]))
    assert block_size(nodes) == size
    assert block_size(Nodes.of(lengths, range(-1, len(lengths) - 1), np.arange(sum(lengths)))) == 64


def test_rows_that_are_too_long_or_share_keys_are_no_tiles() -> None:
    assert lay_tiles(roots([4] * 4 + [60]), 0, True, 8) is None
    siblings = Nodes.of([6, 8, 8], [-1, 0, 0], np.array([*range(6), *range(6, 14), *range(6, 14)]))
    assert lay_tiles(siblings, 0, True, 8) is None
    assert lay_tiles(roots([7, 8, 6]), 0, True, 8) is not None
    assert lay_tiles(roots([7, 8, 6]), 0, True, 24) is None  # one tile is one block
    assert lay_tiles(roots([16, 16, 9]), 0, True, 16) is not None
    assert lay_tiles(roots([16, 9, 9, 9, 9]), 0, True, 16) is None  # most of the tiles would be empty
    with pytest.raises(ValueError, match="both ways"):
        lay_tiles(roots([7, 8, 6]), 4, False, 8)


def test_short_rows_fill_tiles_whatever_their_order() -> None:
    """The long ones lie first, each with what fits beside it best."""
    tiles = lay_tiles(roots([3, 10, 6, 13, 5, 11, 4, 9, 3]), 0, False, 16)
    assert tiles is not None
    assert (len(tiles), tiles.n, tiles.m, len(tiles.empty)) == (4, 16, 16, 0)
    assert tiles.asked.tolist() == tiles.held.tolist()
    assert torch.equal(tiles.queries[tiles.asked], torch.arange(64))
    assert (tiles.mask == 0).sum() == sum(n * n for n in (3, 10, 6, 13, 5, 11, 4, 9, 3))


def test_one_token_that_asks_in_each_of_unlike_rows_goes_in_tiles() -> None:
    """Their short rows fall into one tile, so that most slots of queries are empty; blocks would compute far more."""
    lengths = [4] * 40 + [20] * 20 + [60] * 10
    nodes, first = roots(lengths), np.cumsum([0, *lengths[:-1]])
    tiles = lay_tiles(nodes, 0, False, 64, first)
    assert tiles is not None
    blocks = cut_blocks(nodes, 0, False, 64, first)
    assert 2 * tiles.mask.numel() < sum((b.end - b.begin) * sum(high - low for low, high in b.keys) for b in blocks)


@pytest.mark.parametrize("parents", [[-1, 0, 0], [-1, -1, -1]], ids=["blocks", "tiles"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradients_hold_under_dropout(softcap: float | None, parents: list[int]) -> None:
    """Against finite differences, with the same draw each time."""
    nodes = Nodes.of([4, 8, 4], parents, np.array([*range(4), *range(4, 12), *range(4, 8)]))
    rule = Rule(0.6, softcap, dropout=0.3)
    blocks = cut_blocks(nodes, size=8) if 0 in parents else lay_tiles(nodes, 0, True, 8)
    assert blocks is not None
    q, k, v = (torch.randn(16, n, 4, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2))

    def drawn(*inputs: Tensor) -> Tensor:
        torch.manual_seed(1)
        return attend(*inputs, blocks, rule)

    assert torch.autograd.gradcheck(drawn, (q, k, v))


def test_what_is_dropped_out_is_made_up_for() -> None:
    nodes = Nodes.of([200], [-1], np.arange(200))
    q = torch.zeros(200, 4, 8)  # all keys weigh the same, so the mean of values of one comes out
    v = torch.ones(200, 4, 8)
    torch.manual_seed(0)
    attended = attend(q, q, v, cut_blocks(nodes), Rule(1.0, dropout=0.5))
    assert float(attended[100:].mean()) == pytest.approx(1.0, abs=0.05)
    assert float(attended[100:].std()) > 0.01


def test_short_rows_share_a_block_and_long_ones_are_cut_evenly() -> None:
    nodes = Nodes.of([5, 6, 7, 100], [-1] * 4, np.concatenate([np.arange(n) for n in (5, 6, 7, 100)]))
    assert [(block.begin, block.end) for block in cut_blocks(nodes, size=64)] == [(0, 18), (18, 74), (74, 118)]
