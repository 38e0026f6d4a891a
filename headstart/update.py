"""Go on from a finished run with new rows, and show that what it learned before is kept.

An update is a run like any other: its model is the run's result, the run is mixed in (`data.mix=RUN=0.3`), so that some of
its rows are learned again and those that it held out are scored, and its settings are the defaults.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headstart.config import Config, Override, as_names, build_config, known_keys, setting
from headstart.data.mixing import Part, read_mix
from headstart.display import Display
from headstart.errors import Problem, UsageError
from headstart.run import Run, RunFolder, need_run
from headstart.tune import start

# Old rows beside each new one: about a quarter of what is learned, which keeps what was known even where new text is of another
# kind; a twentieth does where it is alike (Ibrahim et al., "Simple and Scalable Strategies to Continually Pre-train", 2024).
REPLAY = 0.3
# Of rows that say which class they are of, as many old ones as new: at 0.3 a class of 20 rows is left one or two beside the 20 of
# each new class, and what was known fell from 0.929 to 0.777; at 1 it stayed (docs/log.md).
REPLAY_CLASSES = 1.0
CLASSED = ("classification", "multilabel", "images")
# A rate that is as high as the run's own takes weights far from where they are good; what is new is learned at half of it, too.
RATE_FRAC = 0.5
# What belongs to one run alone, is of its data, or is settled by the model as it is.
OWN = (
    "model",
    "weights",
    "method",
    "out",
    "optim.lr",
    "data.train",
    "data.eval",
    "data.mix",
    "data.rows",
    "data.template",
)
# Of what stands on the left, what the user gives takes the place of what the run had.
INSTEAD = {"steps": ("epochs",), "epochs": ("steps",), "data.eval": ("data.held_out", "data.group_by")}


def update(
    run: str | Path,
    data: str | Path | Sequence[str | Path],
    *,
    replay: float | None = None,
    out: str | Path | None = None,
    eval_data: str | Path | Sequence[str | Path] | None = None,
    epochs: float | None = None,
    settings: Mapping[str, Any] | None = None,
    display: Display | None = None,
) -> Run:
    """Fine-tune the result of `run` on new `data`, with `replay` of its old rows beside each new one; return the new run.

    `replay` is 0.3 by itself, of classes 1. The verdict is `better` only where new rows got better and old held-out rows didn't
    certainly fall. Raises what `tune` raises, RunError where `run` isn't a finished run, and DataError where its data isn't what
    it was: with `replay=0` that is taken, and old rows are then not measured.
    """
    named = {
        "data.train": as_names(data),
        "data.eval": None if eval_data is None else as_names(eval_data),
        "out": None if out is None else str(out),
        "epochs": epochs,
        **(settings or {}),
    }
    given = [Override(key, value, "argument") for key, value in named.items() if value is not None]
    return start(update_config(run, replay, given), display or Display())


def update_config(run: str | Path, replay: float | None, given: Sequence[Override]) -> Config:
    """Return the settings of an update: what is `given`, over those of the run. Raises RunError, UsageError."""
    folder = need_run(str(run))
    task = Run(folder.path).result["task"]
    if replay is None:
        replay = REPLAY_CLASSES if task in CLASSED else REPLAY
    if not 0 <= replay < 1000:
        cure = "--replay 0.3: 30 old rows beside each 100 new ones; 0 is none"
        raise UsageError(Problem("usage.flag", f"no share of old rows: {replay:g}", "--replay", cure))
    own = _of_run(folder, {item.key for item in given})
    mixed = next((item.value for item in given if item.key == "data.mix"), own.pop("data.mix", ()))
    named = as_names(mixed) if not isinstance(mixed, str) else mixed.split(",")
    own |= {
        "model": str(folder.path),
        "data.mix": [f"{folder.path}={replay:g}", *named],
    }
    rest = [item for item in given if item.key != "data.mix"]
    known = {item.key for item in rest}
    overrides = [
        Override(key, value, f"{folder.path.name}, which it goes on from")
        for key, value in own.items()
        if key not in known
    ]
    return build_config(None, [*overrides, *rest])


def _of_run(folder: RunFolder, given: set[str]) -> dict[str, Any]:
    """Return the settings of a run that an update begins with: those that a user gave there, and what follows from the model."""
    config = folder.read_config()
    settings = config.settings
    without = {*OWN, *(other for key in given for other in INSTEAD.get(key, ()))}
    kept = [key for key in known_keys() if config.given(key) and key not in without and not key.startswith("lora.")]
    found = {key: setting(settings, key) for key in kept}
    if (held_out := found.get("data.held_out")) and held_out >= 1:  # a number of rows, of other data
        del found["data.held_out"]
    if settings.eval.choices == "off":  # the same is measured; where answers were picked, more of them may be there now
        found["eval.choices"] = "off"
    others = [part for part in read_mix(settings.data.mix) if not part.is_run]
    found |= {"kind": settings.kind, "task": settings.task, "method": settings.method}
    found |= {"optim.lr": float(f"{float(settings.optim.lr or 0.0) * RATE_FRAC:.1e}")}
    return found | ({"data.mix": [_as_entry(part) for part in others]} if others else {})


def _as_entry(part: Part) -> str:
    return f"{part.name}={part.weight!r}"
