"""AdamW over the parameters that train, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a pure function of the step: a linear warm-up, then `shape` down to zero at the end."""

    peak: float
    steps: int
    warmup_steps: int = 0
    shape: str = "cosine"

    def lr(self, step: int) -> float:
        """Return the rate of step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        if self.shape == "cosine":
            return self.peak * 0.5 * (1 + math.cos(math.pi * done))
        return self.peak * (1 - done) if self.shape == "linear" else self.peak


def build_adamw(parameters: Mapping[str, torch.nn.Parameter], weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov and Hutter, 2019) with decay on matrices only."""
    matrices = [p for p in parameters.values() if p.ndim > 1]
    vectors = [p for p in parameters.values() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, fused=True)
