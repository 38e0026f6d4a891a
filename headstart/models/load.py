"""A folder -> a model and its tokenizer: safetensors only, no code but transformers' own."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headstart.errors import ModelError, Problem
from headstart.files import read_json
from headstart.models.attention import register
from headstart.models.source import Source, find_model, quiet


@dataclass(frozen=True)
class Loaded:
    """A causal language model in memory, the PEFT model around it if it has an adapter, and where both came from."""

    model: Any
    adapted: Any
    source: Source
    base: Source


def load_tokenizer(source: Source) -> Any:
    """Load the tokenizer of a model. Raises ModelError where it has none that can be used."""
    from transformers import AutoTokenizer

    quiet()
    path = source.path
    if source.is_adapter and not (path / "tokenizer_config.json").exists():
        path = find_base(source).path
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise _load_error(source, error, "model.tokenizer") from None


def load_config(source: Source) -> Any:
    """Load the config of a model (of an adapter: of its base). Raises ModelError."""
    from transformers import AutoConfig

    quiet()
    path = (find_base(source) if source.is_adapter else source).path
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise _load_error(source, error, "model.kind") from None


def load_model(
    source: Source, device: str, dtype: torch.dtype = torch.float32, classes: Sequence[str] | None = None
) -> Loaded:
    """Load a causal language model, and the adapter on it where the folder is one; with `classes` a classifier of them.

    Raises ModelError where the folder holds another kind of model, or one that needs code of its own.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto, extra = AutoModelForCausalLM, {}
    if classes is not None:
        names = dict(enumerate(classes))
        auto = AutoModelForSequenceClassification
        extra = {
            "num_labels": len(names),
            "id2label": names,
            "label2id": {name: number for number, name in names.items()},
        }
    quiet()
    register()
    base = find_base(source) if source.is_adapter else source
    if classes is None and find_classes(source) is not None:
        cure = "label rows with it: headstart predict MODEL DATA -o FILE"
        raise ModelError(Problem("model.kind", "the model is a classifier and writes no text", source.name, cure))
    try:
        model, info = auto.from_pretrained(
            base.path, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True, **extra
        )
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise _load_error(source, error, "model.kind") from None
    _check_whole(model, info["missing_keys"], source, new_head=classes is not None)
    _mend_generation_config(model)
    model.to(device)
    adapted = model
    if source.is_adapter:
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft's own, as in `adapt`
            adapted = PeftModel.from_pretrained(model, source.path)
        model = adapted.get_base_model()
    model.eval()
    return Loaded(model, adapted, source, base)


def _check_whole(model: Any, missing: Collection[str], source: Source, *, new_head: bool) -> None:
    """Raise ModelError where weights would begin at random that the folder should hold: then it is of another kind."""
    body = f"{model.base_model_prefix}."
    lost = sorted(key for key in missing if not new_head or (key.startswith(body) and ".pooler." not in f".{key}"))
    if lost:
        what = f"it holds no weights for {', '.join(lost[:3])}{' and more' if len(lost) > 3 else ''}"
        cure = "give a model that writes text; a classifier is for `headstart predict`, an encoder for labels"
        raise ModelError(Problem("model.kind", what, source.name, cure))


def _mend_generation_config(model: Any) -> None:
    """Drop the sampling settings of a model where they contradict each other: transformers refuses to save them."""
    from transformers import GenerationConfig

    found = getattr(model, "generation_config", None)
    if found is None:
        return
    try:
        found.validate(strict=True)
    except ValueError:
        ids = {name: getattr(found, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**ids)


def find_classes(source: Source) -> tuple[str, ...] | None:
    """Return the classes of a classifier; None where the model is none."""
    if source.is_adapter:
        return None
    config = load_config(source)
    if not any("ForSequenceClassification" in name for name in config.architectures or ()):
        return None
    return tuple(config.id2label[number] for number in range(len(config.id2label)))


def need_classes(source: Source) -> tuple[str, ...]:
    """Return the classes of a classifier. Raises ModelError where the model is none."""
    classes = find_classes(source)
    if classes is None:
        cure = "tune one first: headstart tune DATA --kind supervised"
        raise ModelError(Problem("model.kind", "the model is no classifier", source.name, cure))
    return classes


def find_base(source: Source) -> Source:
    """Return the model on which an adapter stands."""
    config = read_json(source.path / "adapter_config.json")
    name, revision = config["base_model_name_or_path"], config.get("revision")
    at = f"@{revision}" if revision and not Path(name).exists() else ""
    return find_model(f"{name}{at}")


def stop_ids(source: Source, tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens at which a model stops: those of its generation config, and its tokenizer's own."""
    found: list[int] = []
    folders = [source.path, find_base(source).path] if source.is_adapter else [source.path]
    for folder in folders:
        for name in ("generation_config.json", "config.json"):
            if (folder / name).exists():
                value = read_json(folder / name).get("eos_token_id")
                found += [] if value is None else value if isinstance(value, list) else [value]
    if tokenizer.eos_token_id is not None:
        found.append(int(tokenizer.eos_token_id))
    return tuple(dict.fromkeys(found))


def model_length(model_config: Any) -> int:
    """Return the most positions that a model has; a very large number where it names none."""
    config = model_config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 1 << 20)


def _load_error(source: Source, error: Exception, code: str) -> ModelError:
    said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "trust_remote_code" in str(error):
        cure = "use a version of it that transformers itself knows"
        return ModelError(Problem("model.remote_code", "the model needs code that comes with it", source.name, cure))
    if code == "model.kind" and "Unrecognized configuration class" in str(error):
        said = "it is no causal language model"
    return ModelError(Problem(code, said, source.name, "give a causal language model with its tokenizer"))
