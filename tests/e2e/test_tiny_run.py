"""The whole way on a tiny model: a file in, a run folder out; stopped and killed runs go on as if they never were."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import headstart
from headstart.display import Display
from headstart.engine.plan import lay_out_scoring
from headstart.errors import DataError, ResourceError, RunError, StoppedError, UsageError
from headstart.evaluate.measure import Measured
from headstart.files import read_json
from headstart.fit import _scored_tokens
from headstart.job import Job
from headstart.models import native
from headstart.run import WRITER, RunFolder
from headstart.tune import resume, tune
from headstart.verify import differences

QUICK: dict[str, Any] = {
    "batch_size": 4,
    "steps": 12,
    "eval.every": 4,
    "eval.generate": 2,
    "eval.guard": "off",
    "data.held_out": 16,
    "engine.threads": 1,
}


@pytest.fixture
def quiet(tmp_path: Path) -> Display:
    with (tmp_path / "said.txt").open("w") as file:
        yield Display(file, live=False)


def run_tiny(data: Path, model: Path, out: Path, display: Display, **settings: Any) -> headstart.Run:
    return tune(data, model=str(model), out=out, settings={**QUICK, **settings}, display=display)


def weights(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "model").glob("*.safetensors")
    return load_file(file)


def assert_equal_runs(one: Path, two: Path) -> None:
    """Weights, optimizer, data order and losses are the same bit for bit."""
    assert differences(one, two) == []


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_file_in_and_a_better_model_and_the_proof_out(
    small_data: Path, tiny_model: Path, tmp_path: Path, quiet: Display, method: str
) -> None:
    run = run_tiny(
        small_data,
        tiny_model,
        tmp_path / "run",
        quiet,
        method=method,
        **{"optim.lr": 2e-2 if method == "lora" else 5e-3, "eval.guard": "auto"},
    )
    folder = RunFolder(run.path)
    for file in (
        folder.config_file,
        folder.data_file,
        folder.metrics_file,
        folder.result_file,
        folder.report_file,
        folder.card_file,
        folder.log_file,
    ):
        assert file.stat().st_size > 0, file
    result = run.result
    assert result["verdict"] == "better"
    assert result["difference"]["high"] < 0
    assert result["kind"] == "instruction"
    assert {"nll", "exact_match", "rouge_l", "chrf", "stop_rate"} == set(result["before"]) == set(result["after"])
    assert {"real_tokens_per_s", "train_s", "reference_s", "eval_s"} <= set(result["speed"])
    speed = result["speed"]
    phases = [speed[f"{phase}_s"] for phase in ("data", "forward", "backward", "optimizer")]
    assert min(phases) > 0
    assert sum(phases) <= speed["train_s"]
    assert speed["operations"] == sum(r["operations"] for r in folder.read_metrics() if "loss" in r) > 0
    assert 0 < speed["product_rate_frac"] < 1
    assert speed["padding_tokens"] == 0
    assert "Where the time went" in run.report.read_text()
    assert set(result["guard"]["parts"]) == {"general text", "general questions"}
    assert {row["part"] for row in folder.read_evaluation("before") or [] if row["guard"]} == set(
        result["guard"]["parts"]
    )
    told = {name: reason["measured"] for name, reason in result["reasons"].items()}
    assert told == {
        "custom_fit": True,
        "matching_data": True,
        "time_and_money": True,
        "different_situations": False,
        "shared_knowledge": True,
        "happy_users": False,
        "up_to_date": False,
    }
    assert all(reason["how"] for name, reason in result["reasons"].items() if not told[name])
    assert {"peak_bytes", "planned_bytes"} <= set(result["memory"])
    assert result["rows"] == {"train": 24, "watch": 8, "proof": 8}
    assert [r["step"] for r in folder.read_metrics() if "loss" in r] == list(range(1, 13))
    assert "auto: for 24 rows" in folder.config_file.read_text() or "argument" in folder.config_file.read_text()
    assert "better: loss per predicted token" in (tmp_path / "said.txt").read_text()
    assert "better" in repr(run)
    assert "<table>" in run._repr_html_()


def test_the_same_run_twice_gives_the_same_bits(
    small_data: Path, tiny_model: Path, tmp_path: Path, quiet: Display
) -> None:
    one = run_tiny(small_data, tiny_model, tmp_path / "one", quiet, **{"lora.dropout": 0.1})
    two = run_tiny(small_data, tiny_model, tmp_path / "two", quiet, **{"lora.dropout": 0.1})
    assert_equal_runs(one.path, two.path)


def test_without_fast_layers_a_run_asks_for_no_kernels(
    small_data: Path, tiny_model: Path, tmp_path: Path, quiet: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(native, "find", lambda: asked.append("kernels"))
    run = run_tiny(small_data, tiny_model, tmp_path / "plain", quiet, **{"engine.fast": "off", "steps": 2})
    assert asked == []
    assert read_json(run.path / "data.json")["versions"][native.COMPILER] == "not used"


def test_the_guard_is_scored_once_by_the_same_untouched_model(
    small_data: Path, tiny_model: Path, tmp_path: Path, quiet: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADSTART_HOME", str(tmp_path / "home"))
    model, guard = tmp_path / "model", tmp_path / "known.jsonl"
    shutil.copytree(tiny_model, model)
    guard.write_text("".join(json.dumps({"text": f"The plan of day {n}."}) + "\n" for n in range(12)), encoding="utf-8")
    own = Job._measure_part
    scored: list[str] = []

    def counted(job: Job, renderer: Any, task: str, *more: Any) -> Any:
        scored.append(task)
        return own(job, renderer, task, *more)

    monkeypatch.setattr(Job, "_measure_part", counted)

    def times(name: str, **settings: Any) -> tuple[int, headstart.Run]:
        scored.clear()
        run = run_tiny(small_data, model, tmp_path / name, quiet, **{"eval.guard": str(guard), "steps": 2, **settings})
        return len(scored), run

    job = headstart.plan(small_data, model=str(model), settings={**QUICK, "eval.guard": str(guard), "steps": 2})
    reader, settings = job.engine.reader, job.config.settings
    planned = [_scored_tokens(job.data, settings, job.layout, reader, guard_known=known) for known in (False, True)]
    laid_out = lay_out_scoring(reader, job.data.guard[0].rows.examples, settings.engine.tokens_per_pack or 0)
    assert laid_out is not None
    assert planned[0] - planned[1] == laid_out.tokens > 0
    assert job.guard_before is not None
    for change in ({"data.template": "alpaca"}, {"engine.tokens_per_pack": 96}, {"seed": 5}):
        more = {**QUICK, "eval.guard": str(guard), "steps": 2, **change}
        other = headstart.plan(small_data, model=str(model), settings=more).guard_before
        assert other is not None
        assert other.key != job.guard_before.key
    job.measure_beside(Measured([], "chat"), 64)
    assert not (tmp_path / "home" / "guard").exists()  # packs that were cut down, as where the memory runs out
    (first, one), (second, two) = times("one"), times("two", **{"optim.lr": 1e-2})
    assert (first, second) == (2, 1)  # before and after; after alone
    known = [[row for row in RunFolder(run.path).read_evaluation("before") or [] if row["guard"]] for run in (one, two)]
    assert known[0] == known[1] != []
    assert len(known[0]) == 12
    # Whatever decides what comes out is scored anew, and so is what was damaged.
    assert times("three", **{"lora.rank": 4})[0] == 2
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    count, other = times("four")
    changed = [row for row in RunFolder(other.path).read_evaluation("before") or [] if row["guard"]]
    assert count == 2
    assert [row["nll"] for row in changed] != [row["nll"] for row in known[0]]
    for kept in (tmp_path / "home" / "guard").glob("*.json"):
        kept.write_text(kept.read_text()[:-3])
    assert times("five")[0] == 2
    guard.write_text(guard.read_text().replace("day 3.", "day 3!"), encoding="utf-8")
    assert times("six")[0] == 2


def test_how_often_one_looks_does_not_change_the_weights(
    small_data: Path, tiny_model: Path, tmp_path: Path, quiet: Display
) -> None:
    one = run_tiny(
        small_data, tiny_model, tmp_path / "one", quiet, **{"eval.every": 12, "save.every": 5, "lora.dropout": 0.1}
    )
    two = run_tiny(
        small_data,
        tiny_model,
        tmp_path / "two",
        quiet,
        **{"eval.every": 12, "save.every": 1, "eval.generate": 0, "lora.dropout": 0.1},
    )
    first, second = weights(one.path), weights(two.path)
    assert all(torch.equal(first[name], second[name]) for name in first)


class _StopAt(Display):
    """Asks the process to stop while step `step` is shown, as a user who presses Ctrl-C then."""

    def __init__(self, file: Any, step: int, times: int = 1) -> None:
        super().__init__(file, live=False)
        self._step, self._times = step, times

    def progress(self, label: str, done: int, total: int, detail: str = "") -> None:
        super().progress(label, done, total, detail)
        if label == "training" and done == self._step:
            for _ in range(self._times):
                os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_stopped_at_every_step_and_resumed_is_never_stopped(
    small_data: Path, tiny_model: Path, tmp_path: Path, quiet: Display, method: str
) -> None:
    extra = {"steps": 7, "method": method, **({"lora.dropout": 0.1} if method == "lora" else {})}
    whole = run_tiny(small_data, tiny_model, tmp_path / "whole", quiet, **extra)
    run = tmp_path / "stopped"
    with (tmp_path / "stopped.txt").open("w") as file:
        with pytest.raises(StoppedError, match="stopped after step 1;") as end:
            run_tiny(small_data, tiny_model, run, _StopAt(file, 1), **extra)
        assert end.value.exit_code == 75
        for step in range(2, 8):
            with pytest.raises(StoppedError, match=f"stopped after step {step};"):
                resume(run, _StopAt(file, step))
    assert_equal_runs(whole.path, resume(run, quiet).path)


# A process of its own that kills itself, as a power cut would, while the step named by the environment is shown.
KILLED = """
import os, signal, sys
from pathlib import Path
from headstart.display import Display
from headstart.tune import resume, tune
import json
class Killed(Display):
    def progress(self, label, done, total, detail=""):
        if label == sys.argv[1] and done >= int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
data, model, out, settings = json.loads(sys.argv[3])
tune(data, model=model, out=out, settings=settings, display=Killed(live=False))
"""


@pytest.mark.parametrize(("label", "step"), [("scoring", 1), ("training", 3), ("training", 7), ("training", 12)])
def test_killed_and_resumed_is_never_killed(
    small_data: Path, tiny_model: Path, tmp_path: Path, quiet: Display, label: str, step: int
) -> None:
    settings = {**QUICK, "save.every": 2, "lora.dropout": 0.1}
    whole = tune(small_data, model=str(tiny_model), out=tmp_path / "whole", settings=settings, display=quiet)
    arguments = json.dumps([str(small_data), str(tiny_model), str(tmp_path / "killed"), settings])
    done = subprocess.run([sys.executable, "-c", KILLED, label, str(step), arguments], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    resumed = resume(tmp_path / "killed", quiet)
    assert_equal_runs(whole.path, resumed.path)


def test_the_best_model_is_kept_and_patience_ends_the_run(
    small_data: Path, tiny_model: Path, tmp_path: Path, quiet: Display
) -> None:
    settings = {
        "steps": 200,
        "optim.lr": 0.3,
        "optim.schedule": "constant",
        "eval.every": 2,
        "eval.patience": 2,
        "optim.clip": 0,
    }
    run = run_tiny(small_data, tiny_model, tmp_path / "run", quiet, **settings)
    watched = {r["step"]: r["watch_loss"] for r in RunFolder(run.path).read_metrics() if "watch_loss" in r}
    best = min(watched, key=lambda step: watched[step])
    assert run.result["steps"]["best"] == best
    assert run.result["steps"]["end"] == "patience"
    assert run.result["steps"]["taken"] == best + 4
    kept = load_file(run.path / "checkpoints" / f"best-{best:06d}" / "state.safetensors")
    saved = weights(run.path)
    assert all(
        torch.equal(
            kept[
                name.replace("base_model.model.", "")
                .replace("lora_A.", "lora_A.default.")
                .replace("lora_B.", "lora_B.default.")
            ],
            saved[name],
        )
        for name in saved
    )


def test_a_run_that_gains_nothing_does_not_say_better(
    small_data: Path, tiny_model: Path, tmp_path: Path, quiet: Display
) -> None:
    run = run_tiny(small_data, tiny_model, tmp_path / "run", quiet, **{"optim.lr": 1e-12})
    assert run.result["verdict"] == "no_gain"
    assert run.result["before"]["nll"]["value"] == pytest.approx(run.result["after"]["nll"]["value"], rel=1e-5)


def test_bad_rows_end_the_run_before_it_begins_unless_allowed(
    tiny_model: Path, small_data: Path, tmp_path: Path, quiet: Display
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(small_data.read_text() + '{"messages": []}\nbroken\n', encoding="utf-8")
    with pytest.raises(DataError) as error:
        run_tiny(bad, tiny_model, tmp_path / "run", quiet)
    assert {p.where.rpartition("bad.jsonl:")[2] for p in error.value.problems} == {"41:messages", "42"}
    assert not (tmp_path / "run").exists()
    run = run_tiny(bad, tiny_model, tmp_path / "run", quiet, **{"data.max_bad_rows": 2})
    dropped = read_json(run.path / "data.json")["dropped"]["bad"]
    assert len(dropped) == 2
    assert "2 rows were left out" in run.report.read_text()


def test_a_run_folder_is_never_written_over(small_data: Path, tiny_model: Path, tmp_path: Path, quiet: Display) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("precious")
    with pytest.raises(RunError, match="not empty"):
        run_tiny(small_data, tiny_model, tmp_path / "run", quiet)


def test_a_run_whose_data_changed_is_not_resumed(
    small_data: Path, tiny_model: Path, tmp_path: Path, quiet: Display
) -> None:
    with (tmp_path / "stopped.txt").open("w") as file, pytest.raises(StoppedError):
        run_tiny(small_data, tiny_model, tmp_path / "run", _StopAt(file, 2))
    small_data.write_text(small_data.read_text().replace("sore", "stiff"), encoding="utf-8")
    with pytest.raises(DataError, match="not what it was"):
        resume(tmp_path / "run", quiet)
    small_data.unlink()
    with pytest.raises(DataError, match="the file is gone"):
        resume(tmp_path / "run", quiet)


def test_two_processes_do_not_write_one_run(small_data: Path, tiny_model: Path, tmp_path: Path, quiet: Display) -> None:
    with (tmp_path / "stopped.txt").open("w") as file, pytest.raises(StoppedError):
        run_tiny(small_data, tiny_model, tmp_path / "run", _StopAt(file, 2))
    code = f"from pathlib import Path; from headstart.run import RunFolder; import sys\nwith RunFolder(Path({str(tmp_path / 'run')!r})).locked():\n print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(RunError, match=f"another process writes this run: {other.pid} on"):
        resume(tmp_path / "run", quiet)
    other.communicate()
    assert resume(tmp_path / "run", quiet).result["verdict"]
    assert not (tmp_path / "run" / WRITER).exists()


def test_what_cannot_fit_is_refused_before_the_first_step(
    small_data: Path, tiny_model: Path, tmp_path: Path, quiet: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headstart.machine.device_free_bytes", lambda _: 0)
    monkeypatch.setattr("headstart.machine.device_used_bytes", lambda _: 1)
    with pytest.raises(ResourceError, match="are needed") as error:
        run_tiny(small_data, tiny_model, tmp_path / "run", quiet)
    assert error.value.exit_code == 4
    assert "a smaller model" in error.value.problems[0].cure  # nothing fits into no memory at all


def test_recomputed_activations_change_nothing(
    small_data: Path, tiny_model: Path, tmp_path: Path, quiet: Display
) -> None:
    one = run_tiny(
        small_data, tiny_model, tmp_path / "one", quiet, **{"engine.checkpointing": "off", "lora.dropout": 0.1}
    )
    two = run_tiny(
        small_data, tiny_model, tmp_path / "two", quiet, **{"engine.checkpointing": "on", "lora.dropout": 0.1}
    )
    first, second = weights(one.path), weights(two.path)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-6)


def test_data_is_needed() -> None:
    with pytest.raises(DataError, match="no data was named"):
        tune(settings={})
    with pytest.raises(UsageError, match=r"no setting `optim\.rate`"):
        tune("x.jsonl", settings={"optim.rate": 1})


def test_a_run_goes_on_from_anywhere_and_only_with_what_it_began_with(
    small_data: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = tmp_path / "rows", tmp_path / "elsewhere"
    folder.mkdir()
    other.mkdir()
    small_data.rename(folder / "a.jsonl")
    shutil.copytree(tiny_model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "said.txt").open("w") as file:
        whole = tune("rows", model="model", out="whole", settings=QUICK, display=Display(file, live=False))
        with pytest.raises(StoppedError):
            tune("rows", model="model", out="run", settings=QUICK, display=_StopAt(file, 5))
        display = Display(file, live=False)
        monkeypatch.chdir(other)
        (folder / "b.jsonl").write_text((folder / "a.jsonl").read_text(), encoding="utf-8")
        with pytest.raises(DataError, match=r"b\.jsonl: the file is new"):
            resume(tmp_path / "run", display)
        (folder / "b.jsonl").unlink()
        weights_file = tmp_path / "model" / "model.safetensors"
        kept = weights_file.read_bytes()
        weights_file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        with pytest.raises(DataError, match="the model is not what it was"):
            resume(tmp_path / "run", display)
        weights_file.write_bytes(kept)
        resumed = resume(tmp_path / "run", display)
    assert_equal_runs(tmp_path / whole.path, resumed.path)


def test_a_place_that_cannot_be_written_is_told_before_anything_is_done(
    small_data: Path, tiny_model: Path, tmp_path: Path, quiet: Display
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="a file lies there"):
        run_tiny(small_data, tiny_model, tmp_path / "file", quiet)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "data.json").write_text("{}")  # killed before the run had begun
    run_tiny(small_data, tiny_model, tmp_path / "begun", quiet, steps=1)


def test_a_fault_that_ends_a_file_is_never_an_allowed_bad_row(
    small_data: Path, tiny_model: Path, tmp_path: Path, quiet: Display
) -> None:
    path = tmp_path / "rows.json"
    rows = [json.loads(line) for line in small_data.read_text().splitlines()]
    path.write_text(json.dumps(rows)[:-200], encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.json"):
        run_tiny(path, tiny_model, tmp_path / "run", quiet, **{"data.max_bad_rows": 5})


def test_a_model_with_contradictory_sampling_settings_can_be_saved(
    small_data: Path, tiny_model: Path, tmp_path: Path, quiet: Display
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    found = read_json(folder / "generation_config.json")
    (folder / "generation_config.json").write_text(json.dumps({**found, "temperature": 0.0, "top_p": 0.9}))
    run = run_tiny(small_data, folder, tmp_path / "run", quiet, steps=1)
    assert (run.path / "model" / "generation_config.json").exists()


def test_a_batch_may_be_larger_than_the_data(
    small_data: Path, tiny_model: Path, tmp_path: Path, quiet: Display
) -> None:
    run = run_tiny(small_data, tiny_model, tmp_path / "run", quiet, batch_size=30, steps=2)
    assert run.result["rows"]["train"] == 24
    assert run.result["tokens"]["rows_seen"] == 60
