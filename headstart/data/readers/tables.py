"""CSV and TSV: a header, and as many columns in every record."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from headstart.data.readers.lines import LINE_BYTES, Line, encoding_of, lines_of
from headstart.data.rows import Item, Note, Row, SourceFile, Where, fatal
from headstart.errors import Problem


def read(file: SourceFile, head: bytes) -> Iterator[Item]:
    """Yield the rows of a CSV or TSV file, the columns named by its first line."""
    csv.field_size_limit(LINE_BYTES)
    delimiter = _delimiter(file, head)
    aside: list[Problem | Note] = []
    records = _records(file, head, delimiter, aside)
    header = next((_check_header(file, record) for _, record in records), None)
    if header is None or isinstance(header, Problem):
        yield from aside
        yield from [fatal(header)] if header else []
        return
    if delimiter not in ",\t":
        yield Note(file.name, f"columns are divided by {delimiter!r}")
    found = 0
    for where, record in records:
        found += 1
        if isinstance(record, Problem):
            yield record
        elif len(record) != len(header):
            what = f"{len(record)} columns where the header has {len(header)}"
            yield Problem("row.csv", what, str(where), "quote fields that hold the delimiter or a line break")
        else:
            yield Row(where, dict(zip(header, record, strict=True)))
    yield from aside
    if not found and not aside:
        yield Problem("data.empty", "the file holds a header only", file.name, "give a file with rows")


def _records(
    file: SourceFile, head: bytes, delimiter: str, aside: list[Problem | Note]
) -> Iterator[tuple[Where, list[str] | Problem]]:
    """Yield the records of a CSV file that aren't blank, each with its first line, or what is wrong with it."""
    bad: dict[int, Problem] = {}
    reader = csv.reader(_csv_lines(file, head, aside, bad), delimiter=delimiter, strict=True)
    start = 1
    while True:
        record: list[str] | Problem
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            cure = "close the quote that this row opens; double the quotes inside a quoted field"
            record = Problem("row.csv", f"no CSV: {error}", f"{file.name}:{start}", cure)
            if "end of data" in str(error):  # the quote has swallowed all rows behind it
                record = fatal(record)
        where = Where(file.name, start)
        lines, start = range(start, reader.line_num + 1), reader.line_num + 1
        faults = [bad.pop(number) for number in lines if number in bad]
        if faults or record:
            yield where, faults[0] if faults else record


def _csv_lines(file: SourceFile, head: bytes, aside: list[Problem | Note], bad: dict[int, Problem]) -> Iterator[str]:
    """Yield the lines for the CSV reader; what is wrong with one goes to `bad` under its number."""
    for item in lines_of(file, head):
        if not isinstance(item, Line):
            aside.append(item)
            continue
        if item.problem:
            bad[item.number] = item.problem
        yield item.text.replace("\0", "") + "\n"


def _delimiter(file: SourceFile, head: bytes) -> str:
    if file.path.name.lower().removesuffix(".gz").endswith(".tsv"):
        return "\t"
    encoding = encoding_of(file, head)
    line = head.decode(encoding, errors="replace").split("\n", 1)[0]
    return max(",;\t|", key=lambda mark: (line.count(mark), mark == ","))


def _check_header(file: SourceFile, header: list[str] | Problem) -> list[str] | Problem:
    where = f"{file.name}:1"
    if isinstance(header, Problem):
        return header
    if any(not name.strip() for name in header):
        return Problem(
            "row.csv",
            f"column {header.index(next(n for n in header if not n.strip())) + 1} has no name",
            where,
            "name every column in the first line",
        )
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        return Problem("row.csv", f"the column {twice[0]!r} stands twice", where, "give each column its own name")
    return header
