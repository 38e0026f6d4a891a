"""Settings -> objects: the data, the model, the engine and the plan of a run. Nothing is trained or written here."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from headstart import machine
from headstart.choose import Facts, choose
from headstart.config import Config, Settings, setting
from headstart.data.corpus import is_large, peek, prepare_corpus
from headstart.data.encode import Encoder
from headstart.data.feed import Feed, content_hash
from headstart.data.formats import Detection
from headstart.data.images import Look, vary_image
from headstart.data.labels import Labels
from headstart.data.mixing import mix
from headstart.data.prepare import Prepared, form_sides, prepare, reject_bad_rows
from headstart.data.read import SourceFile, find_files
from headstart.data.render import Renderer
from headstart.data.segments import Example, Segmented
from headstart.data.templates import template_ids
from headstart.engine.engine import Engine, Objective
from headstart.engine.forward import EmbeddingReader, ImageReader, LabelReader, PackReader, Reader, TokenReader
from headstart.engine.plan import (
    FORWARD_COST,
    MEMORY_SHARE,
    STATES_PER_WEIGHT,
    Estimate,
    Layout,
    estimate_generation_s,
    estimate_memory,
    lay_out,
    probe_memory,
    rehearse,
)
from headstart.errors import DataError, ModelError, Problem, ResourceError, UsageError
from headstart.evaluate.generate import PROMPTS_AT_ONCE
from headstart.evaluate.measure import Measured, answer_limit, measure
from headstart.files import read_json
from headstart.models.adapt import Adapted, Lora, adapt
from headstart.models.fast import Sped
from headstart.models.load import (
    POOLINGS,
    find_base,
    is_encoder,
    load_config,
    load_look,
    load_model,
    load_tokenizer,
    make_room,
    model_length,
    stop_ids,
)
from headstart.models.source import Source, find_model
from headstart.objectives.embeddings import embedding_loss
from headstart.objectives.labels import class_losses, number_losses, several_losses, summed
from headstart.objectives.tokens import nll

DOCUMENT_TOKENS = 2048
PROBE_ROWS = 1024
IMAGE_MODEL = "efficientnet-lite0"
WRITES = ("chat", "causal")  # tasks of models that write text; their adapters are kept as adapters
SMALL_MODEL_BYTES = 250_000_000
ROW_LOSSES = {
    "classification": class_losses,
    "multilabel": several_losses,
    "regression": number_losses,
    "images": class_losses,
}


@dataclass
class Data:
    """The data of a run, rendered for its model. `config` has the limits that follow from the model filled in."""

    config: Config
    source: Source
    tokenizer: Any
    renderer: Encoder | Look
    prepared: Prepared

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return self.renderer.stop_ids if isinstance(self.renderer, Encoder) else ()

    @property
    def acceptable(self) -> bool:
        """Tell whether a run would begin with these rows."""
        try:
            self.reject_bad_rows()
        except DataError:
            return False
        return True

    def reject_bad_rows(self) -> None:
        """Raise DataError with every bad row where there are more than the settings allow."""
        reject_bad_rows(self.prepared.problems, self.config.settings.data.max_bad_rows)


@dataclass
class Job:
    """Everything that a run needs, ready to go."""

    data: Data
    config: Config
    adapted: Adapted
    engine: Engine
    layout: Layout
    estimate: Estimate
    engine_facts: str

    @cached_property
    def proof(self) -> Segmented:
        """The rows of the proof that are scored: where not all are, those of the least hashes, so that none is favoured."""
        whole = self.data.prepared.proof
        order = sorted(range(len(whole.kept)), key=lambda index: content_hash(whole.kept[index]))
        chosen = sorted(order[: self.config.settings.eval.rows])
        return Segmented([whole.examples[i] for i in chosen], [whole.kept[i] for i in chosen])

    @property
    def choices(self) -> tuple[str, ...]:
        """The answers out of which one is picked, where answers are not generated."""
        return self.data.prepared.choices if self.config.settings.eval.choices == "on" else ()

    def measure_mixed(self, rows: Measured) -> Measured:
        """Score the data sets that are mixed in, and put their rows behind those of the run's own."""
        settings = self.config.settings
        found = list(rows.rows)
        for mixed in self.data.prepared.mixed:
            measured = measure(
                self.engine.reader,
                build_renderer(self.data.source, self.data.tokenizer, mixed.task, settings.data.template),
                mixed.proof.kept,
                mixed.proof.examples,
                task=mixed.task,
                tokens_per_pack=settings.engine.tokens_per_pack or 1,
            )
            found += [replace(row, part=mixed.name) for row in measured.rows]
        return Measured(found, rows.task)

    def new_feed(self) -> Feed:
        """Return the order of rows, from its beginning."""
        return build_feed(self.config, self.data.prepared)

    def plan(self) -> dict[str, Any]:
        """The plan as plain values."""
        settings = self.config.settings
        prepared = self.data.prepared
        modules = (
            f" in {self.adapted.modules} modules (LoRA, rank {settings.lora.rank})" if self.adapted.modules else ""
        )
        return {
            "model": self.data.source.name,
            "parameters": sum(p.numel() for p in self.adapted.model.parameters()),
            "method": settings.method,
            "trainable": sum(p.numel() for p in self.engine.trainable.values()),
            "modules": modules,
            "train_rows": len(prepared.train.examples),
            "watch_rows": len(prepared.watch.examples),
            "proof_rows": len(self.proof.examples),
            "steps": self.layout.steps,
            "batch_size": settings.batch_size,
            "epochs": self.new_feed().total / len(prepared.train.examples),
            "lr": settings.optim.lr,
            "schedule": settings.optim.schedule,
            "row_tokens": self.layout.row_tokens,
            "tokens": self.layout.tokens,
            "targets": self.layout.targets,
            "shared_frac": self.layout.shared_frac,
            "packs": self.layout.packs,
            "tokens_per_pack": settings.engine.tokens_per_pack,
            "packed": self.engine.reader.packs,
            "engine": self.engine_facts,
            **self.estimate.to_json(),
        }


def build_data(config: Config, today: datetime.date | None = None) -> Data:
    """Find the model's tokenizer and read, split and render the data. Raises DataError, ModelError."""
    settings = config.settings
    files, corpus = _find_corpus(settings)
    sides = None if corpus else form_sides(settings.data, settings.kind, settings.task)
    decided: dict[str, tuple[Any, str]] = {}
    found = corpus or sides.train.detection  # type: ignore[union-attr]
    if config.source("model") == "default" and found.format == "images":
        decided["model"] = (IMAGE_MODEL, "the rows are images")
    source = find_model(decided.get("model", (settings.model,))[0])
    task = found.task
    if settings.task == "auto" and task == "causal" and is_encoder(source):
        task = "masked"
    for key, value, why in (("kind", found.kind, found.format), ("task", task, f"{found.format} and this model")):
        if getattr(settings, key) == "auto":
            decided[key] = (value, f"the rows are {why}")
    tokenizer = None if task == "images" else load_tokenizer(source)
    renderer = build_renderer(source, tokenizer, task, settings.data.template, today)
    limit = settings.data.max_length or row_length(task, source, tokenizer)
    split = task in ("causal", "masked")
    if settings.data.max_length is None:
        decided["data.max_length"] = (limit, "pieces of documents" if split else "the model's own limit")
    if settings.data.over_length == "auto":
        decided["data.over_length"] = ("split" if split else "drop", f"the task is {task}")
    if settings.method is None:
        random = settings.weights == "random"
        decided["method"] = (
            ("full", "an adapter on random weights learns nothing") if random else _choose_method(source, task)
        )
    config = config.decide(decided)
    settings = config.settings
    _check_settings(config)
    watch = settings.eval.every != 0
    how: dict[str, Any] = {"task": task, "seed": settings.seed, "watch": watch}
    if sides is not None:
        prepared = prepare(sides, settings.data, renderer, limit, **how)
    elif isinstance(renderer, Encoder):
        prepared = prepare_corpus(files, settings.data, renderer, limit, **how)
    _mix_in(config, prepared, source, tokenizer, limit, today)
    if settings.eval.choices == "on" and not prepared.choices:
        cure = "leave out eval.choices"
        raise UsageError(Problem("config.no_effect", "no few answers stand again and again", "eval.choices", cure))
    if settings.data.positions == "continue":
        _check_positions(prepared, model_length(load_config(source)))
    return Data(config, source, tokenizer, renderer, prepared)


# Settings that are for some tasks alone.
FOR_TASKS = {
    "data.class_weights": ("classification", "images"),
    "data.whole_words": ("masked",),
    "data.text_pair": (*ROW_LOSSES, "embedding"),
    "data.reasoning": ("chat",),
    "data.train_on": ("chat",),
    "data.template": ("chat",),
    "data.positions": ("causal",),
    "eval.choices": ("chat",),
    "eval.generate": ("chat",),
}


NOTHING = (0, "off")  # values that ask for nothing


def _check_settings(config: Config) -> None:
    """Raise UsageError where settings would do nothing, or nothing good, for the task that was found."""
    settings = config.settings
    lost = [key for key, tasks in FOR_TASKS.items() if config.given(key) and settings.task not in tasks]
    lost = [key for key in lost if setting(settings, key) not in (setting(Settings(), key), *NOTHING)]
    if lost:
        what = f"the task is {settings.task}"
        raise UsageError(
            Problem("config.no_effect", f"`{k}` has no effect: {what}", k, f"leave out `{k}`") for k in lost
        )
    if settings.task == "embedding" and settings.batch_size == 1:
        what = "a text is told apart from the others of its step, and there are none"
        raise UsageError(Problem("config.bad_value", what, "batch_size", "leave it out, or take 64"))
    if settings.weights == "random" and settings.method == "lora":
        cure = "--method full, or leave out -s weights=random"
        raise UsageError(Problem("config.no_effect", "an adapter on random weights learns nothing", "weights", cure))


def _find_corpus(settings: Settings) -> tuple[list[SourceFile], Detection | None]:
    """Return the files to train on and, if they are so large that they go through in a stream, what their rows are."""
    if settings.kind not in ("auto", "unsupervised") or settings.task not in ("auto", "causal", "masked"):
        return [], None
    files = find_files(settings.data.train)
    found = peek(files, settings.data, settings.task) if is_large(files) else None
    return files, found if found and found.format == "text" else None


def _mix_in(
    config: Config, prepared: Prepared, source: Source, tokenizer: Any, limit: int, today: datetime.date | None
) -> None:
    """Add the rows of other data sets to those to train on."""
    settings = config.settings

    def length(task: str) -> int:
        return min(limit, row_length(task, source, tokenizer))

    def renderer(task: str) -> Encoder:
        found = build_renderer(source, tokenizer, task, settings.data.template, today)
        if not isinstance(found, Encoder):
            raise TypeError(f"{task} rows have no text")
        return found

    held = [*prepared.parts.watch, *prepared.parts.proof]
    own = len(prepared.train.examples)
    prepared.mixed = mix(settings.data, own, held, settings.task, renderer, length)
    for mixed in prepared.mixed:
        prepared.formed.append(mixed.formed)
        prepared.train.examples += mixed.train.examples
        prepared.train.kept += mixed.train.kept
        prepared.train.dropped += mixed.train.dropped


def row_length(task: str, source: Source, tokenizer: Any) -> int:
    """Return the most tokens of a row where the user named none.

    What the model can place and, where that is less, what its tokenizer allows; of documents, pieces of
    `DOCUMENT_TOKENS`: longer ones cost more and teach little more.
    """
    if task == "images":
        return load_look(source).patches
    length = min(model_length(load_config(source)), int(min(tokenizer.model_max_length, 1 << 20)))
    return min(length, DOCUMENT_TOKENS) if task in ("causal", "masked") else length


def _check_positions(prepared: Prepared, length: int) -> None:
    problems = [
        Problem("row.too_long", f"{end:,} tokens, and the model has {length:,} positions", str(example.where), cure)
        for part in (prepared.train, prepared.watch, prepared.proof)
        for example in part.examples
        for end in [max(segment.first + len(segment) for segment in example.segments)]
        for cure in ["-s data.positions=restart, or split the document"]
        if end > length
    ]
    if problems:
        raise DataError(problems)


def build_renderer(
    source: Source, tokenizer: Any, task: str, template: str = "model", today: datetime.date | None = None
) -> Encoder | Look:
    """Return what turns rows of a task into tokens: a Renderer for what is to be continued or answered."""
    if task == "images":
        return load_look(source)
    if task not in ("chat", "causal"):
        return Encoder(tokenizer)
    return Renderer(tokenizer, stop_ids(source, tokenizer), "plain" if task == "causal" else template, today)


def build_job(data: Data, tell: Callable[[str], None] | None = None) -> Job:
    """Load the model, decide what was left open, and measure what the run will need.

    `tell` is called with what can't be had as asked. Raises ModelError (an adapter is no whole model, say), and
    ResourceError where the run can't fit.
    """
    if data.source.is_adapter:
        base = find_base(data.source).name
        cure = f"tune the model that it stands on: -m {base}"
        raise ModelError(Problem("model.kind", "the model is an adapter, not a whole model", data.source.name, cure))
    device = machine.pick_device()
    config = _decide_machine(data.config, device)
    torch.set_num_threads(config.settings.engine.threads or 1)
    kept = device == "cpu" and machine.keep_freed_memory()
    bfloat16 = config.settings.engine.precision == "bfloat16"
    lora = config.settings.lora if config.settings.method == "lora" else None
    dtype = torch.bfloat16 if bfloat16 and lora else torch.float32
    task, labels = config.settings.task, data.prepared.labels
    random = config.settings.weights == "random"
    torch.manual_seed(config.settings.seed)  # the head for labels begins at random
    loaded = load_model(data.source, device, dtype, task, labels, random=random)
    if task in ROW_LOSSES and data.tokenizer is not None and loaded.model.config.pad_token_id is None:
        pad = data.tokenizer.pad_token_id
        loaded.model.config.pad_token_id = data.tokenizer.eos_token_id if pad is None else pad
    if task == "masked" and loaded.fresh and tell:
        tell("the model has no head for masked tokens: it begins at random, and much of what is gained is the head's")
    if data.tokenizer is not None:
        make_room(loaded.model, data.tokenizer)
        _check_vocabulary(data, loaded.model)
    adapted = adapt(
        loaded.model,
        Lora(lora.rank, lora.alpha, lora.dropout, lora.targets, _new_tokens(data)) if lora else None,
        config.settings.seed,
        loaded.fresh,
        task="CAUSAL_LM" if task in WRITES else None,
    )
    reader = build_reader(adapted.model, task, data.renderer, bfloat16=bfloat16)
    if random and isinstance(reader, ImageReader):
        reader.settle_norms(data.prepared.train.examples)
    if not reader.packs and tell:
        tell(f"{type(adapted.model).__name__} can't read packs: it trains one row at a time, which is right but slower")
    _try_kernels(reader, data.renderer, tell)
    sped = reader.speed_up() if config.settings.engine.fast == "on" else Sped()
    config = choose(config, _facts(data, device, adapted.model))
    settings = config.settings
    engine = Engine(
        reader,
        adapted.trainable(),
        _objective(settings, labels),
        weight_decay=settings.optim.weight_decay,
        clip=settings.optim.clip,
        joint=task == "embedding",
    )
    config, layout, memory_bytes = _fit_memory(config, data, engine)
    estimate = _estimate(config, data, engine, layout, memory_bytes)
    return Job(data, config, adapted, engine, layout, estimate, _describe_engine(settings, sped, kept))


def _try_kernels(reader: Reader, renderer: Encoder | Look, tell: Callable[[str], None] | None) -> None:
    """Have packs attended to whole on a GPU, where that works."""
    wanted = reader.device.type == "cuda" and reader.packs and isinstance(renderer, Encoder)
    if wanted and not reader.try_kernels() and tell:
        tell(
            "the kernels for whole packs don't work here or with this model: attention goes in blocks, which is right but slower"
        )


def _describe_engine(settings: Settings, sped: Sped, kept: bool) -> str:
    """Return how the work is laid on the machine, in words."""
    threads = f"{settings.engine.threads} threads" if settings.engine.threads != 1 else "1 thread"
    facts = [threads, str(settings.engine.precision), str(sped) if sped.of else "plain layers"]
    return ", ".join(facts + ["freed memory is kept"] * kept)


def build_reader(model: Any, task: str, renderer: Encoder | Look, *, bfloat16: bool) -> Reader:
    """Return a model as the reader of packs of a task."""
    try:
        if isinstance(renderer, Look):
            return ImageReader(model, look=renderer, bfloat16=bfloat16)
        if task in ROW_LOSSES:
            return LabelReader(model, ROW_LOSSES[task], bfloat16=bfloat16)
        if task in ("masked", "tagging"):
            return TokenReader(model, bfloat16=bfloat16)
        return (EmbeddingReader if task == "embedding" else PackReader)(model, bfloat16=bfloat16)
    except ValueError as error:
        raise ModelError(Problem("model.kind", str(error), type(model).__name__, "use another model")) from None


def beside(source: Source, renderer: Encoder | Look, reader: Reader) -> dict[str, Any]:
    """Return the files of JSON that a result needs beside its weights: how it sees, or how its embeddings are pooled."""
    if isinstance(renderer, Look):
        file = source.path / "preprocessor_config.json"
        return {file.name: read_json(file) if file.exists() else renderer.to_json()}
    if not isinstance(reader, EmbeddingReader):
        return {}
    modules = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling"), ("2", "2_Normalize", "Normalize")]
    return {
        "modules.json": [
            {"idx": int(number), "name": number, "path": path, "type": f"sentence_transformers.models.{name}"}
            for number, path, name in modules
        ],
        "sentence_bert_config.json": {"do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": _hidden_size(reader.model.config),
            **{f"pooling_mode_{key}": reader.pooling == mode for mode, key in POOLINGS.items()},
        },
    }


def _objective(settings: Settings, labels: Labels | None) -> Objective:
    if settings.task == "embedding":
        return embedding_loss
    if settings.task not in ROW_LOSSES:
        return nll
    weighted = labels is not None and settings.data.class_weights == "balanced"
    weights = torch.tensor(labels.class_weights()) if labels and weighted else None
    return summed(ROW_LOSSES[settings.task], weights)


def _choose_method(source: Source, task: str) -> tuple[str, str]:
    size = sum(file.stat().st_size for file in source.path.glob("*.safetensors"))
    if task not in WRITES and size < SMALL_MODEL_BYTES:
        return "full", "a small model trains whole in the time of an adapter"
    if task == "images":
        return "full", "an adapter has no place in convolutions"
    return "lora", "an adapter: less memory, nearly the same gain"


def _new_tokens(data: Data) -> list[int]:
    return template_ids(data.tokenizer, data.config.settings.data.template) if data.tokenizer is not None else []


def _check_vocabulary(data: Data, model: Any) -> None:
    """Raise ModelError where the tokenizer makes ids for which the model has no embedding."""
    rows = int(model.get_input_embeddings().weight.shape[0])
    parts = (data.prepared.train, data.prepared.watch, data.prepared.proof)
    highest = max(_highest_id(part.examples) for part in parts)
    if highest >= rows:
        what = f"the tokenizer makes the id {highest}, and the model has {rows:,} embeddings"
        cure = "use the tokenizer that belongs to the model"
        raise ModelError(Problem("model.vocabulary", what, data.source.name, cure))


def _highest_id(examples: Sequence[Example]) -> int:
    if not isinstance(examples, list):  # rows on disk: known since they were written
        return int(examples.highest_id)  # type: ignore[attr-defined]
    return max((int(segment.ids.max()) for example in examples for segment in example.segments), default=0)


def build_feed(config: Config, prepared: Prepared) -> Feed:
    """Return the order of rows that the settings ask for, and how a row varies from time to time."""
    settings = config.settings
    rows, batch_size = len(prepared.train.examples), settings.batch_size or 1
    total = settings.steps * batch_size if settings.steps else round((settings.epochs or 1) * rows)
    vary = prepared.masking.vary if prepared.masking else None
    if settings.task == "images":
        vary = vary_image(settings.seed)
    return Feed(rows, batch_size, max(1, total), settings.seed, vary=vary)


def _decide_machine(config: Config, device: str) -> Config:
    decided: dict[str, tuple[Any, str]] = {}
    if config.settings.engine.threads is None:
        decided["engine.threads"] = (machine.cpu_count(), "cores of this machine")
    precision = config.settings.engine.precision
    if precision == "auto":
        bfloat16 = device == "cuda" and torch.cuda.is_bf16_supported()
        precision = "bfloat16" if bfloat16 else "float32"
        decided["engine.precision"] = (precision, f"on {device}")
    if config.settings.engine.fast == "auto":
        fast = device == "cpu" and precision == "float32"
        decided["engine.fast"] = ("on" if fast else "off", f"on {device} in {precision}")
    elif config.settings.engine.fast == "on" and precision != "float32":
        cure = "leave one of them out"
        what = f"fused layers compute in float32, and engine.precision is {precision}"
        raise UsageError(Problem("config.no_effect", what, "engine.fast", cure))
    return config.decide(decided)


def _facts(data: Data, device: str, model: Any) -> Facts:
    prepared = data.prepared
    return Facts(
        device=device,
        hidden_size=_hidden_size(model.config),
        train_rows=len(prepared.train.examples),
        watch_rows=len(prepared.watch.examples),
        proof_rows=len(prepared.proof.examples),
        train_tokens=int(prepared.train.lengths.sum()),
        watch_tokens=int(prepared.watch.lengths.sum()),
        longest=prepared.longest,
        task=data.config.settings.task,
        held_out=prepared.parts.held_out,
        choices=len(prepared.choices),
    )


def _hidden_size(config: Any) -> int:
    """Return the width of a model; of convolutions, that of the last."""
    text = config.get_text_config()
    sizes = getattr(text, "hidden_sizes", None) or [getattr(text, "hidden_size", None) or 768]
    return int(sizes[-1])


def _tokens(examples: list[Example]) -> int:
    return sum(example.token_count for example in examples)


def _fit_memory(config: Config, data: Data, engine: Engine) -> tuple[Config, Layout, int]:
    """Find packs that fit into the memory: as chosen, then with activations recomputed, then smaller.

    Raises ResourceError where nothing fits, or where what would fit was ruled out by the user.
    """
    examples = data.prepared.train.examples
    feed = build_feed(config, data.prepared)
    device = engine.reader.device.type
    total = machine.device_used_bytes(device) + machine.device_free_bytes(device)
    checkpointing = config.settings.engine.checkpointing
    per_pack = config.settings.engine.tokens_per_pack or 1
    attempts = [("off", per_pack)] if checkpointing != "on" else []
    attempts += [("on", per_pack)] if checkpointing != "off" else []
    if not config.given("engine.tokens_per_pack"):
        attempts.append((attempts[-1][0], data.prepared.longest))
    for mode, tokens in attempts:
        if mode == "on" and not _recompute(engine, wanted=checkpointing == "on"):
            continue
        layout = lay_out(engine.reader, examples, feed, tokens)
        needed = estimate_memory(engine, probe_memory(engine, feed.varied(examples[:PROBE_ROWS])), len(layout.worst))
        if needed <= total * MEMORY_SHARE:
            why = "it fits into the memory" if mode == "off" else "needed to fit into the memory"
            decided: dict[str, tuple[Any, str]] = {}
            if checkpointing == "auto":
                decided["engine.checkpointing"] = (mode, why)
            if tokens != per_pack:
                decided["engine.tokens_per_pack"] = (tokens, "what fits into the memory: the longest row")
            return config.decide(decided), layout, needed
    what = f"{needed / machine.GIB:.1f} GiB are needed and {total / machine.GIB:.1f} GiB are there"
    cure = f"-s engine.checkpointing=on, -s data.max_length={max(64, data.prepared.longest // 2)}, --method lora, or a smaller model"
    raise ResourceError(Problem("memory.plan", what, "", cure))


def _recompute(engine: Engine, *, wanted: bool) -> bool:
    """Have activations recomputed; return whether the architecture can. Raises ModelError where the user wants it."""
    try:
        engine.reader.recompute_activations()
    except ValueError as error:
        if wanted:
            problem = Problem("config.no_effect", str(error), "engine.checkpointing", "leave it out")
            raise ModelError(problem) from None
        return False
    return True


def _estimate(config: Config, data: Data, engine: Engine, layout: Layout, memory_bytes: int) -> Estimate:
    settings, prepared = config.settings, data.prepared
    device = engine.reader.device.type
    free = machine.device_free_bytes(device)
    train_s = rehearse(engine, layout)
    forward_s = train_s * FORWARD_COST
    answers = settings.eval.generate or 0
    proof = prepared.proof.examples[: settings.eval.rows]
    answering_s = estimate_generation_s(
        forward_s,
        prompt_tokens=round(sum(e.token_count - e.target_count for e in proof) / len(proof) * answers),
        new_tokens=round(sum(map(answer_limit, proof)) / len(proof)),
        batches=-(-answers // PROMPTS_AT_ONCE),
        at_once=min(PROMPTS_AT_ONCE, answers),
    )
    watches = layout.steps // settings.eval.every if settings.eval.every else 0
    scored = 2 * _tokens(proof) + watches * _tokens(prepared.watch.examples)
    weights = sum(p.numel() * p.element_size() for p in engine.trainable.values())
    return Estimate(
        memory_bytes=memory_bytes,
        memory_free_bytes=free,
        train_s=train_s * layout.tokens,
        eval_s=forward_s * scored + 2 * answering_s,
        disk_bytes=weights * ((settings.save.keep + 1) * STATES_PER_WEIGHT + 2),
    )
