"""AdamW over the parameters that train, and over the rows of embeddings that do; the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from headstart.models.embedding import LOOKED_UP, RowGradient, spread

MOMENTS = ("exp_avg", "exp_avg_sq")
ROWS_AT_ONCE = 512  # so that what an update reads twice lies in the caches
SQUARES_AT_ONCE = 1 << 16  # that are added up in float32, on narrow registers in sums of 2,048 and more
GROWTH = 1.5  # of the room for rows, where it is too little


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


def total_norm(gradients: Sequence[Tensor]) -> float | Tensor:
    """Return the norm of all gradients together; infinite where a sum of some squares is past their type.

    On a CPU it comes of dot products, which threads share, of pieces: a sum of all squares in float32 would be off by more,
    the more there are.
    """
    if all(gradient.dtype == torch.float32 and gradient.device.type == "cpu" for gradient in gradients):
        pieces = (piece for gradient in gradients for piece in torch.split(gradient.flatten(), SQUARES_AT_ONCE))
        return math.sqrt(sum(float(torch.dot(piece, piece)) for piece in pieces))
    return torch.nn.utils.get_total_norm(gradients)


class RowAdamW:
    """AdamW, without decay, of an embedding [V, D] in which few rows are ever looked up.

    A row that never had a gradient has moments of zero, and isn't moved. So only of the others is there a gradient and are
    there moments, in the order in which they first had one; what comes of it is what AdamW makes of the whole.
    """

    def __init__(self, weight: torch.nn.Parameter) -> None:
        self.weight = weight
        self.gradient = RowGradient(weight)
        setattr(weight, LOOKED_UP, self.gradient)
        self._place = torch.full((len(weight),), -1)  # of a row in `_ids` and the moments
        self._ids = torch.empty(0, dtype=torch.int64)
        self._moments = [weight.new_empty(0, weight.shape[1]) for _ in MOMENTS]
        self._step = torch.zeros(())

    def bytes_of(self, rows: int) -> int:
        """Return what one tensor of so many rows fills."""
        return min(rows, len(self.weight)) * self.weight.shape[1] * self.weight.element_size()

    def make_room(self, rows: int = 0) -> None:
        """Make moments for the rows that have a gradient for the first time; to rehearse, for so many `rows` in all."""
        ids = self.gradient.ids
        new = ids[self._place[ids] < 0]
        if rows > len(self._ids) + len(new):
            free = torch.ones(len(self.weight), dtype=torch.bool)
            free[ids] = free[self._ids] = False
            more = free.nonzero().flatten()[: rows - len(self._ids) - len(new)]
            new = torch.cat([new, more])
        if not len(new):
            return
        ids = torch.cat([self._ids, new])
        known, wanted = len(self._ids), len(ids)
        if wanted > len(self._moments[0]):
            room = min(len(self.weight), max(wanted, int(GROWTH * known)))
            larger = [self.weight.new_zeros(room, self.weight.shape[1]) for _ in MOMENTS]
            for old, moment in zip(self._moments, larger, strict=True):
                moment[:known] = old[:known]
            self._moments = larger
        for moment in self._moments:
            moment[known:wanted] = 0.0
        self._place[new] = torch.arange(known, wanted)
        self._ids = ids

    @torch.no_grad()
    def update(self, lr: float, divisor: Tensor, betas: tuple[float, float], eps: float) -> None:
        """Move all rows that ever had a gradient by what was added up, divided by `divisor`."""
        places, order = self._place[self.gradient.ids].sort()
        values = self.gradient.values.index_select(0, order)
        edges = torch.searchsorted(places, torch.arange(0, len(self._ids) + ROWS_AT_ONCE, ROWS_AT_ONCE)).tolist()
        for number, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
            begin = number * ROWS_AT_ONCE
            ids = self._ids[begin : begin + ROWS_AT_ONCE]
            rows = self.weight.index_select(0, ids)
            gradient = torch.zeros_like(rows)
            gradient.index_copy_(0, places[low:high] - begin, values[low:high])
            first, second = (moment[begin : begin + len(ids)] for moment in self._moments)
            adamw(
                [rows], [gradient], [first], [second], [], [self._step.clone()],
                fused=True, grad_scale=divisor, amsgrad=False, beta1=betas[0], beta2=betas[1],
                lr=lr, weight_decay=0.0, eps=eps, maximize=False,
            )  # fmt: skip
            self.weight.index_copy_(0, ids, rows)
        self._step += 1

    def forget(self) -> None:
        """Be as before the first step, but keep the memory."""
        self._place.fill_(-1)
        self._ids = self._ids[:0]
        self._step.zero_()

    def state(self) -> dict[str, Tensor]:
        """Return the `rows` [A] that have moments, their moments [A, D], and the `step`."""
        known = {key: moment[: len(self._ids)] for key, moment in zip(MOMENTS, self._moments, strict=True)}
        return {"rows": self._ids, "step": self._step, **known} if len(self._ids) else {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state: such a one, or that of AdamW of the whole; nothing of an empty one."""
        self.forget()
        if not state:
            return
        moments = [state[key] for key in MOMENTS]
        rows = state.get("rows")
        if rows is None:
            rows = moments[1].any(1).nonzero().flatten()
            moments = [moment[rows] for moment in moments]
        self._ids, self._step = rows.clone(), state["step"].clone()
        self._moments = [moment.clone() for moment in moments]
        self._place[self._ids] = torch.arange(len(self._ids))


def spread_rows(state: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    """Return the state of a `RowAdamW` of so many rows as that of AdamW of the whole."""
    return {"step": state["step"], **{key: spread(state["rows"], state[key], rows) for key in MOMENTS}}
