"""The verb forward: a causal language model that reads packs."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from headstart.data.forest import Pack
from headstart.models.attention import Forest, can_pack, run_decoder
from headstart.models.head import read_head


class PackReader:
    """A model of transformers that takes packs and gives the log-probabilities of their targets.

    `packs` tells whether it reads forests (tried, not looked up); else each pack must hold one row. `bfloat16` runs it
    in mixed precision.
    """

    def __init__(self, model: Any, *, bfloat16: bool = False) -> None:
        self.model = model
        self.head = read_head(model)
        self.packs = can_pack(model)
        self._bfloat16 = bfloat16

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        device: torch.device = self.model.device
        return device

    def recompute_activations(self) -> None:
        """Keep only the inputs of each layer and make the rest anew in the backward pass.

        Raises ValueError where the architecture can't do that.
        """
        # What it is called since, and what it was called before; the old name warns where the new one is there.
        name = "activation_checkpointing_enable"
        enable = getattr(self.model, name if hasattr(self.model, name) else "gradient_checkpointing_enable")
        enable({"use_reentrant": False})

    def forward(self, pack: Pack) -> Tensor:
        """Return the log-probability of each target of a pack, [L] on the CPU, without gradients or dropout."""
        self.model.eval()
        with torch.no_grad():
            return self.logprobs(pack).cpu()

    def logprobs(self, pack: Pack) -> Tensor:
        """Return the log-probability of each target of a pack, [L], as part of the graph that gradients go through."""
        ids, positions, sources, target_sources, target_ids = (
            torch.from_numpy(part).to(self.device)
            for part in (pack.ids, pack.positions, pack.sources, pack.target_sources, pack.target_ids)
        )
        forest = Forest(pack.length.tolist(), pack.parent.tolist(), positions) if self.packs else None
        with self._precision():
            hidden = run_decoder(self.model, ids, positions, forest)
            return self.head.logprobs(hidden[sources], target_sources, target_ids)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self._bfloat16:
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()
