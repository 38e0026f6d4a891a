"""What is read: rows as they stand in a file, each with where, and what is said beside them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from headstart.errors import Problem

UTF_8 = "utf-8"


class Where(NamedTuple):
    """Where a row stands: the file as the user named it, and the line (of parquet: the row) from 1."""

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"

    def field(self, name: str) -> str:
        """Return `path:line:name`."""
        return f"{self}:{name}"


class Row(NamedTuple):
    """One row as it stands in the file."""

    where: Where
    fields: dict[str, Any]


class Note(NamedTuple):
    """Something about a file that was handled and that the user should know."""

    where: str
    text: str


Item = Row | Problem | Note


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to read: `path` on this disk, `name` as users see it, `revision` if it came from the hub.

    `encoding` is that of its text, where no byte order mark says another; `sha256` that of the bytes that its rows come from,
    where these were hashed to find what was made of them before.
    """

    path: Path
    name: str
    revision: str = ""
    encoding: str = UTF_8
    sha256: str = ""


def fatal(problem: Problem) -> Problem:
    """Return a problem behind which the file can't be read on."""
    return replace(problem, code="data.unreadable")
