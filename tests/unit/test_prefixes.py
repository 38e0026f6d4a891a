"""Prefixes of prompts: what is shared is shared, all is covered, and what saves little stays apart."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headstart.data.prefixes import build_prefixes

PROMPTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=12)


@given(PROMPTS, st.integers(1, 12))
def test_every_prompt_is_its_nodes_and_at_least_one_token_of_its_own(prompts: list[list[int]], worth: int) -> None:
    tree = build_prefixes(prompts, worth)
    for number, prompt in enumerate(prompts):
        end = 0
        for node in (tree.nodes[place] for place in tree.path(number)):
            assert node.begin == end < node.end < len(prompt)
            assert number in node.prompts
            assert prompt[node.begin : node.end] == prompts[node.prompts[0]][node.begin : node.end]
            end = node.end
    for node in tree.nodes:
        assert (node.end - node.begin) * (len(node.prompts) - 1) >= worth


@given(PROMPTS)
def test_what_is_worth_a_token_is_shared_whole(prompts: list[list[int]]) -> None:
    tree = build_prefixes(prompts, 1)
    # Every prefix once, as in a trie, but for the last token of each prompt.
    trie = {tuple(p[:end]) for p in prompts for end in range(1, len(p))}
    kept = sum(node.end - node.begin for node in tree.nodes)
    ends = [tree.nodes[place].end if place >= 0 else 0 for place in tree.above]
    assert kept + sum(len(p) - end for p, end in zip(prompts, ends, strict=True)) == len(trie) + len(prompts)


@given(PROMPTS)
def test_prompts_under_a_node_stand_together(prompts: list[list[int]]) -> None:
    tree = build_prefixes(prompts, 1)
    order = tree.order([len(p) for p in prompts])
    assert sorted(order) == list(range(len(prompts)))
    for node in tree.nodes:
        places = sorted(order.index(number) for number in node.prompts)
        assert places == list(range(places[0], places[0] + len(places)))


def test_of_what_hangs_on_one_node_the_heaviest_comes_first() -> None:
    tree = build_prefixes([[1, 1, 2], [1, 1, 3], [4], [5]], 1)
    assert tree.order([3, 9, 5, 10]) == [3, 1, 0, 2]
