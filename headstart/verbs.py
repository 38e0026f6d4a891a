"""What can be asked besides tuning: check, plan, evaluate, compare, load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from headstart import machine
from headstart.config import Config, Override, as_names, build_config
from headstart.data.check import Findings, find
from headstart.data.encode import Encoder
from headstart.data.feed import content_hash
from headstart.data.images import Look
from headstart.data.labels import Labels, find_choices
from headstart.data.masking import find_masking
from headstart.data.mend import Mended, Mending
from headstart.data.prepare import LABELLED, Coding, form_rows, reject_bad_rows, segment
from headstart.data.read import find_files
from headstart.data.segments import Segmented
from headstart.display import Display
from headstart.errors import DataError, Problem
from headstart.evaluate.compare import Compared, compare_all, to_json
from headstart.evaluate.measure import PER_TOKEN, Measured, OnProgress, measure
from headstart.files import read_json
from headstart.job import Data, Job, build_data, build_job, build_reader, build_renderer, row_length
from headstart.models.load import (
    Loaded,
    find_labels,
    is_encoder,
    load_model,
    load_tokenizer,
    make_room,
    need_labels,
)
from headstart.models.source import Source, find_model
from headstart.run import find_run

Names = str | Path | Sequence[str | Path]
READING = (
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
    "redact",
    "template",
    "over_length",
    "max_length",
    "positions",
    "max_bad_rows",
)
PACK_TOKENS = 2048


@dataclass(frozen=True)
class Evaluated:
    """A model on the rows of some data: what it did on each, and its metrics with their intervals."""

    model: str
    measured: Measured
    metrics: Mapping[str, Mapping[str, float]]
    notes: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """The metrics and rows as plain values."""
        return {
            "model": self.model,
            "metrics": dict(self.metrics),
            "notes": list(self.notes),
            "rows": self.measured.to_json(),
        }


@dataclass(frozen=True)
class Versus:
    """Two models on the same rows: each metric of both, and the paired difference (second minus first)."""

    first: Evaluated
    second: Evaluated
    compared: Sequence[Compared]

    def to_json(self) -> dict[str, Any]:
        """The metrics of both and their differences as plain values."""
        return {
            "a": {"model": self.first.model, "metrics": dict(self.first.metrics), "notes": list(self.first.notes)},
            "b": {"model": self.second.model, "metrics": dict(self.second.metrics), "notes": list(self.second.notes)},
            "rows": len(self.second.measured.rows),
            "differences": to_json(self.compared)["differences"],
        }


def check(data: Names, *, model: str | None = None, settings: Mapping[str, Any] | None = None) -> Findings:
    """Look through data as a run would; nothing is trained. Raises DataError where no row can be read at all."""
    return check_config(_config(data, model, settings))[0]


def check_config(config: Config) -> tuple[Findings, Data]:
    """Look through the data that settings name."""
    data = build_data(config)
    return find(data.prepared, data.renderer), data


def mend_config(config: Config, data: Data, out: Path, *, near: bool = False, private: bool = False) -> Mended:
    """Write the rows to train on without those that can't be used or stand twice; `near` and `private` as `Mending` has them.

    `data` is what was built from the settings. Raises DataError where a file could not be read to its end.
    """
    prepared = data.prepared
    reject_bad_rows([problem for problem in prepared.problems if not problem.is_row], 0)
    parts = (prepared.train, prepared.watch, prepared.proof)
    bad = [problem.where for part in parts for problem in part.problems]
    settings = config.settings.data
    mending = Mending(find_files(settings.train), settings, prepared.formed[0].detection, bad, near, private)
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
    settings: Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
) -> Evaluated:
    """Score a model on every row of `data` and let it answer some.

    For a run, its own settings of how rows are read are used where `settings` don't say otherwise.
    """
    config = reading_config(model, data, settings)
    return _measure(_read(model, config), config, answers, _known_choices(model), on_progress)


def compare(
    a: str,
    b: str,
    data: Names,
    *,
    answers: int = 32,
    settings: Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
) -> Versus:
    """Score two models on the same rows and compare them in pairs; how rows are read comes from `b` if it is a run.

    Rows that one of the models can't read whole are left out for both. Raises DataError where none is left.
    """
    config = reading_config(b, data, settings)
    readings = [_read(name, config) for name in (a, b)]
    common = set(readings[0].keys()) & set(readings[1].keys())
    if not common:
        raise DataError(Problem("data.empty", "no row that both models can read", "", "-s data.over_length=drop"))
    choices = _known_choices(b) or _known_choices(a)
    first, second = (_measure(reading.only(common), config, answers, choices, on_progress) for reading in readings)
    before, after = first.measured.metrics(), second.measured.metrics()
    if [row.targets for row in first.measured.rows] != [row.targets for row in second.measured.rows]:
        # Other tokenizers cut other tokens; a loss per token compares only over the same ones.
        before = {name: metric for name, metric in before.items() if name not in PER_TOKEN}
    return Versus(first, second, compare_all(before, after))


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
    coding = Coding(task, labels, masking, formed.formatted.examples)
    rows = segment(formed.formatted.examples, settings, renderer, max_length, coding, whole=True)
    problems = [*formed.formatted.problems, *rows.problems]
    reject_bad_rows(problems, settings.max_bad_rows)
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
    return _Reading(source, task, labels, renderer, rows, notes)


def _known_choices(model: str) -> tuple[str, ...]:
    """Return the answers out of which the run that a model comes from picks one, if it does."""
    folder = find_run(model)
    if folder is None or folder.read_config().settings.eval.choices != "on" or not folder.result_file.exists():
        return ()
    return tuple(read_json(folder.result_file)["labels"])


def _measure(
    reading: _Reading, config: Config, answers: int, choices: Sequence[str], on_progress: OnProgress | None
) -> Evaluated:
    if reading.task == "chat" and not choices and config.settings.eval.choices != "off":
        choices = find_choices(reading.rows.kept)
    torch.set_num_threads(config.settings.engine.threads or machine.cpu_count())
    model = load_here(reading.source, reading.task, reading.labels).model
    if isinstance(reading.renderer, Encoder):
        make_room(model, reading.renderer.tokenizer)
    reader = build_reader(model, reading.task, reading.renderer, bfloat16=model.device.type == "cuda")
    if reader.device.type == "cpu":
        reader.speed_up()
    measured = measure(
        reader,
        reading.renderer,
        reading.rows.kept,
        reading.rows.examples,
        task=reading.task,
        tokens_per_pack=PACK_TOKENS,
        answers=min(answers, len(reading.rows.kept)),
        labels=reading.labels,
        choices=choices,
        on_progress=on_progress,
    )
    metrics = measured.metrics()
    compared = compare_all(metrics, metrics)
    values = {item.name: item.after.to_json() for item in compared}
    return Evaluated(reading.source.name, measured, values, reading.notes)


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
        if of_run.settings.eval.choices == "off":
            known["eval.choices"] = "off"
        if (task := _task_of_run(model)) == "embedding":
            known["task"] = task
    return _config(data, None, {**known, **(settings or {})})


def _task_of_run(model: str) -> str | None:
    """Return the task of the run that a model is the result of, if it is of one."""
    folder = find_run(model)
    return folder.read_config().settings.task if folder else None
