"""Who sees whom in a pack: in three numbers a token, against rows followed one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.models.sight import BLOCK, Sight, build_sight, find_blocks, longest_row, row_ends, walk

LENGTHS = st.lists(st.sampled_from([1, 2, 3, 7, 40, 127, 128, 129, 200]), min_size=1, max_size=8)


@st.composite
def forests(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Draw lengths and parents, each parent before its children, otherwise in any order."""
    lengths = draw(LENGTHS)
    return lengths, [draw(st.integers(-1, node - 1)) for node in range(len(lengths))]


def row_of(node: int, lengths: list[int], parents: list[int]) -> list[int]:
    """Return the tokens from a root to the end of a node, by following its parents."""
    starts = np.cumsum([0, *lengths])
    row: list[int] = []
    while node >= 0:
        row = [*range(starts[node], starts[node + 1]), *row]
        node = parents[node]
    return row


def dense(lengths: list[int], parents: list[int], window: int = 0, causal: bool = True) -> torch.Tensor:
    """Return which keys each query sees, bool [T, T], row by row."""
    seen = torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool)
    starts = np.cumsum([0, *lengths])
    for node, length in enumerate(lengths):
        row = row_of(node, lengths, parents)
        for place in range(length):
            end = len(row) - length + place + 1 if causal else len(row)
            keys = row[:end]
            seen[starts[node] + place, keys[-window:] if window else keys] = True
    return seen


def positions_of(lengths: list[int], parents: list[int]) -> torch.Tensor:
    return torch.tensor(
        [place for node, n in enumerate(lengths) for place in range(len(row_of(node, lengths, parents)))[-n:]]
    )


def sight_of(lengths: list[int], parents: list[int], window: int = 0, causal: bool = True) -> Sight:
    walked = torch.from_numpy(walk(lengths, parents))
    return build_sight(walked, positions_of(lengths, parents), window, causal)


def seen_by(sight: Sight) -> torch.Tensor:
    places = torch.arange(len(sight.place))
    return sight.sees(places[:, None], places[None, :])


def in_walk_order(lengths: list[int], parents: list[int]) -> tuple[list[int], list[int]]:
    """Return the same forest with its nodes as packs have them: each followed by all that is below it."""
    order: list[int] = []

    def visit(node: int) -> None:
        order.append(node)
        for child, parent in enumerate(parents):
            if parent == node:
                visit(child)

    for node, parent in enumerate(parents):
        if parent < 0:
            visit(node)
    return [lengths[n] for n in order], [order.index(parents[n]) if parents[n] >= 0 else -1 for n in order]


@settings(max_examples=60, deadline=None)
@given(forest=forests(), window=st.sampled_from([0, 1, 5, 130]))
def test_a_token_sees_its_own_row_up_to_itself_and_no_other(forest: tuple[list[int], list[int]], window: int) -> None:
    assert torch.equal(seen_by(sight_of(*forest, window)), dense(*forest, window))


@settings(max_examples=60, deadline=None)
@given(forest=forests())
def test_places_are_a_walk_and_what_is_below_a_node_stands_together(forest: tuple[list[int], list[int]]) -> None:
    lengths, parents = forest
    place, first, end = walk(lengths, parents)
    assert sorted(place) == list(range(sum(lengths)))
    starts = np.cumsum([0, *lengths])
    for node, parent in enumerate(parents):
        own = slice(starts[node], starts[node + 1])
        assert (place[own] == first[own][0] + np.arange(lengths[node])).all()
        if parent >= 0:
            above = starts[parent]
            assert first[above] + lengths[parent] <= first[own][0]
            assert end[own][0] <= end[above]
    assert longest_row(lengths, parents) == max(len(row_of(n, lengths, parents)) for n in range(len(lengths)))
    again = walk(*in_walk_order(lengths, parents))
    assert (again[0] == np.arange(sum(lengths))).all()


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS)
def test_both_ways_a_root_sees_all_of_itself(lengths: list[int]) -> None:
    roots = [-1] * len(lengths)
    assert torch.equal(seen_by(sight_of(lengths, roots, causal=False)), dense(lengths, roots, causal=False))
    assert row_ends(lengths).tolist() == [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    assert row_ends(lengths).dtype == torch.int32


@settings(max_examples=60, deadline=None)
@given(forest=forests(), window=st.sampled_from([0, 5, 130]), walked=st.booleans())
def test_no_block_is_skipped_that_holds_a_pair_and_none_is_whole_that_lacks_one(
    forest: tuple[list[int], list[int]], window: int, walked: bool
) -> None:
    lengths, parents = in_walk_order(*forest) if walked else forest
    some, every = find_blocks(sight_of(lengths, parents, window))
    missing = -sum(lengths) % BLOCK
    seen = torch.nn.functional.pad(dense(lengths, parents, window), (0, missing, 0, missing))
    blocks = seen.view(len(some), BLOCK, len(some), BLOCK)
    assert (some | ~blocks.any(3).any(1)).all()
    assert (blocks.all(3).all(1) | ~every).all()
    if walked and not window:
        assert torch.equal(some, blocks.any(3).any(1))
        assert torch.equal(every, blocks.all(3).all(1))


def test_a_window_that_looks_both_ways_is_refused() -> None:
    with pytest.raises(ValueError, match="looks both ways"):
        sight_of([3], [-1], window=2, causal=False)
