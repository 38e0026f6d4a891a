"""What the untouched model gives the answers that preferences are made of: computed once, kept by what it follows from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from headstart.data.segments import Example
from headstart.files import read_json, write_json
from headstart.machine import home

KEPT = 32  # references of other runs; those that were of no use for the longest time make room

References = list[list[float]]  # of each row the log-probability of each of its answers


def reference_key(examples: Sequence[Example], decided_by: Sequence[Any]) -> str:
    """Return a name for references that follows from the rows' tokens and from all else that decides their bits."""
    digest = hashlib.sha256(json.dumps(decided_by, sort_keys=True).encode())
    for example in examples:
        for segment in example.segments:
            digest.update(len(segment).to_bytes(8, "little"))
            digest.update(segment.ids.tobytes() + segment.weights.tobytes())
    return digest.hexdigest()


def find_references(key: str, own: Path, compute: Callable[[], References], tokens_per_pack: int) -> References:
    """Return references by their key: from a run's own file, from the cache, or computed; both hold them then.

    A run goes on from its own file. Among those of other runs only such count as were computed in packs of the same size,
    since the last bits follow from these; where the cache can't be written, it is of no use.
    """
    cached = home() / "references" / f"{key}-{tokens_per_pack}.json"
    found = _read(own, key)
    if found is None:
        found = _read(cached, key) or compute()
        write_json(own, {"key": key, "logprobs": found})
        _keep(cached, key, found)
    return found


def _read(path: Path, key: str) -> References | None:
    """Return what a file holds, if it is of this key and whole."""
    try:
        kept = read_json(path)
        return list(kept["logprobs"]) if kept["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(path: Path, key: str, found: References) -> None:
    try:
        write_json(path, {"key": key, "logprobs": found})
        others = sorted(path.parent.glob("*.json"), key=lambda other: other.stat().st_mtime)
        for other in others[:-KEPT]:
            other.unlink(missing_ok=True)
    except OSError:
        return  # the run's own file is what it goes on from


def with_references(examples: Sequence[Example], found: References) -> list[Example]:
    """Return rows that know what the reference gives each of their answers."""
    return [
        replace(example, label=np.column_stack([np.asarray(example.label)[:, 0], logprobs]))
        for example, logprobs in zip(examples, found, strict=True)
    ]
