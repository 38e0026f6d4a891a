"""Settings -> the data of a run: found, read, split and rendered for its model."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from headstart.begin import (
    COMPARED,
    WRITES,
    carry_template,
    choose_method,
    decide_adapter,
    decide_reward,
    is_reward_model,
)
from headstart.choose import choose_preference
from headstart.config import TASKS, Config, PreferenceSettings, Settings, setting
from headstart.data.chats import Chats, find_chats, prepare_chats
from headstart.data.corpus import is_large, peek, prepare_corpus
from headstart.data.encode import Encoder
from headstart.data.feed import Feed, hashes_of
from headstart.data.formats import Detection
from headstart.data.images import Look, vary_image
from headstart.data.mixing import Mixed, mix, replay
from headstart.data.prepare import Prepared, Sides, form_sides, prepare, reject_bad_rows, reject_dropped, reject_spelled
from headstart.data.read import LINES, UTF_8, SourceFile, find_files, kind_of
from headstart.data.records import Preference, Record
from headstart.data.render import Renderer
from headstart.data.replay import Known
from headstart.data.segments import Example, Segmented
from headstart.errors import DataError, Problem, UsageError
from headstart.evaluate.compare import MIN_ROWS
from headstart.evaluate.guard import Guarded, load_guard, without_learned
from headstart.evaluate.robust import Variant
from headstart.lineage import describe_parent, read_known
from headstart.models.load import find_base, is_encoder, load_config, load_look, load_tokenizer, model_length, stop_ids
from headstart.models.source import Source, find_model
from headstart.objectives.labels import class_losses, number_losses, several_losses

DOCUMENT_TOKENS = 2048
IMAGE_MODEL = "efficientnet-lite0"
ROW_LOSSES = {
    "classification": class_losses,
    "multilabel": several_losses,
    "regression": number_losses,
    "images": class_losses,
}
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
    variants: Sequence[Variant] = ()
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
        """The rows that are scored beside the run's own: those of what is mixed in, the guard's, and own ones written otherwise."""
        parts: list[Guarded | Variant] = [*self.guard, *self.variants]
        return [*(mixed.proof for mixed in self.prepared.mixed), *(part.rows for part in parts)]

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
    _note_groups(prepared)
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


def _note_groups(prepared: Prepared) -> None:
    """Say so where the rows of the proof are of too few groups for a verdict: those of one stand or fall together."""
    groups = [record.group for record in prepared.proof.kept] if isinstance(prepared.proof.kept, list) else []
    count = len({group or number for number, group in enumerate(groups)})
    if count < MIN_ROWS <= len(groups):
        what = f"the {len(groups):,} rows of the proof are of {count:,} {'group' if count == 1 else 'groups'}"
        prepared.formed[0].notes.append(
            f"{what}, and a verdict needs {MIN_ROWS}: rows of one group stand or fall together"
        )


def _check_positions(prepared: Prepared, length: int) -> None:
    problems = [
        Problem("row.too_long", f"{end:,} tokens, and the model has {length:,} positions", str(example.where), cure)
        for part in (prepared.train, prepared.watch, prepared.proof)
        for example in part.examples
        for end in [end_of(example)]
        for cure in ["-s data.positions=restart, or split the document"]
        if end > length
    ]
    if problems:
        raise DataError(problems)


def end_of(example: Example) -> int:
    """Return how many positions a row needs."""
    return max(segment.first + len(segment) for segment in example.segments)


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


def build_feed(config: Config, prepared: Prepared) -> Feed:
    """Return the order of rows that the settings ask for, and how a row varies from time to time."""
    settings = config.settings
    rows, batch_size = len(prepared.train.examples), settings.batch_size or 1
    total = settings.steps * batch_size if settings.steps else round((settings.epochs or 1) * rows)
    vary = prepared.masking.vary if prepared.masking else None
    if settings.task == "images":
        vary = vary_image(settings.seed)
    return Feed(rows, batch_size, max(1, total), settings.seed, vary=vary)
