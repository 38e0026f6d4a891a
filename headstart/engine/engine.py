"""The verbs that every kind of training drives: forward_backward, optim_step, state, load_state.

The engine knows packs, a model and an objective. It divides a step's gradient once, by the count of the whole step, so
that how rows are packed or split never changes it.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headstart.data.forest import Pack
from headstart.engine.clock import Clock
from headstart.engine.forward import Reader
from headstart.engine.optim import MOMENTS, RowAdamW, build_adamw, spread_rows, total_norm
from headstart.errors import DivergedError, Problem
from headstart.faults import reach
from headstart.machine import out_of_memory
from headstart.models.embedding import LOOKED_UP
from headstart.objectives.tokens import Total

Objective = Callable[[Tensor, Tensor], Total]
RandomState = tuple[Tensor, ...]


class PackTooLargeError(Exception):
    """The memory ran out on a pack with these `rows` (numbers in the step). The gradient of the step is incomplete."""

    def __init__(self, rows: Sequence[int], said: str) -> None:
        super().__init__(said)
        self.rows = rows


@dataclass(frozen=True)
class Sums:
    """What went through the engine: the loss summed, what it is divided by, and tokens (shared ones once, and not).

    On a GPU the first two stay there: to read them (`loss`, `count`) is to wait for all that was asked of it. So does what
    the objective `told`.
    """

    summed: float | Tensor = 0.0
    counted: float | Tensor = 0.0
    tokens: int = 0
    row_tokens: int = 0
    told: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """The loss SUM."""
        return float(self.summed)

    @property
    def count(self) -> float:
        """What the loss and its gradient are divided by."""
        return float(self.counted)

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.summed + other.summed,
            self.counted + other.counted,
            self.tokens + other.tokens,
            self.row_tokens + other.row_tokens,
            {**self.told, **{name: value + self.told.get(name, 0.0) for name, value in other.told.items()}},
        )

    @property
    def means(self) -> dict[str, float]:
        """What the objective told, each a mean; of nothing there is none."""
        read = {name: value.tolist() for name, value in self.told.items()}
        return {name: total / count for name, (total, count) in read.items() if count}


def read_together(*values: float | Tensor) -> list[float]:
    """Return numbers of which some may lie on a GPU, waiting for it once."""
    there = [value.double() for value in values if isinstance(value, Tensor) and value.is_cuda]
    read = iter(torch.stack(there).tolist() if there else ())
    return [next(read) if isinstance(value, Tensor) and value.is_cuda else float(value) for value in values]


def _number(value: Tensor) -> float | Tensor:
    """Return a number as what it is added up in: in double precision, on the GPU if it is there."""
    return value.detach().double() if value.is_cuda else float(value.detach())


class Engine:
    """A model in training: gradients in, updates out.

    `reader` is the model as a reader of packs, `trainable` those of its parameters that are updated. With `joint` the
    objective is about all packs of a step at once, as where rows are told apart from each other.
    """

    def __init__(
        self,
        reader: Reader,
        trainable: Mapping[str, torch.nn.Parameter],
        objective: Objective,
        *,
        weight_decay: float = 0.0,
        clip: float = 1.0,
        joint: bool = False,
    ) -> None:
        self.reader = reader
        self.trainable = dict(trainable)
        self._objective = objective
        self._clip = clip
        self._joint = joint
        self._sums = Sums()
        self.taken = Sums()  # what the last step was made of
        # Decay moves every row. On a GPU, rows of which none knows how many there are would have the host wait for it.
        by_rows = not weight_decay and reader.device.type == "cpu"
        self.rows = {n: RowAdamW(p) for n, p in self.trainable.items() if by_rows and hasattr(p, LOOKED_UP)}
        whole = {n: p for n, p in self.trainable.items() if n not in self.rows}
        for parameter in whole.values():
            if hasattr(parameter, LOOKED_UP):
                setattr(parameter, LOOKED_UP, None)  # another engine may have learned it by rows
        self.optimizer = build_adamw(whole, weight_decay)
        self.clock = Clock(reader.device.type)

    @property
    def joint(self) -> bool:
        """Tell whether the objective is about all packs of a step at once."""
        return self._joint

    def forward_backward_all(self, packs: Sequence[Pack]) -> Sums:
        """Add the gradient of the loss SUM of a step's packs, and return their sums.

        Raises PackTooLargeError where the memory runs out; then the step's gradient has to be discarded.
        """
        if self._joint:
            with _naming(max(packs, key=len)):
                return self._forward_backward_joint(packs)
        sums = Sums()
        for pack in packs:
            with _naming(pack):
                sums += self.forward_backward(pack)
        return sums

    def _forward_backward_joint(self, packs: Sequence[Pack]) -> Sums:
        """Add the gradient of a loss over all packs together, with the memory of one (GradCache, Gao et al., 2021).

        The outputs of all packs are made first; then each pack goes through again, with the same dropout, to carry on the
        gradient that the loss has with respect to its outputs.
        """
        self.reader.train()
        if len(packs) == 1:
            return self._through(packs[0])
        states, outputs = [], []
        with self.clock.phase("forward"), torch.no_grad():
            for pack in packs:
                states.append(self.random_state())
                outputs.append(self.reader.outputs(pack))
        joined = torch.cat(outputs).requires_grad_(True)
        total = self._objective(joined, torch.cat([self.reader.targets(pack) for pack in packs]))
        (gradient,) = torch.autograd.grad(total.loss, joined)
        after = self.random_state()
        for pack, state, part in zip(packs, states, torch.split(gradient, [len(o) for o in outputs]), strict=True):
            self.set_random_state(state)
            with self.clock.phase("forward"):
                again = self.reader.outputs(pack)
            reach("step.forward")
            with self.clock.phase("backward"):
                torch.autograd.backward(again, part)
            reach("step.backward")
        self.set_random_state(after)
        return self._note(packs, total)

    def random_state(self) -> RandomState:
        """Return the state of the generators that dropout draws from."""
        cuda = (torch.cuda.get_rng_state(),) if self.reader.device.type == "cuda" else ()
        return (torch.get_rng_state(), *cuda)

    @staticmethod
    def set_random_state(state: RandomState) -> None:
        """Let dropout draw what it drew from this state on."""
        torch.set_rng_state(state[0])
        if state[1:]:
            torch.cuda.set_rng_state(state[1])

    def forward_backward(self, pack: Pack) -> Sums:
        """Add the gradient of a pack's loss SUM to that of the step, and return the pack's sums."""
        if self._joint:
            return self._forward_backward_joint([pack])
        self.reader.train()
        return self._through(pack)

    def _through(self, pack: Pack) -> Sums:
        with self.clock.phase("forward"):
            total = self._objective(self.reader.outputs(pack), self.reader.targets(pack))
        reach("step.forward")
        with self.clock.phase("backward"):
            torch.autograd.backward(total.loss)
        reach("step.backward")
        return self._note([pack], total)

    def _note(self, packs: Sequence[Pack], total: Total) -> Sums:
        tokens, row_tokens = sum(map(len, packs)), sum(pack.row_tokens for pack in packs)
        sums = Sums(_number(total.loss), _number(total.count), tokens, row_tokens, total.told)
        self._sums += sums
        return sums

    def rehearse(self, pack: Pack) -> None:
        """Run a pack forward and backward for what that takes alone; its gradient stays until `discard`."""
        self.reader.train()
        with self.clock.phase("forward"):
            outputs = self.reader.outputs(pack)
            # Without the rest of its step a joint objective says nothing; what it costs is next to nothing.
            loss = outputs.sum() if self._joint else self._objective(outputs, self.reader.targets(pack)).loss
        with self.clock.phase("backward"):
            torch.autograd.backward(loss)

    def rehearse_optim_step(self, words: int = 0) -> float:
        """Take two steps that change no weight, and return the seconds of the second; the gradient is gone then.

        All that a step fills is filled after it, and the moments are zero as before the first step. `words` is how many
        different tokens there will be in training.
        """
        self.prepare_optimizer()
        for parameter in self.trainable.values():
            if parameter.grad is not None:
                parameter.grad.zero_()  # so that nothing that isn't finite can reach the weights
        for rows in self.rows.values():
            rows.make_room(words)
            rows.gradient.values.zero_()
        for _ in range(2):
            begun = time.perf_counter()
            self._update(Sums(counted=1.0), 0.0)
            taken = time.perf_counter() - begun
        self.discard()
        self.forget_moments()
        return taken

    def forget_moments(self) -> None:
        """Set the optimizer's moments to what they are before the first step."""
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
        for rows in self.rows.values():
            rows.forget()

    def prepare_optimizer(self) -> None:
        """Make the moments of every parameter that has a gradient, as AdamW would in its first step.

        So where the memory runs out for them, no weight was changed and no parameter has half of its moments.
        """
        for parameter in self.trainable.values():
            if parameter.grad is not None and not self.optimizer.state.get(parameter):
                moments = {key: torch.zeros_like(parameter) for key in MOMENTS}
                step = torch.zeros((), dtype=torch.float32, device=parameter.device)
                self.optimizer.state[parameter] = {"step": step, **moments}
        for rows in self.rows.values():
            rows.make_room()

    def optim_step(self, lr: float) -> float:
        """Divide by the step's count, clip, update and clear; return the gradient's norm before clipping.

        Raises DivergedError, with the weights untouched and the gradient cleared, where the loss or the gradient is
        not finite.
        """
        with self.clock.phase("optimizer"):
            return self._optim_step(lr)

    def _optim_step(self, lr: float) -> float:
        self.prepare_optimizer()
        sums, self._sums = self._sums, Sums()
        norm = self._update(sums, lr)
        self._clear()
        return norm

    def _clear(self) -> None:
        self.optimizer.zero_grad()
        for rows in self.rows.values():
            rows.gradient.clear()

    def _update(self, sums: Sums, lr: float) -> float:
        if any(rows.weight.grad is not None for rows in self.rows.values()):
            raise RuntimeError(
                "an embedding that learns by rows got a gradient of the whole, which nothing would apply"
            )
        gradients = [p.grad for p in self.trainable.values() if p.grad is not None]
        gradients += [rows.gradient.values for rows in self.rows.values()]
        # The one moment of a step at which the host waits for a GPU.
        total, loss, count = read_together(total_norm(gradients), sums.summed, sums.counted)
        norm = total / count if count else math.nan  # where nothing is predicted there is no mean
        self.taken = replace(sums, summed=loss, counted=count)
        if not math.isfinite(norm) or not math.isfinite(loss):
            self._clear()
            what = f"the loss sum is {loss} over {count:g} targets and the gradient's norm {norm}"
            cure = "lower optim.lr; look at the rows of this step"
            raise DivergedError(Problem("numbers.not_finite", what, "", cure))
        # The update divides as it goes, by the step's count and by what clips: no pass over the gradients for that.
        divisor = count * max(1.0, norm / self._clip if self._clip else 1.0)
        scale = torch.tensor(divisor, device=self.reader.device)
        self.optimizer.grad_scale = scale  # type: ignore[attr-defined]
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        for rows in self.rows.values():
            rows.update(lr, scale, self.optimizer.defaults["betas"], self.optimizer.defaults["eps"])
        # The fused AdamW doesn't say that it changed them; what is made of adapters and weights must know (models/linear.py).
        torch.autograd.graph.increment_version(list(self.trainable.values()))
        return norm

    def discard(self) -> None:
        """Forget the gradient that was added up so far."""
        self._sums = Sums()
        self._clear()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything that makes the next step what it would have been: tensors by name, and plain values."""
        tensors = {f"model.{name}": p.detach() for name, p in self.trainable.items()}
        for name, parameter in self.trainable.items():
            rows = self.rows.get(name)
            state = rows.state() if rows else self.optimizer.state.get(parameter, {})
            for key, value in state.items():
                tensors[f"optim.{key}.{name}"] = value
        tensors["rng.torch"] = torch.get_rng_state()
        if self.reader.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        kind, keys, *rest = np.random.get_state(legacy=True)
        numbers = {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]}
        return tensors, {"rng": numbers}

    def load_state(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Take over a state. Raises KeyError where a parameter of this engine is missing from it."""
        self.load_trained(tensors)
        torch.set_rng_state(tensors["rng.torch"])
        if self.reader.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"])
        version, internal, gauss = numbers["rng"]["python"]
        random.setstate((version, tuple(internal), gauss))
        np.random.set_state(tuple(numbers["rng"]["numpy"]))

    def load_trained(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the weights and moments of a state. Raises KeyError where a parameter is missing from it."""
        self.load_weights({name: tensors[f"model.{name}"] for name in self.trainable})
        for name, parameter in self.trainable.items():
            keys = ("rows", "step", *MOMENTS)
            state = {key: tensors[f"optim.{key}.{name}"] for key in keys if f"optim.{key}.{name}" in tensors}
            if name in self.rows:
                self.rows[name].load_state(state)
                continue
            for key, value in (spread_rows(state, len(parameter)) if "rows" in state else state).items():
                device = "cpu" if key == "step" and self.reader.device.type == "cpu" else self.reader.device
                self.optimizer.state[parameter][key] = value.clone().to(device)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Set the parameters that train, by name."""
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(weights[name])


@contextlib.contextmanager
def _naming(pack: Pack) -> Iterator[None]:
    """Say of which rows the pack was on which the memory ran out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = out_of_memory(error)
        if said is None:
            raise
        raise PackTooLargeError(sorted(set(pack.segment_rows.tolist())), said) from None
