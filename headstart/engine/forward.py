"""The verb forward: models that read packs, and what comes out at the places that an objective needs."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headstart.data.forest import Pack, build_packs
from headstart.data.segments import Example
from headstart.models.attention import Forest, can_pack, run_decoder
from headstart.models.head import read_head
from headstart.models.labels import find_packing, label_logits, row_logits

LOGITS_COPIES = 4

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Reader(ABC):
    """A model of transformers that takes packs.

    `packing` tells how rows may lie in one (tried, not looked up): in a `forest`, as `roots` that share nothing, or
    `none`: then each pack must hold one row. `bfloat16` runs the model in mixed precision.
    """

    def __init__(self, model: Any, packing: str, *, bfloat16: bool = False) -> None:
        self.model = model
        self.packing = packing
        self._bfloat16 = bfloat16

    @property
    def packs(self) -> bool:
        """Tell whether several rows go through at once."""
        return self.packing != "none"

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        device: torch.device = self.model.device
        return device

    @property
    def head_bytes(self) -> int:
        """The most memory that the head fills for a while."""
        return 0

    def build_packs(self, examples: Sequence[Example], tokens_per_pack: int) -> list[Pack]:
        """Lay out rows as this model can read them."""
        return build_packs(examples, tokens_per_pack, share=self.packing == "forest", one_row=self.packing == "none")

    def recompute_activations(self) -> None:
        """Keep only the inputs of each layer and make the rest anew in the backward pass.

        Raises ValueError where the architecture can't do that.
        """
        # What it is called since, and what it was called before; the old name warns where the new one is there.
        name = "activation_checkpointing_enable"
        enable = getattr(self.model, name if hasattr(self.model, name) else "gradient_checkpointing_enable")
        enable({"use_reentrant": False})

    def forward(self, pack: Pack) -> Tensor:
        """Return `outputs` on the CPU, without gradients or dropout."""
        self.model.eval()
        with torch.no_grad():
            return self.outputs(pack).cpu()

    @abstractmethod
    def outputs(self, pack: Pack) -> Tensor:
        """Return what the objective is about, as part of the graph that gradients go through."""

    @abstractmethod
    def targets(self, pack: Pack) -> Tensor:
        """Return what the objective holds the outputs against."""

    @abstractmethod
    def row_losses(self, pack: Pack) -> tuple[Floats, Floats, Ints]:
        """Return the loss of each target, its weight, and the number of its row, without gradients."""

    def hidden(self, pack: Pack) -> Tensor:
        """Return the hidden states of a pack, [T, D]."""
        ids, positions = self.tensors(pack.ids, pack.positions)
        forest = Forest(pack.length.tolist(), pack.parent.tolist(), positions) if self.packs else None
        return run_decoder(self.model, ids, positions, forest)

    def tensors(self, *arrays: Any) -> list[Tensor]:
        """Return arrays as tensors where the model lies."""
        return [torch.from_numpy(array).to(self.device) for array in arrays]

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Return the precision that the model runs in."""
        if self._bfloat16:
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()


class PackReader(Reader):
    """A causal language model: outputs are the log-probabilities of a pack's targets, [L]; targets their weights."""

    def __init__(self, model: Any, *, bfloat16: bool = False) -> None:
        self.head = read_head(model)
        super().__init__(model, "forest" if can_pack(model) else "none", bfloat16=bfloat16)

    @property
    def head_bytes(self) -> int:
        """The most memory that the logits of one chunk fill."""
        return self.head.rows_at_once * self.head.vocabulary * 4 * LOGITS_COPIES

    def outputs(self, pack: Pack) -> Tensor:
        """Return the log-probability of each target."""
        sources, target_sources, target_ids = self.tensors(pack.sources, pack.target_sources, pack.target_ids)
        with self.precision():
            return self.head.logprobs(self.hidden(pack)[sources], target_sources, target_ids)

    def targets(self, pack: Pack) -> Tensor:
        """Return the weight of each target."""
        (weights,) = self.tensors(pack.weights)
        return weights

    def row_losses(self, pack: Pack) -> tuple[Floats, Floats, Ints]:
        """Return the negative log-probability of each target, its weight and its row."""
        return -self.forward(pack).double().numpy(), pack.weights.astype(np.float64), pack.target_rows


class LabelReader(Reader):
    """A classifier (`...ForSequenceClassification`): outputs are the logits of a pack's rows, [S, C]; targets their classes."""

    def __init__(self, model: Any, *, bfloat16: bool = False) -> None:
        packing, self._place = find_packing(model)
        super().__init__(model, packing, bfloat16=bfloat16)

    def outputs(self, pack: Pack) -> Tensor:
        """Return the logits of each row, in float32 or wider."""
        with self.precision():
            if self.packs:
                places = pack.begins if self._place == "first" else pack.ends
                logits = label_logits(self.model, self.hidden(pack)[torch.from_numpy(places).to(self.device)])
            else:
                logits = row_logits(self.model, self.tensors(pack.ids)[0])
        return logits if logits.dtype == torch.float64 else logits.float()

    def targets(self, pack: Pack) -> Tensor:
        """Return the class of each row."""
        (labels,) = self.tensors(pack.labels)
        return labels

    def row_losses(self, pack: Pack) -> tuple[Floats, Floats, Ints]:
        """Return the negative log-probability of each row's class; a class that the model doesn't have weighs nothing."""
        logprobs = self.forward(pack).double().log_softmax(-1).numpy()
        known = pack.labels >= 0
        losses = -logprobs[np.arange(len(logprobs)), np.maximum(pack.labels, 0)] * known
        return losses, known.astype(np.float64), pack.segment_rows
