"""Curves: how speed, memory and the time to the first step go with one knob. A literal table, run one value at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.judge import Round
from bench.runner import Bench, FailedError

Values = tuple[int, ...]


@dataclass(frozen=True)
class Study:
    """One knob: its values by size of the run, and the spec of each value. `draws` names what is drawn, from `DRAWN`."""

    text: str
    x: str
    values: Mapping[str, Values]
    spec: Callable[[int], dict[str, Any]]
    draws: tuple[str, ...]
    contender: str = "headstart-lora"


DRAWN: Mapping[str, tuple[str, Callable[[Round], float]]] = {
    "speed": ("real tokens/s", lambda found: found.rate),
    "memory": ("peak memory, GB", lambda found: found.peak_bytes / 1e9),
    "start": ("time to the first step, s", lambda found: float(found.extra["start_s"])),
}

STUDIES = {
    "packs": Study(
        "speed and memory against the tokens of a pack",
        "tokens per pack",
        {"quick": (256, 1024), "usual": (256, 512, 1024, 2048, 4096), "full": (256, 512, 1024, 2048, 4096)},
        # Steps of sixteen rows, so that there is enough to fill the largest pack; rows no longer than the smallest.
        lambda value: {"tokens_per_pack": value, "batch_size": 16, "rows": 48, "length": 200, "max_length": 256},
        ("speed", "memory"),
    ),
    "lengths": Study(
        "speed and memory against the length of rows",
        "tokens of a row",
        {"quick": (128, 512), "usual": (128, 512, 2048, 8192), "full": (128, 256, 512, 1024, 2048, 4096, 8192)},
        lambda value: {
            "length": value,
            "max_length": value + value // 4 + 64,
            "batch_size": max(1, 1024 // value),
            "rows": 3 * max(1, 1024 // value),
        },
        ("speed", "memory"),
    ),
    "ranks": Study(
        "speed and memory against the rank of the adapter",
        "LoRA rank",
        {"quick": (4, 64), "usual": (4, 16, 64, 256), "full": (4, 8, 16, 32, 64, 128, 256)},
        lambda value: {"rank": value, "alpha": 2.0 * value},
        ("speed", "memory"),
    ),
    "threads": Study(
        "speed against threads",
        "threads",
        {"quick": (1, 2), "usual": (1, 2), "full": (1, 2)},
        lambda value: {"threads": value},
        ("speed",),
    ),
    # Rows go through reader and tokenizer before the first step; two steps are taken.
    "rows": Study(
        "time to the first step against the number of rows",
        "rows in the file",
        {"quick": (100, 1_000), "usual": (1_000, 10_000), "full": (1_000, 10_000, 100_000, 1_000_000)},
        lambda value: {"rows": value, "length": 64, "steps": 2},
        ("start",),
    ),
}


def run_study(bench: Bench, study: Study, size: str) -> dict[str, Any]:
    """Run each value of a study; a value that fails is said and left out."""
    points, said = [], []
    for value in study.values[size]:
        try:
            found = bench.run(study.contender, 0, study.spec(value))
        except FailedError as error:
            said.append(f"{study.x} {value:,}: {error}")
            continue
        points.append({"x": value, **{name: DRAWN[name][1](found) for name in study.draws}})
    return {"text": study.text, "x": study.x, "points": points, "said": said}
