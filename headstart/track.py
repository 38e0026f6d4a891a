"""What a run writes down, sent to a tracker: TensorBoard, Weights & Biases, MLflow, trackio.

A tracker lives in a process of its own, which reads what the run's folder holds and follows it until the run has ended. So
nothing that a tracker does (fail, hang, fill memory) can reach the run; and a run can be sent at any later time, too.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from headstart.config import flat
from headstart.display import Display
from headstart.errors import Problem, UsageError
from headstart.files import read_json, write_json
from headstart.run import RunFolder

POLL_S = 2.0
LAST_WORD_S = 30.0  # how long the end of a run waits for a tracker to have taken it all in
PROJECT = "headstart"
FOLDER = "tracking"


class Sink(Protocol):
    """Where a tracker's values go."""

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Open, with the run's settings."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take the values of a step."""

    def end(self, summary: Mapping[str, float | str]) -> None:
        """Close, with what the run came to; empty where it has no result yet."""


class TensorBoard:
    """Event files in the run's own folder."""

    def __init__(self, path: Path, key: str) -> None:  # noqa: ARG002 (event files have no key)
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(path / "tensorboard"))

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Show the settings as a text."""
        self._writer.add_text("settings", "\n".join(f"    {key}: {value}" for key, value in settings.items()))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add a scalar for each value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def end(self, summary: Mapping[str, float | str]) -> None:
        """Add what the run came to, and close."""
        for name, value in summary.items():
            if isinstance(value, str):
                self._writer.add_text(name, value)
            else:
                self._writer.add_scalar(name, value, 0)
        self._writer.close()


class WandB:
    """A run of Weights & Biases; its environment variables (WANDB_PROJECT, WANDB_MODE, ...) are obeyed."""

    module = "wandb"

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        self._run: Any = None

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Begin the tracker's run, or go on with it."""
        if os.environ.get("HEADSTART_OFFLINE") == "1":
            os.environ["WANDB_MODE"] = "offline"
        self._run = importlib.import_module(self.module).init(**self._named(), config=dict(settings))

    def _named(self) -> dict[str, Any]:
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        return {
            "project": project,
            "name": self._path.name,
            "id": self._key,
            "dir": str(self._path),
            "resume": "allow",
        }

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log the values of a step."""
        self._run.log(dict(values), step=step)

    def end(self, summary: Mapping[str, float | str]) -> None:
        """Set the summary and finish."""
        self._run.summary.update(dict(summary))
        self._run.finish()


class Trackio(WandB):
    """A run of trackio, whose calls are those of Weights & Biases; it lies on this machine. It has no summary."""

    module = "trackio"

    def _named(self) -> dict[str, Any]:
        return {"project": PROJECT, "name": f"{self._path.name}-{self._key[:6]}", "resume": "allow"}

    def end(self, summary: Mapping[str, float | str]) -> None:
        """Log what the run came to, and finish."""
        if summary:
            self._run.log(dict(summary))
        self._run.finish()


class MLflow:
    """A run of MLflow, where MLFLOW_TRACKING_URI says."""

    def __init__(self, path: Path, key: str) -> None:
        from mlflow.tracking import MlflowClient

        self._client, self._path, self._key, self._id = MlflowClient(), path, key, ""

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Begin the tracker's run, or go on with it: it is found by its tag."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        found = self._client.search_runs([experiment], f"tags.headstart = '{self._key}'")
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {"headstart": self._key}
        self._id = self._client.create_run(experiment, run_name=self._path.name, tags=tags).info.run_id
        for key, value in settings.items():
            self._client.log_param(self._id, key, str(value)[:500])

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log the values of a step."""
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=step)

    def end(self, summary: Mapping[str, float | str]) -> None:
        """Log what the run came to, and finish."""
        for name, value in summary.items():
            if isinstance(value, str):
                self._client.set_tag(self._id, name, value)
            else:
                self._client.log_metric(self._id, name, value)
        self._client.set_terminated(self._id, status="FINISHED" if summary else "KILLED")


SINKS: dict[str, Callable[[Path, str], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def check_trackers(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names. Raises UsageError for one that isn't known, or whose library isn't installed."""
    for name in names:
        if name not in SINKS:
            what = f"there is no tracker {name!r}"
            raise UsageError(Problem("usage.flag", what, "--track", f"one of {', '.join(SINKS)}"))
        if importlib.util.find_spec(name) is None:
            what, cure = f"{name} isn't installed", f'pip install "headstart[{name}]"'
            raise UsageError(Problem("track.package", what, "--track", cure))
    return tuple(dict.fromkeys(names))


# --- what is sent ---


def named(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of the metrics by the names that trackers group them by."""
    found = {key: float(value) for key, value in record.items() if _is_number(value) and key != "step"}
    part = "train" if "loss" in record else "watch"
    return {f"{part}/{key.removeprefix('watch_')}": value for key, value in found.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def summary(result: Mapping[str, Any]) -> dict[str, float | str]:
    """Return the verdict of a result, and each metric before and after."""
    found: dict[str, float | str] = {"verdict": result["verdict"]}
    for side in ("before", "after", "difference"):
        for name, value in (result.get(side) or {}).items():
            if isinstance(value, Mapping) and _is_number(value.get("value")):
                found[f"{side}/{name}"] = float(value["value"])
    return found


def send(folder: RunFolder, name: str, more: Callable[[], bool] = lambda: False) -> int:
    """Send what a run wrote to a tracker, and what it writes while `more` says that it may; return how many lines.

    Each line is sent once, also over several calls: how far it came lies in the run's folder. A run that was resumed takes
    some steps anew; these were sent already, and are the same.
    """
    kept = Kept.read(folder.path, name)
    sink = SINKS[name](folder.path, kept.key)
    sink.begin(flat(folder.read_config().settings.model_dump(mode="json")))
    count, going = 0, True
    while going:
        going = more()  # asked first: what is written before the end is read after it
        for place, record in _placed(folder.read_metrics()):
            if place > kept.sent and (values := named(record)):
                sink.log(values, record["step"])
                kept, count = replace(kept, sent=place), count + 1
        kept.write(folder.path)
    sink.end(summary(read_json(folder.result_file)) if folder.result_file.exists() else {})
    return count


def send_all(path: Path, names: Sequence[str], display: Display) -> dict[str, int]:
    """Send a run to trackers as far as it is; return the lines that each was sent. Raises UsageError, RunError."""
    folder = RunFolder.open(path)
    found = {}
    for name in check_trackers(names):
        found[name] = send(folder, name)
        display.fact(name, f"{found[name]:,} lines of the metrics were sent")
    return found


@dataclass(frozen=True)
class Kept:
    """What is known of a run at a tracker: its `key` there, the last line that was `sent`, whether it is `followed`."""

    name: str
    key: str
    sent: tuple[int, int] = (-1, 0)
    followed: bool = False

    @staticmethod
    def read(path: Path, name: str) -> Kept:
        """Return what is known of a run's folder; a new key where it was never sent."""
        file = path / FOLDER / f"{name}.json"
        if not file.exists():
            return Kept(name, uuid.uuid4().hex[:16])
        found = read_json(file)
        return Kept(name, found["key"], tuple(found["sent"]), found["followed"])

    def write(self, path: Path) -> None:
        """Write it down."""
        (path / FOLDER).mkdir(exist_ok=True)
        write_json(path / FOLDER / f"{self.name}.json", asdict(self))


def _placed(records: Sequence[Mapping[str, Any]]) -> Iterator[tuple[tuple[int, int], Mapping[str, Any]]]:
    """Yield the lines of the metrics with their step and which line of that step each is."""
    last = (-1, 0)
    for record in records:
        if "out_of_memory" in record:  # no line of a step: that is taken anew
            continue
        last = (record["step"], last[1] + 1 if record["step"] == last[0] else 0)
        yield last, record


# --- beside a run ---


@contextlib.contextmanager
def tracked(folder: RunFolder, names: Sequence[str], display: Display) -> Iterator[None]:
    """While active, trackers follow the run: those named, and those that followed it before it was stopped."""
    path = folder.path
    before = [file.stem for file in sorted((path / FOLDER).glob("*.json")) if Kept.read(path, file.stem).followed]
    children = {name: _begin(folder, name, display) for name in dict.fromkeys((*names, *before))}
    try:
        yield
    finally:
        ends = time.monotonic() + LAST_WORD_S
        for name, child in children.items():
            if child is not None:
                _wait(name, child, ends, path, display)


def _begin(folder: RunFolder, name: str, display: Display) -> subprocess.Popen[bytes] | None:
    """Start the process that follows a run. Whatever hinders it is told, and the run goes on."""
    command = [sys.executable, "-m", "headstart.track", str(folder.path.resolve()), name]
    try:
        replace(Kept.read(folder.path, name), followed=True).write(folder.path)
        with _log(folder.path, name).open("ab") as log:
            # A session of its own, so that Ctrl-C is for the run alone. Its input ends when the run does, however it does.
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True)
    except OSError as error:
        display.warn(f"{name} can't be started ({error.strerror or error}); the run goes on without it")
        return None


def _wait(name: str, child: subprocess.Popen[bytes], ends: float, path: Path, display: Display) -> None:
    later = f"what is missing: headstart track {path} --to {name} ({_log(path, name)} says more)"
    with contextlib.suppress(OSError):
        child.stdin.close()  # type: ignore[union-attr]
    try:
        if child.wait(max(0.0, ends - time.monotonic())):
            display.warn(f"{name} failed and the run went on without it; {later}")
    except subprocess.TimeoutExpired:
        child.kill()
        display.warn(f"{name} had not taken in all of the run after {LAST_WORD_S:.0f} s and was left; {later}")


def _log(path: Path, name: str) -> Path:
    return path / FOLDER / f"{name}.log"


def main() -> None:
    """Follow a run with a tracker until this process's input ends."""
    path, name = sys.argv[1:]
    ended = threading.Event()

    def listen() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=listen, daemon=True).start()
    send(RunFolder.open(Path(path)), name, lambda: not ended.wait(POLL_S))


if __name__ == "__main__":
    main()
