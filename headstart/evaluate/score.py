"""Score rows: the negative log-likelihood of each row's answer, and of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headstart.data.segments import Example
from headstart.engine.forward import LabelReader, Reader

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
    reader: Reader,
    examples: Sequence[Example],
    tokens_per_pack: int,
    on_pack: Callable[[int, int], None] | None = None,
) -> RowScores:
    """Score `examples`, packed as in training; `on_pack(done, total)` is called after each pack."""
    nll = np.zeros(len(examples))
    targets = np.zeros(len(examples))
    packs = reader.build_packs(examples, tokens_per_pack)
    for done, pack in enumerate(packs, 1):
        losses, weights, rows = reader.row_losses(pack)
        np.add.at(nll, rows, losses * weights)
        np.add.at(targets, rows, weights)
        if on_pack:
            on_pack(done, len(packs))
    return RowScores(nll, targets)


def classify_rows(
    reader: LabelReader,
    examples: Sequence[Example],
    tokens_per_pack: int,
    on_pack: Callable[[int, int], None] | None = None,
) -> Floats:
    """Return the probability of each class for each row, [N, C]."""
    found: list[Floats | None] = [None] * len(examples)
    packs = reader.build_packs(examples, tokens_per_pack)
    for done, pack in enumerate(packs, 1):
        for row, values in zip(pack.segment_rows, reader.forward(pack).double().softmax(-1).numpy(), strict=True):
            found[row] = values
        if on_pack:
            on_pack(done, len(packs))
    return np.array(found)
