"""How strongly a run's change is used: what each strength from 0 to 1 gives at the job, and what it leaves of what was known."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from headstart import machine
from headstart.begin import WRITES
from headstart.choose import CHOICE_ROWS
from headstart.config import Config
from headstart.dataset import Data, build_data
from headstart.engine.forward import PreferenceReader, Reader
from headstart.errors import DataError, ModelError, Problem, RunError, UsageError
from headstart.evaluate.compare import Compared, compare
from headstart.evaluate.guard import BOUND, FEW, KEPT, UNCLEAR, compare_guard, guard_result
from headstart.evaluate.measure import PRIMARY, Measured, OnProgress, as_references, measure, own_reference
from headstart.files import new_folder, read_json, sha256, write_json
from headstart.job import build_reader, build_terms
from headstart.lineage import file_fault
from headstart.models.load import Loaded, load_model
from headstart.models.source import find_model
from headstart.models.strength import Dial, build_dial
from headstart.report.reasons import NOT_MEASURED
from headstart.run import Run, RunFolder, need_run

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
PACK_TOKENS = 2048


@dataclass(frozen=True)
class Setting:
    """What a strength gives: the job's metric against strength 0, and the guard as a result holds it."""

    strength: float
    job: Compared
    guard: Mapping[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        job = self.job
        return {
            "strength": self.strength,
            "value": job.after.to_json(),
            "difference": job.to_json(),
            "guard": self.guard or NOT_MEASURED,
        }


@dataclass(frozen=True)
class Strengths:
    """A run at several strengths, on the same rows."""

    run: str
    settings: Sequence[Setting]
    zero: str  # the model at strength 0
    own: bool  # whether the rows are those that the run held out

    def greatest(self, *verdicts: str) -> float | None:
        """Return the greatest strength at which the guard's verdict is one of these; None where it was not measured."""
        return max((s.strength for s in self.settings if s.guard and s.guard["verdict"] in verdicts), default=None)

    @property
    def holds(self) -> float | None:
        """The greatest strength at which nothing of what was known is lost for certain."""
        return self.greatest(KEPT, UNCLEAR, FEW)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        job = self.settings[0].job
        return {
            "run": self.run,
            "metric": job.name,
            "rows": job.rows,
            "grouped": job.grouped,
            "own": self.own,
            "zero": self.zero,
            "strengths": [setting.to_json() for setting in self.settings],
            "holds": self.holds,
            "kept": self.greatest(KEPT),
        }


def measure_strengths(
    run: str,
    data: Sequence[str] = (),
    *,
    strengths: Sequence[float] = STRENGTHS,
    on_progress: OnProgress | None = None,
) -> Strengths:
    """Score a run at some strengths (0 first) on its own held-out rows, or on `data`, and on the guard.

    Raises RunError where it is no finished run, UsageError where it isn't one that writes text, and DataError where its data
    isn't what it was.
    """
    folder = _open(run)
    config = _config(folder, data)
    with machine.resources():
        rows = build_data(config)
        loaded, dial = _load(folder)
        reader = _reader(loaded, rows)
        found: list[Measured] = []
        for number, strength in enumerate(strengths):
            dial.set(strength)
            found.append(_score(reader, rows, found[0] if found else None))
            if on_progress:
                on_progress("strengths", number + 1, len(strengths))
    settings = [_against(found[0], one, strength) for one, strength in zip(found, strengths, strict=True)]
    result = Run(folder.path).result
    return Strengths(str(folder.path), settings, (result["base"] or result["model"])["name"], not data)


def write_at(run: str, strength: float, out: Path) -> Path:
    """Write a run's model at a strength, in the form that it has: plain peft or transformers loads it. Return the folder.

    Its data isn't needed. Raises RunError where it is no finished run or something lies at `out`, and UsageError where it
    isn't one that writes text.
    """
    folder = _open(run)
    if not 0 <= strength <= 1:
        cure = "--at 0.5: half of what was learned; 0 is the model that it stands on, 1 the run"
        raise UsageError(Problem("usage.flag", f"no strength: {strength:g}", "--at", cure))
    if out.exists():
        raise RunError(Problem("run.exists", "something lies there", str(out), "choose another with -o"))
    with machine.resources():
        loaded, dial = _load(folder)
        dial.set(strength)
        with new_folder(out) as target:
            shutil.copytree(folder.model, target, dirs_exist_ok=True)
            for file in target.glob("*.safetensors*"):
                file.unlink()
            more = {"save_embedding_layers": False} if loaded.source.is_adapter else {}
            loaded.adapted.save_pretrained(target, **more)
            (target / "README.md").unlink(missing_ok=True)
            told = {"run": str(folder.path.resolve()), "result_sha256": sha256(folder.result_file)}
            write_json(target / "strength.json", {**told, "strength": strength})
    return out


def _open(run: str) -> RunFolder:
    folder = need_run(run)
    task = Run(folder.path).result["task"]
    if task not in WRITES:
        what = f"the run is for {task}: what was known before is measured of models that write text"
        raise UsageError(Problem("usage.flag", what, run, "give a run that learned to write"))
    if Run(folder.path).result["weights"] == "random":
        what = "the run began at random: there is no model that it comes from"
        raise ModelError(Problem("model.kind", what, run, "give a run that began with a model"))
    return folder


def _config(folder: RunFolder, data: Sequence[str]) -> Config:
    """Return a run's settings, with which its rows are read again; with `data` all rows of it are scored."""
    config = folder.read_config().fixed()
    if data:
        return config.pin({"data.eval": list(data), "eval.every": 0, "eval.rows": None, "data.max_bad_rows": 0})
    files = read_json(folder.data_file)["files"]
    faults = [fault for file in files if (fault := file_fault(file, "when the run began"))]
    if faults:
        gone = any(not Path(file["path"]).exists() for file in files)  # what it trained on tells its rows apart
        cure = "put back what was there" + ", or name rows to score on: headstart strength RUN DATA" * (not gone)
        raise DataError(Problem("data.changed", what, where, cure) for what, where in faults)
    return config


def _load(folder: RunFolder) -> tuple[Loaded, Dial]:
    """Load a run's result, and its dial."""
    settings = folder.read_config().settings
    torch.set_num_threads(settings.engine.threads or machine.cpu_count())
    dtype = getattr(torch, Run(folder.path).result["dtype"])
    loaded = load_model(find_model(str(folder.path)), machine.pick_device(), dtype, settings.task)
    return loaded, build_dial(loaded, find_model(settings.model), settings.task)


def _reader(loaded: Loaded, data: Data) -> Reader:
    settings = data.config.settings
    terms = build_terms(settings, data.prepared.train.kept if settings.task == "preference" else ())
    bfloat16 = settings.engine.precision == "bfloat16"
    reader = build_reader(loaded.model, settings.task, data.renderer, bfloat16=bfloat16, terms=terms)
    if settings.engine.fast == "on":
        reader.speed_up()
    return reader


def _score(reader: Reader, data: Data, first: Measured | None) -> Measured:
    """Score the run's rows and the guard; of preferences strength 0, which was the `first`, is the reference."""
    settings = data.config.settings
    proof = data.proof(settings.eval.rows)
    choices = data.prepared.choices if settings.eval.choices == "on" else ()
    measured = measure(
        reader,
        data.renderer,
        proof.kept,
        proof.examples,
        task=settings.task,
        tokens_per_pack=PACK_TOKENS,
        answers=min(CHOICE_ROWS, len(proof.kept)) if choices else 0,
        choices=choices,
        references=as_references(first),
    )
    measured = own_reference(measured) if settings.task == "preference" and first is None else measured
    rows = list(measured.rows)
    plain = reader.beside if isinstance(reader, PreferenceReader) else reader
    for part in data.guard:
        kept, examples = part.rows.kept, part.rows.examples
        found = measure(plain, part.renderer, kept, examples, task=part.task, tokens_per_pack=PACK_TOKENS)
        rows += [replace(row, part=part.name, guard=True) for row in found.rows]
    return Measured(rows, measured.task)


def _against(first: Measured, second: Measured, strength: float) -> Setting:
    before, after = first.metrics(), second.metrics()
    name = next(name for name in PRIMARY[first.task] if name in before and name in after)
    kept = compare_guard(first.guard(), second.guard())
    return Setting(strength, compare(name, before[name], after[name]), guard_result(kept, BOUND) if kept else None)
