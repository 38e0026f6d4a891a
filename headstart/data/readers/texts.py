"""Plain text: a file is a row."""

from __future__ import annotations

from collections.abc import Iterator

from headstart.data.readers.lines import lines_of
from headstart.data.rows import Item, Note, Row, SourceFile, Where
from headstart.errors import Problem


def read(file: SourceFile, head: bytes) -> Iterator[Item]:
    """Read a file as one row with a text."""
    parts: list[str] = []
    for item in lines_of(file, head):
        if isinstance(item, Note):
            yield item
            continue
        if isinstance(item, Problem) or item.problem:
            yield item if isinstance(item, Problem) else item.problem  # type: ignore[misc]
            return
        parts.append(item.text + "\n" * item.ended)
    text = "".join(parts)
    if "\r" in text:
        yield Note(file.name, "line ends with a carriage return are read as line feeds")
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    yield Row(Where(file.name, 1), {"text": text})
