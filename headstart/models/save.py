"""What comes out: a folder that plain transformers or peft loads, with tokenizer, template and stop tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headstart.files import new_folder
from headstart.models.source import Source


def save_result(
    model: Any, tokenizer: Any, stop_ids: Sequence[int], folder: Path, source: Source | None = None
) -> None:
    """Write a tuned model (a PEFT model: its adapter) with its tokenizer; the folder appears whole or not at all.

    An adapter names what it stands on: the hub id and commit of `source` if it has them, else the folder. The adapter
    of a classifier is merged into it.
    """
    with new_folder(folder) as target:
        inner = model.get_base_model() if hasattr(model, "peft_config") else model
        if getattr(inner, "generation_config", None) is not None and stop_ids:
            inner.generation_config.eos_token_id = list(stop_ids)
        if hasattr(model, "peft_config") and model.peft_config["default"].task_type == "SEQ_CLS":
            # Whole, since the names of the classes stand in the model's config; the run's own model stays as it is.
            copy.deepcopy(model).merge_and_unload().save_pretrained(target)
        elif hasattr(model, "peft_config"):
            if source is not None and source.kind == "hub":
                config = model.peft_config["default"]
                config.base_model_name_or_path = source.name.partition("@")[0]
                config.revision = source.revision
            model.save_pretrained(target)
            # An adapter folder has no generation config of its own, but whoever loads it needs to know where to stop.
            inner.generation_config.save_pretrained(target)
            (target / "README.md").unlink(missing_ok=True)
        else:
            model.save_pretrained(target)
        tokenizer.save_pretrained(target)
