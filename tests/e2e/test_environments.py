"""Environments that are not as one would wish: a run works there, or says why it doesn't."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from headstart import machine
from headstart.files import read_json

BEGIN = "from headstart.cli import main; main()"
RUN = [
    "-s",
    "steps=2",
    "-s",
    "batch_size=4",
    "-s",
    "data.held_out=16",
    "-s",
    "eval.generate=2",
    "-s",
    "engine.threads=1",
]


def call(place: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Call the command line where there is no terminal, no home that can be written, no folder for temporaries."""
    bare = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path), "HEADSTART_OFFLINE": "1"}
    bad = {"HOME": "/dev/null", "TMPDIR": "/dev/null", "TERM": "dumb", "COLUMNS": "80", "LINES": "24"}
    return subprocess.run(
        [sys.executable, "-c", BEGIN, *command],
        cwd=place,
        env={**bare, **bad, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        umask=0o077,
        check=False,
    )


@pytest.fixture
def place(tmp_path: Path, small_data: Path) -> Path:
    """Return a folder with an odd name, which holds rows of an odd name that say more than ASCII can."""
    place = tmp_path / "a b\u00e9\n\u4f60"
    place.mkdir()
    text = small_data.read_text(encoding="utf-8").replace("sore throat", "caf\u00e9 \u4f60").replace("Th", "\u00de")
    (place / "rows \u00e9.jsonl").write_text(text, encoding="utf-8")
    return place


def test_a_run_in_a_bare_place_without_home_temporaries_terminal_and_locale(place: Path, tiny_model: Path) -> None:
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = call(place, "tune", "rows \u00e9.jsonl", "-m", str(tiny_model), "-o", "o\nn", *RUN, **locale)
    assert done.returncode == 0, done.stderr
    run = place / "o\nn"
    assert read_json(run / "result.json")["verdict"]
    assert {path.stat().st_mode & 0o077 for path in run.rglob("*")} == {0}
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize("more", [["--show", "1"], ["--json"]])
def test_what_standard_output_cannot_spell_is_spelled_out(place: Path, tiny_model: Path, more: list[str]) -> None:
    rows = ["check", "rows \u00e9.jsonl", "-m", str(tiny_model), "-s", "data.held_out=16"]
    done = call(place, *rows, *more, LC_ALL="C.UTF-8", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    if more == ["--json"]:
        assert "rows \u00e9.jsonl" in json.loads(done.stdout)["longest"][0]["where"]
    else:
        assert "rows \\xe9.jsonl" in done.stdout


def test_memory_is_known_without_proc_meminfo(monkeypatch: pytest.MonkeyPatch) -> None:
    total = psutil.virtual_memory().total

    def refuse() -> None:
        raise FileNotFoundError(2, "No such file or directory", "/proc/meminfo")

    monkeypatch.setattr(psutil, "virtual_memory", refuse)
    assert 0 < machine.memory_free_bytes() < machine.memory_total_bytes() <= 1.01 * total
