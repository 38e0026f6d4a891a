"""Negative log-likelihood of tokens: the objective of every kind of training that continues text."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Total:
    """What an objective returns: a sum that can be differentiated, and what the step divides it by."""

    loss: Tensor
    count: Tensor


def nll(logprobs: Tensor, weights: Tensor) -> Total:
    """Sum the weighted negative log-probabilities. `logprobs`, `weights` [L] -> scalars; the count is the weights' sum."""
    return Total(-(logprobs * weights).sum(), weights.sum())
