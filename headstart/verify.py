"""Show on a user's own machine and data that a run which is killed and goes on is the run that was never killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from headstart import faults
from headstart.config import read_resolved
from headstart.display import Display
from headstart.errors import HeadstartError, Problem, ResourceError
from headstart.files import read_json, write_atomic
from headstart.run import RunFolder

STEPS = 6
# Before the first checkpoint, in the middle of a step, while older checkpoints are deleted, at the very end.
KILLS = ("step.updated:1", "step.backward:2", "checkpoint.pruning:1", "file.written@result.json")
# What must be the same in each line of the metrics, and how the names of what else must be begin.
TOLD = ("step", "loss", "lr", "grad_norm", "tokens")
WATCHED = ("watch_", "sample_")


@dataclass(frozen=True)
class Verified:
    """Whether the two runs are the same, in what they differ, and where the second was killed."""

    run: str
    steps: int
    kills: Sequence[str]
    differences: Sequence[str]

    @property
    def same(self) -> bool:
        """Tell whether nothing differs."""
        return not self.differences

    def to_json(self) -> dict[str, Any]:
        """The outcome as plain values."""
        return {**asdict(self), "same": self.same}


def verify_resume(run: Path, display: Display, steps: int = STEPS) -> Verified:
    """Take a run's first steps twice, with its own data and settings, once untouched and once killed again and again.

    Everything is written to a temporary folder; the run itself is only read. Raises RunError where there is no such run,
    and ResourceError where a process ends otherwise than it should.
    """
    config = RunFolder.open(run).read_config()
    watched = config.settings.eval.every
    few = {
        "steps": steps,
        "epochs": None,
        "save.every": 2,
        "save.keep": 1,
        "eval.every": 2 if watched else 0,
        "eval.rows": min(8, config.settings.eval.rows or 8),
        "eval.generate": 0,
        "eval.patience": 0,
    }
    with tempfile.TemporaryDirectory(prefix="headstart-verify-") as name:
        whole, killed = Path(name) / "untouched", Path(name) / "killed"
        for folder in (whole, killed):
            write_atomic(folder.with_suffix(".yaml"), config.pin({**few, "out": str(folder)}).render())
        display.line(f"  {steps} steps, untouched")
        _carry_on(whole, "", 0)
        for kill in KILLS:
            display.line(f"  the same steps, killed at {kill}")
            _carry_on(killed, kill, -signal.SIGKILL)
        display.line("  and carried on to the end")
        _carry_on(killed, "", 0)
        return Verified(str(run), steps, KILLS, differences(whole, killed))


def _carry_on(run: Path, fail: str, code: int) -> None:
    """Begin a run from the settings beside its folder, or go on with it, in a process of its own that ends with `code`."""
    begun = RunFolder(run).config_file.exists()
    command = ["resume", str(run)] if begun else ["begin", str(run.with_suffix(".yaml"))]
    environment = {**os.environ, faults.VARIABLE: fail}
    done = subprocess.run(
        [sys.executable, "-m", "headstart.verify", *command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != code:
        what = f"a process ended with {done.returncode} and not {code}: {done.stderr.strip()[-500:]}"
        raise ResourceError(Problem("run.incomplete", what, " ".join(command), "see what it says"))


def differences(one: Path, two: Path) -> list[str]:
    """Return in what two finished runs differ: model, weights and moments of their last checkpoints, metrics, scores.

    Tensors are compared bit for bit, and so are numbers. What was timed is left out.
    """
    found = []
    for kind in ("step", "best"):
        last = [max((run / "checkpoints").glob(f"{kind}-[0-9]*"), default=None) for run in (one, two)]
        if last[0] is None or last[1] is None:
            found += [f"only one run has a checkpoint `{kind}`"] * (last[0] is not last[1])
        elif last[0].name != last[1].name:
            found.append(f"the last checkpoints are {last[0].name} and {last[1].name}")
        else:
            found += _other_tensors(last[0], last[1])
    found += _other_tensors(one / "model", two / "model")
    told = [
        [
            {key: line[key] for key in line if key in TOLD or key.startswith(WATCHED)}
            for line in RunFolder(run).read_metrics()
        ]
        for run in (one, two)
    ]
    found += ["the metrics differ"] * (told[0] != told[1])
    results = [read_json(RunFolder(run).result_file) for run in (one, two)]
    for key in ("before", "after", "differences", "verdict", "tokens"):
        found += [f"`{key}` of the results differs"] * (results[0][key] != results[1][key])
    return found


def _other_tensors(one: Path, two: Path) -> list[str]:
    """Return which tensors of two folders differ by a bit."""
    names = {file.name for folder in (one, two) for file in folder.glob("*.safetensors")}
    found = [] if names else [f"{one.name} holds no tensors"]
    for name in sorted(names):
        if not ((one / name).exists() and (two / name).exists()):
            found.append(f"{one.name}/{name} is in one run only")
            continue
        first, second = load_file(one / name), load_file(two / name)
        keys = sorted(first.keys() | second.keys())
        other = [
            key for key in keys if key not in first or key not in second or not torch.equal(first[key], second[key])
        ]
        found += [f"{one.name}/{name}: {len(other)} of {len(keys)} tensors differ, first {other[0]}"] if other else []
    return found


def say_verified(display: Display, found: Verified) -> None:
    """Say how it ended."""
    if found.same:
        what = f"killed {len(found.kills)} times and carried on, {found.steps} steps are the same bit for bit"
        display.line(f"  {what}: weights, moments, metrics, scores", "bold green")
        return
    for line in found.differences:
        display.line(f"  {line}", "red")


def _main(verb: str, path: str) -> None:
    """Begin a run from its resolved settings, or go on with it."""
    from headstart.tune import resume, start

    display = Display(sys.stderr, live=False)
    if verb == "begin":
        start(read_resolved(Path(path)).fixed(), display)
    else:
        resume(Path(path), display)


if __name__ == "__main__":
    try:
        _main(*sys.argv[1:])
    except HeadstartError as error:
        sys.exit(str(error))
