"""The mended file: rows as they stood, but for what was asked to be mended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headstart.config import DataSettings
from headstart.data.mend import Mended, Mending
from headstart.data.prepare import form_rows
from headstart.data.read import find_files
from headstart.errors import DataError, UsageError

WORDS = "one two three four five six seven eight nine ten eleven twelve thirteen"


def mend(file: Path, *, bad: list[str] | None = None, near: bool = False, private: bool = False, **how: Any) -> Mended:
    settings = DataSettings(train=(str(file),), **how)
    found = form_rows(settings.train, settings).detection
    return Mending(find_files(settings.train), settings, found, bad or (), near, private).write(file.parent / "c.jsonl")


def written(file: Path) -> list[Any]:
    return [json.loads(line) for line in (file.parent / "c.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows: list[Any] = [
        {"prompt": WORDS, "completion": "a", "id": 1},
        {"prompt": f"more {WORDS}", "completion": "a", "id": 2},
        {"prompt": WORDS, "completion": "a", "id": 3},  # stands before, but for a column that isn't used
        {"prompt": "mail jo@example.org", "completion": "y", "id": "al@example.org"},
        {"prompt": "mail al@example.org", "completion": "y", "n": [1.5, None]},
        {"prompt": "p", "completion": "\u00e4"},
        {"prompt": 5, "completion": "x"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "no json\n", encoding="utf-8")
    return path


def test_rows_stay_as_they_stood_but_bad_and_equal_ones_go(file: Path) -> None:
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:6]]
    done = mend(file)
    assert written(file) == [lines[n] for n in (0, 1, 3, 4, 5)]
    assert (done.rows, done.bad, done.duplicates, done.near_duplicates, done.redacted) == (5, 2, 1, 0, {})
    assert mend(file, bad=[f"{file}:6:turn[1]"]).bad == 3
    assert [row["prompt"] for row in written(file)][-1] == "mail al@example.org"


def test_near_duplicates_go_and_private_data_is_replaced_where_that_is_asked(file: Path) -> None:
    done = mend(file, near=True, private=True)
    # Replaced, the two mails are one row. What is in other columns is replaced too.
    assert written(file) == [
        {"prompt": WORDS, "completion": "a", "id": 1},
        {"prompt": "mail [EMAIL]", "completion": "y", "id": "[EMAIL]"},
        {"prompt": "p", "completion": "\u00e4"},
    ]
    assert (done.rows, done.bad, done.duplicates, done.near_duplicates) == (3, 2, 2, 1)
    assert done.redacted == {"email": 2}


def test_rows_with_another_label_are_no_duplicates_and_tables_become_lines(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('text,label,more\n"a\nb",x,1\n"a\nb",y,2\n"a\nb",x,3\n', encoding="utf-8")
    assert mend(file).duplicates == 1
    assert written(file) == [{"text": "a\nb", "label": "x", "more": "1"}, {"text": "a\nb", "label": "y", "more": "2"}]


def test_nothing_is_written_over_what_is_read_nor_half(file: Path, tmp_path: Path) -> None:
    settings = DataSettings(train=(str(file),))
    found = form_rows(settings.train, settings).detection
    mending = Mending(find_files(settings.train), settings, found)
    (tmp_path / "link.jsonl").symlink_to(file)
    before = file.read_bytes()
    names = ("rows.jsonl", "link.jsonl", "c.csv", "c.jsonl.gz", "rows.jsonl/c.jsonl")
    for out in [tmp_path / name for name in names]:
        with pytest.raises(UsageError, match=r"is what is read|is no name|can't be written"):
            mending.write(out)
    one_line = tmp_path / "line.json"
    one_line.write_text('[{"text": "a"}, {"text": "b"}, {"text": ""}]', encoding="utf-8")
    assert (mend(one_line).rows, mend(one_line).bad) == (2, 1)
    (tmp_path / "c.jsonl").unlink()
    with pytest.raises(DataError, match="several rows stand on one line"):
        mend(one_line, bad=[f"{one_line}:1"])
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": "a"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="no row is left"):
        mend(empty, bad=[f"{empty}:1"])
    assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.jsonl", "line.json", "link.jsonl", "rows.jsonl"]


def test_what_json_does_not_know_is_an_error_and_dates_are_text(tmp_path: Path) -> None:
    import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "rows.parquet"
    day = datetime.date(2024, 2, 29)
    pq.write_table(pa.table({"text": ["a"], "day": [day]}), file)
    mend(file)
    assert written(file) == [{"text": "a", "day": "2024-02-29"}]
    for value in (b"bytes", float("nan")):
        pq.write_table(pa.table({"text": ["a"], "more": [value]}), file)
        with pytest.raises(DataError, match="can't be written as JSON"):
            mend(file)
