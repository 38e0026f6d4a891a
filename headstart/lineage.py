"""Where a model comes from: the run whose result it is, that run's rows by what they were for, and so on back to the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headstart.begin import COMPARED
from headstart.config import Config, Settings
from headstart.data.mixing import Part, read_mix
from headstart.data.preferences import parted
from headstart.data.prepare import first_records, form_sides, split_parts
from headstart.data.records import Preference
from headstart.data.replay import UNKNOWN, Known, Old
from headstart.errors import DataError, Problem, UsageError
from headstart.files import read_json, sha256
from headstart.models.load import find_labels
from headstart.models.source import Source
from headstart.run import RunFolder, find_run


def read_known(settings: Settings, source: Source, task: str) -> Known:
    """Read what the model learned before, as far as a run is mixed in (`data.mix=RUN=0.3`).

    Raises UsageError where a run of another task is named, or several, and DataError as `read_olds` does.
    """
    part = _run_of(settings)
    if part is None:
        return UNKNOWN
    of_run = RunFolder(Path(part.name)).read_config().settings.task
    if of_run != task:
        what = f"the run is for {of_run}, and these rows are for {task}"
        raise UsageError(Problem("config.bad_value", what, "data.mix", "give rows of the same task"))
    return Known(read_olds(settings), part.weight, find_labels(source) if source.kind == "run" else None)


def _run_of(settings: Settings) -> Part | None:
    """Return the run that is mixed in; None where none is. Raises UsageError where there are several."""
    parts = [part for part in read_mix(settings.data.mix) if part.is_run]
    if len(parts) > 1:
        cure = "name the run that the model comes from: those before it come with it"
        raise UsageError(Problem("config.bad_value", f"{len(parts)} runs are named", "data.mix", cure))
    return parts[0] if parts else None


def read_olds(settings: Settings) -> list[Old]:
    """Return the rows of the run that is mixed in by what they were for, and behind it those of the runs that it came from.

    Raises DataError with every file of theirs that is gone or isn't what it was; where nothing is to be learned again
    (`RUN=0`), there are then no such rows.
    """
    part = _run_of(settings)
    if part is None:
        return []
    folder = RunFolder(Path(part.name))
    record = read_json(folder.data_file)
    faults = [fault for file in record["files"] if (fault := file_fault(file, "when the run began"))]
    if faults and part.weight:
        cure = "put back what was there; or learn none of it again and leave it unmeasured: --replay 0"
        raise DataError(Problem("data.changed", what, where, cure) for what, where in faults)
    return [] if faults else _read_old(folder)


def _read_old(folder: RunFolder) -> list[Old]:
    settings = folder.read_config().settings
    before = read_olds(settings)
    sides = form_sides(settings.data, settings.kind, settings.task)
    if settings.task in COMPARED and settings.data.group_by is None:
        rows = [row for row in sides.train.formatted.examples if isinstance(row, Preference)]
        sides.train.formatted.examples = list(parted(rows))
    watch = settings.eval.every != 0
    parts = split_parts(sides.train, sides.evaluation, settings.data, Known(before), watch=watch)
    parts.train = first_records(parts.train, settings.data.rows)
    for formed in sides.formed:
        formed.notes.clear()  # they were told when the run began
    name = folder.path.name
    name = name if all(old.name != name for old in before) else str(folder.path)
    return [Old(name, parts.train, parts.watch, parts.proof, sides.formed, _gains(folder)), *before]


def _gains(folder: RunFolder) -> dict[str, float]:
    """Return the difference that a run made in each metric; nothing where it has no result."""
    if not folder.result_file.exists():
        return {}
    differences: Mapping[str, Any] = read_json(folder.result_file)["differences"]
    return {name: found["value"] for name, found in differences.items()}


def file_fault(file: Mapping[str, Any], when: str) -> tuple[str, str] | None:
    """Return what is wrong with a file that a run knows by its hash, and where; None where it is what it was."""
    path = Path(file["path"])
    if not path.exists():
        return "the file is gone", file["name"]
    return (f"the file is not what it was {when}", file["name"]) if sha256(path) != file["sha256"] else None


def describe_parent(source: Source, config: Config) -> dict[str, Any] | None:
    """Return from which run a model comes, with what pins it; None where it comes from none."""
    folder = find_run(str(source.path)) if source.kind == "run" else None
    if folder is None or not folder.result_file.exists():
        return None
    record = read_json(folder.data_file)
    replayed = _run_of(config.settings)
    return {
        "run": str(folder.path.resolve()),
        "result_sha256": sha256(folder.result_file),
        "data": [{key: file[key] for key in ("name", "sha256")} for file in record["files"]],
        "replay": replayed.weight if replayed else None,
    }


def find_parents(paths: Sequence[Path]) -> dict[Path, str]:
    """Return for each run that comes from another where that one lies: among `paths` where it is there, else where it lay.

    A run that was moved is known by the hash of its result.
    """
    results = {path: RunFolder(path).result_file for path in paths}
    known = {sha256(file): path for path, file in results.items() if file.exists()}
    found = {}
    for path in paths:
        told = read_json(RunFolder(path).data_file).get("lineage") if RunFolder(path).data_file.exists() else None
        if told:
            there = [other for other in paths if other.resolve() == Path(told["run"])]
            found[path] = str(known.get(told["result_sha256"], there[0] if there else told["run"]))
    return found
