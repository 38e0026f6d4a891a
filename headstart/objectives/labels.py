"""Cross-entropy of classes: the objective of classification."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from headstart.objectives.tokens import Total


def cross_entropy(logits: Tensor, labels: Tensor) -> Total:
    """Sum the negative log-probabilities of the right classes.

    `logits` [S, C], `labels` int64 [S]; those of -1 count for nothing. -> scalars; the count is that of the rows.
    """
    return Total(F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum"), (labels >= 0).sum())
