"""Settings -> objects: the data, the model, the engine and the plan of a run. Nothing is trained or written here."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from headstart import machine
from headstart.choose import Facts, choose
from headstart.config import Config
from headstart.data.encode import Encoder
from headstart.data.feed import Feed
from headstart.data.prepare import Prepared, form_sides, prepare, reject_bad_rows
from headstart.data.render import Renderer
from headstart.data.segments import Example, Segmented
from headstart.engine.engine import Engine, Objective
from headstart.engine.forward import LabelReader, PackReader, Reader
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
from headstart.errors import DataError, ModelError, Problem, ResourceError
from headstart.evaluate.generate import PROMPTS_AT_ONCE
from headstart.evaluate.measure import answer_limit
from headstart.models.adapt import Adapted, Lora, adapt
from headstart.models.load import find_base, load_config, load_model, load_tokenizer, model_length, stop_ids
from headstart.models.source import Source, find_model
from headstart.objectives.labels import cross_entropy
from headstart.objectives.tokens import nll

DOCUMENT_TOKENS = 2048
SMALL_MODEL_BYTES = 250_000_000
OBJECTIVES: dict[str, Objective] = {"instruction": nll, "unsupervised": nll, "supervised": cross_entropy}


@dataclass
class Data:
    """The data of a run, rendered for its model. `config` has the limits that follow from the model filled in."""

    config: Config
    source: Source
    tokenizer: Any
    renderer: Encoder
    prepared: Prepared

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

    @property
    def proof(self) -> Segmented:
        """The rows of the proof that are scored."""
        rows = self.config.settings.eval.rows
        whole = self.data.prepared.proof
        return Segmented(whole.examples[:rows], whole.kept[:rows])

    def new_feed(self) -> Feed:
        """Return the order of rows, from its beginning."""
        return build_feed(self.config, len(self.data.prepared.train.examples))

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
            **self.estimate.to_json(),
        }


def build_data(config: Config, today: datetime.date | None = None) -> Data:
    """Find the model's tokenizer and read, split and render the data. Raises DataError, ModelError."""
    source = find_model(config.settings.model)
    tokenizer = load_tokenizer(source)
    settings = config.settings.data
    sides = form_sides(settings, config.settings.kind)
    decided: dict[str, tuple[Any, str]] = {}
    if config.settings.kind == "auto":
        decided["kind"] = (sides.kind, f"the rows are {sides.train.detection.format}")
    renderer = build_renderer(source, tokenizer, sides.kind, settings.template, today)
    limit = settings.max_length or row_length(sides.kind, source, tokenizer)
    if settings.max_length is None:
        why = "pieces of documents" if sides.kind == "unsupervised" else "the model's own limit"
        decided["data.max_length"] = (limit, why)
    if settings.over_length == "auto":
        decided["data.over_length"] = ("split" if sides.kind == "unsupervised" else "drop", f"{sides.kind} rows")
    if config.settings.method is None:
        decided["method"] = _choose_method(source, sides.kind)
    config = config.decide(decided)
    prepared = prepare(sides, config.settings.data, renderer, limit, watch=config.settings.eval.every != 0)
    if config.settings.data.positions == "continue":
        _check_positions(prepared, model_length(load_config(source)))
    return Data(config, source, tokenizer, renderer, prepared)


def row_length(kind: str, source: Source, tokenizer: Any) -> int:
    """Return the most tokens of a row where the user named none.

    What the model can place and, where that is less, what its tokenizer allows; of documents, pieces of
    `DOCUMENT_TOKENS`: longer ones cost more and teach little more.
    """
    length = min(model_length(load_config(source)), int(min(tokenizer.model_max_length, 1 << 20)))
    return min(length, DOCUMENT_TOKENS) if kind == "unsupervised" else length


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
    source: Source, tokenizer: Any, kind: str, template: str = "model", today: datetime.date | None = None
) -> Encoder:
    """Return what turns rows of a kind into tokens: a Renderer for conversations and, without template, documents."""
    if kind == "supervised":
        return Encoder(tokenizer)
    return Renderer(tokenizer, stop_ids(source, tokenizer), "plain" if kind == "unsupervised" else template, today)


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
    bfloat16 = config.settings.engine.precision == "bfloat16"
    lora = config.settings.lora if config.settings.method == "lora" else None
    dtype = torch.bfloat16 if bfloat16 and lora else torch.float32
    classes = data.prepared.classes or None
    torch.manual_seed(config.settings.seed)  # the head of a classifier begins at random
    loaded = load_model(data.source, device, dtype, classes)
    if classes and loaded.model.config.pad_token_id is None:
        loaded.model.config.pad_token_id = data.tokenizer.pad_token_id or data.tokenizer.eos_token_id
    _check_vocabulary(data, loaded.model)
    adapted = adapt(
        loaded.model,
        Lora(lora.rank, lora.alpha, lora.dropout, lora.targets) if lora else None,
        config.settings.seed,
        "SEQ_CLS" if classes else "CAUSAL_LM",
    )
    reader = build_reader(adapted.model, config.settings.kind, bfloat16=bfloat16)
    if not reader.packs and tell:
        tell(f"{type(adapted.model).__name__} can't read packs: it trains one row at a time, which is right but slower")
    config = choose(config, _facts(data, device, adapted.model))
    settings = config.settings
    engine = Engine(
        reader,
        adapted.trainable(),
        OBJECTIVES[settings.kind],
        weight_decay=settings.optim.weight_decay,
        clip=settings.optim.clip,
    )
    config, layout, memory_bytes = _fit_memory(config, data, engine)
    estimate = _estimate(config, data, engine, layout, memory_bytes)
    return Job(data, config, adapted, engine, layout, estimate)


def build_reader(model: Any, kind: str, *, bfloat16: bool) -> Reader:
    """Return a model as the reader of packs of a kind."""
    try:
        return (LabelReader if kind == "supervised" else PackReader)(model, bfloat16=bfloat16)
    except ValueError as error:
        raise ModelError(Problem("model.kind", str(error), type(model).__name__, "use another model")) from None


def _choose_method(source: Source, kind: str) -> tuple[str, str]:
    size = sum(file.stat().st_size for file in source.path.glob("*.safetensors"))
    if kind == "supervised" and size < SMALL_MODEL_BYTES:
        return "full", "a small model trains whole in the time of an adapter"
    return "lora", "an adapter: less memory, nearly the same gain"


def _check_vocabulary(data: Data, model: Any) -> None:
    """Raise ModelError where the tokenizer makes ids for which the model has no embedding."""
    rows = int(model.get_input_embeddings().weight.shape[0])
    parts = (data.prepared.train, data.prepared.watch, data.prepared.proof)
    highest = max(int(s.ids.max()) for part in parts for example in part.examples for s in example.segments)
    if highest >= rows:
        what = f"the tokenizer makes the id {highest}, and the model has {rows:,} embeddings"
        cure = "use the tokenizer that belongs to the model"
        raise ModelError(Problem("model.vocabulary", what, data.source.name, cure))


def build_feed(config: Config, rows: int) -> Feed:
    """Return the order of rows that the settings ask for."""
    settings = config.settings
    batch_size = settings.batch_size or 1
    total = settings.steps * batch_size if settings.steps else round((settings.epochs or 1) * rows)
    return Feed(rows, batch_size, max(1, total), settings.seed)


def _decide_machine(config: Config, device: str) -> Config:
    decided: dict[str, tuple[Any, str]] = {}
    if config.settings.engine.threads is None:
        decided["engine.threads"] = (machine.cpu_count(), "cores of this machine")
    if config.settings.engine.precision == "auto":
        bfloat16 = device == "cuda" and torch.cuda.is_bf16_supported()
        decided["engine.precision"] = ("bfloat16" if bfloat16 else "float32", f"on {device}")
    return config.decide(decided)


def _facts(data: Data, device: str, model: Any) -> Facts:
    prepared = data.prepared
    return Facts(
        device=device,
        hidden_size=int(model.config.get_text_config().hidden_size),
        train_rows=len(prepared.train.examples),
        watch_rows=len(prepared.watch.examples),
        proof_rows=len(prepared.proof.examples),
        train_tokens=_tokens(prepared.train.examples),
        watch_tokens=_tokens(prepared.watch.examples),
        longest=prepared.longest,
        kind=data.config.settings.kind,
        held_out=prepared.parts.held_out,
    )


def _tokens(examples: list[Example]) -> int:
    return sum(example.token_count for example in examples)


def _fit_memory(config: Config, data: Data, engine: Engine) -> tuple[Config, Layout, int]:
    """Find packs that fit into the memory: as chosen, then with activations recomputed, then smaller.

    Raises ResourceError where nothing fits, or where what would fit was ruled out by the user.
    """
    examples = data.prepared.train.examples
    feed = build_feed(config, len(examples))
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
        needed = estimate_memory(engine, probe_memory(engine, examples), len(layout.worst))
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
