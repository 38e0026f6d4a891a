"""Checkpoints: committed whole with a manifest of hashes, found again only if every byte is as it was written.

    checkpoints/step-000100/   state.safetensors  state.json  manifest.json
    checkpoints/best-000080/   the same with the weights alone

A folder is written under another name, synced, renamed and only then are older ones deleted.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from headstart.errors import DamagedError, Problem, RunError
from headstart.faults import reach
from headstart.files import new_folder, read_json, remove_folder, sha256, write_json

TENSORS, VALUES, MANIFEST = "state.safetensors", "state.json", "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read back: its step, its tensors by name, its plain values."""

    step: int
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one run, in one folder. `keep` is how many are left beside the best one; `run` names the run."""

    def __init__(self, folder: Path, keep: int = 2, run: str = "") -> None:
        self._folder = folder
        self._keep = keep
        self._run = run

    def save(self, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any], best: int | None) -> Path:
        """Commit a checkpoint, then delete all but the newest `keep` and the best. Raises OSError; then none is deleted."""
        path = self._write("step", step, tensors, values)
        reach("checkpoint.committed")
        superseded = [self._path("step", old) for old in self._steps("step")[: -self._keep]]
        superseded += [self._path("best", old) for old in self._steps("best") if old != best]
        for old_path in superseded:
            # What can't be deleted now is tried again after the next one; the new one is safe all the same.
            with contextlib.suppress(OSError):
                reach("checkpoint.pruning")
                remove_folder(old_path)
        return path

    def save_best(self, step: int, weights: Mapping[str, Tensor]) -> Path:
        """Commit the best weights so far; the ones before them stay until the next checkpoint is committed."""
        return self._write("best", step, weights, {})

    def load_newest(self) -> tuple[Checkpoint, list[Problem]]:
        """Return the newest checkpoint that is whole, and what is wrong with newer ones, which are set aside.

        Raises RunError where none is whole.
        """
        problems: list[Problem] = []
        for step in reversed(self._steps("step")):
            found = self._read("step", step)
            if isinstance(found, Checkpoint):
                return found, problems
            problems.append(found)
            self._set_aside(self._path("step", step))
        cure = "headstart resume takes every step anew, since all of them are set aside; or begin a new run"
        raise RunError([*problems, Problem("checkpoint.none", "no checkpoint is whole", str(self._folder), cure)])

    @property
    def newest(self) -> int | None:
        """The step of the newest checkpoint, whole or not; None where there is none."""
        return max(self._steps("step"), default=None)

    def load_best(self, step: int) -> Mapping[str, Tensor]:
        """Return the weights that were kept as the best at `step`. Raises RunError where they are damaged."""
        found = self._read("best", step)
        if isinstance(found, Problem):
            raise RunError(found)
        return found.tensors

    def _write(self, kind: str, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Path:
        path = self._path(kind, step)
        with new_folder(path) as folder:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
            reach("checkpoint.tensors")
            (folder / VALUES).write_text(json.dumps(values), encoding="utf-8")
            reach("checkpoint.values")
            files = {
                name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
                for name in (TENSORS, VALUES)
            }
            manifest = {"format": FORMAT, "kind": kind, "step": step, "run": self._run, "files": files}
            write_json(folder / MANIFEST, manifest)
        return path

    def _read(self, kind: str, step: int) -> Checkpoint | Problem:
        path = self._path(kind, step)
        fault = self._fault(path, kind, step)
        if fault:
            return Problem("checkpoint.damaged", fault, str(path), "an older one is used where there is one")
        return Checkpoint(step, load_file(path / TENSORS), read_json(path / VALUES))

    def _fault(self, path: Path, kind: str, step: int) -> str:
        """Return what is wrong with a checkpoint; empty where every byte is as it was written."""
        try:
            manifest = read_json(path / MANIFEST)
            faults = [self._other(manifest, kind, step)]
            faults += [_file_fault(path / name, written) for name, written in manifest["files"].items()]
        except DamagedError as error:
            return error.problems[0].what
        except (OSError, KeyError, TypeError, AttributeError) as error:
            return f"it can't be read: {error}"
        return next((fault for fault in faults if fault), "")

    def _other(self, manifest: Mapping[str, Any], kind: str, step: int) -> str:
        if (manifest["kind"], manifest["step"]) != (kind, step):
            return f"its manifest is that of {manifest['kind']} {manifest['step']}"
        if manifest.get("run", self._run) != self._run:  # those of the first versions name none
            return "it belongs to another run"
        if manifest["format"] > FORMAT:
            return f"it was written by a newer headstart (format {manifest['format']})"
        return "" if set(manifest["files"]) == {TENSORS, VALUES} else "its manifest names other files"

    def _set_aside(self, path: Path) -> None:
        """Give a damaged checkpoint another name, so that it is kept and never used."""
        aside, number = path.with_name(f"damaged-{path.name}"), 1
        while aside.exists():
            number += 1
            aside = path.with_name(f"damaged-{path.name}-{number}")
        path.rename(aside)

    def _path(self, kind: str, step: int) -> Path:
        return self._folder / f"{kind}-{step:06d}"

    def _steps(self, kind: str) -> list[int]:
        names = (path.name.removeprefix(f"{kind}-") for path in self._folder.glob(f"{kind}-*"))
        return sorted(int(name) for name in names if name.isdigit())


def _file_fault(file: Path, written: Mapping[str, Any]) -> str:
    if file.is_symlink() or not file.is_file():
        return f"{file.name} is no regular file"
    if file.stat().st_size != written["bytes"]:
        return f"{file.name} has {file.stat().st_size} bytes and not {written['bytes']}"
    return "" if sha256(file) == written["sha256"] else f"{file.name} is not what was written (its hash differs)"
