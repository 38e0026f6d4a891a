"""Score rows: the negative log-likelihood of each row's answer, and of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headstart.data.forest import build_packs
from headstart.data.segments import Example
from headstart.engine.forward import PackReader

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RowScores:
    """For each row the summed nll of its targets (nats) and how many there are, both [N]."""

    nll: Floats
    targets: Floats

    def __add__(self, other: RowScores) -> RowScores:
        return RowScores(np.concatenate([self.nll, other.nll]), np.concatenate([self.targets, other.targets]))

    @property
    def mean(self) -> float:
        """Return the nll per target over all rows."""
        return float(self.nll.sum() / self.targets.sum())


def score_rows(
    reader: PackReader,
    examples: Sequence[Example],
    tokens_per_pack: int,
    on_pack: Callable[[int, int], None] | None = None,
) -> RowScores:
    """Score `examples`, packed as in training; `on_pack(done, total)` is called after each pack."""
    nll = np.zeros(len(examples))
    targets = np.zeros(len(examples))
    packs = build_packs(examples, tokens_per_pack, one_row=not reader.packs)
    for done, pack in enumerate(packs, 1):
        logprobs = reader.forward(pack).double().numpy()
        np.add.at(nll, pack.target_rows, -logprobs * pack.weights)
        np.add.at(targets, pack.target_rows, pack.weights)
        if on_pack:
            on_pack(done, len(packs))
    return RowScores(nll, targets)
