"""A run's folder on disk, and a finished run as users hold it."""

from __future__ import annotations

import contextlib
import datetime
import html
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from headstart.config import Config, read_resolved
from headstart.errors import DamagedError, Problem, RunError
from headstart.files import Lines, read_json, remove_temporaries, sync_file, write_atomic, write_json

DEFAULT_FOLDER = Path("runs")
WRITER = ".writer.json"
NOT_BEGUN = (".lock", WRITER, "data.json")  # a run begins with its config.yaml, which is written after these


class RunFolder:
    """The files of one run; each is written whole or not at all, but for the logs, which grow line by line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.data_file = path / "data.json"
        self.metrics_file = path / "metrics.jsonl"
        self.metrics = Lines(self.metrics_file)
        self.checkpoints = path / "checkpoints"
        self.evaluation = path / "evaluation"
        self.reference_file = self.evaluation / "reference.json"
        self.model = path / "model"
        self.result_file = path / "result.json"
        self.report_file = path / "report.html"
        self.card_file = path / "README.md"
        self.log_file = path / "log.txt"

    @staticmethod
    def create(path: Path) -> RunFolder:
        """Make a new run folder. Raises RunError where something lies there already."""
        RunFolder.check_free(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise _not_made(path, error) from None
        return RunFolder(path)

    @staticmethod
    def check_free(path: Path) -> None:
        """Raise RunError where something lies at `path` already; what a run left that had not begun doesn't count."""
        try:
            there = path.exists()
        except (OSError, ValueError) as error:  # no name that a disk takes
            raise _not_made(path, error) from None
        if not there:
            return
        cure = f"choose another with -o, or go on with it: headstart resume {path}"
        if not path.is_dir():
            raise RunError(Problem("run.exists", "a file lies there", str(path), "choose another with -o"))
        if any(item.name not in NOT_BEGUN and not item.name.startswith(".tmp-") for item in path.iterdir()):
            raise RunError(Problem("run.exists", "the folder is not empty", str(path), cure))

    @staticmethod
    def open(path: Path) -> RunFolder:
        """Open a run folder that exists. Raises RunError."""
        folder = RunFolder(path)
        if not folder.config_file.exists() or not folder.data_file.exists():
            raise RunError(_not_found(str(path)))
        return folder

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process alone. Raises RunError where another process writes it.

        The system lets go of a lock when its process ends, however it ends, so no lock is ever stale.
        """
        lock, writer = FileLock(self.path / ".lock"), self.path / WRITER
        try:
            lock.acquire(timeout=0)
        except Timeout:
            what, cure = f"another process writes this run{self._writer()}", "wait for it, or stop it"
            raise RunError(Problem("run.locked", what, str(self.path), cure)) from None
        try:
            for folder in (self.path, self.evaluation, self.checkpoints):
                remove_temporaries(folder)
            since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            write_json(writer, {"pid": os.getpid(), "host": platform.node(), "since": since})
            yield
        finally:
            writer.unlink(missing_ok=True)
            lock.release()

    def _writer(self) -> str:
        """Return who holds the folder, in words, as far as that can be read."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            holder = read_json(self.path / WRITER)
            return f": {holder['pid']} on {holder['host']}, since {holder['since']}"
        return ""

    def write_config(self, config: Config) -> None:
        """Write the resolved settings."""
        write_atomic(self.config_file, config.render())

    def read_config(self) -> Config:
        """Read the resolved settings, with their sources."""
        return read_resolved(self.config_file)

    def add_metrics(self, record: dict[str, Any]) -> None:
        """Add a line to the metrics. Raises OSError where it can't be written now; then it is with the next."""
        self.metrics.add(json.dumps(record, allow_nan=False))

    def sync_metrics(self) -> None:
        """Make the metrics survive a power cut, those that the disk refused before included."""
        self.metrics.flush()
        if self.metrics_file.exists():
            sync_file(self.metrics_file)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the metrics; a line that a kill cut short is left out."""
        if not self.metrics_file.exists():
            return []
        records = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
        return records

    def forget_after(self, step: int, *, due: bool = False) -> None:
        """Drop the metrics of steps after `step`, and the evaluation of that step where it is `due`: they come again."""
        last = (step, not due)
        kept = [record for record in self.read_metrics() if (record["step"], "watch_loss" in record) <= last]
        write_atomic(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept))

    def write_evaluation(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Keep what a model did on the frozen rows (`before` or `after`)."""
        write_json(self.evaluation / f"{name}.json", rows)

    def read_evaluation(self, name: str) -> list[dict[str, Any]] | None:
        """Return what `write_evaluation` kept, or None. Raises DamagedError."""
        path = self.evaluation / f"{name}.json"
        try:
            return read_json(path) if path.exists() else None
        except DamagedError as error:
            cure = "delete it: it is made anew when the run goes on"
            raise DamagedError(replace(problem, cure=cure) for problem in error.problems) from None


def _not_made(path: Path, error: OSError | ValueError) -> RunError:
    what = f"the folder can't be made: {getattr(error, 'strerror', None) or error}"
    return RunError(Problem("run.exists", what, str(path)[:80], "choose another with -o"))


def new_run_path(data: str, model: str) -> Path:
    """Return the first free `runs/DATA-MODEL-N`."""
    names = [Path(part).name.partition(".")[0] for part in (data.removeprefix("hub:"), model)]
    return free_path("-".join(part for part in names if part) or "run")


def free_path(stem: str) -> Path:
    """Return the first free `runs/STEM-N`."""
    number = 1
    while (path := DEFAULT_FOLDER / f"{stem}-{number}").exists():
        number += 1
    return path


@dataclass(frozen=True)
class Run:
    """A finished run: where it lies, what came out, and how to use it."""

    path: Path

    @cached_property
    def result(self) -> dict[str, Any]:
        """Return the result: verdict, scores before and after, the difference, speed, memory. Raises RunError."""
        file = RunFolder(self.path).result_file
        if not file.exists():
            cure = f"headstart resume {self.path}"
            raise RunError(Problem("run.incomplete", "the run has no result yet", str(self.path), cure))
        result: dict[str, Any] = read_json(file)
        return result

    @property
    def report(self) -> Path:
        """Where the report lies: one HTML file."""
        return RunFolder(self.path).report_file

    @cached_property
    def model(self) -> Any:
        """Return the tuned model, loaded: a transformers or PEFT model in evaluation mode."""
        import torch

        from headstart.machine import pick_device
        from headstart.models.load import find_labels, load_model
        from headstart.models.source import find_model

        dtype = getattr(torch, self.result["dtype"])
        source = find_model(str(self.path))
        task = self.result["task"]
        return load_model(source, pick_device(), dtype, task, find_labels(source)).adapted

    def __repr__(self) -> str:
        from headstart.report.words import shift

        difference = self.result["difference"]
        return f"Run({str(self.path)!r}: {self.result['verdict']}, {difference['metric']} {shift(difference)})"

    def _repr_html_(self) -> str:
        from headstart.report.words import sentence

        result = self.result
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{result['before'][name]['value']:.3f}</td>"
            f"<td>{result['after'][name]['value']:.3f}</td></tr>"
            for name in result["before"]
        )
        return (
            f"<b>{html.escape(sentence(result))}</b><table><tr><th></th><th>before</th><th>after</th></tr>{rows}</table>"
            f"<p>report: <code>{html.escape(str(self.report))}</code></p>"
        )


def find_run(model: str) -> RunFolder | None:
    """Return the run that a model is the result of, named by the run's folder or by the model's in it."""
    path = Path(model)
    candidates = (path, path.parent) if path.name == "model" else (path,)
    return next((RunFolder(p) for p in candidates if RunFolder(p).config_file.exists()), None)


def need_run(model: str) -> RunFolder:
    """Return the run that `find_run` finds. Raises RunError where none lies there."""
    folder = find_run(model)
    if folder is None:
        raise RunError(_not_found(model))
    return folder


def _not_found(path: str) -> Problem:
    return Problem("run.not_found", "no run lies there", path, "`headstart runs` lists those that there are")


def find_runs(folder: Path = DEFAULT_FOLDER) -> list[Path]:
    """Return the run folders in `folder`, the newest last."""
    found = [path.parent for path in folder.glob("*/config.yaml")]
    return sorted(found, key=lambda path: (path / "config.yaml").stat().st_mtime)
