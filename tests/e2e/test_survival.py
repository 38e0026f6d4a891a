"""Runs that are killed, or whose disk, memory or numbers fail, at every named place: they end as if nothing had been."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import pty
import re
import resource
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from headstart import faults, machine, verify
from headstart.config import Override, build_config
from headstart.data import chats as chats_on_disk
from headstart.data.store import is_whole
from headstart.dataset import build_data
from headstart.display import Display
from headstart.engine import loop
from headstart.engine.checkpoint import Checkpoints
from headstart.engine.engine import Engine
from headstart.engine.numbers import is_spike
from headstart.errors import (
    DataError,
    DivergedError,
    HeadstartError,
    InterruptedRun,
    ResourceError,
    RunError,
    StoppedError,
    UsageError,
)
from headstart.files import TEMPORARY_PREFIX, read_json, write_json
from headstart.models import native
from headstart.run import RunFolder
from headstart.tune import resume, tune
from headstart.verify import differences, verify_resume
from tests.conftest import build_encoder, build_model, build_network
from tests.e2e.test_tiny_run import QUICK, _StopAt, assert_equal_runs

# A server that has imported everything and computed nothing forks a process for each session: none pays for imports.
SESSIONS = multiprocessing.get_context("forkserver")
LATE = (
    "sacrebleu",
    "scipy.stats",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
)
SESSIONS.set_forkserver_preload(["headstart.tune", "peft", "transformers", *LATE, "tests.e2e.test_survival"])
SETTINGS = {**QUICK, "steps": 6, "eval.every": 2, "save.every": 2, "save.keep": 1, "data.held_out": 16}
CANARY = "hf_canary_that_must_never_be_written"
ENCODES = {"eval.generate": None}
WAYS: dict[str, dict[str, Any]] = {
    "lora, dropout, several packs a step": {"lora.dropout": 0.1, "engine.tokens_per_pack": 32, "eval.guard": "auto"},
    "full": {"method": "full", "optim.lr": 1e-3},
    "labels": {**ENCODES, "method": "full", "kind": "supervised", "data.text": "text", "data.label": "label"},
    "embeddings": {**ENCODES, "method": "lora", "engine.tokens_per_pack": 32},  # the adapter is merged at the end
    "masked text": {**ENCODES, "method": "full", "task": "masked"},
    "images": {**ENCODES, "method": "full"},
    "pairs": {"lora.dropout": 0.1, "engine.tokens_per_pack": 160},  # of which answers are drawn on the way
    "votes": {"lora.dropout": 0.1, "engine.tokens_per_pack": 160},
}
BUILD = {"labels": build_encoder, "embeddings": build_encoder, "masked text": build_encoder, "images": build_network}


def session(data: Path, model: Path, run: Path, settings: dict[str, Any], fail: str, shown: str = os.devnull) -> None:
    """Begin a run or go on with it, shown in a file, and leave with its exit code; a process of its own."""
    os.environ.update({faults.VARIABLE: fail, "HEADSTART_HOME": str(run.parent / "home")})
    torch.set_num_threads(1)
    gc.freeze()
    with Path(shown).open("w") as file:
        display = Display(file, live=False)
        try:
            if (run / "config.yaml").exists():
                resume(run, display)
            else:
                tune(data, model=str(model), out=run, settings=settings, display=display)
        except HeadstartError as error:
            (run.parent / f"{run.name}-error.json").write_text(json.dumps(error.to_json()), encoding="utf-8")
            sys.exit(error.exit_code)


class Trial:
    """A run that is carried out in sessions, and the same run untouched."""

    def __init__(self, data: Path, model: Path, folder: Path, settings: dict[str, Any]) -> None:
        self.data, self.model, self.folder = data, model, folder
        self.settings = {key: value for key, value in {**SETTINGS, **settings}.items() if value is not None}
        folder.mkdir()
        self.whole = folder / "whole"
        assert self.session("", self.whole) == 0

    def session(self, fail: str, run: Path) -> int:
        process = SESSIONS.Process(target=session, args=(self.data, self.model, run, self.settings, fail))
        process.start()
        process.join()
        assert process.exitcode is not None
        return process.exitcode

    def survive(self, *fails: str, code: int = -signal.SIGKILL) -> Path:
        """Let each session fail as told, then go on to the end; nothing must tell it from the untouched run."""
        run = self.folder / f"run-{len(list(self.folder.iterdir()))}"
        for fail in fails:
            assert self.session(fail, run) == code, fail
        assert self.session("", run) == 0
        assert_equal_runs(self.whole, run)
        assert not list(run.rglob(f"{TEMPORARY_PREFIX}*"))
        return run

    def error(self, run: Path) -> dict[str, Any]:
        return dict(read_json(run.parent / f"{run.name}-error.json")["problems"][0])


@pytest.fixture(scope="module", params=list(WAYS))
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trial]:
    made: dict[str, Trial] = {}

    def make(name: str) -> Trial:
        if name not in made:
            made[name] = build_trial(tmp_path_factory.mktemp("survival"), name)
        return made[name]

    return make


def build_trial(folder: Path, way: str) -> Trial:
    """Write model and rows of a way of training into a folder, and carry out its untouched run."""
    model = BUILD.get(way, build_model)(folder / "model")
    return Trial(write_rows(folder, way), model, folder / "runs", WAYS[way])


def write_rows(folder: Path, way: str) -> Path:
    """Write the rows that a way of training learns from; return the file, or the folder."""
    if way == "images":
        return write_pictures(folder / "pictures")
    path = folder / "rows.jsonl"
    made = {"labels": labels, "embeddings": related, "masked text": texts, "pairs": pairs, "votes": votes}
    rows = made.get(way, chats)()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chats() -> list[dict[str, Any]]:
    words = ["sore throat", "plan", "report", "patient", "doctor", "answer", "three days", "reason"]
    turns = [(f"{n} {words[n % 8]}?", f"The {words[n % 8]}.") for n in range(40)]
    return [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in turns]


def labels() -> list[dict[str, Any]]:
    return [{"text": f"text {n % 50} {n % 3}", "label": "abc"[n % 3]} for n in range(48)]


def related() -> list[dict[str, Any]]:
    return [{"anchor": f"{n} {n % 7}", "positive": f"text {n} {n % 5}"} for n in range(44)]


def texts() -> list[dict[str, Any]]:
    return [{"text": " ".join(str(word % 50) for word in range(n, n + 12))} for n in range(44)]


def pairs() -> list[dict[str, Any]]:
    turns = [row["messages"] for row in chats()]
    return [{"prompt": q["content"], "chosen": a["content"], "rejected": q["content"]} for q, a in turns]


def votes() -> list[dict[str, Any]]:
    return [{"prompt": r["prompt"], "completion": r[s], "label": s == "chosen"} for r in pairs() for s in list(r)[1:]]


def write_pictures(folder: Path) -> Path:
    """Write dark and bright images into a folder for each; return the folder that holds both."""
    chance = np.random.default_rng(0)
    for number in range(40):
        path = folder / ("dark" if number % 2 else "bright") / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        base = 20 if number % 2 else 180
        Image.fromarray((base + chance.integers(0, 60, (24, 36, 3))).astype(np.uint8)).save(path)
    return folder


KILLS = [
    *(f"{point}@{name}" for name in ("before.json", "report.html", "result.json") for point in faults.POINTS[:4]),
    *(f"{point}@step-000004" for point in ("folder.made", "folder.written", "folder.synced", "folder.renamed")),
    *(f"{point}@best-000002" for point in ("folder.written", "folder.renamed")),
    *(f"{point}@model" for point in ("folder.made", "folder.synced", "folder.renamed")),
    "line.made@metrics.jsonl:3",
    "evaluation.pack:3",
    "evaluation.scored@before",
    "evaluation.scored@after",
    *(f"step.{point}:3" for point in ("forward", "backward", "gradient", "updated", "told")),
    "step.updated:6",
    *(f"checkpoint.{point}:2" for point in ("tensors", "values", "committed", "pruning")),
]
NOT_BEGUN = [f"{point}@{name}" for name in ("data.json", "config.yaml") for point in faults.POINTS[:3]]
WAYS_OF = list(WAYS)


@pytest.mark.parametrize(("number", "fail"), list(enumerate([*KILLS, *NOT_BEGUN])))
def test_killed_anywhere_and_gone_on_with_is_never_killed(
    trials: Callable[[str], Trial], number: int, fail: str
) -> None:
    trials(WAYS_OF[number % len(WAYS_OF)]).survive(fail)


def test_every_place_is_tried() -> None:
    tried = {text.partition("@")[0].partition(":")[0] for text in [*KILLS, "folder.aside"]}
    assert tried == set(faults.POINTS)


def test_killed_again_and_again(trials: Callable[[str], Trial], way: str) -> None:
    """The folder of the model is there when it is written a second time."""
    trials(way).survive("step.forward:2", "checkpoint.pruning", "file.written@result.json", "folder.aside@model")


# What may happen to a run, in any order and with any of these settings.
CONFIGS = {
    "method": st.sampled_from(["lora", "full"]),
    "lora.dropout": st.sampled_from([0.0, 0.1]),
    "batch_size": st.sampled_from([2, 3, 8]),
    "engine.tokens_per_pack": st.sampled_from([32, 64, 512]),
    "eval.every": st.sampled_from([0, 1, 3]),
    "save.every": st.sampled_from([0, 1, 2, 5]),
    "save.keep": st.sampled_from([1, 2]),
    "optim.schedule": st.sampled_from(["cosine", "constant"]),
}
BLOWS = st.builds(
    lambda point, time, how: f"{point}:{time}{how}",
    st.sampled_from(faults.POINTS),
    st.integers(1, 8),
    st.sampled_from(["", "=SIGTERM", "=ENOSPC"]),
)
EXAMPLES = int(os.environ.get("HEADSTART_EXAMPLES", "2"))  # of the next test; it takes some ten seconds each


@hypothesis.settings(
    max_examples=EXAMPLES,
    derandomize=EXAMPLES == 2,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(config=st.fixed_dictionaries(CONFIGS), blows=st.lists(BLOWS, min_size=1, max_size=4))
def test_any_schedule_of_blows_comes_to_the_same(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any], blows: list[str]
) -> None:
    if config["method"] == "full":
        config = {key: value for key, value in config.items() if not key.startswith("lora.")}
    folder = tmp_path_factory.mktemp("blows")
    trial = Trial(write_rows(folder, "full"), tiny_model, folder / "runs", config)
    run = trial.folder / "run"
    for blow in blows:
        assert trial.session(blow, run) in (0, -signal.SIGKILL, StoppedError.exit_code, ResourceError.exit_code), blow
    assert trial.session("", run) == 0
    assert_equal_runs(trial.whole, run)


DISK_FAULTS = [
    ("file.written@before.json", "ENOSPC"),
    ("file.made@config.yaml", "EROFS"),
    ("folder.made@model", "EMFILE"),
    ("folder.written@model", "EDQUOT"),
    ("folder.synced@step-000006", "EIO"),
    ("file.synced@result.json", "EACCES"),
    ("file.made@report.html", "ENAMETOOLONG"),
]


@pytest.mark.parametrize(("place", "fault"), DISK_FAULTS)
def test_a_disk_that_fails_ends_the_run_and_loses_nothing(
    trials: Callable[[str], Trial], place: str, fault: str
) -> None:
    trial = trials(WAYS_OF[len(fault) % len(WAYS_OF)])
    problem = trial.error(trial.survive(f"{place}={fault}", code=ResourceError.exit_code))
    assert problem["code"] == ("disk.full" if fault in ("ENOSPC", "EDQUOT") else "disk.failed")
    assert ("-o FOLDER" if "config.yaml" in place else "headstart resume") in problem["cure"]


@pytest.mark.parametrize(
    "fault", ["folder.written@step-000002=ENOSPC", "checkpoint.values=EIO", "line.made@metrics.jsonl:2=ENOSPC"]
)
def test_what_cannot_be_written_for_once_is_told_and_the_run_goes_on(
    trials: Callable[[str], Trial], fault: str
) -> None:
    trial = trials(WAYS_OF[0])
    run = trial.folder / fault.partition("=")[0]
    assert trial.session(fault, run) == 0
    assert_equal_runs(trial.whole, run)
    assert "can't be written (" in (run / "log.txt").read_text()


def test_a_model_that_is_merged_is_there_whole_or_not_at_all(trials: Callable[[str], Trial]) -> None:
    trial = trials("embeddings")
    run = trial.folder / "merged"
    killed, full = -signal.SIGKILL, ResourceError.exit_code
    for place, code in (("written", killed), ("written@model=ENOSPC", full), ("synced@model=EIO", full)):
        assert trial.session(f"folder.{place}" + "@model" * ("@" not in place), run) == code
        assert not (run / "model").exists()
    assert trial.session("", run) == 0
    assert_equal_runs(trial.whole, run)


def cramped(most_bytes: int, *of_session: Any) -> None:
    """Carry out a session in which the system writes no file of more than some bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))
    session(*of_session)


def test_what_the_system_itself_refuses_is_told_and_loses_nothing(trials: Callable[[str], Trial]) -> None:
    """No place of ours fails here: the best weights are written, and the larger checkpoints aren't."""
    trial = trials("full")
    run = trial.folder / "cramped"
    (best,) = (trial.whole / "checkpoints").glob("best-*")
    sizes = [
        (trial.whole / "checkpoints" / name / "state.safetensors").stat().st_size for name in (best, "step-000006")
    ]
    arguments = (sum(sizes) // 2, trial.data, trial.model, run, trial.settings, "")
    process = SESSIONS.Process(target=cramped, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == ResourceError.exit_code
    assert trial.error(run)["code"] == "disk.failed"
    said = (run / "log.txt").read_text()
    assert all(f"step {step}: the checkpoint can't be written (File too large)" in said for step in (2, 4))
    assert not list((run / "checkpoints").glob("step-*"))
    assert trial.session("", run) == 0
    assert_equal_runs(trial.whole, run)


def test_a_disk_that_stays_full_keeps_the_last_good_checkpoint(trials: Callable[[str], Trial]) -> None:
    trial = trials("full")
    run = trial.survive("folder.written:5+=ENOSPC", code=ResourceError.exit_code)
    assert "free some space" in trial.error(run)["cure"]


@pytest.mark.parametrize("name", WAYS_OF[1:])
def test_memory_that_runs_out_in_scoring_costs_time_alone(trials: Callable[[str], Trial], name: str) -> None:
    trial = trials(name)
    run = trial.folder / "scored"
    assert trial.session("evaluation.pack:1=memory,evaluation.pack:4=memory", run) == 0
    assert (run / "log.txt").read_text().count("out of memory while scoring") == 2
    assert read_json(run / "result.json")["verdict"] == read_json(trial.whole / "result.json")["verdict"]


def test_memory_that_runs_out_beside_training_ends_the_run_and_loses_nothing(trials: Callable[[str], Trial]) -> None:
    trial = trials("labels")
    for place in ("evaluation.scored@before", "evaluation.scored@after", "folder.made@model"):
        run = trial.survive(f"{place}=memory", code=ResourceError.exit_code)
        assert trial.error(run)["code"] == "memory.exhausted"


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("step.forward:4", "SIGTERM"),
        ("checkpoint.tensors", "SIGTERM"),
        ("checkpoint.pruning", "SIGINT"),
        ("step.told:3", "SIGHUP"),
    ],
)
def test_asked_to_stop_anywhere_it_saves_and_goes_on(trials: Callable[[str], Trial], place: str, name: str) -> None:
    trials(WAYS_OF[len(place) % len(WAYS_OF)]).survive(f"{place}={name}", code=StoppedError.exit_code)


@pytest.mark.parametrize(
    "asked", ["step.forward:4=SIGINT,step.backward:4=SIGINT", "checkpoint.tensors=SIGTERM,checkpoint.values=SIGTERM"]
)
def test_asked_twice_it_stops_at_once_and_loses_nothing(trials: Callable[[str], Trial], asked: str) -> None:
    trials(WAYS_OF[0]).survive(asked, code=InterruptedRun.exit_code)


@pytest.mark.parametrize("place", ["folder.made", "checkpoint.values", "folder.synced"])
def test_killed_in_the_save_that_it_was_asked_for_it_loses_nothing(trials: Callable[[str], Trial], place: str) -> None:
    """A grace that is shorter than a save: the step before last is there."""
    trial = trials("full")
    place = place if place.startswith("checkpoint") else f"{place}@step-000003"
    asked = "step.told:3=SIGTERM"
    run = trial.folder / place
    # Best weights and the checkpoint of step 2 are written before.
    assert trial.session(f"{asked},{place}{':3' if place.startswith('checkpoint') else ''}", run) == -signal.SIGKILL
    assert Checkpoints(run / "checkpoints").newest == 2
    assert trial.session("", run) == 0
    assert_equal_runs(trial.whole, run)


@pytest.mark.parametrize("name", ["full", "pairs"])
def test_an_evaluation_that_it_is_asked_to_stop_in_is_broken_off_and_made_anew(
    trials: Callable[[str], Trial], name: str
) -> None:
    """It may take longer than a run is given to stop in. So may the second try, and that of the last step.

    The checkpoint is not written again: between the two renames that this would take, none would be there.
    """
    trial = trials(name)
    run = trial.folder / "broken-off"
    again = "evaluation.pack=SIGTERM,folder.aside@step-000002"
    for asked, step in (("step.told:2=SIGTERM", 2), (again, 2), ("step.told:4=SIGTERM", 6)):
        assert trial.session(asked, run) == StoppedError.exit_code
        assert Checkpoints(run / "checkpoints").newest == step
        watched = [line["step"] for line in RunFolder(run).read_metrics() if "watch_loss" in line]
        assert watched == list(range(2, step, 2))
    assert trial.session("evaluation.scored@after", run) == -signal.SIGKILL  # the checkpoint is still that without it
    assert trial.session("", run) == 0
    assert_equal_runs(trial.whole, run)


def on_a_terminal(data: Path, model: Path, run: Path, settings: dict[str, Any], fail: str) -> None:
    """Carry out a run in a terminal of its own that is closed when the run halts. Leave with its exit code."""
    child, terminal = pty.fork()
    if not child:
        try:
            session(data, model, run, settings, fail, "/dev/tty")
        except SystemExit as end:
            os._exit(int(end.code or 0))
        finally:
            os._exit(1)
    while b"training" not in os.read(terminal, 1 << 16):
        pass
    assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
    os.close(terminal)  # sends SIGHUP; what is said from now on can't be written
    os.kill(child, signal.SIGCONT)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def test_a_terminal_that_is_closed_stops_a_run_which_saves_and_goes_on(trials: Callable[[str], Trial]) -> None:
    trial = trials("full")
    run = trial.folder / "terminal"
    arguments = (trial.data, trial.model, run, trial.settings, "step.backward:3=SIGSTOP")
    process = SESSIONS.Process(target=on_a_terminal, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == StoppedError.exit_code
    assert Checkpoints(run / "checkpoints").newest == 3
    assert "nothing more can be shown" in (run / "log.txt").read_text()
    assert trial.session("", run) == 0
    assert_equal_runs(trial.whole, run)


def halted(data: Path, model: Path, run: Path, settings: dict[str, Any], fail: str) -> None:
    """Carry out a run in a process that halts; let it go on whenever it does. Leave with its exit code."""
    child = os.fork()
    if not child:
        try:
            session(data, model, run, settings, fail)
            os._exit(0)
        finally:
            os._exit(1)
    halts, status = 0, os.waitpid(child, os.WUNTRACED)[1]
    while os.WIFSTOPPED(status):
        halts += 1
        os.kill(child, signal.SIGCONT)
        status = os.waitpid(child, os.WUNTRACED)[1]
    sys.exit(halts if status == 0 else -1)


def test_halted_and_let_go_on_it_is_the_same(trials: Callable[[str], Trial]) -> None:
    trial = trials("full")
    run = trial.folder / "halted"
    halts = "step.backward:2=SIGSTOP,checkpoint.tensors:2=SIGSTOP,evaluation.scored@after=SIGSTOP"
    process = SESSIONS.Process(target=halted, args=(trial.data, trial.model, run, trial.settings, halts))
    process.start()
    process.join()
    assert process.exitcode == 3
    assert_equal_runs(trial.whole, run)


def read_alone(data: Path, model: Path, home: Path) -> None:
    """Encode a file's rows by way of the cache; a process of its own."""
    os.environ["HEADSTART_HOME"] = str(home)
    chats_on_disk.STORED_BYTES = 0
    named = {"data.train": (str(data),), "model": str(model)}
    build_data(build_config(None, [Override(key, value, "argument") for key, value in named.items()]))


def test_ten_processes_make_one_cache(trials: Callable[[str], Trial], tmp_path: Path) -> None:
    trial = trials(WAYS_OF[0])
    processes = [SESSIONS.Process(target=read_alone, args=(trial.data, trial.model, tmp_path)) for _ in range(10)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 10
    (store,) = (path for path in (tmp_path / "tokens").rglob("manifest.json"))
    assert is_whole(store.parent)
    assert not list(tmp_path.rglob(f"{TEMPORARY_PREFIX}*"))


def without_network(data: Path, model: Path, run: Path, settings: dict[str, Any]) -> None:
    """Carry out a run where no connection can be made, and with a secret in the environment."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was tried")

    socket.socket.connect = refuse  # type: ignore[method-assign]
    socket.getaddrinfo = refuse  # type: ignore[assignment]
    os.environ["HF_TOKEN"] = CANARY
    session(data, model, run, settings, "")


def test_a_run_needs_no_network_and_writes_no_secret(trials: Callable[[str], Trial]) -> None:
    trial = trials(WAYS_OF[0])
    run = trial.folder / "offline"
    process = SESSIONS.Process(target=without_network, args=(trial.data, trial.model, run, trial.settings))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert_equal_runs(trial.whole, run)
    assert not [path for path in run.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]


# --- numbers ---


def poison(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Put a NaN into one gradient of some steps."""
    real = loop.take_step

    def take_step(engine: Engine, examples: Any, rows: Any, plan: Any, step: int, *more: Any, **named: Any) -> Any:
        add = engine.forward_backward_all

        def add_poisoned(packs: Any) -> Any:
            sums = add(packs)
            gradient = next(p.grad for p in engine.trainable.values() if p.grad is not None)
            gradient.view(-1)[0] = float("nan")
            return sums

        with monkeypatch.context() as patch:
            if step + 1 in steps:
                patch.setattr(engine, "forward_backward_all", add_poisoned)
            return real(engine, examples, rows, plan, step, *more, **named)

    monkeypatch.setattr(loop, "take_step", take_step)


@pytest.fixture
def quiet(tmp_path: Path) -> Any:
    with (tmp_path / "said.txt").open("w") as file:
        yield Display(file, live=False)


def test_a_step_that_is_not_finite_is_left_out_told_and_the_same_after_a_stop(
    small_data: Path, tiny_model: Path, tmp_path: Path, quiet: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 2, 3)
    settings = {**SETTINGS, "save.every": 3}
    whole = tune(small_data, model=str(tiny_model), out=tmp_path / "whole", settings=settings, display=quiet)
    assert whole.result["steps"]["left_out"] == [2, 3]
    lines = RunFolder(whole.path).read_metrics()
    assert [line["step"] for line in lines if "loss" in line] == [1, 4, 5, 6]
    assert "gradient's norm nan" in next(line["not_finite"] for line in lines if "not_finite" in line)
    assert "small.jsonl:" in (tmp_path / "said.txt").read_text()
    assert "left out" in whole.report.read_text()
    assert "NaN" not in RunFolder(whole.path).metrics_file.read_text()
    # At once, in the step behind a checkpoint that was written right after a step that was left out.
    with (tmp_path / "stopped.txt").open("w") as file:
        display = _StopAt(file, 4, times=2)
        with pytest.raises(InterruptedRun):
            tune(small_data, model=str(tiny_model), out=tmp_path / "run", settings=settings, display=display)
    assert_equal_runs(whole.path, resume(tmp_path / "run", quiet).path)


def test_three_in_a_row_end_the_run_and_name_the_last_good_checkpoint(
    small_data: Path, tiny_model: Path, tmp_path: Path, quiet: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 4, 5, 6)
    with pytest.raises(DivergedError, match="3 steps in a row") as error:
        tune(small_data, model=str(tiny_model), out=tmp_path / "run", settings=SETTINGS, display=quiet)
    assert error.value.exit_code == 5
    problem = error.value.problems[0]
    assert problem.where.count("small.jsonl:") == SETTINGS["batch_size"]
    assert "that of step 4" in problem.cure  # left out, it is saved as it was after step 3
    assert "--allow settings" in problem.cure


def test_a_step_that_is_not_finite_can_roll_back_or_end_the_run(
    small_data: Path, tiny_model: Path, tmp_path: Path, quiet: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 6)
    back, left = (
        tune(
            small_data,
            model=str(tiny_model),
            out=tmp_path / policy,
            settings={**SETTINGS, "optim.not_finite": policy, "eval.every": 0, "save.every": 4},
            display=quiet,
        )
        for policy in ("rollback", "skip")
    )
    saved = load_file(left.path / "checkpoints" / "step-000006" / "state.safetensors")
    rolled = load_file(back.path / "checkpoints" / "step-000006" / "state.safetensors")
    assert any(not torch.equal(saved[name], rolled[name]) for name in saved if name.startswith("model."))
    assert "the weights are those of step 4 again" in (tmp_path / "said.txt").read_text()
    settings = {**SETTINGS, "optim.not_finite": "stop"}
    with pytest.raises(DivergedError):
        tune(small_data, model=str(tiny_model), out=tmp_path / "stop", settings=settings, display=quiet)


def test_a_spike_stands_out_by_eight_robust_deviations() -> None:
    recent = [2.0, 2.1, 1.9, 2.2, 1.8] * 4  # median 2.0, median absolute deviation 0.1
    limit = 2.0 + 8 * 1.4826 * 0.1
    assert not is_spike(limit - 1e-6, recent)
    assert is_spike(limit + 1e-6, recent)
    assert not is_spike(100.0, recent[:15])
    assert is_spike(20.0 * (1 + 8 * 0.02) + 1e-6, [20.0] * 16)
    assert not is_spike(0.03 + 0.499, [0.03] * 16)  # near nothing one hard row stands out, and is none
    assert is_spike(0.03 + 0.501, [0.03] * 16)


# --- a changed world ---


def stopped(data: Path, model: Path, run: Path, step: int = 3, **more: Any) -> None:
    with Path(os.devnull).open("w") as file, pytest.raises(StoppedError):
        tune(data, model=str(model), out=run, settings={**SETTINGS, **more}, display=_StopAt(file, step))


def test_other_settings_and_versions_are_refused_or_allowed_by_name_and_recorded(
    small_data: Path, tiny_model: Path, tmp_path: Path, quiet: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    stopped(small_data, tiny_model, run)
    config = run / "config.yaml"
    config.write_text(re.sub(r"( lr: )[\d.e-]+", r"\g<1>0.0005", config.read_text()))
    versions = machine.versions()
    monkeypatch.setattr(machine, "versions", lambda: {**versions, "torch": "99.0"})
    with pytest.raises(RunError) as error:
        resume(run, quiet)
    assert [problem.where for problem in error.value.problems] == ["config.yaml", "torch"]
    assert re.search(r"`optim\.lr` was [\d.e-]+ and is 0\.0005", str(error.value))
    with pytest.raises(RunError, match=r"torch: was .* and is 99\.0"):
        resume(run, quiet, ["settings"])
    with pytest.raises(UsageError, match="'lr' can't be allowed"):
        resume(run, quiet, ["lr"])
    done = resume(run, quiet, ["settings", "versions"])
    (once,) = read_json(run / "data.json")["allowed"]
    assert len(once["changes"]) == 2
    assert "99.0" in done.report.read_text()
    assert next(line["lr"] for line in reversed(RunFolder(run).read_metrics()) if "lr" in line) < 0.0005


@pytest.mark.skipif(native.find() is None, reason="there are no kernels here")
def test_a_run_that_began_without_kernels_does_not_go_on_with_them_in_silence(
    small_data: Path, tiny_model: Path, tmp_path: Path, quiet: Display
) -> None:
    run = tmp_path / "run"
    stopped(small_data, tiny_model, run)
    record = read_json(run / "data.json")
    assert record["versions"].pop("C compiler") in str(native.find().compiler)
    write_json(run / "data.json", record)  # as it was before there were kernels
    with pytest.raises(RunError, match="was not used and is") as error:
        resume(run, quiet)
    assert [problem.where for problem in error.value.problems] == ["C compiler"]
    resume(run, quiet, ["versions"])


def test_more_rows_can_be_allowed_but_never_other_rows_of_the_proof(
    small_data: Path, tiny_model: Path, tmp_path: Path, quiet: Display
) -> None:
    run = tmp_path / "run"
    stopped(small_data, tiny_model, run)
    kept = small_data.read_text()
    rows = read_json(run / "evaluation" / "before.json")
    held = {row["where"].rpartition(":")[2] for row in rows if not row["guard"]}
    lines = kept.splitlines(keepends=True)
    trained = next(n for n in range(len(lines)) if str(n + 1) not in held)
    small_data.write_text("".join([*lines[:trained], lines[trained].replace("The", "A"), *lines[trained + 1 :]]))
    with pytest.raises(DataError, match="--allow data"):
        resume(run, quiet)
    small_data.write_text("".join(lines[1:]))
    with pytest.raises(DataError, match="other rows are held out"):
        resume(run, quiet, ["data"])
    small_data.write_text(kept)
    resume(run, quiet)


def test_a_checkpoint_of_another_run_is_set_aside(
    small_data: Path, tiny_model: Path, tmp_path: Path, quiet: Display
) -> None:
    for name, seed in (("one", 0), ("two", 1)):
        stopped(small_data, tiny_model, tmp_path / name, 4, seed=seed, **{"save.keep": 2})
    newest = tmp_path / "one" / "checkpoints" / "step-000004"
    shutil.rmtree(newest)
    shutil.copytree(tmp_path / "two" / "checkpoints" / "step-000004", newest)
    resume(tmp_path / "one", quiet)
    assert "belongs to another run" in (tmp_path / "said.txt").read_text()
    assert (newest.parent / "damaged-step-000004").is_dir()


def test_damaged_best_weights_are_told_and_the_last_are_kept(
    small_data: Path, tiny_model: Path, tmp_path: Path, quiet: Display
) -> None:
    run = tmp_path / "run"
    stopped(small_data, tiny_model, run, **{"optim.lr": 0.3, "optim.schedule": "constant", "optim.clip": 0})
    (best,) = (run / "checkpoints").glob("best-*")
    (best / "state.safetensors").write_bytes(b"")
    done = resume(run, quiet)
    said = (tmp_path / "said.txt").read_text()
    kept = done.result["steps"]["best"]
    assert kept is None or kept > 2
    assert kept is not None or "the model of the last step" in said


def test_a_record_that_is_cut_is_named_and_can_be_made_anew(trials: Callable[[str], Trial]) -> None:
    trial = trials("full")
    run = trial.folder / "cut"
    assert trial.session("step.told:3=SIGTERM", run) == StoppedError.exit_code
    for name, cure in (("data.json", "put it back"), ("evaluation/before.json", "delete it")):
        file = run / name
        whole = file.read_bytes()
        for left in (b"", whole[: len(whole) // 2], b"\xff" + whole[1:]):
            file.write_bytes(left)
            assert trial.session("", run) == RunError.exit_code
            problem = trial.error(run)
            assert (problem["code"], problem["where"]) == ("run.damaged", str(file))
            assert cure in problem["cure"]
        if cure == "put it back":
            file.write_bytes(whole)
        else:
            file.unlink()
    assert trial.session("", run) == 0
    assert_equal_runs(trial.whole, run)


@pytest.mark.parametrize("every", [0, 2])  # what is written first is a checkpoint, or the best weights
def test_a_run_whose_folder_is_taken_away_says_so(
    small_data: Path, tiny_model: Path, tmp_path: Path, every: int
) -> None:
    class TakesAway(Display):
        def progress(self, label: str, done: int, total: int, detail: str = "") -> None:
            if label == "training" and done == 3:
                shutil.rmtree(tmp_path / "run")

    with (tmp_path / "said.txt").open("w") as file:
        display, settings = TakesAway(file, live=False), {**SETTINGS, "eval.every": every}
        with pytest.raises(ResourceError, match="folder is gone") as error:
            tune(small_data, model=str(tiny_model), out=tmp_path / "run", settings=settings, display=display)
    assert error.value.exit_code == 4
    assert not (tmp_path / "run").exists()


# --- proof on a user's own machine ---


def test_a_user_can_see_that_nothing_is_lost(
    small_data: Path, tiny_model: Path, tmp_path: Path, quiet: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "KILLS", verify.KILLS[:2])  # the others are tried above, without a new process for each
    run = tune(
        small_data, model=str(tiny_model), out=tmp_path / "run", settings={**SETTINGS, "steps": 4}, display=quiet
    )
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with (tmp_path / "verified.txt").open("w") as file:
        found = verify_resume(run.path, Display(file, live=False), steps=4)
    assert found.same, found.differences
    assert before == {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    other = tmp_path / "other"
    shutil.copytree(run.path, other)
    file = next((other / "model").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (difference,) = differences(run.path, other)
    assert "1 of" in difference
