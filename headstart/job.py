"""Settings -> objects: the data, the model, the engine and the plan of a run. Nothing is trained or written here."""

from __future__ import annotations

import contextlib
import datetime
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from headstart import machine
from headstart.begin import (
    COMPARED,
    WRITES,
    carry_template,
    choose_method,
    decide_adapter,
    decide_reward,
    is_reward_model,
)
from headstart.choose import CHOICE_ROWS, EVALS_PER_RUN, Facts, choose, choose_preference
from headstart.config import TASKS, Config, PreferenceSettings, Settings, setting
from headstart.data.chats import Chats, find_chats, prepare_chats
from headstart.data.corpus import is_large, peek, prepare_corpus
from headstart.data.encode import Encoder
from headstart.data.feed import Feed, hashes_of
from headstart.data.formats import Detection
from headstart.data.images import Look, vary_image
from headstart.data.labels import Labels
from headstart.data.mixing import Mixed, mix, replay
from headstart.data.preferences import desirable_weight
from headstart.data.prepare import Prepared, Sides, form_sides, prepare, reject_bad_rows, reject_dropped, reject_spelled
from headstart.data.read import LINES, UTF_8, SourceFile, find_files, kind_of
from headstart.data.records import Preference, Record
from headstart.data.render import Renderer
from headstart.data.replay import Known
from headstart.data.segments import Example, Segmented
from headstart.data.templates import template_ids
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
from headstart.engine.plan import (
    MEMORY_SHARE,
    STATES_PER_WEIGHT,
    Estimate,
    Layout,
    Memory,
    Scoring,
    lay_out,
    lay_out_scoring,
    measure_memory,
    rehearse,
)
from headstart.engine.work import RATE_ROWS, Shape, best_rate, probe_pack, read_shape
from headstart.errors import DataError, ModelError, Problem, ResourceError, UsageError
from headstart.evaluate.graders.rows import Grading
from headstart.evaluate.guard import Guarded, load_guard, without_learned
from headstart.evaluate.measure import Measured, RowResult, answer_limit, best_only, choose_answered, measure
from headstart.evaluate.rehearse import answering_bytes, measure_pace
from headstart.evaluate.watch import Watch, build_watch
from headstart.files import read_json, seconds_per_byte
from headstart.lineage import describe_parent, read_known
from headstart.models.adapt import Adapted, Lora, adapt, carry_on
from headstart.models.fast import Sped
from headstart.models.labels import zero_head
from headstart.models.load import (
    POOLINGS,
    find_base,
    is_encoder,
    load_config,
    load_look,
    load_merged,
    load_model,
    load_tokenizer,
    make_room,
    model_length,
    pad_aside,
    stop_ids,
)
from headstart.models.source import Source, find_model
from headstart.objectives.embeddings import embedding_loss
from headstart.objectives.labels import class_losses, number_losses, several_losses, summed
from headstart.objectives.preference import REFERENCE_FREE, Terms, preference_losses, preference_objective
from headstart.objectives.tokens import nll

DOCUMENT_TOKENS = 2048
LEAST_PACK = 256  # smaller packs cost more than they save
LEAST_LENGTH = 16
IMAGE_MODEL = "efficientnet-lite0"
# Tasks of which it is told where their head is new.
HEADS = {
    "masked": "masked tokens: it begins at random, and much of what is gained is the head's",
    "reward": "rewards: it begins at zero, so that before training each pair is a tie",
}
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
    guard: Sequence[Guarded] = ()
    lineage: dict[str, Any] | None = None
    _proofs: dict[int | None, Segmented] = field(default_factory=dict, init=False, repr=False)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return self.renderer.stop_ids if isinstance(self.renderer, Encoder) else ()

    def proof(self, rows: int | None) -> Segmented:
        """The rows of the proof that are scored: where not all are, those of the least hashes, so that none is favoured."""
        if rows not in self._proofs:
            whole = self.prepared.proof
            hashes = hashes_of(whole.kept)
            chosen = sorted(sorted(range(len(hashes)), key=hashes.__getitem__)[:rows])
            self._proofs[rows] = Segmented([whole.examples[i] for i in chosen], [whole.kept[i] for i in chosen])
        return self._proofs[rows]

    @property
    def base(self) -> Source | None:
        """The model on which the one that is tuned stands, where that is an adapter."""
        return find_base(self.source) if self.source.is_adapter else None

    @property
    def carries_on(self) -> bool:
        """Tell whether the adapter that the model is trains further; else it is merged into its base, and all of that is new.

        A further adapter on top of a merged one would stand on a model that lies nowhere.
        """
        settings = self.config.settings
        return self.source.is_adapter and settings.method == "lora" and settings.task in WRITES

    @property
    def start(self) -> str:
        """What the run begins with, in words, where that is an adapter."""
        if self.base is None:
            return ""
        what = "trains further" if self.carries_on else "is merged into it first, and the result is a whole model"
        return f"the adapter of {self.source.name} on {self.base.name} {what}"

    @property
    def beside(self) -> list[Segmented]:
        """The rows that are scored beside the run's own: those of what is mixed in, and the guard's."""
        return [*(mixed.proof for mixed in self.prepared.mixed), *(part.rows for part in self.guard)]

    @property
    def acceptable(self) -> bool:
        """Tell whether a run would begin with these rows."""
        try:
            self.reject_bad_rows()
        except DataError:
            return False
        return True

    def reject_bad_rows(self) -> None:
        """Raise DataError with every bad row where there are more than the settings allow.

        Also where many rows are dropped as too long and the user didn't say that they may be.
        """
        settings = self.config.settings.data
        reject_bad_rows(self.prepared.problems, settings.max_bad_rows)
        if settings.control_tokens == "refuse" and isinstance(self.renderer, Encoder):
            mixed = [side for part in self.prepared.mixed for side in (part.train, part.proof)]
            own = (self.prepared.train, self.prepared.watch, self.prepared.proof)
            reject_spelled([*own, *mixed], self.renderer.spells_control)
        if not self.config.given("data.over_length"):
            parts = (self.prepared.train, self.prepared.watch, self.prepared.proof)
            reject_dropped(parts, settings.max_length or self.prepared.longest)


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
    grading: Grading = field(default_factory=Grading)

    @property
    def proof(self) -> Segmented:
        """The rows of the proof that are scored."""
        return self.data.proof(self.config.settings.eval.rows)

    @property
    def needs_reference(self) -> bool:
        """Tell whether answers are held against what the untouched model gives them."""
        return _needs_reference(self.config.settings)

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

    def measure_beside(self, rows: Measured, tokens_per_pack: int, labels: Labels | None = None) -> Measured:
        """Score what is mixed in and the guard, and put their rows behind those of the run's own.

        Old rows are scored as the run's own are, with its `labels`, but answered only where answers are picked.
        """
        template = self.config.settings.data.template
        found = list(rows.rows)
        for mixed in self.data.prepared.mixed:
            if mixed.old:
                measured = self._measure_old(mixed.proof, tokens_per_pack, labels)
            else:
                renderer = build_renderer(self.data.source, self.data.tokenizer, mixed.task, template)
                measured = self._measure_part(renderer, mixed.task, mixed.proof, tokens_per_pack)
            found += [replace(row, part=mixed.name) for row in measured]
        for part in self.data.guard:
            measured = self._measure_part(part.renderer, part.task, part.rows, tokens_per_pack)
            found += [replace(row, part=part.name, guard=True) for row in measured]
        return Measured(found, rows.task)

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
        return _build_watch(self.data, self.config.settings, self.engine.reader, self.layout)

    def _measure_old(self, rows: Segmented, tokens_per_pack: int, labels: Labels | None) -> Sequence[RowResult]:
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


def _needs_reference(settings: Settings) -> bool:
    return settings.task == "preference" and settings.preference.objective not in REFERENCE_FREE


def _objective_words(settings: Settings) -> str:
    """Return how answers are held against each other; nothing where they aren't."""
    if settings.task not in COMPARED:
        return ""
    terms = settings.preference
    smoothed = f", {terms.label_smoothing:g} smoothed" if terms.label_smoothing else ""
    if settings.task == "reward":
        return f"reward: Bradley-Terry on the rewards of all pairs{smoothed}"
    return f"{terms.objective}, beta {terms.beta:g}{smoothed}, likelihood of the chosen answer {terms.likelihood:g}"


def build_data(config: Config, today: datetime.date | None = None) -> Data:
    """Find the model's tokenizer and read, split and render the data. Raises DataError, ModelError."""
    config, files, corpus, chats, sides = _read_rows(decide_reward(config))
    settings = config.settings
    decided: dict[str, tuple[Any, str]] = {}
    found = corpus or (chats.detection if chats else sides.train.detection)  # type: ignore[union-attr]
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
    decided |= carry_template(config, task)
    template = decided.get("data.template", (settings.data.template,))[0]
    renderer = build_renderer(source, tokenizer, task, template, today)
    limit = settings.data.max_length or row_length(task, source, tokenizer)
    split = task in ("causal", "masked")
    if settings.data.max_length is None:
        decided["data.max_length"] = (limit, "pieces of documents" if split else "the model's own limit")
    if settings.data.over_length == "auto":
        decided["data.over_length"] = ("split" if split else "drop", f"the task is {task}")
    decided |= _choose_leaks(settings, task, streamed=bool(corpus or chats), corpus=bool(corpus))
    if settings.method is None:
        decided["method"] = choose_method(settings, source, task)
    config = decide_adapter(config.decide(decided), source)
    config = _decide_preference(config, sides.train.formatted.examples if sides else ())
    settings = config.settings
    _check_settings(config)
    known = read_known(settings, source, task)
    stream = files if corpus else ()
    prepared = _prepare_stream(settings, stream, chats, renderer, limit, known) or prepare(
        sides or form_sides(settings.data, settings.kind, settings.task),
        settings.data,
        renderer,
        limit,
        task=task,
        seed=settings.seed,
        watch=settings.eval.every != 0,
        unpaired=settings.preference.objective == "kto",
        known=known,
    )
    _check_files(config, prepared)
    mixed = replay(prepared, known, settings.data, renderer, limit)
    _mix_in(config, prepared, source, tokenizer, limit, today, mixed)
    guard = _read_guard(config, prepared, source, tokenizer, today)
    if settings.eval.choices == "on" and not prepared.choices:
        cure = "leave out eval.choices"
        raise UsageError(Problem("config.no_effect", "no few answers stand again and again", "eval.choices", cure))
    if settings.data.positions == "continue":
        _check_positions(prepared, model_length(load_config(source)))
    return Data(config, source, tokenizer, renderer, prepared, guard, describe_parent(source, config))


def _prepare_stream(
    settings: Settings,
    files: Sequence[SourceFile],
    chats: Chats | None,
    renderer: Encoder | Look,
    limit: int,
    known: Known,
) -> Prepared | None:
    """Prepare data that goes through in a stream: `files` of text, or `chats`; None where there is none, or it can't."""
    watch = settings.eval.every != 0
    if chats and isinstance(renderer, Renderer):
        return prepare_chats(chats, settings.data, renderer, limit, known, seed=settings.seed, watch=watch)
    if chats or not files or not isinstance(renderer, Encoder):
        return None
    if known.olds:
        what = "text of this size goes through in a stream, and a run can't be mixed into it"
        cure = f"go on without what the run learned: headstart tune DATA -m {settings.model}"
        raise UsageError(Problem("config.no_effect", what, "data.mix", cure))
    return prepare_corpus(files, settings.data, renderer, limit, task=settings.task, seed=settings.seed, watch=watch)


def _read_rows(config: Config) -> tuple[Config, list[SourceFile], Detection | None, Chats | None, Sides | None]:
    """Return the rows of a run: text or chats that go through in a stream, or else those that are held in memory.

    Where they are preferences and the model gives rewards, that is what is learned further.
    """
    settings = config.settings
    files, corpus = _find_corpus(settings)
    chats = None if corpus else find_chats(settings.data, settings.kind, settings.task)
    sides = None if corpus or chats else form_sides(settings.data, settings.kind, settings.task)
    if (
        sides
        and sides.task == "preference"
        and settings.preference.objective == "auto"
        and is_reward_model(settings.model)
    ):
        why = "the model is a reward model"
        return _read_rows(config.decide(dict.fromkeys(("task", "preference.objective"), ("reward", why))))
    return config, files, corpus, chats, sides


def _decide_preference(config: Config, records: Sequence[Record]) -> Config:
    """Decide how answers are held against each other, where rows are preferences."""
    rows = [record for record in records if isinstance(record, Preference)]
    if not rows:
        return config
    return choose_preference(config, sum(len(row.answers) == 1 for row in rows))


def _choose_leaks(settings: Settings, task: str, *, streamed: bool, corpus: bool) -> dict[str, tuple[str, str]]:
    """Decide whether rows are looked for that nearly say what is held out. Raises UsageError where they can't be."""
    if settings.data.leaks == "near" and corpus:
        cure = "leave it out; `headstart check` finds them"
        what = "`data.leaks` can't be near: text of this size goes through in a stream"
        raise UsageError(Problem("config.no_effect", what, "data.leaks", cure))
    if settings.data.leaks != "auto":
        return {}
    if streamed or task == "images":
        return {"data.leaks": ("exact", "images" if task == "images" else "comparing so many rows takes long")}
    return {}


# Settings that are for some tasks alone.
FOR_TASKS = {
    **dict.fromkeys(
        ("data.leaks", "data.fix", "data.control_tokens"), tuple(task for task in TASKS if task != "images")
    ),
    "data.class_weights": ("classification", "images"),
    "data.whole_words": ("masked",),
    "data.text_pair": (*ROW_LOSSES, "embedding"),
    "data.reasoning": ("chat", *COMPARED),
    "data.train_on": ("chat",),
    "data.template": ("chat", *COMPARED),
    "data.positions": ("causal",),
    "eval.choices": ("chat",),
    "eval.generate": ("chat", "preference"),
    "eval.graders": tuple(task for task in TASKS if task != "reward"),
    "eval.guard": WRITES,
    **{f"preference.{name}": COMPARED for name in PreferenceSettings.model_fields},
}


NOTHING = (0, "off", ("off",), "exact")  # values that ask for nothing


def _check_settings(config: Config) -> None:
    """Raise UsageError where settings would do nothing, or nothing good, for the task that was found."""
    settings = config.settings
    lost = [key for key, tasks in FOR_TASKS.items() if config.given(key) and settings.task not in tasks]
    lost = [key for key in lost if setting(settings, key) not in (setting(Settings(), key), *NOTHING)]
    if settings.task != "chat" and set(settings.data.fix) - {"redact"} and "data.fix" not in lost:
        lost.append("data.fix")  # of turns, which only conversations have
    if lost:
        what = f"the task is {settings.task}"
        raise UsageError(
            Problem("config.no_effect", f"`{k}` has no effect: {what}", k, f"leave out `{k}`") for k in lost
        )
    if settings.task == "embedding" and settings.batch_size == 1:
        what = "a text is told apart from the others of its step, and there are none"
        raise UsageError(Problem("config.bad_value", what, "batch_size", "leave it out, or take 64"))
    if settings.preference.objective == "kto" and settings.batch_size == 1:
        what = "gains are held against those of answers to other prompts of the step, of which there should be several"
        raise UsageError(Problem("config.bad_value", what, "batch_size", "leave it out, or take 8"))
    if settings.task == "reward" and settings.data.template == "plain":
        what = "a reward model reads a conversation as a chat template writes it"
        raise UsageError(Problem("config.bad_value", what, "data.template", "-s data.template=chatml"))
    if settings.weights == "random" and settings.method == "lora":
        cure = "--method full, or leave out -s weights=random"
        raise UsageError(Problem("config.no_effect", "an adapter on random weights learns nothing", "weights", cure))


def _check_files(config: Config, prepared: Prepared) -> None:
    """Raise UsageError where an encoding was named, and no file holds text that could be in it."""
    kinds = [kind_of(file.path) for formed in prepared.formed for file in formed.files]
    if config.settings.data.encoding != UTF_8 and not any(kind in LINES for kind in kinds):
        what = "`data.encoding` has no effect: no file is one of text"
        raise UsageError(Problem("config.no_effect", what, "data.encoding", "leave it out"))


def _find_corpus(settings: Settings) -> tuple[list[SourceFile], Detection | None]:
    """Return the files to train on and, if they are so large that they go through in a stream, what their rows are."""
    if settings.kind not in ("auto", "unsupervised") or settings.task not in ("auto", "causal", "masked"):
        return [], None
    files = find_files(settings.data.train, settings.data.encoding)
    found = peek(files, settings.data, settings.task) if is_large(files) else None
    if settings.data.rows and found and found.format == "text":
        what = "`data.rows` has no effect: text of this size goes through in a stream"
        raise UsageError(Problem("config.no_effect", what, "data.rows", "leave it out, or -s steps=N"))
    return files, found if found and found.format == "text" else None


def _mix_in(
    config: Config,
    prepared: Prepared,
    source: Source,
    tokenizer: Any,
    limit: int,
    today: datetime.date | None,
    replayed: Sequence[Mixed],
) -> None:
    """Add old rows, and those of other data sets, to the rows to train on, and old ones to those to watch."""
    settings = config.settings

    def length(task: str) -> int:
        return min(limit, row_length(task, source, tokenizer))

    def renderer(task: str) -> Encoder:
        found = build_renderer(source, tokenizer, task, settings.data.template, today)
        if not isinstance(found, Encoder):
            raise TypeError(f"{task} rows have no text")
        return found

    held = [*hashes_of(prepared.parts.watch), *hashes_of(prepared.parts.proof)]
    own = len(prepared.train.examples)
    held += [digest for mixed in replayed if mixed.old for digest in hashes_of([*mixed.old.watch, *mixed.old.proof])]
    prepared.mixed = [*replayed, *mix(settings.data, own, held, settings.task, renderer, length)]
    for mixed in prepared.mixed:
        prepared.formed += mixed.formed
        prepared.watch.examples += mixed.watch.examples
        prepared.watch.kept += mixed.watch.kept
        prepared.train.examples += mixed.train.examples
        prepared.train.kept += mixed.train.kept
        prepared.train.dropped += mixed.train.dropped


def _read_guard(
    config: Config, prepared: Prepared, source: Source, tokenizer: Any, today: datetime.date | None
) -> list[Guarded]:
    """Read what the model knew before and is to keep: of tasks that write text; of others nothing is guarded."""
    settings = config.settings
    if settings.task not in WRITES:
        return []
    template = "plain" if settings.task == "causal" else settings.data.template

    @functools.cache  # several parts are of one task
    def renderer(task: str) -> Renderer:
        found = build_renderer(source, tokenizer, task, template, today)
        if not isinstance(found, Renderer):
            raise TypeError(f"{task} rows are not rendered")
        return found

    def length(task: str) -> int:
        return row_length(task, source, tokenizer)

    guard = load_guard(settings.eval.guard, renderer, length)
    if isinstance(prepared.train.kept, list):  # rows of a stream aren't read again for this
        guard, notes = without_learned(guard, prepared.train.kept)
        prepared.formed[0].notes += notes
    prepared.formed += [part.formed for part in guard if part.formed]
    return guard


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
    if task not in (*WRITES, "reward"):
        return Encoder(tokenizer)
    template = "plain" if task == "causal" else template
    return Renderer(tokenizer, stop_ids(source, tokenizer), template, today, whole=task == "reward")


def build_job(data: Data, tell: Callable[[str], None] | None = None) -> Job:
    """Load the model, decide what was left open, and measure what the run will need.

    `tell` is called with what can't be had as asked. Raises ModelError, and ResourceError where the run can't fit.
    """
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
    engine = Engine(
        reader,
        adapted.trainable(),
        _objective(settings, labels, terms),
        weight_decay=settings.optim.weight_decay,
        clip=settings.optim.clip,
        joint=task == "embedding" or terms.objective == "kto" or (task in COMPARED and not reader.packs),
    )
    fitted = _fit_memory(config, data, engine)
    estimate = _estimate(data, engine, fitted, shape)
    facts = _describe_engine(settings, sped, kept)
    return Job(data, fitted.config, adapted, engine, fitted.layout, estimate, facts, shape, new_head)


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


@dataclass(frozen=True)
class Fitted:
    """A way to run that was looked at: its settings, how rows fall into packs there, and what it fills."""

    config: Config
    layout: Layout
    scoring: Scoring | None
    memory: Memory


@machine.settled()
def _fit_memory(config: Config, data: Data, engine: Engine) -> Fitted:
    """Find packs that fit into the memory, the fastest way first: as chosen, in smaller packs, with activations recomputed.

    Packs a half or a quarter as large cost little; activations made anew cost a third of the time. Raises ResourceError
    where nothing fits, or where what would fit was ruled out by the user, with the setting that would do.
    """
    device = engine.reader.device.type
    machine.trim_memory()
    total = machine.device_used_bytes(device) + machine.device_free_bytes(device)
    limit = total * MEMORY_SHARE
    ways = sorted(_ways(config, data.prepared.longest), key=lambda way: not _allowed(config, *way))
    least: Fitted | None = None
    recomputing = False
    for mode, tokens in ways:
        if mode == "on":
            recomputing = recomputing or _recompute(engine, wanted=config.settings.engine.checkpointing == "on")
        if recomputing != (mode == "on"):
            continue
        found = _look(config, data, engine, mode, tokens)
        allowed, fits = _allowed(config, mode, tokens), found.memory.peak() <= limit
        if fits and allowed:
            return found
        if fits:
            raise _too_large(least or found, total, _cure_of(config, mode, tokens))
        least = found if least is None or found.memory.peak() < least.memory.peak() else least
    if least is None:
        raise TypeError("a way that is allowed is always looked at")
    raise _too_large(least, total, _cure(config, least, data, limit))


def _ways(config: Config, longest: int) -> list[tuple[str, int]]:
    """Return what can be tried, as (checkpointing, tokens_per_pack), the fastest first."""
    first = config.settings.engine.tokens_per_pack or 1
    sizes = [size for size in (first, first // 2, first // 4) if size >= max(longest, LEAST_PACK)] or [first]
    sizes += [longest] * (longest < sizes[-1])
    return [(mode, size) for mode in ("off", "on") for size in sizes]


def _allowed(config: Config, mode: str, tokens: int) -> bool:
    """Tell whether the user left this open."""
    engine = config.settings.engine
    own = not config.given("engine.tokens_per_pack") or tokens == engine.tokens_per_pack
    return own and engine.checkpointing in ("auto", mode)


def _look(config: Config, data: Data, engine: Engine, mode: str, tokens: int) -> Fitted:
    """Lay the run out and measure what it would fill."""
    prepared, settings = data.prepared, config.settings
    layout = lay_out(engine.reader, prepared.train.examples, build_feed(config, prepared), tokens)
    parts = [data.proof(settings.eval.rows).examples, prepared.watch.examples]
    parts += [part.examples for part in data.beside]
    scored = [lay_out_scoring(engine.reader, part, tokens) for part in parts]
    larger = [one for one in scored if one and not one.within(layout.worst)]
    scoring = max(larger, key=lambda one: len(one.worst), default=None)
    others = {"saving": _saving_bytes(engine, settings)}
    if settings.eval.generate and settings.eval.choices != "on":
        others["answering"] = answering_bytes(engine.reader, *_answering(data, settings))
    memory = measure_memory(engine, layout, scoring, others)
    decided: dict[str, tuple[Any, str]] = {}
    if settings.engine.checkpointing == "auto":
        why = "it fits into the memory" if mode == "off" else "needed to fit into the memory"
        decided["engine.checkpointing"] = (mode, why)
    if tokens != settings.engine.tokens_per_pack:
        decided["engine.tokens_per_pack"] = (tokens, "what fits into the memory")
    return Fitted(config.decide(decided), layout, scoring, memory)


def _saving_bytes(engine: Engine, settings: Settings) -> int:
    """Return what writing the result fills for a while: an adapter that is merged, a second model."""
    if settings.method != "lora" or settings.task in WRITES:
        return 0
    parameters = list(engine.reader.model.parameters())
    largest = max(p.numel() * p.element_size() for p in parameters)
    return int(sum(p.numel() * p.element_size() for p in parameters) + 2 * largest)


def _cure_of(config: Config, mode: str, tokens: int) -> str:
    """Return the settings that lead to a way that the user ruled out."""
    parts = []
    if config.settings.engine.checkpointing not in ("auto", mode):
        parts.append(f"-s engine.checkpointing={mode}")
    if config.given("engine.tokens_per_pack") and tokens != config.settings.engine.tokens_per_pack:
        parts.append(f"-s engine.tokens_per_pack={tokens}")
    return " ".join(parts)


def _cure(config: Config, found: Fitted, data: Data, limit: float) -> str:
    """Return the settings with which the run would fit, by the same measure; where there are none, say so."""
    longest = data.prepared.longest
    mode = found.config.settings.engine.checkpointing
    for part in (0.5, 0.25, 0.125, 0.0625):
        length = int(longest * part)
        if length >= LEAST_LENGTH and found.memory.peak(round(len(found.layout.worst) * part)) <= limit:
            return f"{_cure_of(config, mode, length)} -s data.max_length={length}".strip()
    without = found.memory.peak() - found.memory.fixed_bytes
    if found.config.settings.method == "full" and without <= limit:
        return "--method lora"
    return "a smaller model, or a machine with more memory"


def _too_large(found: Fitted, total: int, cure: str) -> ResourceError:
    needed = found.memory.peak()
    what = f"{needed / machine.GIB:.1f} GiB are needed and {total / machine.GIB:.1f} GiB are there"
    return ResourceError(Problem("memory.plan", what, "", cure))


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


def _estimate(data: Data, engine: Engine, fitted: Fitted, shape: Shape | None) -> Estimate:
    settings, layout = fitted.config.settings, fitted.layout
    device = engine.reader.device.type
    free = machine.device_free_bytes(device)
    pace = rehearse(engine, layout, fitted.scoring)
    weights = sum(p.numel() * p.element_size() for p in engine.trainable.values())
    every = settings.save.every
    saves = -(-layout.steps // every) if every else 1
    written = weights * (STATES_PER_WEIGHT * saves + min(saves, EVALS_PER_RUN) + 1)
    dtype = torch.bfloat16 if settings.engine.precision == "bfloat16" else torch.float32
    rows = min(settings.engine.tokens_per_pack or 512, RATE_ROWS)
    return Estimate(
        memory_bytes=fitted.memory.planned(pace.peak_bytes),
        memory_free_bytes=free,
        train_s=pace.train_s * layout.tokens + (pace.step_s + layout.data_s) * layout.steps,
        eval_s=pace.forward_s * _scored_tokens(data, settings, layout, engine.reader)
        + _answering_s(data, engine, settings, layout, pace.forward_s),
        save_s=written * seconds_per_byte(Path(settings.out or ".")),
        disk_bytes=weights * ((settings.save.keep + 1) * STATES_PER_WEIGHT + 2),
        phases_bytes=fitted.memory.phases(),
        rehearsed_bytes=pace.peak_bytes,
        product_rate=best_rate(shape, rows, dtype, device) if shape else 0.0,
    )


def _scored_tokens(data: Data, settings: Settings, layout: Layout, reader: Reader) -> int:
    """Return how many tokens go forward to score: the proof twice, what is watched as often as it is."""
    prepared, budget = data.prepared, settings.engine.tokens_per_pack or 1
    scored = data.proof(settings.eval.rows).examples
    parts = [scored, prepared.watch.examples, *(part.examples for part in data.beside)]
    proof, watch, *beside = (one.tokens if (one := lay_out_scoring(reader, part, budget)) else 0 for part in parts)
    watches = -(-layout.steps // settings.eval.every) if settings.eval.every else 0
    twice = 2 if settings.task == "tagging" else 1  # losses, and then the tags
    if settings.eval.choices == "on":
        chosen = scored[: settings.eval.generate or 0]
        aims = sum(example.target_count for example in chosen)
        prompts = _tokens(chosen) - aims
        count = len(prepared.choices)
        proof += (prompts if reader.packing == "forest" else prompts * count) + aims * count
    referred = 0
    if _needs_reference(settings):
        rows = len(prepared.train.examples)  # once, however often they are trained on
        referred = watch + round(layout.tokens * rows / (layout.steps * (settings.batch_size or 1)))
    return 2 * (proof * twice + sum(beside)) + watches * watch + referred


def _build_watch(data: Data, settings: Settings, reader: Reader, layout: Layout) -> Watch | None:
    rows, every, renderer = data.prepared.watch, settings.eval.every, data.renderer
    if not (isinstance(reader, PreferenceReader) and isinstance(renderer, Renderer) and rows.examples and every):
        return None
    evaluations = -(-layout.steps // every)
    return build_watch(
        reader, renderer, rows, settings.eval.generate or 0, settings.seed, evaluations, layout.row_tokens
    )


def _answered(data: Data, settings: Settings) -> Sequence[Example]:
    """Return the rows whose answers are written out; of preferences each with its best answer alone."""
    rows = data.proof(settings.eval.rows)
    if settings.task != "preference":
        return list(rows.examples[: settings.eval.generate or 0])
    chosen = choose_answered(rows.kept, settings.eval.generate or 0)
    return [best_only(rows.examples[n], rows.kept[n]) for n in chosen]


def _answering(data: Data, settings: Settings) -> tuple[list[int], list[int]]:
    """Return how many tokens the prompts have that are answered, and how many their answers may have."""
    rows = _answered(data, settings)
    return [row.token_count - row.target_count for row in rows], [answer_limit(row) for row in rows]


def _answering_s(data: Data, engine: Engine, settings: Settings, layout: Layout, forward_s: float) -> float:
    """Return the seconds that answering takes, before and after, and of preferences on the way."""
    if not settings.eval.generate or settings.eval.choices == "on":
        return 0.0
    prompts, limits = _answering(data, settings)
    wanted = [row.target_count for row in _answered(data, settings)]
    # Untouched, a model mostly goes on to the limit; tuned, it ends where the references do.
    pace = measure_pace(engine.reader)
    watch = _build_watch(data, settings, engine.reader, layout)
    looks = watch.times * pace.answering_s(list(map(len, watch.prompts)), watch.limits, forward_s) if watch else 0.0
    return looks + sum(pace.answering_s(prompts, ends, forward_s) for ends in (limits, wanted))
