"""What readers are given, whole and changed: small files of every ending, made in code."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

from headstart.config import DataSettings
from headstart.data.images import Look, load_pixels, segment_pictures
from headstart.data.prepare import form_rows
from headstart.data.read import Note, Row, Where, find_files, kind_of, read
from headstart.data.records import Picture
from headstart.errors import DataError, Problem

LOOK = Look(8, 8, (0.5,) * 3, (0.5,) * 3)
CHAT = {
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "t"},
        {"role": "assistant", "content": "<think>why</think>a", "weight": 1},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
}
ROWS: list[dict[str, Any]] = [
    CHAT,
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
    {"instruction": "q", "input": "i", "output": "a"},
    {"prompt": "q", "completion": [{"role": "assistant", "content": "a"}]},
    {"text": "t", "label": ["x", "y"]},
    {"text": "t", "label": 1.5},
    {"text": "t", "label": "x"},
    {"sentence1": "t", "sentence2": "u", "score": 0.5},
    {"tokens": ["t"], "ner_tags": ["B-x"]},
    {"anchor": "t", "positive": "u", "negative": "v"},
    {"image": "a.png", "label": 1},
    {"text": "t\u2028\u00e9"},
]
PDF = (
    b"%PDF-1.4\n1 0 obj\n<< /Type /Catalog /Pages 2 0 R >>\nendobj\n2 0 obj\n<< /Type /Pages /Kids [3 0 R] /Count 1 >>\nendobj\n"
    b"3 0 obj\n<< /Type /Page /Parent 2 0 R /Contents 4 0 R /Resources << >> >>\nendobj\n4 0 obj\n<< /Length 20 >>\nstream\n"
    b"BT (a text) Tj ET   \nendstream\nendobj\ntrailer << /Size 5 /Root 1 0 R >>\nstartxref\n9\n%%EOF"
)


def seeds() -> dict[str, list[bytes]]:
    """Return files by their ending."""
    rows = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]
    table = b'a,b\n1,"x ""y""\nz"\n\n2;3,\t4\n'
    found = {
        ".jsonl": [row + b"\n" + row + b"\n" for row in rows] + [b"[" + b",\n".join(rows) + b"]"],
        ".json": [b"[\n" + b",\n".join(rows) + b"\n]", b'{"data": [' + rows[2] + b"]}", rows[0], b"\n".join(rows)],
        ".csv": [table, "a;b\r\n1;2\r\n".encode("utf-16"), b"\xef\xbb\xbftext,label\nt,x\nu,y\n"],
        ".tsv": [table.replace(b",", b"\t")],
        ".txt": ["one\r\ntwo\u0085".encode(), "text".encode("utf-16"), "text".encode("utf-32")],
        ".conll": [b"-DOCSTART- O\n\na DT O\nb\tB-x\n\n# c\nd O"],
        ".html": [b"<html><body><p>a<b>b</b></p><script>c</script><table><tr><td>d</table></body></html>"],
        ".pdf": [PDF],
        ".docx": [_word()],
        ".parquet": _parquets(),
        **{f".{kind}": [_image(kind)] for kind in ("png", "jpeg", "gif", "bmp", "webp", "tiff")},
    }
    return found | {".jsonl.gz": [gzip.compress(content) for content in found[".jsonl"][:3]]}


def try_to_read(path: Path) -> None:
    """Read a file, and make records of its rows. Raises AssertionError where anything but rows and problems comes of it."""
    items = list(read(find_files([str(path)])))
    assert all(isinstance(item, Row | Problem | Note) for item in items)
    for item in items:
        if isinstance(item, Problem):
            assert item.why
            assert item.cure
            assert item.where.startswith(str(path))
    if kind_of(path) == "image":
        picture = Picture(Where(str(path), 1), str(path), "a", "")
        made = segment_pictures([picture], None, LOOK)
        assert len(made.examples) + len(made.problems) == 1
        for example in made.examples:
            assert example.image
            assert load_pixels(example.image, LOOK).shape == (3, 8, 8)
    for how in ({}, {"text": "text"}, {"prompt": "{a}", "completion": "{b}"}):
        try:
            formed = form_rows([str(path)], DataSettings(train=(str(path),), **how))  # type: ignore[arg-type]
        except DataError as error:
            error.describe()
        else:
            assert formed.rows >= len(formed.formatted.examples)


def _image(kind: str) -> bytes:
    from PIL import Image

    held = io.BytesIO()
    Image.frombytes("RGB", (9, 7), bytes(range(189))).save(held, kind)
    return held.getvalue()


def _word() -> bytes:
    kind = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"
    of = "http://schemas.openxmlformats.org"
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{of}/package/2006/content-types"><Default Extension="rels" '
        'ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/word/document.xml" ContentType="{kind}"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{of}/package/2006/relationships"><Relationship Id="a" '
        f'Type="{of}/officeDocument/2006/relationships/officeDocument" Target="word/document.xml"/></Relationships>',
        "word/document.xml": f'<w:document xmlns:w="{of}/wordprocessingml/2006/main"><w:body><w:p><w:r><w:t>a text</w:t></w:r></w:p>'
        "<w:tbl><w:tr><w:tc><w:p/></w:tc></w:tr></w:tbl></w:body></w:document>",
    }
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:  # stored, so that what is changed is the text
        for name, text in parts.items():
            archive.writestr(name, text)
    return held.getvalue()


def _parquets() -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: list[dict[str, Any]] = [
        {"text": ["t", None, "u"], "label": [1, 2, None]},
        {"messages": [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]] * 3},
        {"text": pa.array(["t"] * 3).dictionary_encode(), "at": pa.array([1, 2, 3], pa.timestamp("ns"))},
    ]
    found = []
    for number, column in enumerate(columns):
        held = io.BytesIO()
        pq.write_table(pa.table(column), held, compression=("none", "snappy", "zstd")[number])
        found.append(held.getvalue())
    return found
