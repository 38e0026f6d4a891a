"""Bad inputs, numbered, each with the answer that it gets before anything is trained.

R is refused; X is left out and counted, where `data.max_bad_rows` allows that, and else refused; F is mended, and said; W is
taken and warned of; OK is taken as it is. What is refused or left out is named with its place.

    python -m tests.unit.test_bad_inputs      prints the table of docs/reliability.md
"""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headstart.config import DataSettings, Override, build_config
from headstart.data import inflate
from headstart.data.check import find
from headstart.data.prepare import form_sides, prepare
from headstart.data.read import Row, find_files, read
from headstart.data.render import Renderer
from headstart.dataset import Data, build_data
from headstart.errors import DataError, HeadstartError, ModelError, Problem, RunError, UsageError
from headstart.job import _check_vocabulary
from headstart.report.words import data_lines
from headstart.run import RunFolder
from tests.conftest import is_test
from tests.tokens import make_tokenizer

ROOT = Path(__file__).parents[2]
MAX_LENGTH = 512
INPUTS = {
    1: "empty file, blank lines only, header only",
    2: "UTF-8 byte order mark",
    3: "UTF-16 or UTF-32, with and without a byte order mark",
    4: "Latin-1, GB18030, Shift-JIS",
    5: "one byte that is no UTF-8 in line 9,000",
    6: "CRLF, CR alone, both mixed with LF",
    7: "U+2028, U+2029, U+0085 inside of texts",
    8: "NUL bytes",
    9: ".jsonl that is one JSON list, .json that is one object a line",
    10: "parquet, Excel, PDF, a web page, a Git LFS pointer under another name",
    11: "last line cut in half",
    12: "pretty-printed objects, two objects on a line",
    13: "trailing comma, comments, single quotes, Python's repr",
    14: "NaN, Infinity",
    15: "a name twice in one object",
    16: "nested 100,000 deep",
    17: "numbers of 5,000 digits, 1e999, -0.0",
    18: "half of a surrogate pair",
    19: "a line of 1 GiB",
    20: "very many short rows",
    21: "bombs: gzip, zip, zstd, parquet, Word; archives in archives",
    22: "gzip: cut short, wrong checksum, several members",
    23: "zip and tar, whatever lies in them",
    24: "parquet: no footer, flipped bytes, a wrong number of rows",
    25: "parquet with pickled values",
    26: "CSV: open quote, ragged row, `;`, names twice or none, a field of 1 MB",
    27: "several formats in one file",
    28: "a field of several types",
    29: "null, missing, empty",
    30: "rows to score on of another kind, or none",
    31: "folders: hidden files, loops, pipes, devices, what may not be read",
    32: "data that changes or vanishes under a run",
    33: "hub: scripts, gated, no such split, offline",
    34: "`messages` missing, no list, empty",
    35: "role missing, null, a number",
    36: "other names of roles",
    37: "content missing or null without tool calls",
    38: "images or sound for a model of text",
    39: "empty answers",
    40: "no answer; a turn after the last answer; an answer first",
    41: "two turns of one role in a row",
    42: "system turn not first, several, or unknown to the template",
    43: "chat template that fails, is missing, or never ends",
    44: "tool calls: no JSON, unknown tool, result of no call, bad schema",
    45: "`weight` neither 0 nor 1; every weight 0",
    46: "preference pairs: equal, one side missing, prompts differ",
    47: 'labels and votes: NaN, infinite, null, "yes", 2, one class only',
    48: "columns and keys that nothing reads",
    49: "control tokens spelled in texts",
    50: "Jinja in texts",
    51: "rows longer than the model reads",
    52: "a step without a target",
    53: "texts that give no token",
    54: "end of text masked, beginning of text doubled",
    55: "prompt that is no prefix of what is trained",
    56: "token ids without an embedding",
    57: "fewer than 10 rows, 1 row, fewer than a step",
    58: "rows twice; rows on both sides",
    59: "keys, addresses, numbers of cards and phones",
    60: "invisible and look-alike characters",
    61: "escape sequences in texts and names of files",
    62: "HTML and scripts in texts",
    63: "odd names of files",
    64: "other languages, blobs, words of 200,000 characters",
}


class Case(NamedTuple):
    """A file and its answer: the code and the place (behind the file's name) of a problem, or the words of a note."""

    row: int
    name: str
    answer: str
    content: bytes | Callable[[Path], object]
    code: str = ""
    place: str = ""
    said: str = ""
    file: str = "a.jsonl"
    how: Mapping[str, Any] = {}
    texts: Sequence[str] = ()  # of the first record
    template: str = "chatml"


# --- what is written ---


def lines(*rows: Any) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def pair(n: int) -> dict[str, str]:
    return {"prompt": f"question {n}", "completion": f"answer {n}"}


def among(*rows: Any, good: Callable[[int], Any] = pair, count: int = 30) -> bytes:
    """Return good rows, with others from line 2 on."""
    return lines(good(0), *rows, *(good(n) for n in range(1, count)))


def turns(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def user(content: Any = "Hi?", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def told(content: Any = "Hello.", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def chat(n: int) -> dict[str, Any]:
    return turns(user(f"question {n}"), told(f"answer {n}"))


def labelled(n: int) -> dict[str, Any]:
    return {"text": f"text {n}", "label": "ab"[n % 2]}


def scored(n: int) -> dict[str, Any]:
    return {"text": f"text {n}", "label": n + 0.5}


def preferred(n: int) -> dict[str, Any]:
    return {"prompt": f"question {n}", "chosen": f"yes {n}", "rejected": f"no {n}"}


def voted(n: int) -> dict[str, Any]:
    return {**pair(n), "label": n % 2 == 0}


def document(n: int) -> dict[str, Any]:
    return {"text": f"a text with the number {n}"}


def chats(*rows: Any) -> bytes:
    return among(*rows, good=chat)


def call(arguments: Any = "{}", name: Any = "look", **more: Any) -> dict[str, Any]:
    return told(None, tool_calls=[{"id": "c", "function": {"name": name, "arguments": arguments}}], **more)


GOOD = among()
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
SYSTEM = {"role": "system", "content": "s"}
RESULT = {"role": "tool", "tool_call_id": "c", "content": "seen"}
FIRST = ("question 0", "answer 0")


def table(columns: Mapping[str, Any], schema: pa.Schema | None = None) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table(dict(columns), schema=schema), path)


def damaged(change: Callable[[bytearray], object]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        table({"text": [f"text {n}" for n in range(300)]})(path)
        content = bytearray(path.read_bytes())
        change(content)
        path.write_bytes(content)

    return write


def count_one_row_more(content: bytearray) -> None:
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    place = content.index(b"\xd8\x04", footer)  # 300 rows, as Thrift writes numbers
    content[place : place + 2] = b"\xda\x04"


def pickled(path: Path) -> None:
    told_of = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": b"\x80\x04N."}
    table({"text": [b"a"] * 30}, pa.schema([pa.field("text", pa.binary(), metadata=told_of)]))(path)


def packed(*names: str, content: bytes = b"x") -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, content)
    return held.getvalue()


def tarred(name: str) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    return held.getvalue()


def word_bomb(path: Path) -> None:
    path.write_bytes(packed("word/document.xml", "[Content_Types].xml", content=b"<a/>" * 200_000))


def folder(*more: Callable[[Path], object]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.mkdir()
        (path / "good.jsonl").write_bytes(GOOD)
        for add in more:
            add(path)

    return write


def texts_with_crlf(path: Path) -> None:
    path.mkdir()
    for number in range(20):
        (path / f"{number:02}.txt").write_bytes(b"one\r\ntwo %d\rthree\n" % number)


def with_eval(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(GOOD)
        (path.parent / "eval.jsonl").write_bytes(content)

    return write


EVAL = {"eval": "{folder}/eval.jsonl"}
TRAINED_ON = {"train_on": "last"}
MEMBERS = gzip.compress((b" " * 1_000 + b"\n") * 1_000) * 4  # 4 MiB


CASES = [
    # --- files ---
    Case(1, "empty", "R", b"", "data.empty"),
    Case(1, "blank lines", "R", b"\n  \n\n", "data.empty"),
    Case(1, "an empty list", "R", b"[]", "data.empty", file="a.json"),
    Case(1, "header only", "R", b"prompt,completion\n", "data.empty", file="a.csv"),
    Case(2, "JSON", "F", b"\xef\xbb\xbf" + GOOD, said="byte order mark", texts=FIRST),
    Case(
        2,
        "CSV",
        "F",
        b"\xef\xbb\xbfprompt,completion\n" + b"question 0,answer 0\na,b\nc,d\n" * 4,
        said="byte order mark",
        file="a.csv",
        texts=FIRST,
    ),
    Case(3, "UTF-16", "F", GOOD.decode().encode("utf-16"), said="UTF-16", texts=FIRST),
    Case(3, "UTF-32", "F", GOOD.decode().encode("utf-32"), said="UTF-32", texts=FIRST),
    Case(
        3, "UTF-16LE without", "R", GOOD.decode().encode("utf-16-le"), "data.wrong_type", said="UTF-16LE text without"
    ),
    Case(
        3, "UTF-16BE without", "R", GOOD.decode().encode("utf-16-be"), "data.wrong_type", said="UTF-16BE text without"
    ),
    Case(3, "UTF-32 without", "R", GOOD.decode().encode("utf-32-le"), "data.wrong_type", said="UTF-32 text without"),
    Case(3, "half of a UTF-16 pair", "R", "\ufeffa".encode("utf-16-le") + b"\x00\xd8", "data.unreadable", file="a.txt"),
    *(
        Case(
            4,
            name,
            "R",
            among(f'{{"prompt": "{text}", "completion": "b"}}'.encode(name)),
            "data.encoding",
            ":2",
            "-s data.encoding=",
        )
        for name, text in (("latin-1", "caf\u00e9"), ("gb18030", "\u4f60\u597d"), ("shift-jis", "\u3053\u3093"))
    ),
    *(
        Case(
            4,
            f"{name}, as said",
            "F",
            f'{{"prompt": "{text}", "completion": "b"}}\n'.encode(name) + GOOD,
            said=f"decoded from {said}",
            how={"encoding": name},
            texts=(text, "b"),
        )
        for name, text, said in (
            ("cp1252", "caf\u00e9 \u20ac", "CP1252"),
            ("gb18030", "\u4f60\u597d", "GB18030"),
            ("shift-jis", "\u3053\u3093", "SHIFT_JIS"),
        )
    ),
    Case(
        4,
        "wrongly said",
        "R",
        among(b'{"prompt": "\x81", "completion": "b"}'),
        "data.encoding",
        ":2",
        "not CP1252",
        how={"encoding": "cp1252"},
    ),
    Case(
        4,
        "UTF-8 said to be cp1252",
        "R",
        among('{"prompt": "\u00e9t\u00e9 \u00e9t\u00e9 \u00e9t\u00e9 \u00e9t\u00e9", "completion": "b"}'.encode()),
        "data.wrong_type",
        "",
        "is UTF-8",
        how={"encoding": "cp1252"},
    ),
    Case(
        4,
        "said beside a mark",
        "F",
        b"\xef\xbb\xbf" + GOOD,
        said="byte order mark",
        how={"encoding": "cp1252"},
        texts=FIRST,
    ),
    Case(
        3,
        "UTF-16LE without, as said",
        "F",
        GOOD.decode().encode("utf-16-le"),
        said="decoded from UTF-16-LE",
        how={"encoding": "utf-16-le"},
        texts=FIRST,
    ),
    Case(
        5,
        "in JSON",
        "X",
        lines(*map(pair, range(8_999)), b'{"prompt": "a\xff", "completion": "b"}'),
        "data.encoding",
        ":9000",
        "byte 14",
    ),
    Case(4, "web page", "R", b"<p>caf\xe9 au lait</p>", "data.wrong_type", said="no text in UTF-8", file="a.html"),
    Case(
        5,
        "web page",
        "R",
        b"<meta charset=utf-8><p>caf\xe9</p>",
        "data.wrong_type",
        said="no text in utf-8",
        file="a.html",
    ),
    Case(6, "CRLF", "OK", GOOD.replace(b"\n", b"\r\n"), texts=FIRST),
    Case(6, "CR", "F", GOOD.replace(b"\n", b"\r"), said="carriage return alone", texts=FIRST),
    Case(6, "mixed", "OK", lines(pair(0)).replace(b"\n", b"\r") + among(count=20), texts=FIRST),
    Case(6, "in texts", "F", texts_with_crlf, said="read as line feeds", file="f", texts=("one\ntwo 0\nthree\n",)),
    Case(
        7,
        "JSON",
        "OK",
        among() + '{"prompt": "a\u2028b\u2029c\u0085d", "completion": "e"}\n'.encode(),
    ),
    Case(
        7,
        "CoNLL",
        "OK",
        "".join(f"10\u00a0000\tO\nb\u2028c B-x\n{n} O\n\n" for n in range(20)).encode(),
        file="a.conll",
        texts=("10\u00a0000", "b\u2028c", "0"),
    ),
    Case(8, "JSON", "R", among(b'{"prompt": "a\0", "completion": "b"}'), "data.encoding", ":2", "NUL"),
    Case(8, "CSV", "R", b"prompt,completion\na,\0b\nc,d\n", "data.encoding", ":2", "NUL", file="a.csv"),
    Case(8, "text", "R", b"some text\0 of a file that is long enough", "data.encoding", ":1", "NUL", file="a.txt"),
    Case(8, "CoNLL", "R", b"a O\n\na long enough word\0 O\n", "data.encoding", ":3", "NUL", file="a.conll"),
    Case(9, "list", "F", json.dumps([pair(n) for n in range(30)]).encode(), said="one JSON document", texts=FIRST),
    Case(9, "lines", "F", GOOD, said="one object a line", file="a.json", texts=FIRST),
    Case(10, "parquet", "R", b"PAR1" + GOOD, "data.wrong_type", said="parquet"),
    Case(10, "Excel", "R", packed("xl/workbook.xml"), "data.wrong_type", said="Excel"),
    Case(10, "old Excel", "R", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "data.wrong_type", said="old Excel", file="a.csv"),
    Case(10, "PDF", "R", b"%PDF-1.7\n", "data.wrong_type", said="PDF"),
    Case(10, "web page", "R", b"\n <HTML><body>Sign in</body>", "data.wrong_type", said="login"),
    Case(10, "Git LFS", "R", b"version https://git-lfs.github.com/spec/v1\n", "data.wrong_type", said="git lfs pull"),
    Case(10, "JSON named parquet", "R", GOOD, "data.wrong_type", said="not parquet", file="a.parquet"),
    Case(11, "JSON lines", "R", GOOD + b'{"prompt": "a", "comp', "data.truncated", ":31", "middle of a row"),
    Case(11, "JSON list", "R", b'[{"prompt": "a", "completion": "b"},', "data.truncated", file="a.json"),
    Case(11, "CSV", "R", b"prompt,completion\na,b\nc", "row.csv", ":3", file="a.csv"),
    Case(
        12,
        "pretty",
        "R",
        (json.dumps(pair(0), indent=1) + "\n").encode() * 3,
        "data.unreadable",
        ":5",
        "one object a line",
    ),
    Case(12, "two on a line", "R", among(b"{} {}"), "row.not_json", ":2", "break the line"),
    Case(13, "comma", "R", among(b'{"prompt": "a",}'), "row.not_json", ":2", "column 1"),
    Case(13, "comment", "R", among(b"// here it begins"), "row.not_json", ":2", "column 1"),
    Case(13, "comment behind", "R", among(b'{"prompt": "a"} # so'), "row.not_json", ":2", "column 17"),
    Case(13, "single quotes", "R", among(b"{'prompt': 'a'}"), "row.not_json", ":2", "double quotes"),
    Case(13, "repr", "R", among(b'{"prompt": None}'), "row.not_json", ":2", "column 12"),
    *(
        Case(14, name, "R", among(b'{"prompt": %s}' % name.encode()), "row.not_json", ":2", name)
        for name in ("NaN", "Infinity", "-Infinity")
    ),
    Case(
        14,
        "in a call",
        "R",
        chats(turns(user(), call('{"a": NaN}'))),
        "row.tool_call",
        ":2:turn[1].tool_calls[0].function.arguments",
    ),
    Case(15, "row", "R", among(b'{"prompt": "a", "prompt": "b"}'), "row.duplicate_key", ":2", "'prompt'"),
    Case(15, "inside", "R", among(b'{"prompt": {"a": 1, "a": 1}}'), "row.duplicate_key", ":2", "'a'"),
    Case(16, "100,000", "R", among(b'{"prompt": ' + b"[" * 100_000), "row.not_json", ":2", "too deep"),
    Case(
        16,
        "65",
        "R",
        among(b'{"prompt": "a", "completion": "b", "c": %s1%s}' % (b"[" * 64, b"]" * 64)),
        "row.not_json",
        ":2",
        "64",
    ),
    Case(16, "64", "OK", among(b'{"prompt": "a", "completion": "b", "c": %s1%s}' % (b"[" * 63, b"]" * 63))),
    Case(
        16, "in tools", "R", chats(turns(user(), told(), tools="[" * 100_000)), "row.tool_call", ":2:tools", "too deep"
    ),
    Case(17, "5,000 digits", "R", among(b'{"prompt": %s}' % (b"9" * 5_000)), "row.not_json", ":2", "digits"),
    Case(17, "400 digits", "R", among({"text": "a", "label": 10**400}, good=scored), "row.label", ":2:label"),
    Case(17, "1e999", "R", among(b'{"prompt": 1e999}'), "row.not_json", ":2", "larger than any"),
    Case(17, "-0.0", "OK", among({"text": "a", "label": -0.0}, good=scored)),
    Case(18, "prompt", "X", among({"prompt": "\ud800", "completion": "b"}), "row.unencodable", ":2:turn[0].content"),
    Case(18, "thought", "X", chats(turns(user(), told(reasoning="\udfff"))), "row.unencodable", ":2:turn[1].reasoning"),
    Case(18, "name", "X", chats(turns(user(name="\ud800"), told())), "row.unencodable", ":2:turn[0].name"),
    Case(18, "document", "X", among({"text": "\ud800"}, good=document), "row.unencodable", ":2"),
    Case(18, "column that nothing reads", "W", among({**pair(50), "\ud800": "\ud800"}), said="columns not used"),
    Case(19, "UTF-8", "R", b'{"prompt": "' + b"x" * (16 << 20) + b'"}\n', "data.too_large", ":1", "16 MiB"),
    Case(19, "UTF-16", "R", ('{"prompt": "' + "x" * (16 << 20)).encode("utf-16"), "data.too_large", ":1", "16 MiB"),
    Case(21, "gzip", "R", MEMBERS, "data.too_large", said="hold more than", file="a.jsonl.gz"),
    Case(21, "gzip of one list", "R", gzip.compress(b"[") + MEMBERS, "data.too_large", file="a.json.gz"),
    Case(21, "parquet", "R", table({"text": ["x" * 10_000] * 1_000}), "data.too_large", file="a.parquet"),
    Case(21, "Word", "R", word_bomb, "data.too_large", file="a.docx"),
    Case(21, "zstd", "R", b"\x28\xb5\x2f\xfd" + bytes(9), "data.wrong_type", said="zstd"),
    Case(21, "zip", "R", packed("a.jsonl"), "data.wrong_type", said="zip"),
    Case(
        21,
        "gzip in gzip",
        "R",
        gzip.compress(gzip.compress(GOOD)),
        "data.wrong_type",
        said="inside of another",
        file="a.jsonl.gz",
    ),
    Case(22, "cut short", "R", gzip.compress(GOOD)[:-12], "data.truncated", file="a.jsonl.gz"),
    Case(
        22, "wrong checksum", "R", gzip.compress(GOOD)[:-8] + bytes(8), "data.truncated", said="CRC", file="a.jsonl.gz"
    ),
    Case(22, "something behind it", "R", gzip.compress(GOOD) + b"more", "data.truncated", file="a.jsonl.gz"),
    Case(22, "two members", "OK", gzip.compress(GOOD) + gzip.compress(lines(pair(40))), file="a.jsonl.gz", texts=FIRST),
    Case(23, "zip", "R", packed("../../a.jsonl", "/etc/passwd"), "data.unknown_type", file="a.zip"),
    Case(23, "tar", "R", tarred("../../a.jsonl"), "data.wrong_type", said="tar"),
    Case(
        24,
        "no footer",
        "R",
        damaged(lambda content: content.__delitem__(slice(-9, None))),
        "data.unreadable",
        file="a.parquet",
    ),
    Case(
        24,
        "cut in the middle",
        "R",
        damaged(lambda c: c.__delitem__(slice(600, 900))),
        "data.unreadable",
        file="a.parquet",
    ),
    Case(24, "wrong number of rows", "R", damaged(count_one_row_more), "data.unreadable", said="301", file="a.parquet"),
    Case(25, "parquet", "R", pickled, "data.unreadable", said="pickles", file="a.parquet"),
    Case(25, "pickle", "R", b"\x80\x04N.", "data.wrong_type", said="pickle"),
    Case(25, "pickle by name", "R", b"\x80\x04N.", "data.unknown_type", file="a.pkl"),
    Case(26, "open quote", "R", b'prompt,completion\na,b\n"c,d\ne,f\n', "data.unreadable", ":3", "quote", file="a.csv"),
    Case(26, "ragged", "R", b"prompt,completion\na,b,c\n", "row.csv", ":2", "3 columns", file="a.csv"),
    Case(
        26,
        "semicolons",
        "F",
        b"prompt;completion\n" + b"question 0;answer 0\na;b\n" * 9,
        said="divided by ';'",
        file="a.csv",
        texts=FIRST,
    ),
    Case(26, "twice", "R", b"prompt,prompt\na,b\n", "data.unreadable", ":1", "twice", file="a.csv"),
    Case(26, "no name", "R", b"prompt,\na,b\n", "data.unreadable", ":1", "no name", file="a.csv"),
    Case(
        26,
        "1 MB",
        "OK",
        b"text\n" + b"".join(b"text %d\n" % n for n in range(30)) + b"x " * 500_000 + b"\n",
        file="a.csv",
    ),
    Case(
        26,
        "over the bound",
        "R",
        b'text\n"' + (b"x" * (1 << 20) + b"\n") * 17 + b'"\n',
        "row.csv",
        ":2",
        "field",
        file="a.csv",
    ),
    # --- rows ---
    Case(27, "messages and pairs", "R", among(chat(0), chat(1)), "format.mixed", said="2 rows of messages, first at"),
    Case(28, "parts of text", "OK", chats(turns(user([{"type": "text", "text": "Hi?"}]), told()))),
    Case(28, "number", "R", chats(turns(user(7), told())), "row.field_type", ":2:turn[0].content"),
    Case(28, "messages as text", "R", chats(turns() | {"messages": "[]"}), "row.field_type", ":2:messages"),
    *(
        Case(29, f"{field} {value!r}", "X", among({**good(99), field: value}, good=good), code, place)
        for good, field, value, code, place in (
            (pair, "completion", None, "row.field_missing", ":2:turn[1].content"),
            (pair, "completion", "", "row.empty_answer", ":2:turn[1].content"),
            (labelled, "label", None, "row.field_missing", ":2:label"),
            (labelled, "label", "", "row.field_missing", ":2:label"),
            (document, "text", None, "row.field_missing", ":2:text"),
            (document, "text", "", "row.empty_text", ":2"),
        )
    ),
    Case(29, "text missing", "X", among({"id": 7}, good=document), "row.field_missing", ":2:text"),
    Case(29, "completion missing", "R", among({"prompt": "a"}), "row.field_missing", ":2"),
    Case(
        29, "label missing", "R", among({"text": "a"}, good=labelled), "format.mixed", said="1 rows of text, first at"
    ),
    Case(
        29,
        "tools and weight",
        "OK",
        chats(turns(user(), told(weight=None), tools=None), turns(user(), told(), tools="")),
    ),
    Case(29, "prompt empty", "OK", among({"prompt": "", "completion": "b"})),
    Case(30, "another kind", "R", with_eval(among(good=document)), "format.kind", how=EVAL),
    Case(30, "empty", "R", with_eval(b"\n"), "data.empty", how=EVAL),
    Case(
        30,
        "without the column",
        "R",
        with_eval(among(good=chat)),
        "format.column",
        how=EVAL | {"prompt": "prompt", "completion": "completion"},
    ),
    Case(
        31,
        "hidden",
        "OK",
        folder(lambda p: (p / ".hidden.jsonl").write_text("bad"), lambda p: (p / ".git").mkdir()),
        file="f",
        texts=FIRST,
    ),
    Case(31, "pipe", "R", folder(lambda p: os.mkfifo(p / "pipe.jsonl")), "data.not_a_file", "/pipe.jsonl", file="f"),
    Case(
        31,
        "device",
        "R",
        folder(lambda p: (p / "zero.jsonl").symlink_to("/dev/zero")),
        "data.not_a_file",
        "/zero.jsonl",
        file="f",
    ),
    Case(
        31,
        "link to itself",
        "R",
        folder(lambda p: (p / "x.jsonl").symlink_to(p / "x.jsonl")),
        "data.not_a_file",
        "/x.jsonl",
        file="f",
    ),
    Case(
        31, "folder in itself", "R", folder(lambda p: (p / "loop").symlink_to(p)), "data.not_a_file", "/loop", file="f"
    ),
    Case(31, "pipe by name", "R", os.mkfifo, "data.not_a_file"),
    Case(31, "no such file", "R", lambda path: None, "data.missing"),
    # --- conversations ---
    Case(34, "missing", "R", chats({"id": 1}), "row.field_type", ":2:messages"),
    Case(34, "null", "R", chats(turns() | {"messages": None}), "row.field_type", ":2:messages"),
    Case(34, "empty", "R", chats(turns()), "row.field_type", ":2:messages", "empty"),
    Case(34, "no object", "R", chats(turns("Hi?")), "row.field_type", ":2:messages[0]"),
    Case(35, "missing", "R", chats(turns({"content": "a"}, told())), "row.role", ":2:turn[0].role"),
    Case(35, "null", "R", chats(turns({"role": None, "content": "a"}, told())), "row.role", ":2:turn[0].role"),
    Case(35, "number", "R", chats(turns({"role": 3, "content": "a"}, told())), "row.role", ":2:turn[0].role"),
    Case(35, "list", "R", chats(turns({"role": ["user"], "content": "a"}, told())), "row.role", ":2:turn[0].role"),
    Case(
        36,
        "human and gpt",
        "F",
        chats(turns({"role": "human", "content": "a"}, {"role": "gpt", "content": "b"})),
        said="role `human` read as `user`",
    ),
    Case(
        36,
        "robot",
        "R",
        chats(turns({"role": "robot", "content": "a"}, told())),
        "row.role",
        ":2:turn[0].role",
        "robot",
    ),
    Case(37, "missing", "R", chats(turns({"role": "user"}, told())), "row.field_missing", ":2:turn[0].content"),
    Case(37, "null", "R", chats(turns(user(), told(None))), "row.field_missing", ":2:turn[1].content"),
    Case(
        38,
        "image",
        "R",
        chats(turns(user([{"type": "image_url", "image_url": {}}]), told())),
        "row.media",
        ":2:turn[0].content[0]",
    ),
    Case(38, "sound", "R", chats(turns(user([{"type": "input_audio"}]), told())), "row.media", ":2:turn[0].content[0]"),
    Case(39, "empty", "X", chats(turns(user(), told(""))), "row.empty_answer", ":2:turn[1].content"),
    Case(39, "white space", "X", chats(turns(user(), told(" \n"))), "row.empty_answer", ":2:turn[1].content"),
    Case(40, "none", "X", chats(turns(user())), "row.no_answer", ":2"),
    Case(
        40,
        "turn behind",
        "W",
        chats(turns(user(), told(), user("Bye."))),
        said="1 rows end with turns after the last answer",
    ),
    Case(40, "answer first", "W", chats(turns(told(), user(), told())), said="1 rows begin with an answer"),
    Case(
        41, "template that allows", "W", chats(turns(user(), user(), told())), said="1 rows have two turns of one role"
    ),
    Case(
        41,
        "joined, as asked",
        "F",
        lines(turns(user("a"), user("b"), told("c"), told("d"))) + chats(),
        said="1 rows have two turns of one role in a row, which are joined",
        how={"fix": ("merge_turns",)},
        texts=("a\n\nb", "c\n\nd"),
    ),
    Case(
        42,
        "not first",
        "R",
        chats(turns(user(), {"role": "system", "content": "s"}, told())),
        "row.role",
        ":2:turn[1].role",
        "-s data.fix=fold_system",
    ),
    Case(
        42,
        "folded, as asked",
        "F",
        lines(turns(SYSTEM, SYSTEM, user("a"), told("b"), SYSTEM, user("c"), told("d"))) + chats(),
        said="1 rows have a system turn, which is put in front of the user's next turn",
        how={"fix": ("fold_system",)},
        texts=("s\n\ns\n\na", "b", "s\n\nc", "d"),
        template="gemma",
    ),
    Case(
        42,
        "nothing to fold into",
        "R",
        chats(turns(user(), SYSTEM, told())),
        "row.role",
        ":2:turn[1].role",
        how={"fix": ("fold_system",)},
    ),
    Case(
        42,
        "several",
        "R",
        chats(turns({"role": "system", "content": "s"}, {"role": "developer", "content": "s"}, user(), told())),
        "row.role",
        ":2:turn[1].role",
        "behind another",
    ),
    Case(
        42,
        "unknown to the template",
        "R",
        chats(turns({"role": "system", "content": "s"}, user(), told())),
        "row.template",
        ":2",
        "-s data.fix=fold_system",
        template="gemma",
    ),
    Case(
        44,
        "arguments",
        "R",
        chats(turns(user(), call("{'a': 1}"))),
        "row.tool_call",
        ":2:turn[1].tool_calls[0].function.arguments",
        "no JSON",
    ),
    Case(
        44,
        "arguments a list",
        "R",
        chats(turns(user(), call("[1]"))),
        "row.tool_call",
        ":2:turn[1].tool_calls[0].function.arguments",
        "not an object",
    ),
    Case(44, "no name", "R", chats(turns(user(), call(name=None))), "row.tool_call", ":2:turn[1].tool_calls[0]"),
    Case(
        44,
        "unknown tool",
        "R",
        chats(turns(user(), call(name="fly"), tools=[TOOL])),
        "row.tool_call",
        ":2:turn[1].tool_calls",
        "'fly'",
    ),
    Case(
        44,
        "result of no call",
        "R",
        chats(turns(user(), {**RESULT, "tool_call_id": "d"}, told())),
        "row.tool_call",
        ":2:turn[1]",
    ),
    Case(
        44,
        "tool without a name",
        "R",
        chats(turns(user(), told(), tools=[{"type": "function"}])),
        "row.tool_call",
        ":2:tools[0]",
    ),
    Case(
        44,
        "schema",
        "R",
        chats(turns(user(), told(), tools=[{"name": "f", "parameters": "x"}])),
        "row.tool_call",
        ":2:tools[0]",
    ),
    Case(44, "all right", "OK", chats(turns(user(), call(), RESULT, told(), tools=[TOOL])), template="tools"),
    *(
        Case(45, repr(weight), "R", chats(turns(user(), told(weight=weight))), "row.weight", ":2:turn[1].weight")
        for weight in (2, 0.5, -1, "1", [1])
    ),
    Case(45, "all 0", "X", chats(turns(user(), told(weight=0))), "row.no_answer", ":2", "weight 0"),
    Case(46, "equal", "X", among({**preferred(50), "rejected": "yes 50"}, good=preferred), "row.pair", ":2:rejected"),
    *(
        Case(46, name, "R", among(row, good=preferred), "row.pair", f":2:{place}")
        for name, row, place in (
            ("null", {**preferred(50), "rejected": None}, "rejected"),
            ("missing", {"prompt": "question", "chosen": "yes"}, "rejected"),
            ("other prompt", {**preferred(50), "rejected": [user(), told()]}, "rejected"),
            ("two answers", {**preferred(50), "chosen": [told(), told()]}, "chosen"),
        )
    ),
    Case(
        46,
        "empty side",
        "R",
        among({**preferred(50), "chosen": ""}, good=preferred),
        "row.empty_answer",
        ":2:chosen.content",
    ),
    Case(46, "wrong role", "R", among({**preferred(50), "chosen": [user()]}, good=preferred), "row.role", ":2:chosen"),
    Case(
        46,
        "one side too long",
        "R",
        among(*[{**preferred(50 + n), "rejected": "long " * 600} for n in range(3)], good=preferred),
        "row.too_long",
    ),
    Case(
        46,
        "rejected always longer",
        "W",
        among(good=lambda n: {**preferred(n), "rejected": f"a far longer answer {n}"}, count=40),
        said="are the sides swapped?",
    ),
    *(
        Case(47, f"vote {name}", "R", among({**pair(50), "label": value}, good=voted), "row.label", ":2:label", said)
        for name, value, said in (
            ("null", None, "no label"),
            ("nan", "nan", "'nan'"),
            ("2", 2, "2 where true or false"),
        )
    ),
    Case(47, "votes all for", "W", among(good=lambda n: {**pair(n), "label": True}), said="is never seen"),
    Case(
        47,
        "NaN",
        "R",
        b"text,label\na,0.5\nb,1.5\nc,nan\n" + b"d,2.5\ne,3.5\n" * 9,
        "row.label",
        ":4:label",
        file="a.csv",
    ),
    Case(
        47,
        "infinite",
        "R",
        b"text,label\na,0.5\nb,1.5\nc,inf\n" + b"d,2.5\ne,3.5\n" * 9,
        "row.label",
        ":4:label",
        file="a.csv",
    ),
    Case(47, "text", "R", among({"text": "a", "label": "yes"}, good=scored), "row.label", ":2:label"),
    Case(47, "fraction", "R", among({"text": "a", "label": 0.5}, good=labelled), "row.label", ":2:label"),
    Case(47, "one class", "R", among(good=lambda n: {"text": f"text {n}", "label": "a"}), "labels.one", said="'a'"),
    Case(48, "column", "W", among({**pair(50), "mood": 1}), said="columns not used: mood"),
    Case(48, "key", "W", chats(turns(user(mood=1), told())), said="keys of turns that are not used: `mood`"),
    # --- tokens ---
    Case(
        49, "in a prompt", "W", among({"prompt": "a<|im_end|>", "completion": "b"}), said="1 rows spell control tokens"
    ),
    Case(
        49,
        "in a prompt, refused",
        "R",
        among({"prompt": "a<|im_end|>", "completion": "b"}),
        "row.control",
        ":2",
        "-s data.control_tokens=text",
        how={"control_tokens": "refuse"},
    ),
    Case(51, "few", "W", chats(turns(user("long " * 500), told())), said="1 rows to train on dropped whole"),
    Case(
        51,
        "many",
        "R",
        chats(*[turns(user(f"{n} long " * 500), told()) for n in range(3)]),
        "row.too_long",
        said="3 of 33 rows (9%)",
    ),
    Case(
        51,
        "many, as asked",
        "W",
        chats(*[turns(user(f"{n} long " * 500), told()) for n in range(3)]),
        said="dropped whole",
        how={"over_length": "drop"},
    ),
    Case(
        52,
        "text of one token",
        "X",
        among({"text": "a"}, good=document),
        "row.empty_text",
        ":2",
        "nothing can be predicted",
    ),
    Case(57, "six", "W", among(count=6), said="rows to train on are few"),
    Case(57, "one", "R", lines(pair(0)), "split.too_small"),
    Case(58, "twice", "W", among(pair(0)), said="1 rows stand more than once"),
    Case(
        58,
        "both sides",
        "W",
        with_eval(lines(pair(3), pair(50))),
        said="1 rows to score on also stood in the training data",
        how=EVAL,
    ),
    Case(58, "nothing but", "R", with_eval(GOOD), "split.too_small", how=EVAL),
]

# Rows that other tests hold, with the answers that these ask for.
HELD: dict[int, tuple[str, tuple[str, ...]]] = {
    4: ("R", ("tests/unit/test_bad_inputs.py::test_an_encoding_that_cannot_be_or_does_nothing_is_refused",)),
    5: ("X", ("tests/unit/test_read.py::test_a_bad_line_takes_its_whole_row_along_and_no_other",)),
    20: ("OK", ("tests/unit/test_bad_inputs.py::test_many_rows_take_no_more_memory_than_few",)),
    19: ("R", ("tests/unit/test_bad_inputs.py::test_of_a_line_without_end_little_is_read",)),
    24: (
        "R",
        (
            "tests/unit/test_bad_inputs.py::test_flipped_bytes_of_parquet_are_rows_or_problems",
            "tests/unit/test_bad_inputs.py::test_a_damaged_footer_of_parquet_never_ends_the_process",
        ),
    ),
    31: ("R", ("tests/unit/test_bad_inputs.py::test_what_may_not_be_read_is_named",)),
    32: ("R", ("tests/e2e/test_tiny_run.py::test_a_run_whose_data_changed_is_not_resumed",)),
    33: (
        "R",
        (
            "tests/unit/test_source.py::test_a_hub_data_set_is_read_from_its_data_files",
            "tests/unit/test_source.py::test_what_the_hub_does_not_have",
            "tests/unit/test_bad_inputs.py::test_a_data_set_of_the_hub_without_a_network",
        ),
    ),
    43: (
        "R",
        (
            "tests/laws/test_rendering.py::test_no_template_is_an_error_and_plain_is_a_choice",
            "tests/laws/test_rendering.py::test_a_row_that_the_template_refuses_is_a_problem_with_its_place",
            "tests/unit/test_bounded.py::test_a_template_that_goes_on_and_on_is_an_error",
        ),
    ),
    41: ("R", ("tests/unit/test_bad_inputs.py::test_a_template_may_refuse_two_turns_of_one_role",)),
    49: (
        "OK, R",
        (
            "tests/laws/test_rendering.py::test_content_never_becomes_a_control_token",
            "tests/unit/test_corpus.py::test_control_tokens_in_a_stream_can_be_refused",
        ),
    ),
    50: (
        "OK",
        (
            "tests/unit/test_bad_inputs.py::test_jinja_in_a_text_is_text",
            "tests/laws/test_rendering.py::test_content_comes_back_byte_for_byte",
        ),
    ),
    52: ("R", ("tests/unit/test_bad_inputs.py::test_a_step_without_a_target_is_refused_with_its_rows",)),
    53: ("X", ("tests/unit/test_bad_inputs.py::test_a_text_that_gives_no_token_is_left_out",)),
    54: (
        "OK",
        (
            "tests/laws/test_rendering.py::test_pad_equals_end_and_the_end_is_trained",
            "tests/laws/test_rendering.py::test_training_tokens_are_those_of_the_tokenizer_itself",
        ),
    ),
    55: ("R", ("tests/laws/test_rendering.py::test_the_prompt_is_a_prefix_of_the_training_tokens",)),
    56: ("R", ("tests/unit/test_bad_inputs.py::test_a_token_without_an_embedding_is_refused",)),
    57: ("OK", ("tests/unit/test_feed.py::test_every_step_but_the_last_is_full_and_epochs_are_whole",)),
    58: (
        "W, F",
        (
            "tests/unit/test_near.py::test_near_duplicates_are_those_that_all_pairs_give",
            "tests/unit/test_feed.py::test_rows_that_say_nearly_what_is_held_out_are_not_trained_on_where_that_is_asked",
        ),
    ),
    59: (
        "W",
        (
            "tests/unit/test_private.py::test_each_kind_is_found_whole_between_words_and_replaced",
            "tests/unit/test_private.py::test_what_only_looks_private_stays",
        ),
    ),
    60: (
        "W",
        (
            "tests/unit/test_quality.py::test_what_hurts_in_one_row",
            "tests/unit/test_quality.py::test_words_that_mix_scripts_in_the_open_are_left_alone",
            "tests/unit/test_quality.py::test_words_of_look_alikes_alone_are_found_where_their_script_is_not_at_home",
        ),
    ),
    64: (
        "W",
        (
            "tests/unit/test_quality.py::test_rows_in_another_script",
            "tests/unit/test_quality.py::test_rows_in_another_language",
            "tests/unit/test_quality.py::test_what_hurts_in_one_row",
        ),
    ),
    61: (
        "F",
        (
            "tests/unit/test_report.py::test_nothing_in_data_steers_a_terminal",
            "tests/unit/test_report.py::test_names_that_steer_a_terminal_are_spelled_out_wherever_they_are_printed",
        ),
    ),
    62: (
        "F",
        (
            "tests/unit/test_report.py::test_data_in_the_page_is_text",
            "tests/unit/test_report.py::test_names_of_classes_and_models_are_text_in_page_and_card",
        ),
    ),
    63: (
        "OK, R",
        (
            "tests/unit/test_bad_inputs.py::test_odd_names_of_files_are_read_or_refused",
            "tests/unit/test_bad_inputs.py::test_odd_names_of_runs_are_made_or_refused",
        ),
    ),
}

# Rows that nothing holds yet, and why; of those that are held too, the part that is not.
OPEN = {
    60: "words that hold nothing but look-alike letters are told where few rows show that their script is at home",
    63: "a server is not there yet; names on the command line are held",
    64: "languages are told apart by their commonest words, in 19 of them and in rows of a dozen words or more",
}


# --- how they are answered ---


@cache
def renderer(template: str) -> Renderer:
    tokenizer = make_tokenizer(template)
    return Renderer(tokenizer, (tokenizer.eos_token_id,))


class Answer(NamedTuple):
    refused: bool
    problems: Sequence[Problem]
    notes: str = ""
    texts: Sequence[str] = ()


def answer(path: Path, how: Mapping[str, Any], template: str) -> Answer:
    """Go the way of a run up to its first step."""
    values = {key: value.format(folder=path.parent) if key == "eval" else value for key, value in how.items()}
    given = [Override(f"data.{key}", value, "-s") for key, value in values.items()]
    config = build_config(None, [Override("data.train", str(path), "-s"), *given])
    settings: DataSettings = config.settings.data
    try:
        sides = form_sides(settings)
        prepared = prepare(sides, settings, renderer(template), MAX_LENGTH, task=sides.task)
        Data(config, cast(Any, None), None, renderer(template), prepared).reject_bad_rows()
    except HeadstartError as error:
        return Answer(True, error.problems)
    spelled = find(prepared, renderer(template)).control_rows
    notes = [*data_lines(prepared), f"{len(spelled)} rows spell control tokens" * bool(spelled)]
    first = min(sides.train.formatted.examples, key=lambda record: record.where)
    return Answer(False, prepared.problems, "\n".join(notes), first.texts)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.row}-{case.name}")
def test_the_answer_is_that_of_the_table(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inflate, "INFLATED_BYTES", 1 << 20)
    monkeypatch.setattr(inflate, "RATIO_MAX", 20)
    path = tmp_path / case.file
    path.write_bytes(case.content) if isinstance(case.content, bytes) else case.content(path)
    found = answer(path, case.how, case.template)
    if case.answer in ("R", "X"):
        assert found.refused, found.notes
        named = [p for p in found.problems if p.code == case.code]
        assert named, found.problems
        problem = named[0]
        assert not case.place or problem.where == f"{path}{case.place}"
        assert case.said in f"{problem.what} {problem.cure}", problem
        assert problem.cure
    if case.answer == "X":
        found = answer(path, {**case.how, "max_bad_rows": 1}, case.template)
        assert [(p.code, p.where) for p in found.problems] == [(case.code, f"{path}{case.place}")]
        assert "1 rows can't be used" in found.notes
    if case.answer in ("F", "W", "OK"):
        assert not found.refused, found.problems
        assert not found.problems
        assert case.said in found.notes
    if case.texts:
        assert tuple(found.texts) == tuple(case.texts)


# --- what no single file shows ---


def peak_bytes(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_many_rows_take_no_more_memory_than_few(tmp_path: Path) -> None:
    peaks = []
    for count in (2_000, 20_000):
        path = tmp_path / f"{count}.jsonl"
        path.write_bytes(among(count=count))
        peaks.append(peak_bytes(lambda path=path: sum(1 for _ in read(find_files([str(path)])))))  # type: ignore[misc]
    assert peaks[1] < 1.2 * peaks[0] < 2 << 20


def test_of_a_line_without_end_little_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"x" * (16 << 20)) * 64)  # 1 GiB in 1 MiB
    found: list[Any] = []
    assert peak_bytes(lambda: found.extend(read(find_files([str(path)])))) < 96 << 20
    assert [item.code for item in found] == ["data.too_large"]


def test_flipped_bytes_of_parquet_are_rows_or_problems(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table({"text": [f"text {n}" for n in range(300)], "n": list(range(300))})(path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 13):
        content = bytearray(whole)
        content[place] ^= 0xFF
        path.write_bytes(content)
        found = list(read(find_files([str(path)])))
        assert sum(isinstance(item, Row) for item in found) == 300 or isinstance(found[-1], Problem)


def test_a_damaged_footer_of_parquet_never_ends_the_process(tmp_path: Path) -> None:
    """A column that allows no null, and statistics of nulls: asked for its values too early, pyarrow calls terminate()."""
    path = tmp_path / "a.parquet"
    table({"text": [f"text {n}" for n in range(3)]})(path)
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    told = []
    for place in range(footer, len(whole) - 8):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :])
        told += [item.what for item in read(find_files([str(path)])) if isinstance(item, Problem)]
    assert any("histogram size mismatch" in what for what in told)


def test_what_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder()(tmp_path / "f")

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(tmp_path / "f"))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        (problem,) = read(find_files([str(tmp_path / "f")]))
    assert isinstance(problem, Problem)
    assert (problem.code, Path(problem.where).name) == ("data.not_a_file", "good.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        with pytest.raises(DataError, match="Permission denied"):
            find_files([str(tmp_path / "f")])


def test_a_data_set_of_the_hub_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADSTART_OFFLINE", "1")
    with pytest.raises(DataError, match="unset it, or give local files"):
        find_files(["hub:owner/name"])


def test_an_encoding_that_cannot_be_or_does_nothing_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    for name in ("utf-7", "unicode_escape", "rot13", "base64", "klingon", "idna", ""):
        with pytest.raises(UsageError, match="it should be an encoding of text"):
            build_config(None, [Override("data.encoding", name, "-s")])
    path = tmp_path / "a.parquet"
    table({"prompt": [f"question {n}" for n in range(30)], "completion": [f"answer {n}" for n in range(30)]})(path)
    named = {"data.train": str(path), "data.encoding": "cp1252", "model": str(tiny_model)}
    config = build_config(None, [Override(key, value, "-s") for key, value in named.items()])
    with pytest.raises(UsageError, match="no file is one of text"):
        build_data(config)


def test_a_template_may_refuse_two_turns_of_one_role(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("chatml")
    refusal = (
        "{% if loop.previtem and loop.previtem.role == m.role %}{{ raise_exception('one role twice') }}{% endif %}"
    )
    tokenizer.chat_template = tokenizer.chat_template.replace("%}", "%}" + refusal, 1)
    path = tmp_path / "a.jsonl"
    path.write_bytes(chats(turns(user(), user(), told())))
    settings = DataSettings(train=(str(path),))
    strict = Renderer(tokenizer, (tokenizer.eos_token_id,))
    (problem,) = prepare(form_sides(settings), settings, strict, MAX_LENGTH, task="chat").problems
    assert (problem.code, problem.where, "one role twice" in problem.what) == ("row.template", f"{path}:2", True)
    assert problem.cure.endswith("-s data.fix=merge_turns")
    settings = DataSettings(train=(str(path),), fix=("merge_turns",))
    assert not prepare(form_sides(settings), settings, strict, MAX_LENGTH, task="chat").problems


@pytest.mark.parametrize("text", ["{{ 7*7 }}", "{% raw %}{% endraw %}", "{# gone? #}", "{%- for x in y -%}", "${7*7}"])
def test_jinja_in_a_text_is_text(tmp_path: Path, text: str) -> None:
    own = renderer("chatml")
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"prompt": text, "completion": text}))
    (row,) = form_sides(DataSettings(train=(str(path),))).train.formatted.examples
    (runs,) = cast(Any, own.training(cast(Any, row)))
    assert own.decode_raw(own.encode([runs])[0].ids.tolist()).count(text) == 2


def test_a_step_without_a_target_is_refused_with_its_rows() -> None:
    from headstart.engine.engine import Engine
    from headstart.engine.forward import PackReader
    from headstart.engine.loop import LoopPlan, take_step
    from headstart.engine.optim import Schedule
    from headstart.models.adapt import adapt
    from headstart.models.attention import register
    from headstart.objectives.tokens import nll
    from tests.conftest import example
    from tests.twins import twin

    register()
    adapted = adapt(twin("llama"), None, seed=0)
    engine = Engine(PackReader(adapted.model), adapted.trainable(), nll)
    rows = [example([3, 4, 5], [0.0, 0.0, 0.0], line=7)]
    with pytest.raises(HeadstartError, match="rows:7"):
        take_step(engine, rows, range(1), LoopPlan(Schedule(1e-2, 10), 1000), 0, 0.0)


def test_a_text_that_gives_no_token_is_left_out(tmp_path: Path) -> None:
    from transformers import BertTokenizerFast

    from headstart.data.encode import Encoder
    from headstart.data.labels import Labels, segment_labelled
    from headstart.data.masking import find_masking, segment_masked
    from headstart.data.read import Where
    from headstart.data.records import Document, Labelled, Related
    from headstart.data.related import segment_related

    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]))
    own = Encoder(BertTokenizerFast(str(vocabulary)))
    where, nothing = Where("f", 3), "\u200d\u200d"  # of which this tokenizer keeps nothing
    masking = find_masking(own, 0, whole_words=False)
    for made in (
        segment_labelled([Labelled(where, nothing, "x")], own, Labels("classification", ("x", "y")), max_length=20),
        segment_related([Related(where, ("a", nothing))], own, max_length=20),
        segment_masked([Document(where, nothing)], own, masking, max_length=20),
    ):
        assert [(p.code, p.where, p.what) for p in made.problems] == [
            ("row.empty_text", "f:3", "the text gives no token")
        ]
        assert not made.examples


def test_a_token_without_an_embedding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)
    settings = DataSettings(train=(str(path),))
    prepared = prepare(form_sides(settings), settings, renderer("chatml"), MAX_LENGTH, task="chat")
    highest = max(part.highest_id for part in (prepared.train, prepared.watch, prepared.proof))
    data: Any = SimpleNamespace(prepared=prepared, source=SimpleNamespace(name="base"))

    def model(rows: int) -> Any:
        return SimpleNamespace(get_input_embeddings=lambda: SimpleNamespace(weight=SimpleNamespace(shape=(rows, 8))))

    _check_vocabulary(data, model(highest + 1))
    with pytest.raises(ModelError, match=f"the id {highest}"):
        _check_vocabulary(data, model(highest))


def test_odd_names_of_files_are_read_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("inner").mkdir()
    for name in ("a\nb.jsonl", "-rf.jsonl", "CON.jsonl", "a b;c.jsonl", "inner/../up.jsonl", "\udcff.jsonl"):
        Path(name).write_bytes(GOOD)
        (file,) = find_files([name])
        assert sum(isinstance(item, Row) for item in read([file])) == 30
    for name in ("x" * 300 + ".jsonl", "a\0b.jsonl"):
        with pytest.raises(DataError):
            find_files([name])


def test_odd_names_of_runs_are_made_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    for name in ("a\nb", "-rf", "CON", "\udcff", "x/../y"):
        assert RunFolder.create(Path(name)).path.is_dir()
    for name in ("x" * 300, "a\0b", ".."):
        with pytest.raises(RunError) as error:
            RunFolder.create(Path(name))
        assert error.value.problems[0].code == "run.exists"


# --- the table ---


def held_by(row: int) -> list[str]:
    """Return what holds a row: cases here, by their names, and other tests."""
    named = [f"{case.row}-{case.name}" for case in CASES if case.row == row]
    return [*named, *HELD.get(row, ("", ()))[1]]


def test_every_row_is_held_or_listed_with_a_reason() -> None:
    assert list(INPUTS) == list(range(1, 65))
    assert {row for row in INPUTS if not held_by(row)} <= set(OPEN) <= set(INPUTS)
    names = [(case.row, case.name) for case in CASES]
    assert len(set(names)) == len(names)


def test_every_test_that_is_named_is_there() -> None:
    for name in (test for _, tests in HELD.values() for test in tests):
        assert is_test(name), name


def test_the_page_has_the_table_of_these_tests() -> None:
    assert markdown() in (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def rows_of_table() -> Iterator[tuple[str, str, str, str]]:
    for row, what in INPUTS.items():
        cases = [case for case in CASES if case.row == row]
        answers = dict.fromkeys([*(case.answer for case in cases), *HELD.get(row, ("", ()))[0].split(", ")])
        codes = dict.fromkeys(case.code for case in cases if case.code)
        others = [f"`{name.partition('::')[2]}`" for name in HELD.get(row, ("", ()))[1]]
        held = [f"{len(cases)} cases"] * bool(cases) + others
        held += [f"open: {OPEN[row]}"] if row in OPEN else []
        shown = what.replace("|", "\\|"), ", ".join(filter(None, answers)), ", ".join(f"`{code}`" for code in codes)
        yield (str(row), *shown[:2], shown[2] + ("; " if shown[2] and held else "") + ", ".join(held))


def markdown() -> str:
    """Return the table as Markdown."""
    head = ["| # | Input | Answer | Code and what holds it |", "|---|---|---|---|"]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows_of_table())])


if __name__ == "__main__":
    sys.stdout.write(f"{markdown()}\n")
