"""What the untouched model gives rows: answers that preferences are made of, and the guard. Computed once, kept by what it follows from."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from headstart.config import Settings
from headstart.data.segments import Example
from headstart.evaluate.guard import Guarded
from headstart.files import read_json, sha256, write_json
from headstart.machine import home
from headstart.models.native import versions
from headstart.models.source import Source, describe_model

KEPT = 32  # of other runs, in a folder; those that were written the longest time ago make room

References = list[list[float]]  # of each row the log-probability of each of its answers


def computes_with(source: Source, base: Source | None, settings: Settings) -> dict[str, Any]:
    """Return what a run computes with, as it is written down: versions, the model and, of an adapter, its base."""
    return {
        "versions": versions(fast=settings.engine.fast == "on"),
        "model": describe_model(source),
        "base": describe_model(base) if base else None,
    }


def decided_by(written: Mapping[str, Any], settings: Settings, device: str) -> list[Any]:
    """Return what decides the bits of what the untouched model gives rows, but for these: what it computes with, and how.

    How packs are cut isn't told, since a run may cut them down.
    """
    of = settings.model_dump(mode="json", include={"method", "weights", "lora", "engine", "seed"})
    of["engine"].pop("tokens_per_pack")
    models = [model for model in (written["model"], written.get("base")) if model]
    return [models, of, written["versions"], device]


def reference_key(examples: Sequence[Example], decided: Sequence[Any]) -> str:
    """Return a name for references that follows from the rows' tokens and from all else that decides their bits."""
    digest = hashlib.sha256(json.dumps(decided, sort_keys=True).encode())
    for example in examples:
        for segment in example.segments:
            digest.update(len(segment).to_bytes(8, "little"))
            digest.update(segment.ids.tobytes() + segment.weights.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Kept:
    """Plain values in a folder of the cache that follow from a key alone; where that can't be written, it is of no use."""

    folder: str
    key: str

    @property
    def path(self) -> Path:
        """Where they are kept."""
        return home() / self.folder / f"{self.key}.json"

    def read(self) -> list[Any] | None:
        """Return the values; None where they aren't there, or not whole."""
        return _read(self.path, self.key, "found")

    def write(self, found: Any) -> None:
        """Keep values, and no more than `KEPT` of a folder."""
        try:
            write_json(self.path, {"key": self.key, "found": found})
            others = sorted(self.path.parent.glob("*.json"), key=lambda other: other.stat().st_mtime)
            for other in others[:-KEPT]:
                other.unlink(missing_ok=True)
        except OSError:
            return  # a run goes on from its own files


def keep_guard(guard: Sequence[Guarded], decided: Sequence[Any], tokens_per_pack: int) -> Kept:
    """Return where it is kept what the untouched model gives the rows of the guard, which most runs on it ask for alike.

    The name follows from the code too, which makes more of it than log-probabilities.
    """
    said = [
        (part.name, part.task, str(record.where), record.group, *record.texts)
        for part in guard
        for record in part.rows.kept
    ]
    examples = [example for part in guard for example in part.rows.examples]
    return Kept("guard", f"{reference_key(examples, [decided, said, _code_hash()])}-{tokens_per_pack}")


@functools.cache
def _code_hash() -> str:
    """Return a hash of the package's code: a version stands for many states of it while it is worked on."""
    folder = Path(__file__).parents[1]
    files = sorted([*folder.rglob("*.py"), *folder.rglob("*.c")])
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def find_references(key: str, own: Path, compute: Callable[[], References], tokens_per_pack: int) -> References:
    """Return references by their key: from a run's own file, from the cache, or computed; both hold them then.

    A run goes on from its own file. Among those of other runs only such count as were computed in packs of the same size,
    since the last bits follow from these.
    """
    cached = Kept("references", f"{key}-{tokens_per_pack}")
    found = _read(own, key, "logprobs")
    if found is None:
        found = cached.read() or compute()
        write_json(own, {"key": key, "logprobs": found})
        cached.write(found)
    return found


def _read(path: Path, key: str, name: str) -> list[Any] | None:
    """Return the values of this name that a file holds, if it is of this key and whole."""
    try:
        kept = read_json(path)
        return list(kept[name]) if kept["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def with_references(examples: Sequence[Example], found: References) -> list[Example]:
    """Return rows that know what the reference gives each of their answers."""
    return [
        replace(example, label=np.column_stack([np.asarray(example.label)[:, 0], logprobs]))
        for example, logprobs in zip(examples, found, strict=True)
    ]
