"""PDF, Word and web pages: a file is a row, by the libraries of the extra `documents`."""

from __future__ import annotations

import codecs
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from headstart.data.inflate import InflationError, Meter
from headstart.data.rows import Item, Row, SourceFile, Where
from headstart.errors import Problem

TREE_SIZE = 8  # about as many bytes of memory take the parts of a Word file for each byte
BOMS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
NEEDS = {".pdf": "pypdf", ".docx": "docx", ".html": "bs4", ".htm": "bs4"}
OPEN_MOST = 100  # tags behind the last that is closed
SILENT = ("script", "style", "noscript", "template", "head", "nav", "footer")
BLOCKS = ("p", "div", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "br", "section", "article", "blockquote", "pre")


def read(file: SourceFile, _: bytes) -> Iterator[Item]:
    """Read a file as one row with a text."""
    suffix = file.path.suffix.lower()
    try:
        text = text_of(file.path)
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


def text_of(path: Path) -> str:
    """Return the text of a file, blocks parted by empty lines.

    Raises ImportError where the library for it isn't installed, ValueError where the file isn't what its name says, and
    InflationError where it holds too much.
    """
    parts = {".pdf": _pdf, ".docx": _word, ".html": _web, ".htm": _web}[path.suffix.lower()](path)
    return "\n\n".join(text for part in parts if (text := part.strip()))


def _pdf(path: Path) -> Iterator[str]:
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # what it says, the problem says
    try:
        with path.open("rb") as file:
            reader = pypdf.PdfReader(file)
            if reader.is_encrypted and not reader.decrypt(""):
                raise ValueError("it is locked with a password")
            for page in reader.pages:
                yield page.extract_text()
    except pypdf.errors.PyPdfError as error:
        raise ValueError(str(error)) from None


def _word(path: Path) -> Iterator[str]:
    import zipfile

    import docx
    from docx.opc.exceptions import PackageNotFoundError
    from docx.table import Table

    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())  # no more than this is ever read of them
        Meter(path.stat().st_size).add(TREE_SIZE * size)
        content = docx.Document(str(path)).iter_inner_content()
    except (PackageNotFoundError, zipfile.BadZipFile, KeyError) as error:
        raise ValueError(str(error)) from None
    for block in content:
        if isinstance(block, Table):
            yield "\n".join("\t".join(cell.text for cell in row.cells) for row in block.rows)
        else:
            yield block.text


def close_tags(content: bytes) -> bytes:
    """Return a web page in which no great number of tags is never closed: what is behind the last `>` is text, and is spelled as such.

    To Python's parser each of these may be a tag of all that follows, so it would look through the rest for every one.
    """
    end = content.rfind(b">") + 1
    if content.startswith(BOMS) or content.count(b"<", end) <= OPEN_MOST:
        return content
    return content[:end] + content[end:].replace(b"<", b"&lt;")


def _web(path: Path) -> Iterator[str]:
    from bs4 import BeautifulSoup

    logging.getLogger("bs4").setLevel(logging.CRITICAL)
    content = close_tags(path.read_bytes())
    page = BeautifulSoup(content, "html.parser")
    declared = page.declared_html_encoding
    guessed = page.original_encoding not in (None, "ascii", "utf-8", declared) and not content.startswith(BOMS)
    if guessed or page.contains_replacement_characters:
        raise ValueError(f"it is no text in {declared or 'UTF-8'}, and what else it is in is not guessed")
    for tag in page(SILENT):
        tag.decompose()
    for tag in page(BLOCKS):
        tag.insert_before("\n\n")
        tag.append("\n\n")
    for part in re.split(r"\n\s*\n", page.get_text()):
        yield re.sub(r"[ \t]*\n[ \t]*", "\n", re.sub(r"[ \t\u00a0]+", " ", part))
