"""Settings and data -> objects: the model, the engine and the plan of a run. Nothing is trained or written here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from headstart import machine
from headstart.begin import COMPARED, WRITES
from headstart.choose import CHOICE_ROWS, Facts, choose
from headstart.config import Config, Settings
from headstart.data.encode import Encoder
from headstart.data.feed import Feed, content_hash
from headstart.data.images import Look
from headstart.data.labels import Labels
from headstart.data.preferences import desirable_weight
from headstart.data.prepare import Coding, segment
from headstart.data.records import Preference, Record
from headstart.data.segments import Segmented
from headstart.data.templates import template_ids
from headstart.dataset import ROW_LOSSES, Data, build_feed, build_renderer, end_of
from headstart.engine.engine import Engine, Objective
from headstart.engine.forward import (
    EmbeddingReader,
    ImageReader,
    LabelReader,
    PackReader,
    PreferenceReader,
    Reader,
    RewardReader,
    TokenReader,
)
from headstart.engine.plan import Estimate, Layout
from headstart.engine.work import Shape, probe_pack, read_shape
from headstart.errors import ModelError, Problem, UsageError
from headstart.evaluate.compare import MIN_ROWS
from headstart.evaluate.graders.rows import Grading
from headstart.evaluate.measure import Measured, RowResult, choose_answered, measure
from headstart.evaluate.reference import Kept, computes_with, decided_by, keep_guard
from headstart.evaluate.robust import (
    VARIABLE,
    Variant,
    affordable,
    general_rows,
    spare_tokens,
    variant_reading,
    ways_of,
    write_variants,
)
from headstart.evaluate.watch import Watch
from headstart.files import read_json, sha256
from headstart.fit import estimate_run, fit_memory, needs_reference, plan_watch
from headstart.models.adapt import Adapted, Lora, adapt, carry_on
from headstart.models.fast import Sped
from headstart.models.labels import zero_head
from headstart.models.load import POOLINGS, load_config, load_merged, load_model, make_room, model_length, pad_aside
from headstart.models.source import Source
from headstart.objectives.embeddings import embedding_loss
from headstart.objectives.labels import summed
from headstart.objectives.preference import Terms, preference_losses, preference_objective
from headstart.objectives.tokens import nll

# Tasks of which it is told where their head is new.
HEADS = {
    "masked": "masked tokens: it begins at random, and much of what is gained is the head's",
    "reward": "rewards: it begins at zero, so that before training each pair is a tie",
}


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
    shape: Shape | None = None
    new_head: bool = False
    guard_before: Kept | None = None
    grading: Grading = field(default_factory=Grading)

    @property
    def proof(self) -> Segmented:
        """The rows of the proof that are scored."""
        return self.data.proof(self.config.settings.eval.rows)

    @property
    def needs_reference(self) -> bool:
        """Tell whether answers are held against what the untouched model gives them."""
        return needs_reference(self.config.settings)

    @property
    def old_gains(self) -> dict[str, Mapping[str, float]] | None:
        """The runs whose rows are to be kept, each with the difference that it made in each metric; None where none are."""
        if self.data.lineage is None or self.data.lineage["replay"] is None:
            return None
        return {mixed.name: mixed.old.gains for mixed in self.data.prepared.mixed if mixed.old}

    @property
    def choices(self) -> tuple[str, ...]:
        """The answers out of which one is picked, where answers are not generated."""
        return self.data.prepared.choices if self.config.settings.eval.choices == "on" else ()

    def measure_beside(
        self, rows: Measured, tokens_per_pack: int, labels: Labels | None = None, before: Measured | None = None
    ) -> Measured:
        """Score what is mixed in, the guard and rows written otherwise, and put what they gave behind the run's own rows.

        Old rows and those written otherwise are scored as the run's own are, with its `labels`, but answered only where
        answers are picked. Answers of preferences that are written otherwise are held against what the untouched model gave them `before`.
        Without `before` it is the untouched model that is scored, and the guard only where no earlier run kept what it gave.
        """
        template = self.config.settings.data.template
        found = list(rows.rows)
        for mixed in self.data.prepared.mixed:
            if mixed.old:
                measured = self._measure_own(mixed.proof, tokens_per_pack, labels)
            else:
                renderer = build_renderer(self.data.source, self.data.tokenizer, mixed.task, template)
                measured = self._measure_part(renderer, mixed.task, mixed.proof, tokens_per_pack)
            found += [replace(row, part=mixed.name) for row in measured]
        found += self._measure_guard(tokens_per_pack, self.guard_before if before is None else None)
        for variant in self.data.variants:
            measured = self._measure_own(variant.rows, tokens_per_pack, labels, variant.references(before))
            found += variant.mark(measured)
        return Measured(found, rows.task)

    def _measure_guard(self, tokens_per_pack: int, kept: Kept | None) -> Sequence[RowResult]:
        known = kept.read() if kept else None
        if known is not None:
            return Measured.from_json(known, self.config.settings.task).rows
        found: list[RowResult] = []
        for part in self.data.guard:
            measured = self._measure_part(part.renderer, part.task, part.rows, tokens_per_pack)
            found += [replace(row, part=part.name, guard=True) for row in measured]
        # Smaller packs than were planned, for want of memory, have other last bits.
        if kept and tokens_per_pack == self.config.settings.engine.tokens_per_pack:
            kept.write(Measured(found, self.config.settings.task).to_json())
        return found

    def _measure_part(
        self, renderer: Encoder | Look, task: str, rows: Segmented, tokens_per_pack: int
    ) -> Sequence[RowResult]:
        reader = self.engine.reader
        reader = reader.beside if isinstance(reader, PreferenceReader) else reader
        return measure(reader, renderer, rows.kept, rows.examples, task=task, tokens_per_pack=tokens_per_pack).rows

    @contextlib.contextmanager
    def untouched(self) -> Iterator[PackReader]:
        """Give the model as it was before training, for a while: without its adapter, or loaded once more."""
        reader, settings = self.engine.reader, self.config.settings
        if self.adapted.modules and isinstance(reader, PreferenceReader) and not self.data.source.is_adapter:
            try:
                with self.adapted.saved.disable_adapter():
                    yield reader.beside
            finally:
                for parameter in self.engine.trainable.values():  # peft takes it from what is switched off
                    parameter.requires_grad_(True)
            return
        drawing = [torch.cuda.current_device()] if reader.device.type == "cuda" else []
        with torch.random.fork_rng(devices=drawing):  # what is drawn here is no part of the run
            torch.manual_seed(settings.seed)
            dtype, random = reader.model.dtype, settings.weights == "random"
            model = load_model(self.data.source, reader.device.type, dtype, settings.task, random=random).model
            make_room(model, self.data.tokenizer)
            yield PackReader(model, bfloat16=settings.engine.precision == "bfloat16")

    def build_watch(self) -> Watch | None:
        """Return what is watched of preferences on the way; None where nothing is."""
        return plan_watch(self.data, self.config.settings, self.engine.reader, self.layout)

    def _measure_own(
        self,
        rows: Segmented,
        tokens_per_pack: int,
        labels: Labels | None,
        references: Sequence[Sequence[float]] = (),
    ) -> Sequence[RowResult]:
        return measure(
            self.engine.reader,
            self.data.renderer,
            rows.kept,
            rows.examples,
            task=self.config.settings.task,
            tokens_per_pack=tokens_per_pack,
            answers=min(CHOICE_ROWS, len(rows.kept)) if self.choices else 0,
            labels=labels,
            choices=self.choices,
            references=references,
        ).rows

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
            "start": self.data.start,
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
            "objective": _objective_words(settings),
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


def _objective_words(settings: Settings) -> str:
    """Return how answers are held against each other; nothing where they aren't."""
    if settings.task not in COMPARED:
        return ""
    terms = settings.preference
    smoothed = f", {terms.label_smoothing:g} smoothed" if terms.label_smoothing else ""
    if settings.task == "reward":
        return f"reward: Bradley-Terry on the rewards of all pairs{smoothed}"
    return f"{terms.objective}, beta {terms.beta:g}{smoothed}, likelihood of the chosen answer {terms.likelihood:g}"


def build_job(data: Data, tell: Callable[[str], None] | None = None, *, prove: bool = True) -> Job:
    """Load the model, decide what was left open, and measure what the run will need.

    `tell` gets what can't be had as asked; without `prove` no row is written otherwise. Raises ModelError; ResourceError: it can't fit.
    """
    device = machine.pick_device()
    config = _decide_machine(data.config, device)
    torch.set_num_threads(config.settings.engine.threads or 1)
    kept = device == "cpu" and machine.keep_freed_memory()
    bfloat16 = config.settings.engine.precision == "bfloat16"
    lora = config.settings.lora if config.settings.method == "lora" else None
    dtype = torch.bfloat16 if bfloat16 and lora else torch.float32
    task, labels, random = config.settings.task, data.prepared.labels, config.settings.weights == "random"
    torch.manual_seed(config.settings.seed)  # the head for labels begins at random
    if data.source.is_adapter and not data.carries_on:
        loaded = load_merged(data.source, device, dtype, task, labels)
    else:
        loaded = load_model(data.source, device, dtype, task, labels, random=random, trains=data.carries_on)
    if task in ROW_LOSSES and data.tokenizer is not None and loaded.model.config.pad_token_id is None:
        pad = data.tokenizer.pad_token_id
        loaded.model.config.pad_token_id = data.tokenizer.eos_token_id if pad is None else pad
    if task == "reward":
        parts = (data.prepared.train, data.prepared.watch, data.prepared.proof)
        ends = {int(segment.ids[-1]) for part in parts for row in part.examples for segment in row.segments}
        pad_aside(loaded.model, data.tokenizer, ends)
    new_head = task in HEADS and bool(loaded.fresh or random)
    if new_head and tell:
        tell(f"the model has no head for {HEADS[task]}")
    if data.tokenizer is not None:
        make_room(loaded.model, data.tokenizer)
        _check_vocabulary(data, loaded.model)
    adapted = (
        carry_on(loaded.adapted)
        if data.carries_on
        else adapt(
            loaded.model,
            Lora(lora.rank, lora.alpha, lora.dropout, lora.targets, _new_tokens(data)) if lora else None,
            config.settings.seed,
            loaded.fresh,
            task="CAUSAL_LM" if task in WRITES else None,
        )
    )
    terms = build_terms(config.settings, data.prepared.train.kept if task in COMPARED else ())
    reader = build_reader(adapted.model, task, data.renderer, bfloat16=bfloat16, terms=terms)
    if new_head and task == "reward":
        zero_head(adapted.model)  # not before it is known which token the head reads
    if random and isinstance(reader, ImageReader):
        reader.settle_norms(data.prepared.train.examples)
    if not reader.packs and tell:
        tell(f"{type(adapted.model).__name__} can't read packs: it trains one row at a time, which is right but slower")
    # What is needed is counted on plain layers: fused ones call none of their linear modules.
    shape = read_shape(reader, probe_pack(reader, data.prepared.train.examples))
    _try_kernels(reader, data.renderer, tell)
    sped = reader.speed_up() if config.settings.engine.fast == "on" else Sped()
    config = choose(config, _facts(data, device, adapted.model))
    settings = config.settings
    data.variants = _write_variants(data, config) if prove else []
    engine = Engine(
        reader,
        adapted.trainable(),
        _objective(settings, labels, terms),
        weight_decay=settings.optim.weight_decay,
        clip=settings.optim.clip,
        joint=task == "embedding" or terms.objective == "kto" or (task in COMPARED and not reader.packs),
    )
    fitted = fit_memory(config, data, engine)
    facts = _describe_engine(settings, sped, kept)
    guard = _keep_guard(data, fitted.config.settings, device) if prove else None
    estimate = estimate_run(data, engine, fitted, shape, guard_known=guard is not None and guard.read() is not None)
    return Job(data, fitted.config, adapted, engine, fitted.layout, estimate, facts, shape, new_head, guard)


def _keep_guard(data: Data, settings: Settings, device: str) -> Kept | None:
    """Return where it is kept what the untouched model gives the guard; None where nothing is guarded."""
    if not data.guard:
        return None
    # What the hash of the weights doesn't cover: how they are read, and how many words there are.
    places = [source.path for source in (data.source, data.base) if source]
    files = [sha256(file) for place in places for file in sorted(place.glob("*.json"))]
    decided = [
        decided_by(computes_with(data.source, data.base, settings), settings, device),
        files,
        settings.data.template,
    ]
    return keep_guard(data.guard, decided, settings.engine.tokens_per_pack or 0)


def _write_variants(data: Data, config: Config) -> list[Variant]:
    """Return some rows of the proof as they would be written otherwise: as many as cost little beside the training."""
    settings, prepared = config.settings, data.prepared
    if settings.task not in VARIABLE:
        return []
    proof, labels = data.proof(settings.eval.rows), prepared.labels
    limit = settings.data.max_length or prepared.longest
    reading = variant_reading(settings.data)
    # A document whose pieces stand one behind the other may get longer by it than the model has positions.
    length = model_length(load_config(data.source)) if settings.data.positions == "continue" else None

    def encode(records: Sequence[Record]) -> Segmented:
        coding = Coding(settings.task, labels, prepared.masking)
        found = segment(records, reading, data.renderer, limit, coding, whole=True)
        if length is None:
            return found
        fit = [n for n, example in enumerate(found.examples) if end_of(example) <= length]
        return Segmented([found.examples[n] for n in fit], [found.kept[n] for n in fit])

    outside = encode(general_rows(labels.names[0])) if labels and settings.task == "classification" else None
    trained = build_feed(config, prepared).total * float(prepared.train.lengths.mean())
    cost = float(proof.lengths.mean()) * (2 if settings.task == "tagging" else 1)  # losses, and then the tags
    picked = settings.eval.choices == "on"
    if picked:  # each row's answer is weighed against all others
        cost += len(prepared.choices) * float(np.mean([row.target_count for row in proof.examples]))
    spare, most = spare_tokens(trained), len(ways_of(proof.kept[0]))
    if outside and outside.lengths.sum() > spare / 2:
        outside = None  # what a short run can pay for are its own rows
    ways, rows = affordable(spare - (float(outside.lengths.sum()) if outside else 0.0), cost, most)
    able = choose_answered(proof.kept, settings.eval.generate or 0) if picked else range(len(proof.kept))
    ordered = sorted(able, key=lambda number: content_hash(proof.kept[number]))  # so that none is favoured
    records = {number: proof.kept[number] for number in ordered}
    return write_variants(records, encode, ways=ways, rows=rows, least=MIN_ROWS, outside=outside)


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
    facts += ["large pages"] * machine.has_large_pages() + ["freed memory is kept"] * kept
    return ", ".join(facts)


def build_terms(settings: Settings, rows: Sequence[Record]) -> Terms:
    """Return what is asked of preferences, for these rows to train on."""
    chosen = {name: value for name, value in settings.preference.model_dump().items() if value is not None}
    of = Terms(**chosen)
    weight = desirable_weight([row for row in rows if isinstance(row, Preference)])
    return replace(of, margin=of.beta / 2 if of.objective == "simpo" else 0.0, desirable=weight)


def build_reader(
    model: Any, task: str, renderer: Encoder | Look, *, bfloat16: bool, terms: Terms | None = None
) -> Reader:
    """Return a model as the reader of packs of a task; of preferences, with what is asked of them."""
    try:
        if isinstance(renderer, Look):
            return ImageReader(model, look=renderer, bfloat16=bfloat16)
        if task in ROW_LOSSES:
            return LabelReader(model, ROW_LOSSES[task], bfloat16=bfloat16)
        if task in ("masked", "tagging"):
            return TokenReader(model, bfloat16=bfloat16)
        if task == "reward":
            return RewardReader(model, preference_losses(terms or Terms("reward")), bfloat16=bfloat16)
        if task == "preference":
            return PreferenceReader(model, preference_losses(terms or Terms()), bfloat16=bfloat16)
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


def _objective(settings: Settings, labels: Labels | None, terms: Terms) -> Objective:
    if settings.task == "embedding":
        return embedding_loss
    if settings.task in COMPARED:
        return preference_objective(terms)
    if settings.task not in ROW_LOSSES:
        return nll
    weighted = labels is not None and settings.data.class_weights == "balanced"
    weights = torch.tensor(labels.class_weights()) if labels and weighted else None
    return summed(ROW_LOSSES[settings.task], weights)


def _new_tokens(data: Data) -> list[int]:
    return template_ids(data.tokenizer, data.config.settings.data.template) if data.tokenizer is not None else []


def _check_vocabulary(data: Data, model: Any) -> None:
    """Raise ModelError where the tokenizer makes ids for which the model has no embedding."""
    rows = int(model.get_input_embeddings().weight.shape[0])
    parts = (data.prepared.train, data.prepared.watch, data.prepared.proof)
    highest = max(part.highest_id for part in parts)
    if highest >= rows:
        what = f"the tokenizer makes the id {highest}, and the model has {rows:,} embeddings"
        cure = "use the tokenizer that belongs to the model"
        raise ModelError(Problem("model.vocabulary", what, data.source.name, cure))


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
