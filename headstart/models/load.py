"""A folder -> a model and its tokenizer: safetensors only, no code but transformers' own."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from headstart import machine
from headstart.data.images import Look
from headstart.data.labels import Labels
from headstart.errors import ModelError, Problem
from headstart.files import read_json
from headstart.models.attention import register
from headstart.models.source import Source, find_model, quiet


@dataclass(frozen=True)
class Loaded:
    """A model in memory, the PEFT model around it if it has an adapter, and where both came from.

    `fresh` names the parameters that no file held: the head for new labels, say.
    """

    model: Any
    adapted: Any
    source: Source
    base: Source
    fresh: frozenset[str] = frozenset()


@machine.loading()
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


@machine.loading()
def load_config(source: Source) -> Any:
    """Load the config of a model (of an adapter: of its base). Raises ModelError."""
    from transformers import AutoConfig

    quiet()
    _register_networks()
    path = (find_base(source) if source.is_adapter else source).path
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise _load_error(source, error, "model.kind") from None


# The class of transformers that a task's model is of, and how its architectures are called.
AUTO = {
    "chat": "AutoModelForCausalLM",
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "classification": "AutoModelForSequenceClassification",
    "multilabel": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "tagging": "AutoModelForTokenClassification",
    "images": "AutoModelForImageClassification",
    "embedding": "AutoModel",
    "preference": "AutoModelForCausalLM",
    "reward": "AutoModelForSequenceClassification",
}
PROBLEM_TYPES = {
    "single_label_classification": "classification",
    "multi_label_classification": "multilabel",
    "regression": "regression",
}
POOLING = "headstart_pooling"  # an attribute of models: how texts become one vector
POOLINGS = {"mean": "mean_tokens", "cls": "cls_token", "lasttoken": "lasttoken"}
LABELS_KEY = "headstart_labels"  # in the config of a model that tells labels


def _register_networks() -> None:
    """Make the project's own networks known to transformers."""
    from headstart.models import efficientnet

    efficientnet.register()


def load_model(
    source: Source,
    device: str,
    dtype: torch.dtype = torch.float32,
    task: str = "causal",
    labels: Labels | None = None,
    *,
    random: bool = False,
    trains: bool = False,
) -> Loaded:
    """Load a model for a task, with a head for `labels`, and the adapter on it where the folder is one; with `trains`, that
    can be trained further.

    With `random` only its shape is taken, and its weights begin at random. Raises ModelError where the folder holds
    another kind of model, or one that needs code of its own.
    """
    import transformers

    quiet()
    register()
    _register_networks()
    base = find_base(source) if source.is_adapter else source
    told = find_labels(source)
    if told is not None and labels is None and task not in ("masked", "embedding"):
        cure = "label rows with it: headstart predict MODEL DATA -o FILE"
        raise ModelError(Problem("model.kind", "the model is a classifier and writes no text", source.name, cure))
    auto = getattr(transformers, AUTO[task])
    config = load_config(source)
    for key, value in (_head_config(labels) if labels else {}).items():
        setattr(config, key, value)
    info: dict[str, Any] = {"missing_keys": ()}
    try:
        if random:
            model = auto.from_config(config, dtype=dtype)
        else:
            model, info = auto.from_pretrained(
                base.path,
                config=config,
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                # A head of other classes, as that of a model tuned before, begins anew.
                ignore_mismatched_sizes=labels is not None,
            )
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise _load_error(source, error, "model.kind") from None
    if labels and told:
        _carry_head(model, base, told, labels)
    fresh = {*info["missing_keys"], *(key for key, *_ in info.get("mismatched_keys", ()))}
    if AUTO[task] == "AutoModelForCausalLM" or labels or task == "embedding":
        _check_whole(model, fresh, source, new_head=bool(labels))
    _mend_generation_config(model)
    setattr(model, POOLING, _own_pooling(base))
    model.to(device)
    adapted = model
    if source.is_adapter:
        from peft import PeftModel

        make_room(model, load_tokenizer(source))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft's own, as in `adapt`
            adapted = PeftModel.from_pretrained(model, source.path, is_trainable=trains)
        model = adapted.get_base_model()
    model.eval()
    return Loaded(model, adapted, source, base, frozenset(fresh))


def load_merged(
    source: Source, device: str, dtype: torch.dtype = torch.float32, task: str = "causal", labels: Labels | None = None
) -> Loaded:
    """Load a model of text with its adapter merged into it, as a whole model for any task. Raises ModelError."""
    found = load_model(source, "cpu", torch.float32, "causal")
    merged = found.adapted.merge_and_unload()
    if AUTO[task] == AUTO["causal"]:
        return replace(found, model=merged.to(device, dtype), adapted=merged)
    with tempfile.TemporaryDirectory(prefix="headstart-") as folder:
        merged.save_pretrained(folder)
        del merged
        loaded = load_model(Source(source.name, Path(folder), "folder"), device, dtype, task, labels)
    return replace(loaded, source=source, base=found.base)


def read_adapter(source: Source) -> dict[str, Any]:
    """Return what a LoRA adapter says of itself. Raises ModelError where it is of another sort: nothing is known of that."""
    config: dict[str, Any] = read_json(source.path / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        what = f"the adapter is of the sort {config.get('peft_type')}, and only LoRA can be tuned further"
        raise ModelError(
            Problem("model.kind", what, source.name, f"tune what it stands on: -m {find_base(source).name}")
        )
    return config


def head_of(model: Any) -> Any:
    """Return the layer that gives a model's numbers; None where no linear one does."""
    wanted = model.config.num_labels
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == wanted]
    return linear[-1] if linear else None


@torch.no_grad()
def _carry_head(model: Any, base: Source, told: Labels, labels: Labels) -> None:
    """Give a head for `labels` what the one on disk knew, which told `told`: its rows for the classes that both tell.

    Of numbers it gives them in the scale in which they are learned now.
    """
    head = head_of(model)
    if head is None or told.task != labels.task:
        return
    name = next(name for name, module in model.named_modules() if module is head)
    known = {part: _read_tensor(base, f"{name}.{part}") for part in ("weight", "bias")}
    if labels.task == "regression":
        if told.names == labels.names and head.bias is not None:
            (was, at), (spread, mean) = (
                [torch.tensor(values).to(head.bias) for values in (side.spread, side.mean)] for side in (told, labels)
            )
            head.weight.mul_((was / spread)[:, None])
            head.bias.mul_(was).add_(at).sub_(mean).div_(spread)
        return
    places = {label: number for number, label in enumerate(told.names)}
    for part, tensor in known.items():
        own = getattr(head, part)
        if own is None or tensor is None or len(tensor) != len(told.names) or tensor.shape[1:] != own.shape[1:]:
            continue
        for number, label in enumerate(labels.names):
            if label in places:
                own[number] = tensor[places[label]].to(own)


def _read_tensor(source: Source, name: str) -> torch.Tensor | None:
    """Return a tensor of a model's files by its name; None where there is none of that name."""
    from safetensors import safe_open

    for file in sorted(source.path.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118 (no dict)
                found: torch.Tensor = tensors.get_tensor(name)
                return found
    return None


def _own_pooling(source: Source) -> str | None:
    """Return how a model of sentence-transformers pools, where it says so: mean, cls or lasttoken."""
    file = source.path / "1_Pooling" / "config.json"
    said = read_json(file) if file.exists() else {}
    if said.get("pooling_mode") in POOLINGS:
        return str(said["pooling_mode"])
    return next((mode for mode, key in POOLINGS.items() if said.get(f"pooling_mode_{key}")), None)


def _head_config(labels: Labels) -> dict[str, Any]:
    """Return what a model's config says of the labels that it tells."""
    names = dict(enumerate(labels.names))
    problem = next((key for key, task in PROBLEM_TYPES.items() if task == labels.task), None)
    return {
        "id2label": names,
        "label2id": {name: number for number, name in names.items()},
        **({"problem_type": problem} if problem else {}),
        LABELS_KEY: labels.to_json(),
    }


def _check_whole(model: Any, missing: Collection[str], source: Source, *, new_head: bool) -> None:
    """Raise ModelError where weights would begin at random that the folder should hold: then it is of another kind."""
    body = f"{model.base_model_prefix}."
    whole = model.base_model is model  # a model without a head, or one whose body and head aren't told apart
    lost = [key for key in missing if not new_head or (not whole and key.startswith(body))]
    lost = sorted(key for key in lost if ".pooler." not in f".{key}")
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


def find_labels(source: Source) -> Labels | None:
    """Return what a model tells of rows, words or images; None where it is no classifier."""
    if source.is_adapter:
        return None
    config = load_config(source)
    kept = getattr(config, LABELS_KEY, None)
    if kept is not None:
        return Labels.from_json(kept)
    names = tuple(config.id2label[number] for number in range(len(config.id2label)))
    for architecture in config.architectures or ():
        if "ForSequenceClassification" in architecture:
            task = PROBLEM_TYPES.get(config.problem_type or "", "classification" if len(names) > 1 else "regression")
            return Labels(task, names, mean=(0.0,) * len(names), spread=(1.0,) * len(names))
        if "ForTokenClassification" in architecture:
            return Labels("tagging", names)
        if "ForImageClassification" in architecture:
            return Labels("images", names)
    return None


def need_labels(source: Source) -> Labels:
    """Return what a classifier tells. Raises ModelError where the model is none."""
    labels = find_labels(source)
    if labels is None:
        cure = "tune one first: headstart tune DATA --kind supervised"
        raise ModelError(Problem("model.kind", "the model is no classifier", source.name, cure))
    return labels


def is_encoder(source: Source) -> bool:
    """Tell whether a model looks both ways: then it is for masked tokens, and not for text to continue."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    config = load_config(source)
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or ())
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not causal and not getattr(config, "is_decoder", False)


def load_look(source: Source) -> Look:
    """Return how a model wants to see images. Raises ModelError where it takes none."""
    config = load_config(source)
    size = getattr(config, "image_size", None)
    file = source.path / "preprocessor_config.json"
    if size is None and not file.exists():
        cure = "give a model for images: efficientnet-lite0, or a vision model of transformers"
        raise ModelError(Problem("model.kind", "the model takes no images", source.name, cure))
    size = size[0] if isinstance(size, list | tuple) else size
    return Look.from_json(read_json(file) if file.exists() else {}, size or 224)


def make_room(model: Any, tokenizer: Any) -> None:
    """Give a model embeddings for the tokens that its tokenizer was given beside its own, if it has too few.

    They begin at the mean of all others.
    """
    added = tokenizer.get_added_vocab().values()
    rows = int(model.get_input_embeddings().weight.shape[0])
    if len(tokenizer) > rows and added and max(added) == len(tokenizer) - 1 and len(tokenizer) - rows <= len(added):
        training = torch.random.get_rng_state()
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        torch.random.set_rng_state(training)
        with torch.no_grad():
            for layer in {
                id(m): m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m
            }.values():
                layer.weight[rows:] = layer.weight[:rows].mean(0)


def pad_aside(model: Any, tokenizer: Any, ends: Collection[int]) -> None:
    """Have a classifier and its tokenizer pad with a token in which no row ends.

    The head reads the last token that isn't padding: were it the padding's, transformers would read the one before it.
    Raises ModelError where every special token is an end.
    """
    ids = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids]
    pad = next((id_ for id_ in ids if id_ is not None and id_ not in ends), None)
    if pad is None:
        cure = "give its tokenizer a pad_token of its own"
        raise ModelError(Problem("model.tokenizer", "no token is left to pad with: rows end in it", "", cure))
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = pad


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
    length = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 1 << 20
    # RoBERTa and its kin count positions from behind their padding.
    behind = any(name in config.model_type for name in ("roberta", "camembert", "data2vec-text"))
    return int(length) - ((config.pad_token_id or 0) + 1) * behind


def _load_error(source: Source, error: Exception, code: str) -> ModelError:
    said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "trust_remote_code" in str(error):
        cure = "use a version of it that transformers itself knows"
        return ModelError(Problem("model.remote_code", "the model needs code that comes with it", source.name, cure))
    if code == "model.kind" and "Unrecognized configuration class" in str(error):
        said = "it is no causal language model"
    return ModelError(Problem(code, said, source.name, "give a causal language model with its tokenizer"))
