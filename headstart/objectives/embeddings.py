"""Losses of embeddings: texts that belong together come closer than those that don't. All rows of a step count together."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from headstart.objectives.tokens import Total

SCALE = 20.0  # cosines as logits: that of sentence-transformers; a temperature of 0.05, as in SimCSE


def ranking(embeddings: Tensor, targets: Tensor) -> Total:
    """Return the loss of each anchor among all other texts of the step, and the number of anchors.

    MultipleNegativesRanking (Henderson et al., 2017); with a text and itself under another dropout it is SimCSE (Gao et
    al., 2021). `embeddings` [S, D] of length 1; `targets` float [S, 3]: row, number in the row (0 the anchor, 1 what
    fits, others what doesn't), score (not read).
    """
    anchors, positives = (_of(embeddings, targets, number) for number in (0, 1))
    others = embeddings[targets[:, 1] > 1]
    logits = SCALE * anchors @ torch.cat([positives, others]).T
    losses = F.cross_entropy(logits, torch.arange(len(anchors), device=logits.device), reduction="none")
    return Total(losses.sum(), torch.tensor(float(len(anchors))))


def cosine(embeddings: Tensor, targets: Tensor) -> Total:
    """Return the squared error of each pair's cosine against its score, and the number of pairs.

    `targets` as in `ranking`; scores lie between 0 and 1.
    """
    first, second = (_of(embeddings, targets, number) for number in (0, 1))
    scores = _of(targets[:, 2:], targets, 0)[:, 0]
    errors = ((first * second).sum(-1) - scores.to(first.dtype)).square()
    return Total(errors.sum(), torch.tensor(float(len(first))))


def embedding_loss(embeddings: Tensor, targets: Tensor) -> Total:
    """Return the loss that fits the rows: `cosine` where they have scores, `ranking` where they have none (NaN)."""
    return ranking(embeddings, targets) if math.isnan(float(targets[0, 2])) else cosine(embeddings, targets)


def _of(values: Tensor, targets: Tensor, number: int) -> Tensor:
    """Return the values of the segments with a number, in the order of their rows."""
    chosen = torch.nonzero(targets[:, 1] == number)[:, 0]
    return values[chosen[targets[chosen, 0].argsort()]]
