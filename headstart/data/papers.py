"""PDF, Word and web pages -> text, by the libraries of the extra `documents`."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

NEEDS = {".pdf": "pypdf", ".docx": "docx", ".html": "bs4", ".htm": "bs4"}
SILENT = ("script", "style", "noscript", "template", "head", "nav", "footer")
BLOCKS = ("p", "div", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "br", "section", "article", "blockquote", "pre")


def read_paper(path: Path) -> str:
    """Return the text of a file, blocks parted by empty lines.

    Raises ImportError where the library for it isn't installed, and ValueError where the file isn't what its name says.
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
        content = docx.Document(str(path)).iter_inner_content()
    except (PackageNotFoundError, zipfile.BadZipFile, KeyError) as error:
        raise ValueError(str(error)) from None
    for block in content:
        if isinstance(block, Table):
            yield "\n".join("\t".join(cell.text for cell in row.cells) for row in block.rows)
        else:
            yield block.text


def _web(path: Path) -> Iterator[str]:
    from bs4 import BeautifulSoup

    page = BeautifulSoup(path.read_bytes(), "html.parser")
    for tag in page(SILENT):
        tag.decompose()
    for tag in page(BLOCKS):
        tag.insert_before("\n\n")
        tag.append("\n\n")
    for part in re.split(r"\n\s*\n", page.get_text()):
        yield re.sub(r"[ \t]*\n[ \t]*", "\n", re.sub(r"[ \t\u00a0]+", " ", part))
