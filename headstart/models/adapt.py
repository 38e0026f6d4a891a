"""Which parameters train: `adapt` takes a model and gives a model."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headstart.errors import ModelError, Problem


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter: `rank`, `alpha` (its part is scaled by alpha / rank), `dropout`, `targets`.

    `tokens` are ids whose embeddings train too: those that a template brings to a model that never saw them.
    """

    rank: int
    alpha: float
    dropout: float
    targets: Sequence[str]
    tokens: Sequence[int] = ()


@dataclass(frozen=True)
class Adapted:
    """A model whose parameters train or don't.

    `model` is what the engine runs; `saved` is what writes itself to disk (the PEFT model around it, or the model).
    """

    model: Any
    saved: Any
    modules: int

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Return the parameters that train, by name; tied ones once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def adapt(
    model: Any, lora: Lora | None, seed: int, fresh: Collection[str] = (), *, task: str | None = "CAUSAL_LM"
) -> Adapted:
    """Make every parameter of `model` train, or put a LoRA adapter in and make that train alone.

    At the start the adapter adds nothing. `seed` sets its first matrices. `task` is what PEFT calls it; without one
    only the body is adapted, and the head trains whole, as does what is `fresh`: parameters that begin at random.

    Raises ModelError where a target of the adapter isn't found in the model.
    """
    if lora is None:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return Adapted(model, model, 0)
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    missing = [t for t in lora.targets if t != "all-linear" and not _matches(model, t)]
    if missing:
        cure = f"linear modules of this model: {', '.join(_linear_names(model))}; or all-linear"
        raise ModelError(
            Problem("model.lora_targets", f"no module is called {', '.join(missing)}", "lora.targets", cure)
        )
    targets: Any = "all-linear" if "all-linear" in lora.targets else list(lora.targets)
    whole = [] if task else _head_parameters(model, fresh)
    # What a head shares with the embeddings can't have an adapter: merged, it would change the embeddings too.
    tied = _embedding(model)
    if whole and targets == "all-linear":
        targets = [
            name
            for name, module in model.named_modules()
            if _is_linear(module) and f"{name}.weight" not in whole and module.weight is not tied
        ]
    torch.manual_seed(seed)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        trainable_token_indices=_token_rows(model, lora.tokens),
        task_type=task,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2 keeps its weights so
    )
    with warnings.catch_warnings():
        # peft reads a property of transformers that is on its way out; nothing a user could mend.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            wrapped = get_peft_model(model, config)
        except ValueError as error:
            cure = f"linear modules of this model: {', '.join(_linear_names(model))}; or all-linear"
            said = str(error).splitlines()[0]
            raise ModelError(Problem("model.lora_targets", said, "lora.targets", cure)) from None
    for name, parameter in model.named_parameters():
        if name.replace(".base_layer.", ".") in whole:
            parameter.requires_grad_(True)
    return Adapted(wrapped.get_base_model(), wrapped, _count_modules(model))


def carry_on(adapted: Any) -> Adapted:
    """Make the adapter of a PEFT model, loaded to be trained, train further: it begins with what it has learned."""
    model = adapted.get_base_model()
    return Adapted(model, adapted, _count_modules(model))


def _count_modules(model: Any) -> int:
    return sum("lora_A" in name for name, _ in model.named_parameters())


def _embedding(model: Any) -> Any:
    try:
        return model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):  # a model of images
        return None


def _token_rows(model: Any, tokens: Sequence[int]) -> dict[str, list[int]] | None:
    """Return which rows of the embedding train, and of the head where that is another matrix."""
    if not tokens:
        return None
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    ends = ends[:1] if ends[1] is None or ends[1].weight is ends[0].weight else ends
    return {name: list(tokens) for name, module in model.named_modules() if any(module is end for end in ends)}


def _head_parameters(model: Any, fresh: Collection[str]) -> list[str]:
    """Return the parameters that train whole: those outside of the body, and those that begin at random."""
    body = {id(p) for p in model.base_model.parameters()} if model.base_model is not model else set()
    return [name for name, p in model.named_parameters() if name in fresh or (body and id(p) not in body)]


def _is_linear(module: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (torch.nn.Linear, Conv1D))


def _linear_names(model: Any) -> list[str]:
    return sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)})


def _matches(model: Any, target: str) -> bool:
    return any(name == target or name.endswith(f".{target}") for name, _ in model.named_modules())
