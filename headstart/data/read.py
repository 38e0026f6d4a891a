"""Files -> rows, each with where it stands.

jsonl, json, csv, tsv, parquet, conll, txt and md, plain or gzip, pdf, docx and html, and images; one file, many, a folder (of images: one for
each class), or a data set of the hub. A reader
yields rows, problems and notes in the order of the file: a bad row never ends the reading, and nothing is guessed in
silence.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

from headstart.data.inflate import InflationError, Meter, open_plain
from headstart.data.papers import NEEDS, read_paper
from headstart.data.strict import DepthError, DuplicateKeyError, parse_json, parse_json_at
from headstart.errors import DataError, Problem
from headstart.files import shown

UTF_8 = "utf-8"
WIDE = ("utf-16", "utf-32")  # whose line feeds are several bytes
LINE_BYTES = 16 << 20
SNIFF_BYTES = 1 << 16
PARQUET_ROWS = 256  # read at once
HUB_PREFIX = "hub:"
BLANKS = " \t\r"
NOT_WRAPPERS = ("messages", "conversations", "conversation")  # a row of turns, not rows
TEXTS = {".txt": "text", ".md": "text"}
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
KINDS = TEXTS | {
    **dict.fromkeys(IMAGE_ENDINGS, "image"),
    **dict.fromkeys(NEEDS, "paper"),
    **dict.fromkeys((".conll", ".bio", ".iob", ".iob2"), "conll"),
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
LINES = ("text", "conll", "json", "csv")  # readers of lines
SIGNATURES = {
    b"PAR1": "parquet",
    b"PK\x03\x04": "a zip archive (or an Excel or Word file)",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"\x1f\x8b": "a gzip archive inside of another",
    b"7z\xbc\xaf": "a 7z archive",
    b"\xd0\xcf\x11\xe0": "an old Excel or Word file",
    b"%PDF": "a PDF file",
    b"ARROW1": "an Arrow file (write it as parquet)",
    b"\x80\x04": "a Python pickle, which is never opened",
    b"\x80\x05": "a Python pickle, which is never opened",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself (run `git lfs pull`)",
}
PAGE = re.compile(rb"<(!doctype|html|head|body)\b", re.IGNORECASE)
NULS_FRAC = 1 / 8  # as many NUL bytes are no accident of one row
BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


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

    `encoding` is that of its text, where no byte order mark says another.
    """

    path: Path
    name: str
    revision: str = ""
    encoding: str = UTF_8


def find_files(names: Sequence[str], encoding: str = UTF_8) -> list[SourceFile]:
    """Turn what the user named into files. Raises DataError with everything that can't be read."""
    found: list[SourceFile] = []
    problems: list[Problem] = []
    for name in names:
        if name.startswith(HUB_PREFIX):
            from headstart.data.hub import fetch_dataset

            found += fetch_dataset(name)
            continue
        try:
            found += [SourceFile(path, shown(path)) for path in _expand(Path(name))]
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return [replace(file, encoding=encoding) for file in found]


def read(files: Sequence[SourceFile]) -> Iterator[Item]:
    """Yield the rows of `files` in order, with problems and notes where they occur."""
    for file in files:
        try:
            yield from _read_file(file)
        except InflationError as error:
            yield Problem("data.too_large", f"made to fill the memory: {error}", file.name, "unpack it, or delete it")
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            yield Problem("data.truncated", f"the archive is damaged: {error}", file.name, "fetch it again")
        except OSError as error:
            yield Problem(
                "data.not_a_file", f"can't be read: {error.strerror or error}", file.name, "mend its permissions"
            )


def read_parts(files: Sequence[SourceFile], size: int, aside: Callable[[Problem | Note], None]) -> Iterator[list[Row]]:
    """Yield the rows of `files` in order, at most `size` at once; `aside` takes problems and notes where they occur."""
    part: list[Row] = []
    for item in read(files):
        if not isinstance(item, Row):
            aside(item)
            continue
        part.append(item)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


def _expand(path: Path) -> list[Path]:
    try:
        there = path.exists()
    except (OSError, ValueError) as error:
        raise DataError(
            Problem("data.missing", f"no path: {error}", str(path)[:80], "give a path that exists")
        ) from None
    if not there:
        cure = f"give a path that exists; this is {Path.cwd()}"
        raise DataError(Problem("data.missing", "no such file", str(path), cure))
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(Problem("data.not_a_file", "neither a file nor a folder", str(path), "give a regular file"))
    files = _walk(path)
    # Beside tables a text file is a README or a licence, and an image is what a table names.
    tables = [p for p in files if kind_of(p) not in ("text", "image", "paper")]
    images = [p for p in files if kind_of(p) == "image"]
    texts = [p for p in files if kind_of(p) in ("text", "paper")]
    if files:
        # A folder of papers with their figures is one of texts; a folder of images with a README is one of images.
        return tables or (texts if any(kind_of(p) == "paper" for p in texts) else images or texts)
    cure = f"known endings: {' '.join(KINDS)} (each also .gz)"
    raise DataError(Problem("data.empty", "the folder holds no data file", str(path), cure))


def _walk(folder: Path) -> list[Path]:
    """Return the files of a folder and of those in it whose names have a known ending, but for hidden ones.

    Raises DataError with all that would be left out otherwise: what can't be read, what is no regular file, and links to
    folders, which may lead round in circles.
    """
    found: list[Path] = []
    problems: list[Problem] = []

    def put_aside(error: OSError) -> None:
        what = f"can't be read: {error.strerror}"
        problems.append(Problem("data.not_a_file", what, str(error.filename), "mend its permissions"))

    for place, folders, names in os.walk(folder, onerror=put_aside):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for link in (path for path in (Path(place, name) for name in folders) if path.is_symlink()):
            cure = "name the folder that it leads to"
            problems.append(Problem("data.not_a_file", "a link to a folder is not followed", str(link), cure))
        for path in (Path(place, name) for name in names if not name.startswith(".")):
            if not kind_of(path):
                continue
            if path.is_file():
                found.append(path)
            else:
                cure = "take it out of the folder"
                problems.append(Problem("data.not_a_file", "no regular file, or a link to none", str(path), cure))
    if problems:
        raise DataError(problems)
    return sorted(found)


def kind_of(path: Path) -> str | None:
    """Return which reader a file's name asks for, or None."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return KINDS.get(suffixes[-1]) if suffixes else None


def _read_file(file: SourceFile) -> Iterator[Item]:
    kind = kind_of(file.path)
    if kind is None:
        yield Problem(
            "data.unknown_type", "the name has no known ending", file.name, f"known: {' '.join(KINDS)} (each also .gz)"
        )
        return
    with open_plain(file.path) as stream:
        head = stream.read(SNIFF_BYTES)
    if not head.strip() and len(head) < SNIFF_BYTES:
        yield Problem("data.empty", "the file is empty", file.name, "give a file with rows")
        return
    if kind == "paper":
        yield from _read_paper(file, head)
        return
    seen = _seen_as(head)
    if kind in LINES and seen is None and not file.encoding.startswith(WIDE):
        seen = _no_text(head)
    if (kind == "parquet") != (seen == "parquet") or (seen and seen != "parquet"):
        what = seen or "not parquet"
        yield Problem(
            "data.wrong_type", f"named {file.path.suffix} but is {what}", file.name, "give it its true ending"
        )
        return
    yield from READERS[kind](file, head)


def _seen_as(head: bytes) -> str | None:
    """Return what a file's first bytes show it to be, if they do."""
    begin = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if PAGE.match(begin):
        return "a web page, most likely a login or error page"
    if head[257:262] == b"ustar":
        return "a tar archive"
    return next((what for mark, what in SIGNATURES.items() if begin.startswith(mark)), None)


def _no_text(head: bytes) -> str | None:
    """Return what bytes are that hold too many NULs to be text; None of text."""
    nuls = head.count(0)
    if nuls < NULS_FRAC * len(head) or any(head.startswith(mark) for mark in BOMS):
        return None
    if nuls > len(head) / 2:
        return "UTF-32 text without a byte order mark, or binary (-s data.encoding=utf-32-le)"
    sides = {"UTF-16LE": head[1::2].count(0), "UTF-16BE": head[0::2].count(0)}
    name, most = max(sides.items(), key=lambda side: side[1])
    if most < 0.9 * nuls:
        return "binary"
    return f"{name} text without a byte order mark (-s data.encoding={name.lower()})"


# --- text ---


class _Line(NamedTuple):
    """A line of a file. Where it has a `problem`, the text is only good for counting lines and quotes."""

    number: int
    text: str
    ended: bool
    problem: Problem | None = None


def _lines(file: SourceFile, head: bytes) -> Iterator[_Line | Problem | Note]:
    """Yield the lines of a text file, split at line feeds only, decoded strictly."""
    encoding = _encoding_of(file, head)
    if encoding.startswith(WIDE):
        yield Note(file.name, f"decoded from {encoding.upper()}")
        yield from _wide_lines(file, encoding)
        return
    if encoding == "utf-8-sig":
        yield Note(file.name, "begins with a byte order mark, which is left out")
    codec = UTF_8 if encoding == "utf-8-sig" else encoding
    if codec != UTF_8:
        yield Note(file.name, f"decoded from {codec.upper()}")
    newline = b"\r" if b"\r" in head and b"\n" not in head else b"\n"
    if newline == b"\r":
        yield Note(file.name, "its lines end with a carriage return alone, and are read as lines")
    with open_plain(file.path) as raw:
        number = 0
        while block := _readline(raw, newline):
            number += 1
            if len(block) > LINE_BYTES:
                yield _too_long(file, number)
                return
            block = block.removeprefix(codecs.BOM_UTF8 if number == 1 else b"")
            text, problem = _decoded(file, number, block, codec)
            ended = text.endswith(newline.decode())
            text = text.removesuffix(newline.decode())
            yield _Line(number, text, ended, problem or _nul_in(file, number, text))


def _encoding_of(file: SourceFile, head: bytes) -> str:
    """Return what a file says by its byte order mark that it is in, else what the user said."""
    return next((name for mark, name in BOMS.items() if head.startswith(mark)), file.encoding)


def _decoded(file: SourceFile, number: int, block: bytes, codec: str) -> tuple[str, Problem | None]:
    """Decode a line; where that can't be done, the text is only good for counting lines and quotes."""
    try:
        return block.decode(codec), None
    except UnicodeDecodeError as error:
        what = f"byte {error.start + 1} of the line (0x{block[error.start]:02x}) is not {codec.upper()}"
        cure = "say what the file is in: -s data.encoding=cp1252, or gb18030, shift_jis, whatever it is"
        if codec != UTF_8:
            cure = f"mend the line, or convert the file: iconv -f {codec.upper()} -t UTF-8"
        problem = Problem("data.encoding", what, f"{file.name}:{number}", cure)
        return block.decode(codec, errors="replace"), problem


def _wide_lines(file: SourceFile, encoding: str) -> Iterator[_Line | Problem]:
    with open_plain(file.path) as raw, io.TextIOWrapper(raw, encoding, newline="\n") as stream:
        number = 0
        try:
            while text := stream.readline(LINE_BYTES + 1):
                number += 1
                if len(text) > LINE_BYTES:
                    yield _too_long(file, number)
                    return
                ended = text.endswith("\n")
                text = text.removesuffix("\n")
                yield _Line(number, text, ended, _nul_in(file, number, text))
        except UnicodeError as error:
            yield Problem("data.unreadable", f"not {encoding.upper()}: {error}", file.name, "convert it to UTF-8")


def _too_long(file: SourceFile, number: int) -> Problem:
    where = f"{file.name}:{number}"
    return Problem("data.too_large", "the line is longer than 16 MiB", where, "one row a line, smaller rows")


def _nul_in(file: SourceFile, number: int, text: str) -> Problem | None:
    if "\0" not in text:
        return None
    what = f"character {text.index(chr(0)) + 1} of the line is a NUL byte, which no text holds"
    return Problem("data.encoding", what, f"{file.name}:{number}", "delete it, or write the row again")


def _readline(stream: IO[bytes], newline: bytes) -> bytes:
    if newline == b"\n":
        return stream.readline(LINE_BYTES + 1)
    # Old Mac files end lines with a carriage return alone; rare and small, so byte by byte will do.
    line = bytearray()
    while (byte := stream.read(1)) and len(line) <= LINE_BYTES:
        line += byte
        if byte == newline:
            break
    return bytes(line)


# --- json ---


def _decode(text: str, where: str, *, last: bool = False) -> Any | Problem:
    """Decode one JSON value, or say what is wrong with it and how to mend it."""
    try:
        return parse_json(text)
    except ValueError as error:
        if last and isinstance(error, json.JSONDecodeError) and _at_end(error, text):
            cure = "fetch the file again, or delete the line"
            return Problem("data.truncated", "the last line ends in the middle of a row", where, cure)
        return _explain(error, text, where)


def _at_end(error: json.JSONDecodeError, text: str) -> bool:
    """Tell whether the text went wrong by ending."""
    return error.pos >= len(text.rstrip()) - 1 or error.msg.startswith("Unterminated string")


def _explain(error: Exception, text: str, where: str) -> Problem:
    if isinstance(error, DuplicateKeyError):
        what = f"the name {error.args[0]!r} stands twice in one object"
        return Problem("row.duplicate_key", what, where, "keep one of them")
    if isinstance(error, json.JSONDecodeError):
        what = f"no JSON: {error.msg} at column {error.colno}"
        return Problem("row.not_json", what, where, _json_cure(text, error))
    if isinstance(error, DepthError):
        return Problem("row.not_json", str(error), where, "flatten the row")
    return Problem("row.not_json", f"no JSON: {error}", where, "use null, or a number that JSON has")


def _json_cure(text: str, error: json.JSONDecodeError) -> str:
    if error.msg == "Extra data" and "\n" in text:
        return "one object a line, each written by json.dumps; or all of them in one list, in [ and ]"
    if error.msg == "Extra data":
        return "one object a line: break the line between the objects"
    if text.lstrip()[:2] in ("{'", "['") or "property name enclosed in double quotes" in error.msg:
        return "JSON needs double quotes and no comma before a closing bracket; write rows with json.dumps"
    if text.strip() in ("{", "["):
        return "one object a line; or, for one pretty-printed list, let the file begin with ["
    return "write rows with a JSON library, one object a line"


def _read_json(file: SourceFile, head: bytes) -> Iterator[Item]:
    lines = _lines(file, head)
    first: list[_Line] = []
    filled = 0
    for item in lines:
        if isinstance(item, _Line):
            first.append(item)
            filled += bool(item.text.strip())
            # The first lines decide whether this is one object a line or one document.
            if filled == 5:
                break
        else:
            yield item
            if isinstance(item, Problem):  # behind which nothing can be read
                yield from _read_objects(file, first, lines) if first else ()
                return
    if _is_document(first):
        yield from _read_document(file, first, lines)
        return
    if file.path.name.removesuffix(".gz").endswith(".json"):
        yield Note(file.name, "is one object a line, not one JSON document; read as such")
    yield from _read_objects(file, first, lines)


def _is_document(first: Sequence[_Line]) -> bool:
    filled = [line.text for line in first if line.text.strip()]
    if not filled:
        return False
    if filled[0].lstrip().startswith("["):
        return True
    whole = [isinstance(_decode(text, ""), dict) for text in filled]
    # One line that is one object is both; read as a document, a list inside of it is found.
    return whole == [True] or (not any(whole) and filled[0].rstrip()[-1] in "{[,:")


def _read_objects(file: SourceFile, first: list[_Line], rest: Iterator[_Line | Problem | Note]) -> Iterator[Item]:
    found = 0
    for item in itertools.chain(first, rest):
        if not isinstance(item, _Line):
            found += isinstance(item, Problem)
            yield item
            continue
        if not item.text.strip():
            continue
        found += 1
        if item.problem:
            yield item.problem
            continue
        where = Where(file.name, item.number)
        yield from _objects_of(item.text, where, last=not item.ended)
    if not found:
        yield Problem("data.empty", "the file holds blank lines only", file.name, "give a file with rows")


def _objects_of(text: str, where: Where, *, last: bool) -> Iterator[Item]:
    """Yield the row of a line; or several, where a carriage return, which no JSON text holds, parts them."""
    value = _decode(text, str(where), last=last)
    parts = [part for part in text.split("\r") if part.strip()]
    if isinstance(value, Problem) and len(parts) > 1:
        for part in parts:
            yield from _objects_of(part, where, last=last and part is parts[-1])
        return
    yield value if isinstance(value, Problem) else _row(where, value)


def _read_document(file: SourceFile, first: list[_Line], rest: Iterator[_Line | Problem | Note]) -> Iterator[Item]:
    parts: list[str] = []
    whole = True
    for item in itertools.chain(first, rest):
        if not isinstance(item, _Line):
            yield item
        elif item.problem:
            whole = False
            yield _fatal(item.problem)
        else:
            parts.append(item.text)
    if not whole:
        return
    text = "\n".join(parts)
    array = text.lstrip().startswith("[")
    if file.path.name.removesuffix(".gz").endswith("l") and (array or len(parts) > 1):
        yield Note(file.name, "is one JSON document, not one object a line; read as such")
    if array:
        yield from _read_array(file, text, text.index("[") + 1, "]")
        return
    try:
        value = parse_json(text)
    except ValueError as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        yield _fatal(_explain(error, text, str(Where(file.name, line))))
        return
    lists = [v for v in value.values() if isinstance(v, list) and v and all(isinstance(row, dict) for row in v)]
    wrapped = _WRAPPED.match(text)
    if len(value) == 1 and lists and wrapped and wrapped[1] not in NOT_WRAPPERS:
        yield from _read_array(file, text, wrapped.end(), "]}")
    else:
        yield _row(Where(file.name, 1), value)


_WRAPPED = re.compile(r'\s*\{\s*"((?:[^"\\]|\\.)*)"\s*:\s*\[')


def _read_array(file: SourceFile, text: str, position: int, closing: str) -> Iterator[Item]:
    """Read a JSON array element by element, so that each keeps its line and a bad one is named.

    `position` is behind its opening bracket; `closing` is what must follow its last element, and nothing after it.
    """
    space = json.decoder.WHITESPACE.match  # type: ignore[attr-defined]
    line, counted, after = 1, 0, "["
    while True:
        position = space(text, position).end()
        line += text.count("\n", counted, position)
        counted = position
        where = Where(file.name, line)
        mark = text[position : position + 1]
        if not mark:
            yield Problem("data.truncated", "the list is never closed", file.name, "fetch the file again")
            return
        if mark == "]" and after != ",":
            rest = "".join(text[position:].split())
            if rest != closing:
                what = "text after the end of the list"
                yield Problem("data.unreadable", what, str(where), "one list a file, or one object a line")
            return
        if after not in "[,":
            if mark != ",":
                what = "a comma or ] should follow the element before"
                yield Problem("data.unreadable", what, str(where), "write the list with a JSON library")
                return
            after, position = ",", position + 1
            continue
        try:
            value, position = parse_json_at(text, position)
        except ValueError as error:
            if isinstance(error, json.JSONDecodeError):
                where = Where(file.name, error.lineno)
            yield _fatal(_explain(error, text, str(where)))
            return
        after = "value"
        yield _row(where, value)


def _fatal(problem: Problem) -> Problem:
    """Return a problem behind which the file can't be read on."""
    return replace(problem, code="data.unreadable")


def _row(where: Where, value: Any) -> Row | Problem:
    if isinstance(value, dict):
        return Row(where, value)
    what = f"the row is a {type(value).__name__}, not an object"
    return Problem("row.not_object", what, str(where), 'write it as {"name": value}')


# --- csv ---


def _read_csv(file: SourceFile, head: bytes) -> Iterator[Item]:
    csv.field_size_limit(LINE_BYTES)
    delimiter = _delimiter(file, head)
    aside: list[Problem | Note] = []
    records = _records(file, head, delimiter, aside)
    header = next((_check_header(file, record) for _, record in records), None)
    if header is None or isinstance(header, Problem):
        yield from aside
        yield from [_fatal(header)] if header else []
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
                record = _fatal(record)
        where = Where(file.name, start)
        lines, start = range(start, reader.line_num + 1), reader.line_num + 1
        faults = [bad.pop(number) for number in lines if number in bad]
        if faults or record:
            yield where, faults[0] if faults else record


def _csv_lines(file: SourceFile, head: bytes, aside: list[Problem | Note], bad: dict[int, Problem]) -> Iterator[str]:
    """Yield the lines for the CSV reader; what is wrong with one goes to `bad` under its number."""
    for item in _lines(file, head):
        if not isinstance(item, _Line):
            aside.append(item)
            continue
        if item.problem:
            bad[item.number] = item.problem
        yield item.text.replace("\0", "") + "\n"


def _delimiter(file: SourceFile, head: bytes) -> str:
    if file.path.name.lower().removesuffix(".gz").endswith(".tsv"):
        return "\t"
    encoding = _encoding_of(file, head)
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


# --- parquet ---


def _read_parquet(file: SourceFile, _: bytes) -> Iterator[Item]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    meter = Meter(file.path.stat().st_size)
    try:
        with open_plain(file.path) as stream:
            table = pq.ParquetFile(pa.BufferReader(stream.read()) if file.path.suffix == ".gz" else file.path)
        if problem := _parquet_fault(file, table.schema_arrow):
            yield problem
            return
        _check_groups(table, meter)
        meter = Meter(file.path.stat().st_size)
        for batch in table.iter_batches(batch_size=PARQUET_ROWS):
            meter.add(batch.nbytes)
            for fields in _without_nanoseconds(batch).to_pylist():
                number += 1
                yield Row(Where(file.name, number), fields)
        if number != table.metadata.num_rows:
            raise ValueError(f"{number:,} rows where it says that it holds {table.metadata.num_rows:,}")
    except InflationError:
        raise
    except Exception as error:  # what the libraries below raise on a damaged file, nobody lists
        yield Problem("data.unreadable", f"damaged parquet: {error}", file.name, "fetch the file again")
        return
    if not number:
        yield Problem("data.empty", "the file holds no rows", file.name, "give a file with rows")


def _check_groups(table: Any, meter: Meter) -> None:
    """Count what is to come out of a parquet file. Raises ValueError where what it says of itself doesn't agree."""
    for number in range(table.num_row_groups):
        group = table.metadata.row_group(number)
        meter.add(group.total_byte_size)
        for column in range(group.num_columns):
            flat = table.schema.column(column).max_repetition_level == 0
            if flat and group.column(column).num_values != group.num_rows:
                raise ValueError(f"a column of {group.column(column).num_values:,} values in {group.num_rows:,} rows")


def _parquet_fault(file: SourceFile, schema: Any) -> Problem | None:
    names = schema.names
    if twice := next((name for name in names if names.count(name) > 1), None):
        what = f"the column {twice!r} stands twice"
        return Problem("data.unreadable", what, file.name, "give each column its own name")
    for column in schema:
        if (column.metadata or {}).get(b"ARROW:extension:name") == b"arrow.py_extension_type":
            what = f"the column {column.name!r} holds Python pickles, which are never opened"
            return Problem("data.unreadable", what, file.name, "write it as text, numbers or lists")
    return None


def _without_nanoseconds(batch: Any) -> Any:
    """Return a batch whose nanosecond times are text: Python's own times hold microseconds only."""
    import pyarrow as pa

    for place, column in enumerate(batch.schema):
        if pa.types.is_timestamp(column.type) and column.type.unit == "ns":
            batch = batch.set_column(place, column.name, batch.column(place).cast(pa.string()))
    return batch


# --- plain text ---


def _read_text(file: SourceFile, head: bytes) -> Iterator[Item]:
    """Read a file as one row with a text."""
    parts: list[str] = []
    for item in _lines(file, head):
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


# --- tagged words ---


def _read_conll(file: SourceFile, head: bytes) -> Iterator[Item]:
    """Read lines of a word and its tag, the last of the columns; an empty line ends a row."""
    words: list[str] = []
    tags: list[str] = []
    begin = 0
    problem: Problem | None = None
    for item in itertools.chain(_lines(file, head), [None]):
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


# --- PDF, Word, web pages ---


def _read_paper(file: SourceFile, _: bytes) -> Iterator[Item]:
    """Read a file as one row with a text."""
    suffix = file.path.suffix.lower()
    try:
        text = read_paper(file.path)
    except InflationError:
        raise
    except ImportError:
        cure = 'pip install "headstart[documents]"'
        yield Problem("data.unknown_type", f"{suffix} files need {NEEDS[suffix]}", file.name, cure)
        return
    except Exception as error:  # what these libraries raise on a damaged file, nobody lists
        yield Problem(
            "data.wrong_type", f"can't be read as {suffix}: {error}", file.name, "mend the file, or delete it"
        )
        return
    if not text:
        cure = "recognise its text first (OCR), or delete it"
        yield Problem("row.empty_text", "it holds no text, as scanned pages don't", f"{file.name}:1", cure)
        return
    yield Row(Where(file.name, 1), {"text": text})


# --- images ---


def _read_image(file: SourceFile, _: bytes) -> Iterator[Item]:
    """Read an image as one row, whose class is the name of its folder."""
    yield Row(Where(file.name, 1), {"image": Path(file.name).name, "label": file.path.resolve().parent.name})


READERS: dict[str, Callable[[SourceFile, bytes], Iterator[Item]]] = {
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "text": _read_text,
    "conll": _read_conll,
    "image": _read_image,
    "paper": _read_paper,
}
