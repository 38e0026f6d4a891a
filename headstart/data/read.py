"""Files -> rows, each with where it stands.

One file, many, a folder (of images: one for each class), or a data set of the hub; plain or gzip. Which reader a file goes
to follows from its name, and what its first bytes show must agree. A reader (`readers/`) yields rows, problems and notes in
the order of the file: a bad row never ends the reading, and nothing is guessed in silence.
"""

from __future__ import annotations

import codecs
import gzip
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from headstart.data.inflate import InflationError, open_plain
from headstart.data.readers import conll, jsonl, papers, parquet, tables, texts
from headstart.data.readers.lines import BOMS, WIDE
from headstart.data.rows import UTF_8, Item, Note, Row, SourceFile, Where
from headstart.errors import DataError, Problem
from headstart.files import shown

__all__ = [  # with what is read, so that nobody needs to know two rooms
    "HUB_PREFIX",
    "IMAGE_ENDINGS",
    "KINDS",
    "LINES",
    "TEXTS",
    "UTF_8",
    "Item",
    "Note",
    "Row",
    "SourceFile",
    "Where",
    "find_files",
    "kind_of",
    "read",
    "read_parts",
]

SNIFF_BYTES = 1 << 16
HUB_PREFIX = "hub:"
TEXTS = {".txt": "text", ".md": "text"}
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
KINDS = TEXTS | {
    **dict.fromkeys(IMAGE_ENDINGS, "image"),
    **dict.fromkeys(papers.NEEDS, "paper"),
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
        yield from papers.read(file, head)
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


def _read_image(file: SourceFile, _: bytes) -> Iterator[Item]:
    """Read an image as one row, whose class is the name of its folder."""
    yield Row(Where(file.name, 1), {"image": Path(file.name).name, "label": file.path.resolve().parent.name})


READERS: dict[str, Callable[[SourceFile, bytes], Iterator[Item]]] = {
    "json": jsonl.read,
    "csv": tables.read,
    "parquet": parquet.read,
    "text": texts.read,
    "conll": conll.read,
    "image": _read_image,
    "paper": papers.read,
}
