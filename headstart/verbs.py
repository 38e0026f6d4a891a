"""What can be asked besides tuning: check, plan, evaluate, compare, load."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from headstart import machine
from headstart.begin import COMPARED
from headstart.config import Config, DataSettings, Override, as_names, build_config, known_keys, setting
from headstart.data.check import Findings, find
from headstart.data.encode import Encoder
from headstart.data.feed import content_hash
from headstart.data.images import Look
from headstart.data.labels import Labels, find_choices
from headstart.data.masking import find_masking
from headstart.data.mend import Mended, Mending
from headstart.data.preferences import parted
from headstart.data.prepare import LABELLED, Coding, form_rows, reject_bad_rows, reject_spelled, segment
from headstart.data.read import HUB_PREFIX, find_files, kind_of
from headstart.data.records import Preference, Record
from headstart.data.segments import Segmented
from headstart.dataset import Data, build_data, build_renderer, row_length
from headstart.display import Display
from headstart.engine.forward import Reader
from headstart.errors import DataError, Problem, UsageError
from headstart.evaluate.compare import tell_metric
from headstart.evaluate.graders.rows import Grading, build_grading, find_unfit, read_items, ungraded, ungraded_lines
from headstart.evaluate.measure import Measured, OnProgress, RowResult, choose_answered, measure
from headstart.evaluate.predictions import Predictions
from headstart.evaluate.robust import (
    OUTSIDE,
    VARIABLE,
    Robust,
    find_robust,
    general_rows,
    variant_reading,
    write_variants,
)
from headstart.evaluate.versus import Evaluated, Versus, build_versus
from headstart.files import read_json, sha256
from headstart.job import Job, build_job, build_reader
from headstart.models.load import (
    Loaded,
    find_labels,
    is_encoder,
    load_model,
    load_tokenizer,
    make_room,
    need_labels,
)
from headstart.models.source import Source, find_model, weights_hash
from headstart.run import find_run

Names = str | Path | Sequence[str | Path]
READING = (
    "encoding",
    "fix",
    "control_tokens",
    "format",
    "prompt",
    "completion",
    "rejected",
    "text",
    "text_pair",
    "label",
    "whole_words",
    "train_on",
    "reasoning",
    "template",
    "over_length",
    "max_length",
    "positions",
    "max_bad_rows",
)
PACK_TOKENS = 2048
KEPT_AT_ONCE = 64  # rows that are measured and graded before they are kept


def check(data: Names, *, model: str | None = None, settings: Mapping[str, Any] | None = None) -> Findings:
    """Look through data as a run would; nothing is trained. Raises DataError where no row can be read at all."""
    return check_config(_config(data, model, settings))[0]


def check_config(config: Config) -> tuple[Findings, Data]:
    """Look through the data that settings name."""
    data = build_data(config)
    return find(data.prepared, data.renderer), data


def mend_config(
    config: Config,
    data: Data,
    out: Path,
    *,
    near: bool = False,
    private: bool = False,
    graders: Sequence[str | Path] = (),
    least: float | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Mended:
    """Write the rows to train on without those that can't be used or stand twice; `near` and `private` as `Mending` has them.

    `data` is what was built from the settings. With `graders` (files) a row stays only where each gives its own answer
    `least`, or what it takes as passed. Raises DataError where a file could not be read to its end.
    """
    prepared = data.prepared
    reject_bad_rows([problem for problem in prepared.problems if not problem.is_row], 0)
    parts = (prepared.train, prepared.watch, prepared.proof)
    bad = [problem.where for part in parts for problem in part.problems]
    settings = config.settings.data
    unfit: set[str] = set()
    if graders:
        records = list(prepared.formed[0].records)
        grading = build_grading([str(file) for file in graders], settings.train, settings, records)
        unfit = find_unfit(grading, records, least, tell)
    files = find_files(settings.train, settings.encoding)
    mending = Mending(files, settings, prepared.formed[0].detection, bad, near, private, unfit)
    return mending.write(out)


def plan(
    data: Names,
    *,
    model: str | None = None,
    settings: Mapping[str, Any] | None = None,
    display: Display | None = None,
) -> Job:
    """Say what a run would need: tokens, steps, memory, time, disk. A pack goes through the model, nothing is trained.

    Raises what `tune` raises before its first step.
    """
    return plan_config(_config(data, model, settings), display)


def plan_config(config: Config, display: Display | None = None) -> Job:
    """Say what a run with these settings would need."""
    data = build_data(config)
    data.reject_bad_rows()
    return build_job(data, display.warn if display else None)


def evaluate(
    model: str,
    data: Names,
    *,
    answers: int = 32,
    graders: Sequence[str | Path] = (),
    out: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
    robust: bool = False,
) -> Evaluated:
    """Score a model on every row of `data`, let it answer some, and have `graders` (files) score the answers.

    For a run, its own settings of how rows are read are used where `settings` don't say otherwise. With `out`, a folder,
    every prediction is kept in it with its row, and what was begun there goes on with what is missing. With `robust`
    rows that are written otherwise are scored, too. Raises UsageError where rows have no input that could be.
    """
    config = reading_config(model, data, settings)
    reading = _read(model, config)
    grading = _build_grading(graders, config, reading)
    if out and not grading.items:
        wheres = [str(row.where) for row in reading.rows.kept]
        grading = replace(grading, items=read_items(config.settings.data.train, config.settings.data, wheres))
    scoring = _Scoring(config, answers, _known_choices(model), grading, on_progress, robust)
    return scoring.measure(reading, _open_predictions(Path(out), reading, scoring) if out else None)


def compare(
    a: str,
    b: str,
    data: Names,
    *,
    more: Sequence[str] = (),
    answers: int = 32,
    graders: Sequence[str | Path] = (),
    settings: Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
) -> Versus:
    """Score models on the same rows and compare `b` and `more` in pairs with `a`.

    How rows are read comes from `b` if it is a run. Rows that one of the models can't read whole are left out for all.
    Raises DataError where none is left.
    """
    names = (a, b, *more)
    config = reading_config(b, data, settings)
    readings = [_read(name, config) for name in names]
    common = set(readings[0].keys()).intersection(*(reading.keys() for reading in readings))
    if not common:
        what = f"no row that {'both' if len(names) == 2 else 'all'} models can read"
        raise DataError(Problem("data.empty", what, "", "-s data.over_length=drop"))
    readings = [reading.only(common) for reading in readings]
    choices = next((found for name in (b, a, *more) if (found := _known_choices(name))), ())
    scoring = _Scoring(config, answers, choices, _build_grading(graders, config, readings[0]), on_progress)
    return build_versus([scoring.measure(r) for r in readings], _differing_settings(names), scoring.grading.graders)


def split_names(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell the models from the data that follow them: data are files, hub:owner/name, and folders without a model.

    Raises UsageError where there are fewer than two models or no data.
    """
    models = list(itertools.takewhile(lambda name: not _is_data(name), names))
    if len(models) < 2 or len(models) == len(names):
        what = f"{len(models)} models and {len(names) - len(models)} data files are named"
        raise UsageError(Problem("usage.flag", what, " ".join(names), "headstart compare MODEL MODEL ... DATA"))
    return models, list(names[len(models) :])


def _is_data(name: str) -> bool:
    path = Path(name)
    if path.is_dir():
        return not any((path / file).exists() for file in ("config.json", "adapter_config.json", "config.yaml"))
    return name.startswith(HUB_PREFIX) or kind_of(path) is not None or (path.is_file() and path.suffix != ".gguf")


def _differing_settings(names: Sequence[str]) -> dict[str, list[Any]]:
    """Return the settings in which the runs that models come from differ, each with its value in each run."""
    runs = [folder.read_config().settings if (folder := find_run(name)) else None for name in names]
    found = {}
    for key in known_keys():
        values = [None if run is None else setting(run, key) for run in runs]
        told = [value for value, run in zip(values, runs, strict=True) if run is not None]
        if key != "out" and any(value != told[0] for value in told):
            found[key] = values
    return found


def load(model: str) -> tuple[Any, Any]:
    """Return a model (a transformers or PEFT model in evaluation mode) and its tokenizer (of images: None)."""
    source = find_model(model)
    labels = find_labels(source)
    task = labels.task if labels else _task_of_run(model) or "causal"
    tokenizer = None if task == "images" else load_tokenizer(source)
    return load_model(source, machine.pick_device(), task=task, labels=labels).adapted, tokenizer


def load_here(source: Source, task: str, labels: Labels | None = None) -> Loaded:
    """Load a model for a task on this machine's device, in the numbers that suit it."""
    device = machine.pick_device()
    return load_model(source, device, torch.bfloat16 if device == "cuda" else torch.float32, task, labels)


@dataclass(frozen=True)
class _Reading:
    """Rows as one model reads them."""

    source: Source
    task: str
    labels: Labels | None
    renderer: Encoder | Look
    rows: Segmented
    notes: Sequence[str]
    encode_variants: Callable[[Sequence[Record]], Segmented]

    def keys(self) -> list[tuple[str, str]]:
        """Return what each row is: where it stands and, since it may have been cut, what it says."""
        return [(str(row.where), content_hash(row)) for row in self.rows.kept]

    def only(self, keys: set[tuple[str, str]]) -> _Reading:
        """Return the reading of some rows."""
        chosen = [index for index, key in enumerate(self.keys()) if key in keys]
        rows = Segmented([self.rows.examples[i] for i in chosen], [self.rows.kept[i] for i in chosen])
        left_out = len(self.rows.kept) - len(chosen)
        more = [f"{left_out:,} rows left out: the other model can't read them as they are"] if left_out else []
        return replace(self, rows=rows, notes=[*self.notes, *more])


def _read(model: str, config: Config) -> _Reading:
    source = find_model(model)
    settings = config.settings.data
    labels = find_labels(source)
    task = config.settings.task if config.settings.task != "auto" else labels.task if labels else "auto"
    formed = form_rows(settings.train, settings, config.settings.kind, task)
    task = formed.detection.task if task == "auto" else task
    if task == "causal" and config.settings.task == "auto" and is_encoder(source):
        task = "masked"
    if task in LABELLED and labels is None:
        labels = need_labels(source)
    tokenizer = None if task == "images" else load_tokenizer(source)
    renderer = build_renderer(source, tokenizer, task, settings.template)
    max_length = settings.max_length or row_length(task, source, tokenizer)
    masking = None
    if task == "masked" and isinstance(renderer, Encoder):
        masking = find_masking(renderer, 0, whole_words=settings.whole_words)
    if task in COMPARED and settings.group_by is None:
        formed.formatted.examples = list(
            parted([row for row in formed.formatted.examples if isinstance(row, Preference)])
        )
    coding = Coding(task, labels, masking, formed.formatted.examples)

    def encode(records: Sequence[Record], reading: DataSettings = settings) -> Segmented:
        return segment(records, reading, renderer, max_length, coding, whole=True)

    rows = encode(formed.formatted.examples)
    problems = [*formed.formatted.problems, *rows.problems]
    reject_bad_rows(problems, settings.max_bad_rows)
    if settings.control_tokens == "refuse" and isinstance(renderer, Encoder):
        reject_spelled([rows], renderer.spells_control)
    if not rows.examples:
        what = f"no rows are left: {len(rows.dropped)} are over {max_length:,} tokens"
        raise DataError([Problem("data.empty", what, "", "-s data.max_length=N, -s data.over_length=cut"), *problems])
    notes = list(formed.notes)
    if rows.dropped:
        notes.append(
            f"{len(rows.dropped):,} rows dropped whole, over {max_length:,} tokens; first {rows.dropped[0][0]}"
        )
    if rows.cut:
        notes.append(f"{rows.cut:,} rows cut to {max_length:,} tokens")
    if problems:
        notes.append(f"{len(problems):,} rows left out, which can't be used; first {problems[0].where}")
    return _Reading(source, task, labels, renderer, rows, notes, lambda some: encode(some, variant_reading(settings)))


def _known_choices(model: str) -> tuple[str, ...]:
    """Return the answers out of which the run that a model comes from picks one, if it does."""
    folder = find_run(model)
    if folder is None or folder.read_config().settings.eval.choices != "on" or not folder.result_file.exists():
        return ()
    return tuple(read_json(folder.result_file)["labels"])


@dataclass(frozen=True)
class _Scoring:
    """How models are scored: the same for all that are compared."""

    config: Config
    answers: int
    choices: Sequence[str]
    grading: Grading
    on_progress: OnProgress | None
    robust: bool = False

    def measure(self, reading: _Reading, kept: Predictions | None = None) -> Evaluated:
        """Score a model, in batches where predictions are kept; those that are kept already aren't made anew."""
        if self.robust and reading.task not in VARIABLE:
            what = f"rows for {reading.task} have no input that could be written otherwise"
            raise UsageError(Problem("usage.flag", what, "--robust", "leave it out"))
        records = reading.rows.kept
        size = len(records) if kept is None or reading.task == "embedding" else KEPT_AT_ONCE
        batches = [range(start, min(start + size, len(records))) for start in range(0, len(records), size)]
        answers = reading.task in ("chat", "preference")
        answered = set(choose_answered(records, self.answers) if answers else ())
        model, notes = _Model(reading, self), list(reading.notes)
        rows: list[RowResult] = []
        for number, batch in enumerate(batches):
            found = kept.read(number) if kept else None
            if found is None:
                some = Segmented(*(rows[batch.start : batch.stop] for rows in (reading.rows.examples, records)))
                measured = model.measure(some, [i - batch.start for i in batch if i in answered])
                found = list(self.grading.grade(measured, notes.append, self.on_progress).rows)
                if kept:
                    kept.write(number, found, self.grading.items)
            rows += found
        measured = Measured(rows, reading.task)
        notes += ungraded_lines(ungraded({"": measured}))
        values = {name: tell_metric(metric) for name, metric in measured.metrics().items()}
        robust = _measure_robust(reading, measured, model) if self.robust else None
        evaluated = Evaluated(reading.source.name, measured, values, list(dict.fromkeys(notes)), robust)
        if kept:
            kept.finish(len(batches), evaluated.summary())
        return evaluated


class _Model:
    """The model of a reading, loaded when the first rows are to be measured."""

    def __init__(self, reading: _Reading, scoring: _Scoring) -> None:
        self._reading, self._scoring = reading, scoring

    @cached_property
    def _reader(self) -> Reader:
        reading, config = self._reading, self._scoring.config
        torch.set_num_threads(config.settings.engine.threads or machine.cpu_count())
        model = load_here(reading.source, reading.task, reading.labels).model
        if isinstance(reading.renderer, Encoder):
            make_room(model, reading.renderer.tokenizer)
        reader = build_reader(model, reading.task, reading.renderer, bfloat16=model.device.type == "cuda")
        if reader.device.type == "cpu":
            reader.speed_up()
        return reader

    @cached_property
    def choices(self) -> Sequence[str]:
        """The set that answers are picked from; empty where they are free."""
        reading, scoring = self._reading, self._scoring
        if reading.task == "chat" and not scoring.choices and scoring.config.settings.eval.choices != "off":
            return find_choices(reading.rows.kept)
        return scoring.choices

    def measure(self, rows: Segmented, answered: Sequence[int]) -> Measured:
        """Score rows, and answer those that are named by their number."""
        reading = self._reading
        return measure(
            self._reader,
            reading.renderer,
            rows.kept,
            rows.examples,
            task=reading.task,
            tokens_per_pack=PACK_TOKENS,
            chosen=answered,
            labels=reading.labels,
            choices=self.choices,
            on_progress=self._scoring.on_progress,
        )


def _measure_robust(reading: _Reading, clean: Measured, model: _Model) -> Robust:
    """Measure the rows as they would be written otherwise; of classes, also what is from outside the job."""

    # Of answers out of a set, those rows that were answered.
    chosen = [n for n, row in enumerate(clean.rows) if row.answer is not None]
    numbers = chosen if any(clean.rows[n].probability is not None for n in chosen) else range(len(clean.rows))
    label = reading.labels.names[0] if reading.labels and reading.task == "classification" else None
    outside = None if label is None else reading.encode_variants(general_rows(label))
    rows = list(clean.rows)
    for variant in write_variants({n: reading.rows.kept[n] for n in numbers}, reading.encode_variants, outside=outside):
        answered = range(len(variant.rows.kept)) if model.choices and variant.name != OUTSIDE else ()
        rows += variant.mark(model.measure(variant.rows, answered).rows)
    return find_robust(Measured(rows, clean.task))


def _build_grading(graders: Sequence[str | Path], config: Config, reading: _Reading) -> Grading:
    settings = config.settings.data
    if graders and reading.task == "reward":
        what = "a reward model writes no answers that could be graded"
        raise UsageError(Problem("usage.flag", what, "--grader", "leave it out, or name a model that writes text"))
    files = [str(file) for file in graders]
    return build_grading(files, settings.train, settings, reading.rows.kept)


def _open_predictions(path: Path, reading: _Reading, scoring: _Scoring) -> Predictions:
    """Open the folder of an evaluation, which knows what it began with."""
    settings = scoring.config.settings
    identity = {
        "model": {"name": reading.source.name, "sha256": weights_hash(reading.source)},
        "data": [{"name": file.name, "sha256": sha256(file.path)} for file in find_files(settings.data.train)],
        "settings": {
            "data": settings.data.model_dump(mode="json"),
            "choices": [settings.eval.choices, *scoring.choices],
        },
        "answers": scoring.answers,
        "graders": scoring.grading.to_json(),
    }
    return Predictions.open(path, identity)


def _config(data: Names, model: str | None, settings: Mapping[str, Any] | None) -> Config:
    named = {"data.train": as_names(data), "model": model, **(settings or {})}
    return build_config(None, [Override(key, value, "argument") for key, value in named.items()])


def reading_config(model: str, data: Names, settings: Mapping[str, Any] | None) -> Config:
    """Return settings for reading `data`: the user's, over those of the run that the model comes from, if it does."""
    known: dict[str, Any] = {}
    if folder := find_run(model):
        of_run = folder.read_config()
        known = {
            f"data.{name}": getattr(of_run.settings.data, name) for name in READING if of_run.given(f"data.{name}")
        }
        if of_run.settings.data.template == "plain":  # given, or carried over from the run that it began with
            known["data.template"] = "plain"
        if of_run.settings.eval.choices == "off":
            known["eval.choices"] = "off"
        if (task := _task_of_run(model)) == "embedding":
            known["task"] = task
    return _config(data, None, {**known, **(settings or {})})


def _task_of_run(model: str) -> str | None:
    """Return the task of the run that a model is the result of, if it is of one."""
    folder = find_run(model)
    return folder.read_config().settings.task if folder else None
