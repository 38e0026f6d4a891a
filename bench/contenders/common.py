"""What all contenders share: the spec they are given, the rows in it, and the line that they print."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

MARK = "BENCH "
Row = dict[str, Any]


def read_spec() -> dict[str, Any]:
    """Return the spec whose file is named on the command line, with torch's threads set as it says."""
    import torch

    spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    return spec


def read_rows(path: str) -> list[Row]:
    """Return the rows of a file of JSON lines."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def now() -> float:
    """Return the time on the one clock of a process, in seconds."""
    return time.perf_counter()


def peak_bytes() -> int:
    """Return the most resident memory that this process had so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # What getrusage says begins, on Linux, at what the process had that started this one.
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def report(
    *,
    losses: Sequence[float] = (),
    tokens: Sequence[int] = (),
    begin_s: float = 0.0,
    ends_s: Sequence[float] = (),
    peak: int = 0,
    packages: Sequence[str] = (),
    **extra: Any,
) -> None:
    """Print the one line that the runner reads."""
    versions = {name: metadata.version(name) for name in ("torch", *packages)}
    line = {
        "losses": list(losses),
        "tokens": list(tokens),
        "begin_s": begin_s,
        "ends_s": list(ends_s),
        "peak_bytes": peak,
        "extra": {"versions": versions, **extra},
    }
    print(MARK + json.dumps(line), flush=True)
