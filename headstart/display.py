"""What a run says: live in a terminal, plain lines elsewhere; and a copy of every line in the run's log."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from headstart.files import Lines

PLAIN_EVERY_S = 5.0
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
GIB, MIB = 1 << 30, 1 << 20


def safe(text: str) -> str:
    """Return text in which nothing steers a terminal: control characters are spelled out.

    So are halves of surrogate pairs, which can't be printed: file names that are no UTF-8 hold them.
    """
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def hush(file: IO[str]) -> None:
    """Let a stream that can't be written to take everything, and show nothing.

    What waits in its buffer would fail once more when the process ends, and hide the exit code.
    """
    with contextlib.suppress(OSError, ValueError):  # a file that is no file of the system
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, file.fileno())
        os.close(nowhere)


class _Console(Console):
    """A console that says when whoever read it is gone; rich's own ends the process there."""

    def on_broken_pipe(self) -> None:
        raise  # noqa: PLE0704 (the BrokenPipeError that rich is about to handle)


class Display:
    """Lines, and one bar at a time. Styles are rich's; without a terminal nothing but the words is printed.

    With `whole` it is that of a part of something: the whole's shows its progress and its warnings, under its `name`, and
    everything else that it says stands in its log.

    Once there is a log, a terminal that is closed and a reader that is gone are no reason to end: the log goes on.
    """

    def __init__(
        self,
        file: IO[str] | None = None,
        *,
        live: bool | None = None,
        whole: Display | None = None,
        name: str = "",
    ) -> None:
        self._whole, self._name = whole, name
        self.console = _Console(file=file, highlight=False, soft_wrap=True)
        self._live = self.console.is_terminal if live is None else live
        self._log: Lines | None = None
        self._unlogged: list[str] = []
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._label, self._done = "", 0
        self._printed_at = 0.0
        self.shown_at = time.monotonic()  # the last sign of life

    def log_to(self, path: Path) -> None:
        """Write every line to `path` too, those before this one included."""
        self._log = Lines(path)
        lines, self._unlogged = self._unlogged, []
        for line in lines:
            self._write(line)

    def line(self, text: str = "", style: str = "") -> None:
        """Say a line. `text` is data: it is never read as markup."""
        self.shown_at = time.monotonic()
        for part in safe(text).split("\n") if self._whole is None else ():
            self._print(f"[{style}]{escape(part)}[/]" if style else escape(part))
        self._write(text)

    def aside(self, text: str) -> None:
        """Write to the log alone, or say it where there is none yet."""
        if self._log is None:
            self.line(text)
        else:
            self._write(text)

    def title(self, text: str) -> None:
        """Say what comes next."""
        self.line()
        self.line(text, "bold")

    def fact(self, name: str, value: str, style: str = "") -> None:
        """Say a name and its value, aligned with others."""
        self.line(f"  {name:<14} {value}", style)

    def warn(self, text: str) -> None:
        """Say something that needs a look."""
        if self._whole is not None:
            self._whole.warn(f"{self._name}: {text}")
        self.line(f"  ! {text}", "yellow")

    def markup(self, text: str) -> None:
        """Say a line of rich markup, all data in it escaped by the caller."""
        self._print(text)
        self._write(Console(file=None, width=10_000, no_color=True).render_str(text).plain)

    def stream(self, text: str) -> None:
        """Say a piece of a line as it comes."""
        self.console.file.write(safe(text))
        self.console.file.flush()

    def progress(self, label: str, done: int, total: int, detail: str = "") -> None:
        """Show how far a phase is: a bar in a terminal, else a line now and then and at the end."""
        self.shown_at = time.monotonic()
        if self._whole is not None:
            self._whole.progress(f"{self._name}: {label}", done, total, detail)
            return
        if self._live:
            with self._shown_or_logged():
                self._move_bar(safe(label), done, total, safe(detail))
            return
        late = self.shown_at - self._printed_at >= PLAIN_EVERY_S and done != self._done
        if label != self._label or done == total or late:
            self._label, self._done, self._printed_at = label, done, self.shown_at
            self.line(f"  {label} {done}/{total}{'  ' + detail if detail else ''}")

    def end_progress(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            with self._shown_or_logged():
                self._bar.stop()
        self._bar = self._task = None

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_progress()

    def _move_bar(self, label: str, done: int, total: int, detail: str) -> None:
        if self._bar is None or label != self._label:
            self.end_progress()
            columns: list[Any] = [TextColumn("  {task.description}"), BarColumn(bar_width=24), MofNCompleteColumn()]
            columns += [TextColumn("{task.fields[detail]}"), TimeRemainingColumn(compact=True)]
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task(escape(label), total=total, detail="")
            self._label = label
            self._bar.start()
        if self._task is not None:
            self._bar.update(self._task, completed=done, detail=escape(detail))
        if done >= total:
            self.end_progress()
            self._label = ""

    def _print(self, markup: str) -> None:
        with self._shown_or_logged():
            self.console.print(markup)

    @contextlib.contextmanager
    def _shown_or_logged(self) -> Iterator[None]:
        """Show nothing more where that fails and there is a log. Raises OSError where there is none."""
        try:
            yield
        except OSError as error:
            if self._log is None:
                raise
            hush(self.console.file)
            self._write(f"  ! nothing more can be shown ({error.strerror or error}); it goes on, and this log does")

    def _write(self, text: str) -> None:
        if self._log is None:
            self._unlogged.append(text)
            return
        waited = self._log.waits
        try:
            self._log.add(safe(text))
        except OSError as error:
            if not waited:
                self._print(escape(f"  ! the log can't be written ({error.strerror}): it is tried with every line"))


def in_bytes(count: float) -> str:
    """Return a number of bytes as GiB or MiB."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"


def in_time(seconds: float) -> str:
    """Return a span of time in the unit that it is read in."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
