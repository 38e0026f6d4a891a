"""Prompts -> a tree of what they begin with alike, so that it is read once and its keys and values are kept once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WORTH = 32  # tokens that a node must save


@dataclass(frozen=True, slots=True)
class Prefix:
    """Tokens [begin, end) that all of `prompts` have alike, behind those of the node `parent` (-1: at the front)."""

    begin: int
    end: int
    parent: int
    prompts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """`nodes`, a parent before its children, and of each prompt the node that it hangs on (`above`; -1: on none).

    Every prompt keeps at least one token of its own: the one from which its answer is predicted.
    """

    nodes: list[Prefix]
    above: list[int]

    def path(self, prompt: int) -> list[int]:
        """Return the nodes above a prompt, from the front."""
        found = []
        node = self.above[prompt]
        while node >= 0:
            found.append(node)
            node = self.nodes[node].parent
        return found[::-1]

    def order(self, weights: Sequence[int]) -> list[int]:
        """Return the prompts, those under a node together, and of what hangs on one node the heaviest first."""
        heaviest = [max(weights[prompt] for prompt in node.prompts) for node in self.nodes]

        def key(prompt: int) -> list[tuple[int, int]]:
            return [*((-heaviest[node], node) for node in self.path(prompt)), (-weights[prompt], len(self.nodes))]

        return sorted(range(len(self.above)), key=key)


def build_prefixes(prompts: Sequence[Sequence[int]], worth: int = WORTH) -> PrefixTree:
    """Find what prompts (token ids, none empty) begin with alike, where sharing saves at least `worth` tokens."""
    ids = [np.asarray(prompt, np.int64) for prompt in prompts]
    ranked = sorted(range(len(ids)), key=lambda index: ids[index].astype(">i8").tobytes())
    common = [0] + [_common(ids[a], ids[b]) for a, b in zip(ranked, ranked[1:], strict=False)]
    tree = PrefixTree([], [-1] * len(ids))
    pending = [(0, len(ranked), 0, -1)] if ranked else []
    while pending:
        low, high, depth, parent = pending.pop()
        if high - low == 1:
            tree.above[ranked[low]] = parent
            continue
        least = min(common[low + 1 : high])
        if (least - depth) * (high - low - 1) >= worth:
            tree.nodes.append(Prefix(depth, least, parent, tuple(sorted(ranked[low:high]))))
            depth, parent = least, len(tree.nodes) - 1
        cuts = [low, *(place for place in range(low + 1, high) if common[place] <= least), high]
        pending += [(a, b, depth, parent) for a, b in zip(cuts, cuts[1:], strict=False)]
    return tree


def _common(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """Return how many tokens two prompts begin with alike, the last token of neither among them."""
    n = min(len(a), len(b)) - 1
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
