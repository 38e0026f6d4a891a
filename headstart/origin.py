"""What a run began with (files, model, settings, versions), and whether it still stands there when the run goes on."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headstart.config import Config, flat
from headstart.data.hub import pin_dataset
from headstart.data.mixing import read_mix
from headstart.data.read import HUB_PREFIX, SourceFile
from headstart.dataset import Data
from headstart.errors import DataError, Problem, RunError, UsageError
from headstart.evaluate.reference import computes_with
from headstart.files import sha256
from headstart.lineage import file_fault
from headstart.models import native
from headstart.models.source import describe_model

ALLOWED = ("data", "model", "settings", "versions")
# What may differ without a word: where the run lies, and how packs are cut, which a run changes itself where memory runs out.
FREE_SETTINGS = ("out", "engine.tokens_per_pack")


@dataclass(frozen=True)
class Change:
    """Something that is not what it was when the run began: of which kind of `ALLOWED`, and what is wrong with it."""

    kind: str
    problem: Problem

    @property
    def told(self) -> str:
        """The change in a line."""
        return f"{self.problem.where}: {self.problem.what}"


def describe(data: Data, config: Config, today: datetime.date) -> dict[str, Any]:
    """Return what a run begins with, as plain values: files and model by their hashes, settings, versions, rows."""
    prepared = data.prepared
    parts = {"train": prepared.train, "watch": prepared.watch, "proof": prepared.proof}
    return {
        "date": today.isoformat(),
        **computes_with(data.source, data.base, config.settings),
        "settings": config.settings.model_dump(mode="json"),
        "files": [_describe_file(file) for formed in prepared.formed for file in formed.files],
        "formats": [asdict(formed.detection) for formed in prepared.formed],
        "rows_read": sum(formed.rows for formed in prepared.formed),
        "rows": {name: len(part.examples) for name, part in parts.items()},
        "tokens": {name: int(part.lengths.sum()) for name, part in parts.items()},
        "targets": {name: part.target_count for name, part in parts.items()},
        "fit": asdict(prepared.fit) if prepared.fit else None,
        "duplicates": prepared.parts.duplicates,
        "dropped": {
            "too_long": [{"where": str(w), "tokens": n} for part in parts.values() for w, n in part.dropped],
            "in_both": prepared.parts.leaked,
            "held_before": prepared.parts.held_before,
            "trained_before": prepared.parts.trained_before,
            "nearly_in_both": [
                {"where": str(leak.where), "like": str(leak.like), "share": leak.share} for leak in prepared.parts.near
            ],
            "bad": [problem.to_json() for problem in prepared.problems],
        },
        "alike": prepared.parts.alike,
        "cut": sum(part.cut for part in parts.values()),
        "notes": [note for formed in prepared.formed for note in formed.notes],
        "lineage": data.lineage,
    }


def _describe_file(file: SourceFile) -> dict[str, Any]:
    return {
        "name": file.name,
        "path": str(file.path.resolve()),
        "bytes": file.path.stat().st_size,
        "sha256": file.sha256 or sha256(file.path),
        "revision": file.revision,
    }


def identity(record: Mapping[str, Any]) -> str:
    """Return what tells a run's checkpoints from another's: a hash of its rows, its model and its settings."""
    settings = {key: value for key, value in flat(record.get("settings", {})).items() if key not in FREE_SETTINGS}
    told = [[file["sha256"] for file in record["files"]], record["model"]["sha256"], sorted(settings.items())]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def pins(data: Data) -> dict[str, Any]:
    """Return what names the very same model and files from anywhere and at any time."""
    settings, source = data.config.settings, data.source
    files = [file for formed in data.prepared.formed for file in formed.files]

    def pin(name: str) -> str:
        return pin_dataset(name, files) if name.startswith(HUB_PREFIX) else str(Path(name).absolute())

    found: dict[str, Any] = {
        f"data.{side}": [pin(n) for n in getattr(settings.data, side)] for side in ("train", "eval")
    }
    if settings.eval.guard not in (("auto",), ("off",)):
        found["eval.guard"] = [pin(name) for name in settings.eval.guard]
    found["eval.graders"] = [pin(name) for name in settings.eval.graders]
    found["data.mix"] = [f"{pin(part.name)}={part.weight!r}" for part in read_mix(settings.data.mix)]
    if source.kind == "hub":
        found["model"] = f"{source.name.partition('@')[0]}@{source.revision}"
    elif source.kind != "builtin":
        found["model"] = str(Path(settings.model).expanduser().absolute())
    return found


def check_allowed(names: Collection[str]) -> None:
    """Raise UsageError where a name is none of those that can be allowed."""
    for name in names:
        if name not in ALLOWED:
            what = f"{name!r} can't be allowed"
            raise UsageError(Problem("usage.flag", what, "--allow", f"one of {', '.join(ALLOWED)}"))


def find_changes(record: Mapping[str, Any], config: Config) -> list[Change]:
    """Return what changed since a run began and isn't allowed yet, as far as it can be seen before its data is read."""
    changes = [change for file in record["files"] if (change := _changed_file(file))]
    before, now = flat(record.get("settings", {})), flat(config.settings.model_dump(mode="json"))
    for key, was in before.items():
        if key not in FREE_SETTINGS and key in now and now[key] != was:
            what = f"`{key}` was {json.dumps(was)} and is {json.dumps(now[key])}"
            changes.append(_change("settings", "run.changed", what, "config.yaml"))
    versions = native.versions(fast=config.settings.engine.fast == "on")
    # Runs of before there were kernels say nothing of a compiler.
    recorded = {native.COMPILER: "not used", **record["versions"]}
    for name, was in recorded.items():
        if versions.get(name) != was:
            changes.append(_change("versions", "run.changed", f"was {was} and is {versions.get(name)}", name))
    return _not_allowed(record, changes)


def find_other_sources(record: Mapping[str, Any], data: Data) -> list[Change]:
    """Return which files are new or gone and whether the model is another, as far as that isn't allowed yet.

    That files are as they were is known by now.
    """
    known = {file["path"] for file in record["files"]}
    found = {str(file.path.resolve()) for formed in data.prepared.formed for file in formed.files}
    changes = [
        _change("data", "data.changed", "the file is new" if path in found else "the file is not read any more", path)
        for path in sorted(known ^ found)
    ]
    for was, source in ((record["model"], data.source), (record.get("base"), data.base)):
        now = describe_model(source) if source else None
        if was and (now is None or (was["sha256"], was["revision"]) != (now["sha256"], now["revision"])):
            changes.append(_change("model", "data.changed", "the model is not what it was", was["name"]))
    return _not_allowed(record, changes)


def refuse(changes: Sequence[Change], allowed: Collection[str]) -> None:
    """Raise DataError (data, model) or RunError (settings, versions) with every change that isn't allowed."""
    problems = [change.problem for change in changes if change.kind not in allowed]
    if problems:
        raise (DataError if any(p.code == "data.changed" for p in problems) else RunError)(problems)


def _not_allowed(record: Mapping[str, Any], changes: Sequence[Change]) -> list[Change]:
    known = {told for once in record.get("allowed", []) for told in once["changes"]}
    return [change for change in changes if change.told not in known]


def _changed_file(file: Mapping[str, Any]) -> Change | None:
    fault = file_fault(file, "when the run began")
    if fault is None:
        return None
    if not Path(file["path"]).exists():
        cure = f"put it back at {file['path']}"
        return Change("data", Problem("data.changed", fault[0], fault[1], cure))
    return _change("data", "data.changed", *fault)


def _change(kind: str, code: str, what: str, where: str) -> Change:
    cure = f"put back what was there, begin a new run, or go on with it as it is: --allow {kind}"
    return Change(kind, Problem(code, what, where, cure))
