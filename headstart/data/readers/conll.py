"""Tagged words, one a line: an empty line ends a row."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from headstart.data.readers.lines import lines_of
from headstart.data.rows import Item, Note, Row, SourceFile, Where
from headstart.errors import Problem

BLANKS = " \t\r"


def read(file: SourceFile, head: bytes) -> Iterator[Item]:
    """Read lines of a word and its tag, the last of the columns; an empty line ends a row."""
    words: list[str] = []
    tags: list[str] = []
    begin = 0
    problem: Problem | None = None
    for item in itertools.chain(lines_of(file, head), [None]):
        if isinstance(item, Note | Problem):
            yield item
            continue
        text = item.text.strip(BLANKS) if item else ""
        aside = not begin and text.startswith(("-DOCSTART-", "# "))  # within a row a # is a word
        if item and not item.problem and text and not aside:
            begin = begin or item.number
            # Other white space, a no-break space say, is part of a word.
            columns = item.text.split("\t") if "\t" in item.text else text.replace("\r", " ").split(" ")
            if len(columns) < 2:
                where = f"{file.name}:{item.number}"
                problem = problem or Problem(
                    "row.tags", f"no tag in {text!r:.40}", where, "a word and its tag on each line"
                )
            words.append(columns[0].strip(BLANKS))
            tags.append(columns[-1].strip(BLANKS))
        elif item and item.problem:
            begin, problem = begin or item.number, item.problem
        elif begin:
            yield problem or Row(Where(file.name, begin), {"tokens": words, "tags": tags})
            words, tags, begin, problem = [], [], 0, None
