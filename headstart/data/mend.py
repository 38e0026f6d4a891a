"""The mended file: the rows of data as they stood, without those that can't be used or stand twice, as JSON lines."""

from __future__ import annotations

import datetime
import decimal
import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from headstart.config import DataSettings
from headstart.data.formats import Detection, Formatted, Formatting, named_columns
from headstart.data.near import find_alike, shingle
from headstart.data.private import redact
from headstart.data.quality import whole_digest
from headstart.data.read import Note, Row, SourceFile, kind_of, read_parts
from headstart.data.records import Record
from headstart.errors import DataError, Problem, UsageError
from headstart.files import new_file

ROWS_AT_ONCE = 100_000  # among the first so many, every column that is named must be found


@dataclass
class Mended:
    """What was written, and what was done to how many rows; `redacted` counts what was replaced, by its kind."""

    out: str
    rows: int = 0
    bad: int = 0
    unfit: int = 0
    duplicates: int = 0
    near_duplicates: int = 0
    redacted: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        """The counts as plain values."""
        return {**vars(self), "redacted": dict(self.redacted)}


class _Kept(NamedTuple):
    row: Row
    record: Record
    redacted: Counter[str]


@dataclass(frozen=True)
class Mending:
    """How rows are mended. `bad` are places of rows that can't be used though they are of the right form.

    `unfit` are places of rows that are dropped too, though they can be used: their answers aren't good enough.
    Of rows that say nearly the same, all but the first are dropped with `near`; with `private`, personal data and secrets
    are replaced, before rows are compared.
    """

    files: Sequence[SourceFile]
    settings: DataSettings
    detection: Detection
    bad: Collection[str] = ()
    near: bool = False
    private: bool = False
    unfit: Collection[str] = ()

    def write(self, out: Path) -> Mended:
        """Write what stays into a new file.

        Raises UsageError where `out` can't be written without harm, DataError where nothing is left, or where a row can't
        be written or it isn't known which one of a line is bad.
        """
        self._check(out)
        unlike: Sequence[bool] | None = None
        if self.near:
            texts = ("\n".join(kept.record.texts) for kept in self._rows(Mended("")))
            unlike = (find_alike(shingle(texts).finish()).other < 0).tolist()
        mended = Mended(str(out))
        try:
            with new_file(out) as file:
                self._write(file, mended, unlike)
        except (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
            what = f"{out} can't be written: {error.strerror}"
            raise UsageError(Problem("usage.flag", what, "--out", "give a new file: -o clean.jsonl")) from None
        return mended

    def _write(self, file: BinaryIO, mended: Mended, unlike: Sequence[bool] | None) -> None:
        for number, kept in enumerate(self._rows(mended)):
            if unlike is not None and not unlike[number]:
                mended.near_duplicates += 1
                continue
            file.write(_line(kept.row))
            mended.rows += 1
            mended.redacted += kept.redacted
        if not mended.rows:
            raise DataError(Problem("data.empty", "no row is left", self.files[0].name, "mend the rows by hand"))

    def _check(self, out: Path) -> None:
        """Raise UsageError where the file would take the place of what it is made from, or could not be read again."""
        if self.detection.format == "images":
            raise UsageError(Problem("usage.flag", "images aren't rows of a file", "--fix", "delete the bad images"))
        if kind_of(out) != "json" or out.suffix not in (".jsonl", ".ndjson"):
            raise UsageError(Problem("usage.flag", f"{out} is no name for JSON lines", "--out", "-o clean.jsonl"))
        if any(out.exists() and out.samefile(file.path) for file in self.files):
            raise UsageError(
                Problem("usage.flag", f"{out} is what is read", "--out", "give a new file: -o clean.jsonl")
            )

    def _rows(self, mended: Mended) -> Iterator[_Kept]:
        """Yield the rows that can be used, of equal ones the first; count the others."""
        seen: set[int] = set()
        broken = _places(self.bad)
        before = ""

        def put_aside(item: Problem | Note) -> None:
            mended.bad += isinstance(item, Problem)

        formatting: Formatting | None = None
        for rows in read_parts(self.files, ROWS_AT_ONCE, put_aside):
            formatting = formatting or self._formatting(rows)
            for row in rows:
                place = str(row.where)
                if place in broken and place == before:
                    what = "several rows stand on one line, so it isn't known which of them is bad"
                    raise DataError(Problem("row.not_json", what, place, "write one row a line"))
                before = place
                redacted: Counter[str] = Counter()
                plain = row._replace(fields=redact(row.fields, redacted)) if self.private else row
                formatted = Formatted(self.detection)
                formatting.take([plain], formatted)
                if not formatted.examples or place in broken:
                    mended.bad += 1
                    continue
                if place in self.unfit:
                    mended.unfit += 1
                    continue
                digest = whole_digest(formatted.examples[0])
                if digest in seen:
                    mended.duplicates += 1
                    continue
                seen.add(digest)
                yield _Kept(plain, formatted.examples[0], redacted)

    def _formatting(self, rows: Sequence[Row]) -> Formatting:
        settings, found = self.settings, self.detection
        named = named_columns(settings)
        return Formatting(
            rows,
            found.format,
            named,
            found.task,
            settings.train_on,
            settings.reasoning,
            settings.group_by,
            merge="merge_turns" in settings.fix,
            fold="fold_system" in settings.fix,
        )


def _places(wheres: Collection[str]) -> set[str]:
    """Return the rows that are meant: `path:line` of `path:line:field`."""
    return {
        where[:end] for where in wheres for end in [*(n for n, sign in enumerate(where) if sign == ":"), len(where)]
    }


def _line(row: Row) -> bytes:
    """Return a row as a line of JSON. Raises DataError where it holds what JSON doesn't know."""
    try:
        text = json.dumps(row.fields, ensure_ascii=False, allow_nan=False, default=_as_text)
        # Half of a surrogate pair in a column that isn't used stays the escape that it was.
        return text.encode(errors="backslashreplace") + b"\n"
    except (TypeError, ValueError) as error:
        what = f"can't be written as JSON: {error}"
        raise DataError(Problem("row.not_json", what, str(row.where), "change the value, or delete the row")) from None


def _as_text(value: Any) -> str:
    if isinstance(value, (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal)):
        return str(value)
    raise TypeError(f"a {type(value).__name__}")
