"""What keeps a run from going on in silence: memory, signals, numbers, adapters without targets, uneven labels."""

from __future__ import annotations

import errno
import math
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import pytest
import torch

from headstart.config import Override, build_config
from headstart.data.labels import find_labels, label_notes
from headstart.data.read import Where
from headstart.data.records import Labelled
from headstart.data.segments import encode_rows
from headstart.display import Display
from headstart.engine.loop import Progress, Watched, _judge
from headstart.errors import DivergedError, ModelError, ResourceError, UsageError
from headstart.job import _decide_machine
from headstart.machine import resources
from headstart.models.adapt import Lora, adapt
from headstart.models.attention import Forest
from headstart.stall import StallWatch
from headstart.stop import StopRequest
from tests.twins import twin


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), "memory.exhausted"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "memory.exhausted"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), "memory.exhausted"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk.full"),
    ],
)
def test_what_runs_out_is_named(error: Exception, code: str) -> None:
    with pytest.raises(ResourceError) as found, resources():
        raise error
    assert found.value.problems[0].code == code


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), NotImplementedError("op"), OSError(errno.EACCES, "no")]
)
def test_other_faults_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)), resources():
        raise error


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.asked
            known = signal.getsignal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert stop.asked
        assert signal.getsignal(signal.SIGTERM) != known  # those of whoever called are back
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "no terminal"), RuntimeError("reentrant call inside")])
def test_a_stop_is_heard_where_it_cannot_be_told(error: Exception) -> None:
    def tell() -> None:
        raise error

    with StopRequest(tell) as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked


def test_whoever_reads_what_a_run_says_may_leave(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as file:  # which is flushed when it is closed
        display = Display(file, live=False)
        with pytest.raises(BrokenPipeError):
            display.line("without a log")
        display.log_to(tmp_path / "log.txt")
        display.line("a")
        display.line("b")
    told, *said = (tmp_path / "log.txt").read_text().splitlines()
    assert said == ["a", "b"]
    assert "nothing more can be shown (Broken pipe)" in told


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_watched_loss_that_is_no_number_is_never_the_best(value: float) -> None:
    progress = Progress(step=3)
    with pytest.raises(DivergedError, match="step 3"):
        _judge(progress, Watched(value), hooks=None)  # type: ignore[arg-type]
    assert progress.best_step is None


def test_a_target_that_is_no_linear_module_is_told_with_those_that_are() -> None:
    with pytest.raises(ModelError) as error:
        adapt(twin("llama", torch.float32), Lora(4, 8.0, 0.0, ("mlp",)), 0)
    assert "down_proj" in error.value.problems[0].cure


def test_a_window_that_looks_both_ways_is_refused() -> None:
    forest = Forest([3], [-1], torch.arange(3))
    assert [block.mask for block in forest.blocks(0, causal=False)] == [None]
    with pytest.raises(ValueError, match="looks both ways"):
        forest.blocks(2, causal=False)


def test_classes_that_are_uneven_or_have_one_row_are_told() -> None:
    def rows(**counts: int) -> list[Labelled]:
        return [Labelled(Where("f", 1), "text", label) for label, count in counts.items() for _ in range(count)]

    def notes(records: list[Labelled]) -> list[str]:
        return label_notes(records, [], find_labels(records, "classification"))

    told = "\n".join(notes(rows(a=30, b=1)))
    assert "2 classes, of 1 ('b') to 30 ('a') rows" in told
    assert "look at macro F1" in told
    assert "1 classes have one row to train on: 'b'" in told
    assert "macro F1" not in "\n".join(notes(rows(a=20, b=2)))


def test_fused_layers_are_refused_where_they_would_not_compute_as_asked() -> None:
    def decide(**values: str) -> str:
        overrides = [Override(f"engine.{key}", value, "flag") for key, value in values.items()]
        return _decide_machine(build_config(None, overrides), "cpu").settings.engine.fast

    assert decide() == "on"
    assert decide(precision="bfloat16") == "off"
    assert decide(fast="off") == "off"
    with pytest.raises(UsageError, match=r"engine\.precision is bfloat16"):
        decide(fast="on", precision="bfloat16")


class _Told(Display):
    """Remembers the first warning of rows that are encoded, and lets go whoever waits for that: others may come before and after."""

    def __init__(self, file: IO[str]) -> None:
        super().__init__(file, live=False)
        self.told, self.warned = "", threading.Event()

    def warn(self, text: str) -> None:
        super().warn(text)
        if "encode_rows" in text:
            self.told = self.told or text
            self.warned.set()


def test_a_stall_is_told_with_its_place_and_the_stacks_of_all_threads(tmp_path: Path) -> None:
    def a_reader_that_never_answers() -> Iterator[Any]:
        assert display.warned.wait(60)
        yield from ()

    with (tmp_path / "said.txt").open("w") as file:
        display = _Told(file)
        display.log_to(tmp_path / "log.txt")
        with StallWatch(display, 0.01):
            assert not list(encode_rows(a_reader_that_never_answers(), cast(Any, None), max_length=1))
    assert re.search(r"stands at .*segments\.py:\d+ in encode_rows", display.told)
    assert "a_reader_that_never_answers" in (tmp_path / "log.txt").read_text()
    assert "a_reader_that_never_answers" not in (tmp_path / "said.txt").read_text()


class _Silent(Display):
    """Shows that something moved last at given times, one after the other; keeps what is warned of, and shows nothing."""

    def __init__(self, *shown_at: float) -> None:
        super().__init__(cast(Any, None), live=False)
        self._shown_at, self.told, self.seen = iter(shown_at), list[str](), threading.Event()

    @property
    def shown_at(self) -> float:
        found = next(self._shown_at, math.inf)
        if found == math.inf:
            self.seen.set()
        return min(found, threading.TIMEOUT_MAX / 2)

    @shown_at.setter
    def shown_at(self, _: float) -> None:
        pass

    def aside(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        self.told.append(text)


@pytest.mark.parametrize(
    ("shown_at", "told"),
    [
        ([-math.inf, math.inf], []),  # it moved while it was waited for
        ([-math.inf] * 4, ["5.0 min", "10.0 min"]),
        ([-math.inf] * 6, ["5.0 min", "10.0 min", "20.0 min"]),
    ],
)
def test_a_stall_is_told_anew_after_twice_the_time(shown_at: list[float], told: list[str]) -> None:
    display = _Silent(*shown_at)
    with StallWatch(display, 300.0):
        assert display.seen.wait(60)
    assert [re.findall(r"nothing has moved for (.*?);", text) for text in display.told] == [[span] for span in told]


def test_lines_and_bars_are_signs_of_life(tmp_path: Path) -> None:
    with (tmp_path / "said.txt").open("w") as file:
        for live in (False, True):
            display = Display(file, live=live)
            for show in (lambda: display.line("a"), lambda: display.progress("training", 1, 2)):  # noqa: B023
                display.shown_at = -1.0
                show()
                assert display.shown_at >= 0
            display.end_progress()


def test_what_a_thread_that_encodes_dies_of_ends_the_reading(tmp_path: Path) -> None:
    class Dies:
        def training(self, conversation: Any) -> list[Any]:
            return []

        def encode(self, runs: Any) -> Any:
            raise MemoryError("no room for tokens")

    with pytest.raises(MemoryError, match="no room"):
        list(encode_rows(iter([[cast(Any, None)]]), cast(Any, Dies()), max_length=1))
