"""Trackers get each line of a run once, and whatever they do, the run doesn't feel it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import headstart
from headstart import track
from headstart.display import Display
from headstart.errors import UsageError
from headstart.run import RunFolder
from headstart.tune import resume
from tests.conftest import killed_at

# What stands in for a tracker's library: it writes down what it is called with.
STUB = """
import json, os
class Run:
    summary = {}
    def log(self, values, step=None): note("log", step, values)
    def finish(self): note("end", None, dict(self.summary))
def init(**named): note("init", None, {"id": named["id"], **named["config"]}); return Run()
def note(*told):
    with open(os.environ["NOTES"], "a") as file: file.write(json.dumps(told) + "\\n")
"""
FAILS = "raise RuntimeError('the service is down')"


def libraries(folder: Path, monkeypatch: pytest.MonkeyPatch, **texts: str) -> Path:
    """Put modules where this process and its children find them; return the file of notes."""
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    notes = folder / "notes.jsonl"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(Path(headstart.__file__).parents[1])]))
    monkeypatch.setenv("NOTES", str(notes))
    return notes


def test_a_run_that_was_stopped_is_followed_to_its_end_and_each_step_is_sent_once(
    small_data: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    notes = libraries(tmp_path, monkeypatch, wandb=STUB, trackio=FAILS)
    settings = {"batch_size": 4, "steps": 8, "save.every": 3, "eval.generate": 0, "eval.guard": "off"}
    out = tmp_path / "run"
    with killed_at(6), pytest.raises(KeyboardInterrupt):
        headstart.tune(small_data, model=str(tiny_model), out=out, settings=settings, track=["wandb", "trackio"])
    run = resume(out, Display(live=False))
    told = [json.loads(line) for line in notes.read_text(encoding="utf-8").splitlines()]
    assert [step for what, step, values in told if what == "log" and "train/loss" in values] == list(range(1, 9))
    losses = {step: values["train/loss"] for what, step, values in told if "train/loss" in values}
    kept = {line["step"]: line["loss"] for line in RunFolder(out).read_metrics() if "loss" in line}
    assert losses == kept
    begun = [values for what, _, values in told if what == "init"]
    assert len({values["id"] for values in begun}) == 1
    assert begun[0]["optim.lr"] == RunFolder(out).read_config().settings.optim.lr
    *_, (what, _, end) = told
    assert (what, end["verdict"]) == ("end", run.result["verdict"])
    assert end["after/nll"] == run.result["after"]["nll"]["value"]
    assert capsys.readouterr().out.count("trackio failed and the run went on without it") == 2


def test_a_tracker_that_hangs_is_left_behind(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdin=subprocess.PIPE)
    track._wait("wandb", child, time.monotonic(), tmp_path, Display(live=False))
    assert child.wait() < 0
    assert "had not taken in all of the run" in capsys.readouterr().out


def test_tensorboard_reads_what_was_sent(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = track.TensorBoard(tmp_path, "")
    sink.begin({"optim.lr": 1e-4})
    sink.log({"train/loss": 0.5}, 3)
    sink.end({"verdict": "better", "after/accuracy": 1.0})
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(3, 0.5)]
    assert found.Scalars("after/accuracy")[0].value == 1.0


def test_unknown_and_missing_trackers_are_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no tracker 'wanb'"):
        track.check_trackers(["wanb"])
    monkeypatch.setattr(track.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="isn't installed"):
        track.check_trackers(["wandb"])


def test_what_is_no_number_is_not_sent() -> None:
    line = {"step": 4, "loss": 2.0, "lr": 1e-3, "spike": True, "not_finite": "a word", "grad_norm": float("nan")}
    assert track.named(line) == {"train/loss": 2.0, "train/lr": 1e-3, "train/spike": 1.0}
    assert track.named({"step": 4, "watch_loss": 1.5}) == {"watch/loss": 1.5}
