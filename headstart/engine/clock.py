"""Where the time of training goes, phase by phase, without making a device wait."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

PHASES = ("data", "forward", "backward", "optimizer")


class Clock:
    """Seconds by phase. On CUDA phases are timed by events, which are read once they have happened."""

    def __init__(self, device: str = "cpu") -> None:
        self._cuda = device == "cuda"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block to a phase. Building packs is work of the host, and timed there."""
        if not self._cuda or name == "data":
            begun = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - begun
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        yield
        end.record()
        self._events.append((name, begin, end))

    def take(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call, and begin anew.

        On CUDA what has not happened yet is left for the next call, so that nothing has to wait for it.
        """
        later = []
        for name, begin, end in self._events:
            if end.query():  # type: ignore[no-untyped-call]
                self._seconds[name] += begin.elapsed_time(end) / 1000
            else:
                later.append((name, begin, end))
        self._events = later
        taken, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return taken
