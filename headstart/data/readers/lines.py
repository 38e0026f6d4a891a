"""A text file's lines: what encoding it is in, where its lines end, and which of them can't be read."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from typing import IO, NamedTuple

from headstart.data.inflate import open_plain
from headstart.data.rows import UTF_8, Note, SourceFile
from headstart.errors import Problem

WIDE = ("utf-16", "utf-32")  # whose line feeds are several bytes
LINE_BYTES = 16 << 20
# So many bytes beyond ASCII are no accident where all lines are UTF-8: of common Chinese characters in GBK about one in seven
# is UTF-8 by chance, and in one-byte encodings such a letter would have to stand beside another.
UTF_8_BYTES = 16
BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class Line(NamedTuple):
    """A line of a file. Where it has a `problem`, the text is only good for counting lines and quotes."""

    number: int
    text: str
    ended: bool
    problem: Problem | None = None


def lines_of(file: SourceFile, head: bytes) -> Iterator[Line | Problem | Note]:
    """Yield the lines of a text file, split at line feeds only, decoded strictly."""
    encoding = encoding_of(file, head)
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
        number = beyond = 0  # lines, and bytes beyond ASCII while all lines are UTF-8
        while block := _readline(raw, newline):
            number += 1
            if len(block) > LINE_BYTES:
                yield _too_long(file, number)
                return
            if codec != UTF_8 and beyond >= 0 and not block.isascii():
                beyond = beyond + sum(byte > 127 for byte in block) if _is_utf_8(block) else -1
            block = block.removeprefix(codecs.BOM_UTF8 if number == 1 else b"")
            text, problem = _decoded(file, number, block, codec)
            ended = text.endswith(newline.decode())
            text = text.removesuffix(newline.decode())
            yield Line(number, text, ended, problem or _nul_in(file, number, text))
    if beyond >= UTF_8_BYTES:
        what = f"it is UTF-8, which would be garbled if it were read as {codec.upper()}"
        cure = f"data.encoding is that of all files: leave it out, and convert the others: iconv -f {codec.upper()} -t UTF-8"
        yield Problem("data.wrong_type", what, file.name, cure)


def _is_utf_8(block: bytes) -> bool:
    try:
        block.decode()
    except UnicodeDecodeError:
        return False
    return True


def encoding_of(file: SourceFile, head: bytes) -> str:
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


def _wide_lines(file: SourceFile, encoding: str) -> Iterator[Line | Problem]:
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
                yield Line(number, text, ended, _nul_in(file, number, text))
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
