"""Losses of labelled rows, each [S], and the sums of them: one class, several classes, numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from headstart.objectives.tokens import Total

RowLosses = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def class_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the negative log-probability of each row's class, and what the row weighs, both [S].

    `logits` [S, C], `labels` int64 [S]; a class of -1 is none of the model's, and weighs nothing.
    """
    known = labels >= 0
    losses = F.cross_entropy(logits, labels, ignore_index=-1, reduction="none")
    return losses, known.to(losses.dtype)


def several_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the binary cross-entropy of each row, the mean over classes. `logits`, `labels` (0 or 1) [S, C]."""
    losses = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(-1)
    return losses, torch.ones_like(losses)


def number_losses(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared error of each row, the mean over its numbers. `values`, `labels` [S, K]."""
    losses = (values - labels.to(values.dtype)).square().mean(-1)
    return losses, torch.ones_like(losses)


def summed(losses: RowLosses, class_weights: Tensor | None = None) -> Callable[[Tensor, Tensor], Total]:
    """Return the objective that sums losses of rows; `class_weights` [C] are what a row of each class weighs."""

    def objective(outputs: Tensor, labels: Tensor) -> Total:
        found, weights = losses(outputs, labels)
        if class_weights is not None:
            weights = weights * class_weights.to(weights)[labels.clamp_min(0)]
        return Total((found * weights).sum(), weights.sum())

    return objective


cross_entropy = summed(class_losses)
