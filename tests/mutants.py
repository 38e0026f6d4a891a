"""Would a test notice? Each mutant of the code that keeps runs whole must fail one: `python -m tests.mutants [NUMBER ...]`.

A mutant is the package with one thing taken out. It is tried in a copy, by the tests that ought to tell: those of files
and, where a whole run is needed, some of those of survival and of what a run began with.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# (file, what is taken out, what stands there then)
MUTANTS = [
    ("files.py", "            os.fsync(file.fileno())\n        Path(name)", "        Path(name)"),
    ("files.py", "        Path(name).replace(path)", "        Path(path).write_bytes(Path(name).read_bytes())"),
    ("files.py", '    reach("file.renamed", path.name)\n    sync_folder(path.parent)', "    pass"),
    ("files.py", "        with _system_faults(path):", "        with contextlib.nullcontext():"),
    ("files.py", "                sync_file(file)\n", ""),
    ("files.py", "        sync_folder(temporary)\n", ""),
    ("files.py", '    reach("folder.renamed", target.name)\n    sync_folder(target.parent)\n', ""),
    ("files.py", "            old.rename(target)\n", ""),
    ("files.py", "        Path(name).unlink(missing_ok=True)\n        raise", "        raise"),
    ("files.py", "        shutil.rmtree(temporary, ignore_errors=True)\n        raise", "        raise"),
    ("files.py", "                file.truncate(begin)\n", ""),
    ("files.py", "        self._waiting.clear()", "        pass"),
    ("engine/checkpoint.py", '    if file.stat().st_size != written["bytes"]:', "    if False:"),
    ("engine/checkpoint.py", 'if sha256(file) == written["sha256"]', "if True"),
    ("engine/checkpoint.py", "    if file.is_symlink() or not file.is_file():", "    if False:"),
    ("engine/checkpoint.py", '        if (manifest["kind"], manifest["step"]) != (kind, step):', "        if False:"),
    ("engine/checkpoint.py", '        if manifest["format"] > FORMAT:', "        if False:"),
    ("engine/checkpoint.py", "== {TENSORS, VALUES}", "is not None"),
    ("engine/checkpoint.py", '            self._set_aside(self._path("step", step))\n', ""),
    ("engine/checkpoint.py", "        while aside.exists():", "        while False:"),
    ("engine/checkpoint.py", "[: -self._keep]", "[:-1]"),
    ("engine/checkpoint.py", "if old != best]", "]"),
    ("run.py", "in (self.path, self.evaluation, self.checkpoints)", "in (self.evaluation, self.checkpoints)"),
    ("run.py", "in (self.path, self.evaluation, self.checkpoints)", "in (self.path, self.checkpoints)"),
    ("run.py", "in (self.path, self.evaluation, self.checkpoints)", "in (self.path, self.evaluation)"),
    ("files.py", "        path.rename(aside / path.name)\n", "        shutil.rmtree(path)\n"),
    ("files.py", "    else:\n        sync_folder(target.parent)\n", ""),
    ("files.py", "        if not target.is_dir():\n            raise\n", ""),
    ("files.py", "        Path(name).unlink()\n\n\ndef seconds", "        pass\n\n\ndef seconds"),
]
MUTANTS_OF_STORES = [
    ("data/store.py", "        if folder.name.startswith(TEMPORARY_PREFIX):", "        if False:"),
    ("data/store.py", "        with suppress(FileNotFoundError):", "        if True:"),
    ("data/store.py", "    if folder.exists() and not is_whole(folder):", "    if False:"),
    ("data/store.py", "new_folder(folder, replace=False)", "new_folder(folder)"),
]
MUTANTS_OF_RUNS = [
    ("engine/checkpoint.py", '        if manifest.get("run", self._run) != self._run:', "        if False:"),
    ("engine/engine.py", '        torch.set_rng_state(tensors["rng.torch"])\n', ""),
    ("engine/engine.py", '                tensors[f"optim.{key}.{name}"] = value\n', "                pass\n"),
    ("engine/loop.py", "    progress.seen = feed.seen\n    progress.bad_in_a_row = 0", "    progress.bad_in_a_row = 0"),
    ("engine/loop.py", "    progress.step += 1\n    progress.seen = feed.seen\n", "    progress.step += 1\n"),
    ("tune.py", "        self.folder.forget_after(found.step, due=self.progress.due)\n", ""),
    ("tune.py", "        self.feed.seen = self.progress.seen\n", ""),
    ("tune.py", "            if progress.end or self.stop.asked:\n                raise\n", ""),
    ("tune.py", '            self._go_on_without("the checkpoint", error)', "            raise"),
    ("tune.py", "            _check_proof(folder, job)\n", ""),
    (
        "tune.py",
        "        self._check_there()\n        try:\n            with self._timed_save():\n                tensors",
        "        try:\n            with self._timed_save():\n                tensors",
    ),
    ("dataset.py", 'NOTHING = (0, "off", ("off",), "exact")', 'NOTHING = (0, "off", ("off",))'),
    ("tune.py", " if part > 1 and settings.task in WRITES else None", " if part > 1 else None"),
    ("stop.py", "        if self.asked:\n", "        if False:\n"),
    ("origin.py", "        if versions.get(name) != was:", "        if False:"),
    ("lineage.py", ' if sha256(path) != file["sha256"] else None', " if False else None"),
    ("run.py", "    last = (step, not due)\n", "    last = (step, True)\n"),
    ("engine/loop.py", "        progress.due = watched is None\n", ""),
    ("engine/loop.py", "    if not saved and (", "    if ("),
    ("engine/loop.py", '"" if progress.due else ended', "ended"),
    ("tune.py", "score_rows(reader, rows, tokens, self._heed)", "score_rows(reader, rows, tokens)"),
]
MUTANTS_OF_ORIGINS = [
    ("origin.py", '(was["sha256"], was["revision"]) != (now["sha256"], now["revision"])', "False"),
    ("origin.py", "for path in sorted(known ^ found)", "for path in ()"),
    ("lineage.py", "    if not path.exists():", "    if False:"),
    ("run.py", "            lock.acquire(timeout=0)\n", "            pass\n"),
    ("run.py", "            writer.unlink(missing_ok=True)\n", "            pass\n"),
]
MUTANTS_OF_GRADING = [
    ("tune.py", "        _check_graders(folder, job)\n", ""),
    ("origin.py", 'found["eval.graders"] = [pin(name) for name in settings.eval.graders]', "pass"),
    ("evaluate/predictions.py", "            if other := sorted(", "            if other := 0 and sorted("),
    ("evaluate/predictions.py", "if file.exists() else None", "if False else None"),
]
MUTANTS_OF_GUARDS = [
    ("stop.py", "contextlib.suppress(OSError, RuntimeError)", "contextlib.nullcontext()"),
    ("display.py", "            hush(self.console.file)\n", ""),
    ("display.py", "        raise  # noqa: PLE0704 (the", "        super().on_broken_pipe()  # (the"),
    ("stop.py", " if signal.getsignal(number) != signal.SIG_IGN]", "]"),
    ("stop.py", "            signal.signal(number, handler)\n", "            pass\n"),
    ("stall.py", "            if time.monotonic() - self._display.shown_at >= self._limit_s:", "            if True:"),
    ("stall.py", "                self._limit_s *= 2\n", ""),
    ("evaluate/reference.py", 'if kept["key"] == key else None', ""),
]
TABLE = {
    ("tests/unit/test_files.py",): MUTANTS,
    (
        "tests/e2e/test_survival.py",
        "-k",
        "again_and_again or another_run or for_once or left_out or allowed or taken_away or told or ends_the_run or twice or costs_time "
        "or broken_off or terminal",
    ): MUTANTS_OF_RUNS,
    ("tests/e2e/test_tiny_run.py", "-k", "data_changed or goes_on_from_anywhere or two_processes"): MUTANTS_OF_ORIGINS,
    ("tests/e2e/test_graders.py", "-k", "graded_before or keeps_every"): MUTANTS_OF_GRADING,
    ("tests/unit/test_chats.py", "-k", "store"): MUTANTS_OF_STORES,
    ("tests/unit/test_guards.py", "tests/unit/test_preferences.py"): MUTANTS_OF_GUARDS,
}


def is_killed(file: str, old: str, new: str, tests: tuple[str, ...]) -> bool:
    """Tell whether a test fails once `old` is taken out."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for folder in ("headstart", "tests"):
            shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        path = copy / "headstart" / file
        text = path.read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise SystemExit(f"{file}: {old!r} stands there {text.count(old)} times")
        path.write_text(text.replace(old, new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(
            command, cwd=copy, env={**os.environ, "PYTHONPATH": name}, capture_output=True, text=True, check=False
        )
        if done.returncode not in (0, 1):
            raise SystemExit(done.stdout + done.stderr)
        return done.returncode == 1


def main() -> None:
    """Try all mutants, or those whose numbers are named."""
    survivors = tried = 0
    chosen = [(*mutant, tests) for tests, mutants in TABLE.items() for mutant in mutants]
    for number, (file, old, new, tests) in enumerate(chosen, 1):
        if sys.argv[1:] and str(number) not in sys.argv[1:]:
            continue
        tried += 1
        killed = is_killed(file, old, new, tests)
        survivors += not killed
        print(f"{number:>3} {'killed ' if killed else 'SURVIVES'} {file}: {old.strip().splitlines()[0]}", flush=True)
    print(f"{tried - survivors} of {tried} killed")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
