"""Readers: every format, plain and packed; every row keeps its place; what can't be read is named and nothing is lost."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headstart.data.read import Note, Row, find_files, read
from headstart.data.readers.papers import close_tags
from headstart.errors import DataError, Problem

ROWS = [{"q": "one", "a": "eins"}, {"q": "two\nlines", "a": "zwei, „drei“"}, {"q": "\u2028 stays", "a": ""}]


def read_all(path: Path) -> tuple[list[Row], list[Problem], list[Note]]:
    items = list(read(find_files([str(path)])))
    return (
        [item for item in items if isinstance(item, Row)],
        [item for item in items if isinstance(item, Problem)],
        [item for item in items if isinstance(item, Note)],
    )


def write(folder: Path, name: str, rows: Sequence[dict[str, str]]) -> Path:
    path = folder / name
    if ".jsonl" in name:
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    elif ".json" in name:
        data = json.dumps(rows, indent=1, ensure_ascii=False).encode()
    elif ".parquet" in name:
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
        data = path.read_bytes()
    else:
        delimiter = "\t" if ".tsv" in name else ","
        quoted = [[f'"{v.replace(chr(34), chr(34) * 2)}"' for v in row.values()] for row in rows]
        data = "\n".join(delimiter.join(line) for line in [["q", "a"], *quoted]).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, kind: str, packed: str) -> None:
    rows, problems, _ = read_all(write(tmp_path, f"data{kind}{packed}", ROWS))
    assert not problems
    assert [row.fields for row in rows] == ROWS


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("a.jsonl", '{"a": 1}\n\n  \n{"a": 2}\n', [1, 4]),
        ("a.json", '[\n {"a": 1},\n\n {"a":\n 2}\n]', [2, 4]),
        ("a.csv", 'a\n1\n"two\nlines"\n3\n', [2, 3, 5]),
        ("a.json", '{"data": [\n{"a": 1},\n\n{"a": 2}]}', [2, 4]),
        ("a.json", '{"a": 1}', [1]),
        ("a.jsonl", '\ufeff{"a": 1}\r\n{"a": 2}\r\n', [1, 2]),
        ("a.jsonl", '{"a": 1}\r{"a": 2}\r', [1, 2]),
        ("a.jsonl", '[{"a": 1}, {"a": 2}]', [1, 1]),
        ("a.json", '{"a": 1}\n{"a": 2}\n', [1, 2]),
        ("a.csv", "\ufeffa\n1\n", [2]),
    ],
)
def test_rows_know_their_lines(tmp_path: Path, name: str, content: str, lines: list[int]) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8", newline="")
    rows, problems, _ = read_all(path)
    assert not problems
    assert [row.where.line for row in rows] == lines
    assert all(list(row.fields) == ["a"] for row in rows)


@pytest.mark.parametrize(
    ("name", "content", "code", "line", "said"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": nope}\n{"a": 3}\n', "row.not_json", 2, "column 7"),
        ("a.jsonl", b'{"a": 1}\n{"a": 2', "data.truncated", 2, "middle of a row"),
        ("a.jsonl", b'{"a": 1}\n{"a": 1, "a": 2}\n', "row.duplicate_key", 2, "'a'"),
        ("a.jsonl", b'{"a": 1}\n{"a": NaN}\n', "row.not_json", 2, "NaN"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "row.not_object", 2, "list"),
        ("a.jsonl", b'{"a": 1}\n{"a": 2} {"a": 3}\n', "row.not_json", 2, "Extra data"),
        ("a.jsonl", b"{\"a\": 1}\n{'a': 2}\n", "row.not_json", 2, "double quotes"),
        ("a.jsonl", b'{"a": 1}\n' + b"[" * 100_000 + b"\n", "row.not_json", 2, "nested too deep"),
        ("a.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n', "data.encoding", 2, "byte 11"),
        ("a.jsonl", b'{"a": 1}\n{"a": "' + b"x" * (17 << 20) + b'"}\n', "data.too_large", 2, "16 MiB"),
        ("a.json", b'[{"a": 1},\n{"a": 2}', "data.truncated", None, "never closed"),
        ("a.json", b'[{"a": 1}\n{"a": 2}]', "data.unreadable", 2, "comma"),
        ("a.json", b'[{"a": 1},\n]', "data.unreadable", 2, "Expecting value"),
        ("a.json", b'[{"a": 1}]\n[{"a": 2}]', "data.unreadable", 1, "after the end"),
        ("a.json", b'[\n{"a": 1},\n{\n"a": NaN}]', "data.unreadable", 3, "NaN"),
        ("a.json", b'[\n{"a": 1},\n{\n"a": 2,\n}]', "data.unreadable", 5, "double quotes"),
        ("a.jsonl", b'{"a": 1}\n{"a": "two wo', "data.truncated", 2, "middle of a row"),
        ("a.jsonl", b'{"a": 1}\n{"a": 1e999}\n', "row.not_json", 2, "larger than"),
        ("a.json", b'[{"a": 1},\n{"a": }]', "data.unreadable", 2, "Expecting value"),
        ("a.csv", b"a,b\n1,2\n3\n", "row.csv", 3, "1 columns where the header has 2"),
        ("a.csv", b'a,b\n1,"2\n3,4\n', "data.unreadable", 2, "quote"),
        ("a.csv", b"a,a\n1,2\n", "data.unreadable", 1, "twice"),
        ("a.csv", b"a,\n1,2\n", "data.unreadable", 1, "no name"),
        ("a.csv", b"a,b\n1,\x002\n", "data.encoding", 2, "NUL"),
        ("a.csv", b"pr\xe9nom,b\n1,2\n", "data.unreadable", 1, "UTF-8"),
        ("a.csv", b"a,b\n", "data.empty", None, "header"),
        ("a.jsonl", b"\n\n", "data.empty", None, "empty"),
        ("a.jsonl", b"PAR1xxxx", "data.wrong_type", None, "parquet"),
        ("a.jsonl", b"PK\x03\x04xxxx", "data.wrong_type", None, "zip"),
        ("a.csv", b"<!DOCTYPE html><html>", "data.wrong_type", None, "web page"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "data.wrong_type", None, "LFS"),
        ("a.parquet", b"PAR1 and then nothing PAR1", "data.unreadable", None, "damaged"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 999, mtime=0)[:-20], "data.truncated", None, "damaged"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:12] + b"\xff" * 20,
            "data.truncated",
            None,
            "damaged",
        ),
        ("a.xyz", b"{}", "data.unknown_type", None, "ending"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: bytes, code: str, line: int | None, said: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    _, problems, _ = read_all(path)
    assert [problem.code for problem in problems] == [code]
    problem = problems[0]
    assert problem.where == (str(path) if line is None else f"{path}:{line}")
    assert said in problem.what + problem.cure
    assert problem.cure


def test_all_bad_rows_are_found_and_the_good_ones_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\nbad\n{"a": 2}\n{"a":}\n{"a": 3}\n', encoding="utf-8")
    rows, problems, _ = read_all(path)
    assert [row.fields["a"] for row in rows] == [1, 2, 3]
    assert [problem.where.rpartition(":")[2] for problem in problems] == ["2", "4"]


def test_a_bad_line_takes_its_whole_row_along_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'a,b\n1,2\n3,"multi\nli\xe9ne\nend"\n4,"yes" he said\n5,6\n')
    rows, problems, _ = read_all(path)
    assert [(row.where.line, row.fields["a"]) for row in rows] == [(2, "1"), (7, "5")]
    assert [(problem.code, problem.where.rpartition(":")[2]) for problem in problems] == [
        ("data.encoding", "4"),
        ("row.csv", "6"),
    ]
    assert all(problem.is_row for problem in problems)


def test_parquet_times_in_nanoseconds_are_read_and_a_name_twice_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": ["x"], "at": pa.array([1_700_000_000_000_000_001], pa.timestamp("ns"))}), path)
    rows, problems, _ = read_all(path)
    assert not problems
    assert rows[0].fields == {"a": "x", "at": "2023-11-14 22:13:20.000000001"}
    pq.write_table(pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["a", "a"]), path)
    _, problems, _ = read_all(path)
    assert [problem.code for problem in problems] == ["data.unreadable"]


def test_a_name_that_is_no_path_is_refused() -> None:
    with pytest.raises(DataError, match="no path"):
        find_files(["x" * 5000])


def test_utf_16_is_decoded_and_said(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "é"}\n', encoding="utf-16")
    rows, problems, notes = read_all(path)
    assert [row.fields for row in rows] == [{"a": "é"}]
    assert not problems
    assert "UTF-16" in notes[0].text


def test_a_delimiter_that_is_no_comma_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a;b\n1;2,5\n", encoding="utf-8")
    rows, _, notes = read_all(path)
    assert rows[0].fields == {"a": "1", "b": "2,5"}
    assert "';'" in notes[0].text


def test_a_line_break_inside_a_csv_field_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'a\r\n"one\r\ntwo"\r\n')
    assert read_all(path)[0][0].fields == {"a": "one\r\ntwo"}


def test_a_folder_is_its_data_files_in_order(tmp_path: Path) -> None:
    write(tmp_path, "b.jsonl", ROWS[:1])
    write(tmp_path, "a.csv", ROWS[1:2])
    (tmp_path / ".hidden.jsonl").write_text("bad", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("not data", encoding="utf-8")
    assert [file.path.name for file in find_files([str(tmp_path)])] == ["a.csv", "b.jsonl"]


def test_missing_files_are_all_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        find_files([str(tmp_path / "x.jsonl"), str(tmp_path / "y.jsonl")])
    assert [problem.code for problem in error.value.problems] == ["data.missing"] * 2


# --- PDF, Word, web pages ---


def _pdf(text: str) -> bytes:
    """Return the least PDF that shows a text, written by hand."""
    stream = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    end = b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % len(out)
    return out + b"xref\n0 6\n0000000000 65535 f \n" + table + end


def test_papers_are_read_as_texts(tmp_path: Path) -> None:
    import docx

    (tmp_path / "a.pdf").write_bytes(_pdf("The patient has a sore throat."))
    word = docx.Document()
    word.add_paragraph("First of Word.")
    table = word.add_table(1, 2)
    table.cell(0, 0).text, table.cell(0, 1).text = "left", "right"
    word.add_paragraph("Last of Word.")
    word.save(str(tmp_path / "b.docx"))
    page = "<html><head><title>no</title></head><body><script>no()</script><p>One <b>bold</b>\n word.</p><div>Two</div></body>"
    (tmp_path / "c.html").write_text(page, encoding="utf-8")
    texts = {
        Path(item.where.path).name: item.fields["text"]
        for item in read(find_files([str(tmp_path)]))
        if isinstance(item, Row)
    }
    assert texts == {
        "a.pdf": "The patient has a sore throat.",
        "b.docx": "First of Word.\n\nleft\tright\n\nLast of Word.",
        "c.html": "One bold\nword.\n\nTwo",
    }


def test_papers_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.pdf").write_bytes(_pdf("x")[:60])
    (tmp_path / "b.docx").write_bytes(b"PK\x03\x04 no archive")
    (tmp_path / "c.pdf").write_bytes(_pdf(""))
    found = [item for item in read(find_files([str(tmp_path)])) if isinstance(item, Problem)]
    assert [(problem.code, Path(problem.where).name) for problem in found] == [
        ("data.wrong_type", "a.pdf"),
        ("data.wrong_type", "b.docx"),
        ("row.empty_text", "c.pdf:1"),
    ]
    monkeypatch.setitem(sys.modules, "pypdf", None)
    (problem, *_) = (item for item in read(find_files([str(tmp_path / "c.pdf")])) if isinstance(item, Problem))
    assert problem.cure == 'pip install "headstart[documents]"'


def test_a_web_page_of_tags_that_are_never_closed_is_text_and_quickly_read(tmp_path: Path) -> None:
    """Python's parser looks through all of the rest for each of them: of 100,000 it would for hours."""
    page = b"<p>Before.</p>" + b"<a " * 100_000
    assert close_tags(page).count(b"<") == 2
    assert close_tags(b"<p>1 < 2 <b") == b"<p>1 < 2 <b"  # as pages are
    assert close_tags(page + b"</p>") == page + b"</p>"  # then they are one tag
    (tmp_path / "open.html").write_bytes(page)
    rows, problems, _ = read_all(tmp_path / "open.html")
    assert not problems
    assert sum(row.fields["text"].count("<a") for row in rows) == 100_000
