"""Python graders: a process of their own (`jail.py`), watched from here: a case a line, each within its time."""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from headstart.errors import Problem, UsageError
from headstart.evaluate.graders.fill import Case
from headstart.evaluate.graders.forms import Python

JAIL = Path(__file__).with_name("jail.py")
LOUD = "its process wrote what is no answer"
LINE_MAX = 1 << 16  # bytes of an answer
START_S = 60.0  # for Python and what the source imports
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # each would take address space


class SandboxError(Exception):
    """The process is gone or has to go: too slow, too loud or ended by itself."""


def grade_in_sandbox(
    grader: Python, cases: Sequence[Case], tell: Callable[[str], None] = lambda _: None
) -> list[float | str]:
    """Return the score of each case, or what went wrong with it.

    Where a case is too slow or ends the process, the next ones get a new one. Raises UsageError where the source
    itself can't be run, and on a system without limits (Windows). What the system can't keep out is told.
    """
    if os.name == "nt":
        what = "python graders need limits that this system doesn't have"
        raise UsageError(Problem("grader.sandbox", what, grader.name, "run it on Linux or macOS"))
    found: list[float | str] = []
    while len(found) < len(cases):
        with _Process(grader) as process:
            if not process.locked and not found:
                tell(f"{grader.name}: this system doesn't keep a grader from the network and from other processes")
            for case in cases[len(found) :]:
                try:
                    found.append(process.grade(case))
                except SandboxError as error:
                    found.append(str(error))
                    break
    return found


class _Process:
    """A grader's process, ended with all that it began when the block ends."""

    def __init__(self, grader: Python) -> None:
        self._grader = grader
        self.locked = False

    def __enter__(self) -> _Process:
        self._folder = tempfile.TemporaryDirectory(prefix="headstart-grader-")
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(JAIL)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self._folder.name,
            env=dict.fromkeys(THREADS, "1"),
            start_new_session=True,
        )
        try:
            self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        self._process.wait()
        self._folder.cleanup()

    def _begin(self) -> None:
        grader = self._grader
        given = {"source": grader.source, "memory_bytes": grader.memory_limit_mib << 20}
        try:
            begun = self._ask(given, START_S)
            why = str(begun.get("why", LOUD))
        except SandboxError as error:
            begun, why = {}, str(error)
        if why:
            what = f"the source of {grader.name} can't be run: {why}"
            raise UsageError(Problem("grader.sandbox", what, f"{grader.name}:source", "mend the grader's source"))
        self.locked = bool(begun.get("locked"))

    def grade(self, case: Case) -> float | str:
        """Return the score of a case, or what went wrong. Raises SandboxError where this process is of no use any more."""
        answer = self._ask({"sample": case.sample, "item": case.item}, self._grader.time_limit_s)
        match answer:
            case {"score": bool(score) | float(score)} if math.isfinite(score):
                return score
            case {"why": str(why)}:
                return why.encode(errors="backslashreplace").decode()  # half a surrogate can't be kept
        raise SandboxError(LOUD)

    def _ask(self, given: Any, seconds: float) -> dict[str, Any]:
        """Write a line and read one: an object."""
        content = memoryview(json.dumps(given, default=str).encode() + b"\n")
        until = time.monotonic() + seconds
        answer = b""
        source, sink = self._process.stdout, self._process.stdin
        if source is None or sink is None:
            raise TypeError("the process has pipes")
        os.set_blocking(sink.fileno(), False)
        while not answer.endswith(b"\n"):
            left = until - time.monotonic()
            ready, room, _ = select.select([source], [sink] if content else [], [], max(0.0, left))
            if not ready and not room:
                raise SandboxError(f"it took more than {seconds:g} s")
            if room:
                content = content[self._write(content) :]
            if ready:
                part = os.read(source.fileno(), LINE_MAX)
                answer += part
                if not part:
                    raise SandboxError("its process ended by itself, most likely for want of memory")
                if len(answer) > LINE_MAX:
                    raise SandboxError(LOUD)
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(found := json.loads(answer), dict):
                return found
        raise SandboxError(LOUD)

    def _write(self, content: memoryview) -> int:
        try:
            return os.write(self._process.stdin.fileno(), content)  # type: ignore[union-attr]
        except BlockingIOError:
            return 0
        except BrokenPipeError:
            raise SandboxError("its process ended by itself, most likely for want of memory") from None
