"""Negative log-likelihood of tokens: the objective of every kind of training that continues text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Total:
    """What an objective returns: a sum that can be differentiated, and what the step divides it by.

    `told` is what else there is to watch: by name a sum and the number of what was summed, [2].
    """

    loss: Tensor
    count: Tensor
    told: Mapping[str, Tensor] = field(default_factory=dict)


def nll(logprobs: Tensor, weights: Tensor) -> Total:
    """Sum the weighted negative log-probabilities. `logprobs`, `weights` [L] -> scalars; the count is the weights' sum."""
    return Total(-(logprobs * weights).sum(), weights.sum())
