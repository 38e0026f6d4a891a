"""What a run of the bench leaves behind: one JSON file for each work or study, without any path of the machine."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.judge import Round
from bench.runner import Bench, Outcome


def describe_run(bench: Bench, size: str) -> dict[str, Any]:
    """Return when, where, how large and on what."""
    from headstart import machine

    found = machine.describe()
    return {
        "date": datetime.date.today().isoformat(),
        "machine": {key: found[key] for key in ("platform", "processor", "cores", "memory_bytes")},
        "size": size,
        "repeats": bench.size.repeats,
        "threads": bench.threads,
        "rows": dict(bench.sources),
        "python": found["versions"]["python"],
    }


def keep_outcomes(
    folder: Path, name: str, outcomes: Sequence[Outcome], rounds: Mapping[str, Round], about: Mapping[str, Any]
) -> None:
    """Write the lines of a work and the rounds of the contenders that they are about."""
    names = {contender for outcome in outcomes for contender in (outcome.line.ours, outcome.line.theirs)}
    kept = []
    for key, found in rounds.items():
        contender, number, changes = json.loads(key)
        if contender in names:
            kept.append({"contender": contender, "round": number, "changes": changes, **found.to_json()})
    _write(folder, name, {"about": about, "lines": [outcome.to_json() for outcome in outcomes], "rounds": kept})


def keep_study(folder: Path, name: str, found: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write the points of a study."""
    _write(folder, name, {"about": about, "study": found})


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what is kept, by the name of the work or study."""
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}


def _write(folder: Path, name: str, values: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
