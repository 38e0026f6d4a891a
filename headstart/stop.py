"""Being asked to stop: once saves and stops, twice stops now."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from headstart.errors import InterruptedRun, Problem

ASKED_BY = ("SIGINT", "SIGTERM", "SIGHUP")


class StopRequest:
    """While active, signals set `asked`; a second one raises InterruptedRun wherever the program is.

    Outside of the main thread signals are left as they are, since Python allows nothing else.
    """

    def __init__(self, on_ask: Callable[[], None] | None = None) -> None:
        self.asked = False
        self._on_ask = on_ask
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            numbers = [getattr(signal, name) for name in ASKED_BY if hasattr(signal, name)]
            # What is ignored stays so: nohup means that the end of the terminal is not the end of the run.
            heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self.asked:
            cure = "headstart resume goes on from the last checkpoint"
            raise InterruptedRun(Problem("run.interrupted", "stopped at once", "", cure))
        self.asked = True
        if self._on_ask:
            # A terminal that is closed can't be told, nor a stream in the middle of whose writing the signal came.
            with contextlib.suppress(OSError, RuntimeError):
                self._on_ask()
