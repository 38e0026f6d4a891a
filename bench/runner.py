"""Runs contenders in turns, each round in a process of its own, and keeps what they said."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.contenders.common import MARK
from bench.judge import Agreement, Round, Spread, agreement, compare
from bench.rows import Files, without_dropout, write_files, write_rows, write_tokens
from bench.works import COMMON, CONTENDERS, SPECS, Contender, Line, Size

ROOT = Path(__file__).parents[1]
LIMIT_S = 3600


class NotInstalledError(Exception):
    """A contender can't run here; says why."""


class FailedError(Exception):
    """A contender ended without a result; says how."""


@dataclass(frozen=True)
class Outcome:
    """What became of a line. `said` is why it has no value, or why the losses were not compared."""

    line: Line
    value: Spread | None = None
    agrees: Agreement | None = None
    said: str = ""

    @property
    def met(self) -> bool | None:
        """Tell whether the bar is met; None without a bar or a value. A fast wrong answer doesn't meet it."""
        if self.line.bar is None or self.value is None:
            return None
        return self.line.bar.met(self.value.median) and (self.agrees is None or self.agrees.ok)

    @property
    def verdict(self) -> str:
        """The outcome in a word."""
        if self.value is None:
            return self.said
        if self.agrees is not None and not self.agrees.ok:
            return "losses differ"
        return {None: "", True: "met", False: "missed"}[self.met]

    def to_json(self) -> dict[str, Any]:
        """The outcome as plain values."""
        line, bar = self.line, self.line.bar
        return {
            "work": line.work,
            "text": line.text,
            "measure": line.measure,
            "ours": line.ours,
            "theirs": line.theirs,
            "bar": None if bar is None else str(bar),
            "limit": None if bar is None else bar.limit,
            "value": None if self.value is None else vars(self.value),
            "losses_differ": None if self.agrees is None else self.agrees.worst,
            "verdict": self.verdict,
            "said": self.said,
        }


def say_at_once(text: str) -> None:
    """Print a line without waiting for more."""
    print(text, flush=True)


@dataclass
class Bench:
    """One call of the bench: its rows, what ran so far, and where things lie.

    `rounds` are kept by contender, spec and number, so that lines that need the same ones share them.
    """

    data: Path
    work: Path
    size: Size
    threads: int
    say: Callable[[str], None] = say_at_once
    sources: dict[str, str] = field(default_factory=dict)
    _files: dict[str, tuple[Files, dict[str, Any]]] = field(default_factory=dict)
    _rounds: dict[str, Round] = field(default_factory=dict)
    _ran: int = 0

    # --- lines ---

    def judge(self, line: Line) -> Outcome:
        """Run what a line needs and hold it against its bar."""
        try:
            pairs = self.alternate([line.ours, line.theirs], 1 if line.once else self.size.repeats)
            agrees = self._agreement(line, pairs)
        except (NotInstalledError, FailedError) as error:
            return Outcome(line, said=str(error))
        ours, theirs = pairs[line.ours], pairs[line.theirs]
        return Outcome(line, compare(line.measure, ours, theirs), agrees, CONTENDERS[line.theirs].not_alike)

    def _agreement(self, line: Line, pairs: Mapping[str, Sequence[Round]]) -> Agreement | None:
        alike = not CONTENDERS[line.theirs].not_alike and line.ours != line.theirs
        if not alike or line.measure == "share_of_products":
            return None
        if line.check is not None:
            pairs = {name: [self.run(name, 0, line.check)] for name in (line.ours, line.theirs)}
        found = [agreement(a.losses, b.losses) for a, b in zip(pairs[line.ours], pairs[line.theirs], strict=True)]
        return max(found, key=lambda one: one.worst)

    def alternate(self, names: Sequence[str], repeats: int) -> dict[str, list[Round]]:
        """Run contenders in turns: A B A B, each in a fresh process. Raises NotInstalledError, FailedError."""
        found: dict[str, list[Round]] = {name: [] for name in names}
        for name in found:
            self.python(CONTENDERS[name])  # all of them are there before any takes its time
        for number in range(repeats):
            for name, rounds in found.items():
                rounds.append(self.run(name, number))
        return found

    # --- one process ---

    def run(self, name: str, number: int = 0, changes: Mapping[str, Any] | None = None) -> Round:
        """Run a contender once, or return what it said before. Raises NotInstalledError, FailedError."""
        key = json.dumps([name, number, changes], sort_keys=True)
        if key not in self._rounds:
            spec = self.spec(name, changes or {})
            self._rounds[key] = self._process(name, CONTENDERS[name], spec)
            found = self._rounds[key]
            rate = f"{found.rate:8,.0f} tokens/s  {found.peak_bytes / 1e9:5.2f} GB" if found.tokens else ""
            changed = f"  {dict(changes)}" if changes else ""
            self.say(f"  {CONTENDERS[name].title:<36} {rate}{changed}")
        return self._rounds[key]

    def rounds(self) -> dict[str, Round]:
        """Return every round that ran, by what it was."""
        return dict(self._rounds)

    def python(self, contender: Contender) -> str:
        """Return the interpreter of a contender. Raises NotInstalledError where its environment isn't there."""
        if contender.missing:
            raise NotInstalledError(contender.missing)
        if not contender.venv:
            return sys.executable
        base = Path(os.environ.get("BENCH_VENVS", ROOT / "bench"))
        found = base / contender.venv / "bin" / "python"
        if not found.exists():
            raise NotInstalledError(f"not installed: no {contender.venv} (make bench-peers)")
        return str(found)

    def spec(self, name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a contender is to do, with its rows and their tokens written."""
        contender = CONTENDERS[name]
        spec = {**COMMON, **SPECS[contender.rows], **contender.spec, "threads": self.threads, **changes}
        spec["model_path"] = str(_model(spec["model"]))
        if spec.get("dropout") == 0:
            copy = self.work / "models" / f"{Path(spec['model_path']).name}-without-dropout"
            spec["model_path"] = str(without_dropout(Path(spec["model_path"]), copy))
        spec["task"] = {"labels": "classification", "pairs": "preference"}.get(contender.rows, "chat")
        files, found = self._prepare(contender.rows, spec)
        paths = {key: str(getattr(files, key)) for key in ("train", "held_out", "tokens", "held_out_tokens")}
        return {**spec, **paths, "classes": found["classes"], "longest": found["longest"]}

    def _prepare(self, kind: str, spec: dict[str, Any]) -> tuple[Files, dict[str, Any]]:
        wanted = spec.get("rows") or getattr(self.size, kind)
        spec.setdefault("steps", spec.get("epochs", 1) * max(1, wanted // spec["batch_size"]))
        names = ("steps", "batch_size", "seed", "max_length", "length")
        key = json.dumps([kind, wanted, Path(spec["model_path"]).name, *(spec.get(name) for name in names)])
        if key not in self._files:
            folder = self.work / "rows" / f"{kind}-{len(self._files)}"
            if spec.get("length"):
                from bench.rows import long_rows

                files = write_files(
                    folder, long_rows(spec["length"], wanted), long_rows(spec["length"] - 1, 5), "made up"
                )
            else:
                files = write_rows(folder, kind, self.data, wanted, self.size.held_out)
            found = write_tokens(files, {**spec, "method": "full"})
            self.sources[kind] = files.source
            self.say(f"  rows: {kind}, {found['rows']:,} rows, {found['tokens']:,} tokens, {files.source}")
            self._files[key] = files, found
        return self._files[key]

    def _process(self, name: str, contender: Contender, spec: dict[str, Any]) -> Round:
        self._ran += 1
        folder = self.work / "runs" / f"{self._ran:03d}-{name}"
        folder.mkdir(parents=True)
        spec = {**spec, "out": str(folder / "run")}
        (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        command = [self.python(contender), "-m", f"bench.contenders.{contender.script}", str(folder / "spec.json")]
        with (folder / "log.txt").open("w", encoding="utf-8") as log:
            os.sync()  # what the round before left to be written isn't written while this one runs
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=_environment(self.threads),
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                timeout=LIMIT_S,
                check=False,
            )
        (folder / "out.txt").write_text(done.stdout, encoding="utf-8")
        said = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
        if done.returncode or not said:
            raise _failure(done.returncode, (folder / "log.txt").read_text(encoding="utf-8"), folder)
        return Round.from_json(json.loads(said[-1].removeprefix(MARK)))


def _failure(code: int, log: str, folder: Path) -> Exception:
    last = (log.strip().splitlines() or ["nothing was said"])[-1]
    if last.startswith(("ModuleNotFoundError", "ImportError")):
        return NotInstalledError(f"not installed: {last.partition(': ')[2]}")
    # Without folders: they are of this machine and no other.
    short = re.sub(r"(/[\w.-]+)+/", "", last)[:200]
    return FailedError(f"failed ({code}): {short} ({folder.name})")


def _environment(threads: int) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {
        **os.environ,
        **dict.fromkeys(names, str(threads)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def _model(name: str) -> Path:
    from headstart.models.source import find_model

    return find_model(name).path
