"""Look at this machine: what is there, what is wrong, and how to mend it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headstart import machine
from headstart.display import Display, in_bytes

PYTHON_MIN = (3, 10)
MEMORY_MIN_BYTES = 4 * machine.GIB
DISK_MIN_BYTES = 2 * machine.GIB


def examine() -> dict[str, Any]:
    """Return what the machine is and each problem with its cure; `ok` where nothing keeps headstart from working."""
    versions = machine.versions()
    problems = [*_missing(versions), *_space(), *_compiler(versions)]
    if sys.version_info < PYTHON_MIN:
        problems.append(("error", f"Python {versions['python']} is too old", "install Python 3.10 or newer"))
    if importlib.util.find_spec("pip") is None:
        problems.append(("warning", "pip is missing, which fetches the built-in models", "python -m ensurepip"))
    if machine.offline():
        problems.append(("note", "HEADSTART_OFFLINE=1: nothing is fetched", "unset it to fetch models and data"))
    return {
        "ok": not any(level == "error" for level, _, _ in problems),
        "versions": versions,
        "device": machine.pick_device() if versions["torch"] != "not installed" else "unknown",
        "cores": machine.cpu_count(),
        "memory_bytes": machine.memory_total_bytes(),
        "memory_free_bytes": machine.memory_free_bytes(),
        "home": str(machine.home()),
        "disk_free_bytes": machine.disk_free_bytes(machine.home()),
        "tokens_bytes": sum(path.stat().st_size for path in _tokens().rglob("*") if path.is_file()),
        "problems": [{"level": level, "what": what, "cure": cure} for level, what, cure in problems],
    }


def say_examined(display: Display, found: Mapping[str, Any]) -> None:
    """Say what was found."""
    display.title("this machine")
    display.fact("device", f"{found['device']}, {found['cores']} cores")
    display.fact("memory", f"{in_bytes(found['memory_free_bytes'])} free of {in_bytes(found['memory_bytes'])}")
    display.fact("disk", f"{in_bytes(found['disk_free_bytes'])} free at {found['home']}")
    if found["tokens_bytes"]:
        display.fact("tokens", f"{in_bytes(found['tokens_bytes'])} at {_tokens()}, which may be deleted")
    for name, version in found["versions"].items():
        display.fact(name, version)
    display.line()
    for problem in found["problems"]:
        display.line(f"  {problem['level']}: {problem['what']}", "red" if problem["level"] == "error" else "yellow")
        display.line(f"      to mend: {problem['cure']}")
    if found["ok"]:
        display.line("  headstart can work here", "green")


def _tokens() -> Path:
    """Return where the tokens of large data are kept from run to run."""
    return machine.home() / "tokens"


def _missing(versions: Mapping[str, str]) -> list[tuple[str, str, str]]:
    cure = "install headstart anew: make setup, or pip install -c constraints.txt headstart"
    return [("error", f"{name} is missing", cure) for name, version in versions.items() if version == "not installed"]


def _compiler(versions: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Return what keeps a CPU from its kernels (`models/native.py`), which are worth a fifth of a step."""
    if "not installed" in versions.values() or sys.platform != "linux":
        return []
    from headstart.models.native import find, find_compiler, folder

    if find() is not None:
        return []
    compiler = find_compiler()
    what = "there is no C compiler" if compiler is None else f"{compiler} couldn't make kernels in {folder()}"
    return [("note", f"{what}: training on a CPU takes longer", "install gcc, or name a compiler: CC=/path/to/gcc")]


def _space() -> list[tuple[str, str, str]]:
    problems = []
    free = machine.memory_free_bytes()
    if free < MEMORY_MIN_BYTES:
        problems.append(
            ("warning", f"{in_bytes(free)} of memory free; the built-in model wants 4 GiB", "close other programs")
        )
    home = machine.home()
    if machine.disk_free_bytes(home) < DISK_MIN_BYTES:
        problems.append(
            ("warning", f"little disk is free at {home}", "free some, or set HEADSTART_HOME to another disk")
        )
    if not _writable(home):
        problems.append(("error", f"{home} can't be written", "set HEADSTART_HOME to a folder that can"))
    return problems


def _writable(path: Path) -> bool:
    import os

    while not path.exists():
        path = path.parent
    return os.access(path, os.W_OK)
