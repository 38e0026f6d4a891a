"""No stall is silent: where a run shows no sign of life for long, it says where it stands, and what each thread does."""

from __future__ import annotations

import faulthandler
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType

from headstart.display import Display, in_time

SILENT_S = 300.0
PACKAGE = str(Path(__file__).parent)


class StallWatch:
    """While active, says so where nothing was shown for `silent_s`; then for twice as long, and so on.

    It ends nothing: what is slow can't be told from what is stuck. A user who is asked to look can.
    """

    def __init__(self, display: Display, silent_s: float = SILENT_S) -> None:
        self._display = display
        self._limit_s = silent_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stall", daemon=True)

    def __enter__(self) -> StallWatch:
        self._watched = threading.get_ident()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(max(0.0, self._display.shown_at + self._limit_s - time.monotonic())):
            if time.monotonic() - self._display.shown_at >= self._limit_s:
                self._tell()
                self._limit_s *= 2

    def _tell(self) -> None:
        self._display.aside(_stacks())
        place = _place(sys._current_frames().get(self._watched))
        what = f"nothing has moved for {in_time(self._limit_s)}; it stands at {place}"
        self._display.warn(
            f"{what}. What each thread does stands in the log. Ctrl-C twice ends it; what is saved stays"
        )


def _stacks() -> str:
    """Return where every thread stands, as Python tells it."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read().decode(errors="backslashreplace")


def _place(frame: FrameType | None) -> str:
    """Return where a thread stands in this package, or at all where it is elsewhere."""
    innermost = frame
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    found = frame or innermost
    return "its end" if found is None else f"{found.f_code.co_filename}:{found.f_lineno} in {found.f_code.co_name}"
