"""What a large pack fills is known from smaller ones; and where memory runs out, a step is what it would have been."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headstart.data.feed import Feed
from headstart.data.forest import build_packs
from headstart.data.segments import Example
from headstart.display import Display
from headstart.engine.engine import Engine
from headstart.engine.forward import PackReader
from headstart.engine.loop import LoopPlan, Progress, Watched, train
from headstart.engine.memory import measure_growth, scaled, trace
from headstart.engine.optim import Schedule
from headstart.engine.plan import Layout, Scoring, _count_words, rehearse
from headstart.errors import ResourceError, StoppedError
from headstart.models import head
from headstart.models.adapt import Lora, adapt
from headstart.models.attention import register
from headstart.objectives.tokens import nll
from headstart.run import RunFolder
from headstart.tune import resume, tune
from headstart.verbs import plan
from tests.conftest import example
from tests.e2e.test_tiny_run import QUICK, _StopAt, assert_equal_runs
from tests.twins import twin

SAID = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried 1 byte"


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


@pytest.fixture
def quiet(tmp_path: Path) -> Any:
    with (tmp_path / "said.txt").open("w") as file:
        yield Display(file, live=False)


def rows(count: int = 16, length: int = 24) -> list[Example]:
    return [example([3 + (7 * n + k * k) % 90 for k in range(length)], line=n) for n in range(count)]


def build_engine(method: str = "lora", dropout: float = 0.1) -> Engine:
    adapted = adapt(twin("llama"), Lora(4, 8, dropout, ("all-linear",)) if method == "lora" else None, seed=0)
    return Engine(PackReader(adapted.model), adapted.trainable(), nll)


class _Hooks:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.smaller, self.steps = engine, [], []

    def use_smaller_packs(self, tokens_per_pack: int, said: str) -> None:
        self.smaller.append(tokens_per_pack)

    def on_step(self, record: Any) -> None:
        self.steps.append(record)

    def watch(self) -> Watched:
        return Watched(0.0)

    def keep_best(self, progress: Progress) -> bool:
        return True

    def on_bad_step(self, step: int, error: Any) -> None: ...

    def roll_back(self) -> int | None:
        return None

    def save(self, progress: Progress) -> None: ...

    def should_stop(self) -> bool:
        return False


def run(engine: Engine, budgets: list[int], limit: int = 1 << 30, failing_from: int = 0) -> _Hooks:
    """Train for three steps, each with its budget; packs of more than `limit` tokens fail from a step on."""
    hooks, progress = _Hooks(engine), Progress()
    outputs = engine.reader.outputs

    def fail(pack: Any) -> Tensor:
        if len(pack) > limit and progress.step >= failing_from:
            raise RuntimeError(SAID)
        return outputs(pack)

    engine.reader.outputs = fail  # type: ignore[method-assign]
    torch.manual_seed(1)
    feed = Feed(16, 8, 24, seed=0)
    for budget in budgets:
        feed.total = feed.seen + 8
        train(engine, feed, rows(), LoopPlan(Schedule(1e-2, 3), budget), progress, hooks)
    return hooks


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_step_on_which_memory_ran_out_is_the_step_with_smaller_packs(method: str) -> None:
    # Eight rows of 24 tokens lie in packs of 120 and 72: the first goes through, and its gradient is forgotten again.
    failed, small = build_engine(method), build_engine(method)
    hooks = run(failed, [120, 120, 120], limit=60, failing_from=1)
    run(small, [120, 60, 60])
    assert hooks.smaller == [60]
    assert [record.tokens_per_pack for record in hooks.steps] == [120, 60, 60]
    assert all(torch.equal(failed.trainable[name], small.trainable[name]) for name in small.trainable)
    whole, other = build_engine(method, 0.0), build_engine(method, 0.0)
    run(whole, [120] * 3)
    run(other, [120] * 3, limit=60)
    for name, parameter in whole.trainable.items():
        torch.testing.assert_close(other.trainable[name], parameter, rtol=1e-6, atol=1e-9)


def test_one_row_that_is_too_much_ends_the_run_with_a_cure() -> None:
    with pytest.raises(ResourceError, match=r"^rows:\d+: one row alone is too much") as error:
        run(build_engine(), [120], limit=10)
    assert error.value.exit_code == 4
    assert "data.max_length=12" in error.value.problems[0].cure


def test_memory_that_runs_out_for_moments_leaves_the_weights_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build_engine("full")
    before = {name: p.detach().clone() for name, p in engine.trainable.items()}
    real, left = torch.zeros_like, [5]

    def zeros_like(*args: Any, **kwargs: Any) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError(SAID)
        return real(*args, **kwargs)

    engine.forward_backward(build_packs(rows(), 1000)[0])
    monkeypatch.setattr(torch, "zeros_like", zeros_like)
    with pytest.raises(RuntimeError):
        engine.optim_step(1e-2)
    assert all(torch.equal(before[name], p) for name, p in engine.trainable.items())
    assert all(set(state) == {"step", "exp_avg", "exp_avg_sq"} for state in engine.optimizer.state.values())


def test_a_rehearsed_step_changes_nothing() -> None:
    rehearsed, fresh = build_engine("full"), build_engine("full")
    state = rehearsed.random_state()
    rehearsed.rehearse(build_packs(rows(), 1000)[0])
    rehearsed.rehearse_optim_step()
    rehearsed.set_random_state(state)
    for engine in (rehearsed, fresh):
        engine.forward_backward(build_packs(rows(), 1000)[0])
        engine.optim_step(1e-2)
    assert all(torch.equal(rehearsed.trainable[name], fresh.trainable[name]) for name in fresh.trainable)


@pytest.mark.parametrize("shared", [0, 80])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_a_pack_fills_follows_from_smaller_ones(method: str, shared: int) -> None:
    engine = build_engine(method, 0.0)
    made = rows(6, 160) if shared else rows(3, 160)
    for row in made:  # a prefix in common needs masks, which grow with the square
        row.segments[0].ids[:shared] = 5
    (pack,) = build_packs(made, 10_000)
    growth = measure_growth(engine.rehearse, pack, "cpu", begin=engine.discard)
    engine.discard()
    assert growth.tokens[-1] < 0.3 * len(pack)
    assert growth.bytes_at(len(pack)) == pytest.approx(trace(lambda: engine.rehearse(pack)).peak(), rel=0.05)


def test_logits_in_chunks_are_not_carried_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build_engine("lora", 0.0)
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 40 * engine.reader.head.vocabulary)  # type: ignore[attr-defined]
    (pack,) = build_packs(rows(4, 160), 10_000)
    growth = measure_growth(engine.rehearse, pack, "cpu", head=engine.reader.head, begin=engine.discard)  # type: ignore[attr-defined]
    engine.discard()
    assert growth.bytes_at(len(pack)) == pytest.approx(trace(lambda: engine.rehearse(pack)).peak(), rel=0.05)


def test_a_smaller_like_of_a_pack_has_its_nodes() -> None:
    (pack,) = build_packs(rows(6, 160), 10_000)
    small = scaled(pack, 0.25)
    assert len(small.length) == len(pack.length)
    assert (small.parent == pack.parent).all()
    assert len(small.sources) == pytest.approx(len(pack.sources) / 4, abs=1)
    assert (small.start + small.length).max() == len(small.ids) == len(small.positions)
    assert small.sources.max() < len(small)


def fail_from_step(monkeypatch: pytest.MonkeyPatch, step: int, limit: int) -> None:
    """Let the memory run out on packs of more than `limit` tokens in training, from a step on."""
    real = Engine.forward_backward

    def forward_backward(self: Engine, pack: Any) -> Any:
        states = list(self.optimizer.state.values())
        if len(pack) > limit and states and int(states[0]["step"]) >= step - 1:
            raise RuntimeError(SAID)
        return real(self, pack)

    monkeypatch.setattr(Engine, "forward_backward", forward_backward)


def test_a_run_on_which_memory_ran_out_says_so_and_goes_on_bit_for_bit(
    small_data: Path, tiny_model: Path, tmp_path: Path, quiet: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**QUICK, "lora.dropout": 0.1}
    probe = plan(small_data, model=str(tiny_model), settings=settings)
    fail_from_step(monkeypatch, 3, len(probe.layout.worst) // 2)
    whole = tune(small_data, model=str(tiny_model), out=tmp_path / "whole", settings=settings, display=quiet)
    assert whole.result["memory"]["out_of_memory_steps"] == [3]
    smaller = whole.result["memory"]["tokens_per_pack"]
    assert smaller <= len(probe.layout.worst) // 2
    assert RunFolder(whole.path).read_config().settings.engine.tokens_per_pack == smaller
    assert "the memory ran out at step 3" in RunFolder(whole.path).config_file.read_text()
    told = [r for r in RunFolder(whole.path).read_metrics() if r.get("out_of_memory")]
    assert [(r["step"], r["tokens_per_pack"]) for r in told] == [(3, smaller)]
    assert "out of memory" in whole.report.read_text()
    with (tmp_path / "stopped.txt").open("w") as file, pytest.raises(StoppedError, match="stopped after step 5"):
        tune(small_data, model=str(tiny_model), out=tmp_path / "run", settings=settings, display=_StopAt(file, 5))
    resumed = resume(tmp_path / "run", quiet)
    assert_equal_runs(whole.path, resumed.path)
    assert resumed.result["memory"]["out_of_memory_steps"] == [3]


@pytest.mark.parametrize(
    "given", [{"engine.tokens_per_pack": 2048, "engine.checkpointing": "off"}, {"data.max_length": 400}]
)
def test_what_cannot_fit_is_refused_with_a_setting_that_does(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    data = tmp_path / "rows.jsonl"
    texts = [f"{n} sore throat plan report patient doctor answer " * 40 for n in range(60)]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = {**QUICK, "batch_size": 16, "eval.generate": None, "kind": "unsupervised", **given}
    settings = {key: value for key, value in settings.items() if value is not None}
    monkeypatch.setattr("headstart.machine.device_used_bytes", lambda _: 0)
    needed = plan(data, model=str(tiny_model), settings=settings).estimate.phases_bytes["training"]
    monkeypatch.setattr("headstart.machine.device_free_bytes", lambda _: needed // 3)
    with pytest.raises(ResourceError, match="are needed") as error:
        plan(data, model=str(tiny_model), settings={**settings, "engine.checkpointing": "off"})
    cure = error.value.problems[0].cure
    assert cure.startswith("-s ")
    mended = dict(part.split("=") for part in cure.split(" ")[1::2])
    plan(
        data,
        model=str(tiny_model),
        settings={**settings, **{k: int(v) if v.isdigit() else v for k, v in mended.items()}},
    )


def test_a_scored_pack_that_a_training_step_covers_fills_less_than_it() -> None:
    engine = build_engine()
    (training,) = build_packs(rows(6, 160), 10_000)
    (scored,) = build_packs(rows(6, 150), 10_000)
    assert Scoring(len(scored), scored).within(training)
    assert trace(lambda: engine.reader.forward(scored)).peak() < trace(lambda: engine.rehearse(training)).peak()
    assert not Scoring(len(training), training).within(scored)


def test_a_rehearsal_times_scoring_by_itself_and_counts_the_quickest_pass_of_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = build_engine()
    (usual,), (worst,) = build_packs(rows(2), 1000), build_packs(rows(4), 1000)
    passes = {engine.rehearse: iter([9.0, 0.8, 0.6]), engine.reader.forward: iter([0.4, 0.2])}
    asked: list[tuple[Any, Any]] = []

    def timed(work: Any, pack: Any, device: str) -> float:
        asked.append((work, pack))
        work(pack)
        return next(passes[work])

    monkeypatch.setattr("headstart.engine.plan._timed", timed)
    layout = Layout(steps=1, row_tokens=1, tokens=1, targets=1, packs=1, worst=worst, usual=usual)
    pace = rehearse(engine, layout, None)
    assert asked == [(engine.rehearse, worst), *[(engine.rehearse, usual)] * 2, *[(engine.reader.forward, usual)] * 2]
    assert (pace.train_s, pace.forward_s) == (0.6 / len(usual), 0.2 / len(usual))
    # The largest pack to be scored is one of the two that are timed, by its own tokens.
    passes |= {engine.rehearse: iter([9.0, 0.8, 0.6]), engine.reader.forward: iter([0.3, 0.2])}
    asked.clear()
    pace = rehearse(engine, layout, Scoring(99, worst))
    assert asked[-2:] == [(engine.reader.forward, worst), (engine.reader.forward, usual)]
    assert pace.forward_s == min(0.3 / len(worst), 0.2 / len(usual)) == 0.3 / len(worst)
    assert not any(engine.clock.take().values())  # training begins anew


def test_how_many_words_rows_hold_is_known_from_some() -> None:
    """Four times as many tokens hold twice as many words: so do four times as many again. All that is there is counted."""
    first, rest = np.arange(100) % 10, np.arange(300) % 20
    assert _count_words([first, rest], 1600) == 40
    assert _count_words([first, rest], 400) == 20
    assert _count_words([first], 1600) == 10
