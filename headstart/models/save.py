"""What comes out: a folder that plain transformers or peft loads, with tokenizer, template and stop tokens."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from headstart.data.labels import Labels
from headstart.files import new_folder, write_json
from headstart.models.load import LABELS_KEY, head_of
from headstart.models.source import Source


def save_result(
    model: Any,
    tokenizer: Any,
    stop_ids: Sequence[int],
    folder: Path,
    source: Source | None = None,
    *,
    labels: Labels | None = None,
    beside: Mapping[str, Any] | None = None,
) -> None:
    """Write a tuned model (a PEFT model: its adapter) with its tokenizer; the folder appears whole or not at all.

    `labels` are what it tells: its config names them, and where its head can, it gives numbers in their own units.
    `beside` are files of JSON that belong to it: how a model of images sees, how embeddings are pooled.

    An adapter names what it stands on: the hub id and commit of `source` if it has them, else the folder. The adapter
    of a model that writes no text is merged into it, since what it tells stands in the model's config.
    """
    with new_folder(folder) as target:
        inner = model.get_base_model() if hasattr(model, "peft_config") else model
        if getattr(inner, "generation_config", None) is not None and stop_ids:
            inner.generation_config.eos_token_id = list(stop_ids)
        if hasattr(model, "peft_config") and model.peft_config["default"].task_type is None:
            # The run's own model stays as it is.
            _save_whole(copy.deepcopy(model).merge_and_unload(), target, labels)
        elif hasattr(model, "peft_config"):
            if source is not None and source.kind == "hub":
                config = model.peft_config["default"]
                config.base_model_name_or_path = source.name.partition("@")[0]
                config.revision = source.revision
            # Tokens that a template brought are part of the adapter, so the embeddings needn't go with it.
            model.save_pretrained(target, save_embedding_layers=False)
            # An adapter folder has no generation config of its own, but whoever loads it needs to know where to stop.
            inner.generation_config.save_pretrained(target)
            (target / "README.md").unlink(missing_ok=True)
        else:
            _save_whole(model, target, labels)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
        for name, values in (beside or {}).items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            write_json(target / name, values)


def _save_whole(model: Any, folder: Path, labels: Labels | None) -> None:
    head = _last_linear(model) if labels is not None and labels.task == "regression" else None
    if labels is None or head is None:
        if labels is not None:
            setattr(model.config, LABELS_KEY, labels.to_json())
        model.save_pretrained(folder)
        return
    # Numbers were learned with mean 0 and spread 1; the head that is written gives them as the user knows them.
    kept = head.weight.detach().clone(), head.bias.detach().clone()
    spread, mean = (torch.tensor(values).to(head.bias) for values in (labels.spread, labels.mean))
    plain = replace(labels, mean=(0.0,) * len(labels.names), spread=(1.0,) * len(labels.names))
    setattr(model.config, LABELS_KEY, plain.to_json())
    try:
        with torch.no_grad():
            head.weight.mul_(spread[:, None])
            head.bias.mul_(spread).add_(mean)
        model.save_pretrained(folder)
    finally:
        with torch.no_grad():
            head.weight.copy_(kept[0])
            head.bias.copy_(kept[1])


def _last_linear(model: Any) -> Any:
    """Return the layer that gives a model's numbers, if it has a bias; else None."""
    head = head_of(model)
    return head if head is not None and head.bias is not None else None


def saved_scale(model: Any, labels: Labels | None) -> dict[str, list[float]] | None:
    """Return by what the numbers of a saved model must be multiplied, and what is added; None where it gives them plainly."""
    if labels is None or labels.task != "regression" or _last_linear(model) is not None:
        return None
    return {"spread": list(labels.spread), "mean": list(labels.mean)}
