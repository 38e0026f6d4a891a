"""Packs: every token and target of every row is there once, shared or not, within the budget."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.data.forest import BLOCK, Pack, build_packs
from headstart.data.segments import Example
from tests.conftest import example


def unpack(packs: list[Pack]) -> list[tuple[int, list[int], int, float]]:
    """Return (row, context up to the source, target, weight) of every target, read back from the packs."""
    found = []
    for pack in packs:
        ends = pack.start + pack.length
        for target in range(len(pack.target_ids)):
            place = int(pack.sources[pack.target_sources[target]])
            node = int(np.searchsorted(ends, place, side="right"))
            context = pack.ids[pack.start[node] : place + 1].tolist()
            while (node := int(pack.parent[node])) >= 0:
                context = pack.ids[pack.start[node] : ends[node]].tolist() + context
            assert pack.positions[place] == len(context) - 1
            found.append(
                (int(pack.target_rows[target]), context, int(pack.target_ids[target]), float(pack.weights[target]))
            )
    return sorted(found)


def wanted(examples: list[Example]) -> list[tuple[int, list[int], int, float]]:
    return sorted(
        (row, segment.ids[:place].tolist(), int(segment.ids[place]), float(segment.weights[place]))
        for row, item in enumerate(examples)
        for segment in item.segments
        for place in range(1, len(segment))
        if segment.weights[place] > 0
    )


PREFIXES = st.sampled_from([[], [5] * 7, [5] * 8, [5] * 24, [5] * 24 + [6] * 9, [5] * 24 + [6] * 16])
ROWS = st.lists(st.tuples(PREFIXES, st.lists(st.integers(1, 9), min_size=1, max_size=20)), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(rows=ROWS, budget=st.integers(1, 120))
def test_every_target_sees_its_own_row_and_nothing_else(rows: list[tuple[list[int], list[int]]], budget: int) -> None:
    examples = [example([3, *prefix, *rest]) for prefix, rest in rows]
    packs = build_packs(examples, budget)
    assert unpack(packs) == wanted(examples)
    assert sum(pack.row_tokens for pack in packs) == sum(item.token_count for item in examples)
    for pack in packs:
        assert len(pack) <= max(budget, *(len(item.segments[0]) for item in examples))
        assert all(parent < node for node, parent in enumerate(pack.parent.tolist()))
        assert (np.diff(pack.target_sources) >= 0).all()
        assert pack.length.sum() == len(pack) == len(pack.positions)


def test_a_shared_prompt_is_there_once() -> None:
    prompt = list(range(100, 100 + 5 * BLOCK))
    examples = [example([*prompt, n, n + 1]) for n in range(8)]
    (pack,) = build_packs(examples, 10_000)
    assert len(pack) == 5 * BLOCK + 8 * 2
    assert pack.parent.tolist() == [-1] + [0] * 8
    # The last token of the prompt predicts eight different tokens, from one hidden state.
    assert (pack.target_sources == 5 * BLOCK - 1).sum() == 8


def test_rows_that_share_are_packed_together() -> None:
    chance = np.random.default_rng(0)
    prefixes = [chance.integers(1, 99, 10 * BLOCK).tolist() for _ in range(4)]
    examples = [example([*prefixes[n % 4], 1 + n, 2]) for n in range(16)]
    packs = build_packs(examples, 10 * BLOCK + 4 * 2)
    assert len(packs) == 4
    assert all(len(pack) == 10 * BLOCK + 4 * 2 for pack in packs)


def test_one_row_a_pack_where_a_model_needs_it() -> None:
    examples = [example([1, 2, 3]), example([1, 2, 3])]
    packs = build_packs(examples, 100, one_row=True)
    assert [pack.parent.tolist() for pack in packs] == [[-1], [-1]]


def test_rows_that_share_nothing_are_packed_without_loss_and_within_the_budget() -> None:
    chance = np.random.default_rng(0)
    rows = [example(chance.integers(3, 90, int(n)).tolist()) for n in chance.integers(2, 60, 300)]
    packs = build_packs(rows, 64, share=False)
    assert all(len(pack) <= 64 for pack in packs)
    assert sorted(int(row) for pack in packs for row in pack.segment_rows) == list(range(300))
    total = sum(row.token_count for row in rows)
    assert len(packs) <= 1.25 * total / 64  # best fit, the longest first, wastes little
