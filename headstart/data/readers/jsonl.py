"""JSON: one object a line, or one document that holds the rows in a list."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from headstart.data.readers.lines import Line, lines_of
from headstart.data.rows import Item, Note, Row, SourceFile, Where, fatal
from headstart.data.strict import DepthError, DuplicateKeyError, parse_json, parse_json_at
from headstart.errors import Problem

NOT_WRAPPERS = ("messages", "conversations", "conversation")  # a row of turns, not rows
WRAPPED = re.compile(r'\s*\{\s*"((?:[^"\\]|\\.)*)"\s*:\s*\[')


def read(file: SourceFile, head: bytes) -> Iterator[Item]:
    """Yield the rows of a JSON file; its first lines decide whether it is one object a line or one document."""
    lines = lines_of(file, head)
    first: list[Line] = []
    filled = 0
    for item in lines:
        if isinstance(item, Line):
            first.append(item)
            filled += bool(item.text.strip())
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


def _is_document(first: Sequence[Line]) -> bool:
    filled = [line.text for line in first if line.text.strip()]
    if not filled:
        return False
    if filled[0].lstrip().startswith("["):
        return True
    whole = [isinstance(_decode(text, ""), dict) for text in filled]
    # One line that is one object is both; read as a document, a list inside of it is found.
    return whole == [True] or (not any(whole) and filled[0].rstrip()[-1] in "{[,:")


def _read_objects(file: SourceFile, first: list[Line], rest: Iterator[Line | Problem | Note]) -> Iterator[Item]:
    found = 0
    for item in itertools.chain(first, rest):
        if not isinstance(item, Line):
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


def _read_document(file: SourceFile, first: list[Line], rest: Iterator[Line | Problem | Note]) -> Iterator[Item]:
    parts: list[str] = []
    whole = True
    for item in itertools.chain(first, rest):
        if not isinstance(item, Line):
            yield item
        elif item.problem:
            whole = False
            yield fatal(item.problem)
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
        yield fatal(_explain(error, text, str(Where(file.name, line))))
        return
    lists = [v for v in value.values() if isinstance(v, list) and v and all(isinstance(row, dict) for row in v)]
    wrapped = WRAPPED.match(text)
    if len(value) == 1 and lists and wrapped and wrapped[1] not in NOT_WRAPPERS:
        yield from _read_array(file, text, wrapped.end(), "]}")
    else:
        yield _row(Where(file.name, 1), value)


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
            yield fatal(_explain(error, text, str(where)))
            return
        after = "value"
        yield _row(where, value)


def _row(where: Where, value: Any) -> Row | Problem:
    if isinstance(value, dict):
        return Row(where, value)
    what = f"the row is a {type(value).__name__}, not an object"
    return Problem("row.not_object", what, str(where), 'write it as {"name": value}')


# --- what is wrong with it ---


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
