"""Several runs on one question: each a trial in a folder of its own, with settings of its own and the same held-out rows."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from headstart import machine
from headstart.config import Config, Override, build_config
from headstart.data.read import find_files
from headstart.display import Display
from headstart.errors import DataError, DivergedError, Problem, ResourceError, RunError, StoppedError, UsageError
from headstart.files import read_json, sha256, write_json
from headstart.run import RunFolder, free_path
from headstart.tune import resume, start

RECORD = "study.json"


@dataclass(frozen=True)
class Point:
    """The watched rows scored: after how many steps, row tokens and seconds of training, and their loss (nats a target)."""

    step: int
    tokens: int
    train_s: float
    loss: float


@dataclass(frozen=True)
class Outcome:
    """What became of a trial: its run's folder, its curve, what it was trained on, and why it failed, if it did.

    `watched` is how many rows were watched and what they have of targets: trials compare only over the same ones.
    `result` is the run's own, where it was carried to its end: verdict, scores and their difference.
    """

    run: str
    settings: Mapping[str, Any]
    points: Sequence[Point] = ()
    tokens: int = 0
    train_s: float = 0.0
    rows: int = 0
    watched: Sequence[int] = ()
    failed: str = ""
    result: Mapping[str, Any] | None = None

    @property
    def loss(self) -> float | None:
        """The lowest loss on the watched rows, which is that of the weights that are kept; None where it failed."""
        return min((point.loss for point in self.points), default=None) if not self.failed else None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "loss": self.loss}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Outcome:
        """Read what `to_json` made."""
        points = [Point(**point) for point in values["points"]]
        return Outcome(**{**{k: v for k, v in values.items() if k != "loss"}, "points": points})


class Study:
    """The folder of a study. `study.json` says what is asked, and holds what became of each trial that ended."""

    def __init__(self, path: Path, config: Config, asked: Mapping[str, Any]) -> None:
        self.path = path
        self._config = config
        self._asked = {**asked, **_origin(config)}
        self._folder = RunFolder(path)

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """Begin the study, or go on with it where it was begun with the very same. Raises RunError where it wasn't.

        Where the user stops it, the trial is saved, and the error says how the study goes on.
        """
        if not self._file.exists():
            RunFolder.create(self.path)
        elif (changed := _changed(read_json(self._file)["asked"], self._asked)) is not None:
            what = f"what lies there began with another `{changed}`"
            raise RunError(Problem("run.exists", what, str(self.path), "choose another folder with -o"))
        with self._folder.locked():
            if not self._file.exists():
                self._write({})
            try:
                yield
            except StoppedError as error:
                cure = f"the same command again, with -o {self.path}, goes on"
                raise StoppedError(Problem("run.stopped", error.problems[0].what, str(self.path), cure)) from None

    def carry_out(
        self,
        name: str,
        settings: Mapping[str, Any],
        display: Display,
        *,
        prove: bool,
        under: Config | None = None,
    ) -> Outcome:
        """Run a trial with these settings over the study's own, or those `under` it, unless it ended before.

        Without `prove` it is only trained.

        Numbers that are no longer finite and what doesn't fit into the memory make a trial that failed, which is kept too.
        """
        kept = self._outcomes.get(name)
        if kept is not None:
            return Outcome.from_json(kept)
        path = self.path / name
        values = {**settings, "out": str(path)}
        config = vary(under or self._config, values)
        part = Display(live=False, whole=display, name=name)
        failed = ""
        try:
            if RunFolder(path).config_file.exists():
                resume(path, part, prove=prove)
            else:
                start(config, part, prove=prove)
        except (DivergedError, ResourceError) as error:
            if any(problem.code.startswith("disk.") for problem in error.problems):
                raise
            failed = error.problems[0].what
            part.warn(failed)
        finally:
            display.end_progress()
            free_memory()
        outcome = read_outcome(path, settings, failed)
        self._write({**self._outcomes, name: outcome.to_json()})
        return outcome

    def read_again(self, outcome: Outcome) -> Outcome:
        """Take over what a trial's run came to since it was trained."""
        path = Path(outcome.run)
        found = read_outcome(path, outcome.settings)
        self._write({**self._outcomes, path.relative_to(self.path).as_posix(): found.to_json()})
        return found

    @cached_property
    def _file(self) -> Path:
        return self.path / RECORD

    @property
    def _outcomes(self) -> dict[str, Any]:
        outcomes: dict[str, Any] = read_json(self._file)["outcomes"]
        return outcomes

    def _write(self, outcomes: Mapping[str, Any]) -> None:
        write_json(self._file, {"asked": self._asked, "outcomes": outcomes})


def vary(config: Config, values: Mapping[str, Any]) -> Config:
    """Return settings with some of them as a trial has them. Raises UsageError as for those of a user."""
    return build_config(None, [Override(key, value, "trial") for key, value in values.items()], config)


def read_outcome(path: Path, settings: Mapping[str, Any], failed: str = "") -> Outcome:
    """Read what became of a run from its folder."""
    folder = RunFolder(path)
    points, tokens, train_s = [], 0, 0.0
    for line in folder.read_metrics():
        if "loss" in line:
            tokens, train_s = tokens + line["row_tokens"], train_s + line["step_s"]
        elif "watch_loss" in line:
            points.append(Point(line["step"], tokens, train_s, line["watch_loss"]))
    data = read_json(folder.data_file) if folder.data_file.exists() else {"rows": {}, "targets": {}}
    watched = (data["rows"].get("watch", 0), data["targets"].get("watch", 0))
    result = read_json(folder.result_file) if folder.result_file.exists() else None
    rows = data["rows"].get("train", 0)
    return Outcome(str(path), dict(settings), points, tokens, train_s, rows, watched, failed, _told(result))


def _told(result: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what a study tells of a run's result; all of it lies in the run's own folder."""
    keys = ("task", "verdict", "before", "after", "differences", "difference", "speed", "tokens", "rows", "steps")
    return None if result is None else {key: result[key] for key in keys}


def same_rows(outcomes: Sequence[Outcome], asked: str) -> None:
    """Raise UsageError where trials were watched on other rows, or cut them into other targets: nothing compares then."""
    watched = {tuple(outcome.watched): outcome for outcome in outcomes if outcome.points}
    if len(watched) > 1:
        told = ", ".join(f"{rows:,} rows with {targets:,} targets in {o.run}" for (rows, targets), o in watched.items())
        what = f"the trials were scored on other rows, so their losses don't compare: {told}"
        raise UsageError(Problem("config.bad_value", what, asked, "vary what leaves the held-out rows as they are"))


def need_watched(rows: int) -> None:
    """Raise DataError where there are no rows to choose by."""
    if not rows:
        what = "too few held-out rows to choose by some and keep others for the proof"
        cure = "add rows, hold out more (-s data.held_out=0.2), or give rows to score on (--eval-data)"
        raise DataError(Problem("split.too_small", what, "", cure))


def need_evaluations(config: Config) -> None:
    """Raise UsageError where the user wants no row to be watched."""
    if config.settings.eval.every == 0:
        what = "`eval.every` is 0, and trials are told apart by rows that are watched"
        raise UsageError(Problem("config.no_effect", what, "eval.every", "leave it out"))


def study_path(kind: str, config: Config) -> Path:
    """Return the folder that the user named, or the first free `runs/KIND-DATA-N`."""
    if config.settings.out:
        return Path(config.settings.out)
    names = config.settings.data.train
    if not names:
        raise DataError(Problem("data.missing", "no data was named", "data.train", f"headstart {kind} FILE"))
    return free_path(f"{kind}-{Path(names[0].removeprefix('hub:')).name.partition('.')[0]}")


def free_memory() -> None:
    """Give back what a trial filled."""
    gc.collect()
    machine.trim_memory()
    if machine.pick_device() == "cuda":
        import torch

        torch.cuda.empty_cache()


def _origin(config: Config) -> dict[str, Any]:
    """Return what a study begins with, as plain values: settings, files by their hashes, versions."""
    settings = config.settings
    files = find_files((*settings.data.train, *settings.data.eval), settings.data.encoding)
    return {
        "settings": settings.model_dump(mode="json", exclude={"out"}),
        "files": [[file.name, sha256(file.path)] for file in files],
        "versions": machine.versions(),
    }


def _changed(was: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return what of a study's question differs, None where nothing does."""
    return next((key for key in (*now, *was) if was.get(key) != now.get(key)), None)
