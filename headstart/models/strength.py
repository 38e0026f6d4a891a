"""How much of what was learned a model uses: weights that lie anywhere between what they were and what they became.

With an adapter `W + s B A` becomes `W + t s B A`, so B is scaled; of a model that was trained whole each weight goes from its
base's to its own in a straight line (WiSE-FT: Wortsman et al., "Robust fine-tuning of zero-shot models", 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headstart.errors import ModelError, Problem
from headstart.files import read_json
from headstart.models.load import Loaded, load_merged, load_model, load_tokenizer, make_room
from headstart.models.source import Source


class Way(NamedTuple):
    """A weight that moves: from what it was in the base (None: zero) to what it became."""

    weight: Tensor
    base: Tensor | None
    tuned: Tensor


class Dial:
    """A tuned model whose strength can be set: 0 is the model that it comes from, 1 is what it became.

    With an adapter 0 is the model that the adapter stands on, also where it had begun with what another run had learned.
    """

    def __init__(self, ways: Sequence[Way]) -> None:
        self._ways = ways

    @torch.no_grad()
    def set(self, strength: float) -> None:
        """Set every weight to its base's, plus `strength` of the way to what it became; both ends are exact."""
        for weight, base, tuned in self._ways:
            weight.copy_(tuned * strength if base is None else torch.lerp(base, tuned, strength))


def build_dial(loaded: Loaded, base: Source, task: str) -> Dial:
    """Return the dial of a tuned model that was loaded; `base` is the model that it comes from.

    Raises ModelError where an adapter's part can't be taken in shares, or where `base` has other weights.
    """
    if not loaded.source.is_adapter:
        load = load_merged if base.is_adapter else load_model
        origin = load(base, loaded.model.device.type, loaded.model.dtype, task).model
        make_room(origin, load_tokenizer(loaded.source))
        return Dial(_whole(loaded, dict(origin.named_parameters())))
    _check_linear(loaded.source)
    ways = [Way(p, None, p.detach().clone()) for name, p in loaded.model.named_parameters() if ".lora_B." in name]
    return Dial([*ways, *_tokens(loaded.model)])


def _whole(loaded: Loaded, origin: dict[str, Tensor]) -> list[Way]:
    own = dict(loaded.model.named_parameters())
    if own.keys() != origin.keys() or any(own[name].shape != origin[name].shape for name in own):
        what = "its weights aren't those of the model that it comes from: no line leads from these to those"
        raise ModelError(Problem("model.kind", what, loaded.source.name, "take the run as it is"))
    return [Way(p, origin[name].detach(), p.detach().clone()) for name, p in own.items()]


def _tokens(model: Any) -> list[Way]:
    """Return the embeddings that were trained beside an adapter: rows that take the place of the model's own."""
    found = []
    for module in model.modules():
        for name, rows in (getattr(module, "trainable_tokens_delta", None) or {}).items():
            own = module.get_base_layer().weight[module.token_indices[name]]
            found.append(Way(rows, own.detach().clone(), rows.detach().clone()))
    return found


def _check_linear(source: Source) -> None:
    """Raise ModelError where an adapter is more than products that are added."""
    config = read_json(source.path / "adapter_config.json")
    odd = [name for name in ("use_dora", "modules_to_save", "lora_bias") if config.get(name)]
    if config.get("bias", "none") != "none":
        odd.append("bias")
    if config["peft_type"] != "LORA" or odd:
        what = f"an adapter of the form {config['peft_type']}{''.join(f', {name}' for name in odd)} has no strength"
        raise ModelError(Problem("model.kind", what, source.name, "give a run with a plain LoRA adapter"))
