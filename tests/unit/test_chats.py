"""Conversations from a store are those of memory: the same rows, sides, tokens and findings; and a damaged store is made anew."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headstart import files, origin
from headstart.config import DataSettings
from headstart.data import chats, store
from headstart.data.chats import find_chats, prepare_chats
from headstart.data.check import find
from headstart.data.feed import content_hash, hashes_of
from headstart.data.prepare import Prepared, form_sides, prepare
from headstart.data.render import Renderer
from headstart.data.store import StoredRows, StoreWriter, file_hash, find_store, store_folder
from headstart.errors import DataError
from tests.tokens import make_tokenizer

CALL = {"id": "c1", "function": {"name": "look", "arguments": {"at": "the <|im_end|> sign"}}}


@pytest.fixture
def renderer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Renderer:
    monkeypatch.setenv("HEADSTART_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(chats, "STORED_BYTES", 0)
    monkeypatch.setattr(chats, "ROWS_AT_ONCE", 16)
    tokenizer = make_tokenizer("chatml")
    return Renderer(tokenizer, [tokenizer.eos_token_id])


def rows_of_all_kinds() -> list[Any]:
    rows: list[Any] = []
    for n in range(120):
        asked = {"role": "user", "content": f"{n}: what does the report say? " * (1 + n % 7)}
        answer = {"role": "assistant", "content": f"The {'patient' if n % 2 else 'doctor'}."}
        rows.append({"messages": [asked, answer], "group": str(n % 50)})
    rows[7] = rows[6]
    rows[11]["messages"] = [{"role": "system", "content": "be brief"}, *rows[11]["messages"], *rows[12]["messages"]]
    rows[13]["messages"][1]["content"] = "<think>why?</think>It is <|im_end|> so."
    rows[15]["messages"][0]["content"] += " Ask jo@example.org."
    rows[17]["messages"] = [{"role": "user", "content": "no answer"}]
    rows[19]["messages"][0]["content"] = 5
    rows[23]["messages"][1] = {"role": "assistant", "tool_calls": [CALL]}  # the template can't write it
    return rows


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "chats.jsonl", rows_of_all_kinds(), more=["no json"])


def write(path: Path, rows: list[Any], more: list[str] | None = None) -> Path:
    path.write_text("\n".join([*map(json.dumps, rows), *(more or [])]) + "\n", encoding="utf-8")
    return path


def stored(renderer: Renderer, settings: DataSettings, length: int = 90) -> Prepared:
    found = find_chats(settings, "auto", "auto")
    assert found is not None
    prepared = prepare_chats(found, settings, renderer, length)
    assert prepared is not None
    assert isinstance(prepared.train.examples, StoredRows)
    return prepared


def plain(prepared: Prepared) -> list[Any]:
    """Return all that a run sees of its data, as plain values."""
    parts = (prepared.train, prepared.watch, prepared.proof)
    rows = [
        (str(e.where), e.cut, r, [(s.ids.tolist(), s.weights.tolist(), s.first) for s in e.segments])
        for part in parts
        for e, r in zip(part.examples, part.kept, strict=True)
    ]
    numbers = [(p.longest, p.highest_id, p.cut, p.target_count, p.lengths.tolist(), p.dropped) for p in parts]
    numbers[0] = (numbers[0][0], *numbers[0][2:])  # type: ignore[assignment]  # a store knows the highest of all its rows
    hashes = [hashes_of(part.kept) for part in parts]
    split = prepared.parts
    sides = [[r.where for r in side] for side in (split.train, split.watch, split.proof)]
    return [
        rows,
        numbers[0],
        hashes,
        sides,
        split.held_out,
        split.duplicates,
        split.leaked,
        split.near,
        prepared.choices,
    ]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"held_out": 0.3},
        {"held_out": 12},
        {"group_by": "group"},
        {"leaks": "near"},
        {"fix": ("redact",)},
        {"leaks": "near", "eval": ("others.jsonl",)},
        {"over_length": "cut"},
        {"train_on": "last", "reasoning": "drop"},
        {"rows": 20},
        {"eval": ("others.jsonl",)},
    ],
)
def test_a_store_gives_what_memory_gives(
    renderer: Renderer, file: Path, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    write(Path("others.jsonl"), [*rows_of_all_kinds()[30:60], {"instruction": "x"}])
    settings = DataSettings(train=(file.name,), **{"leaks": "exact", **how})
    held = prepare(form_sides(settings), settings, renderer, 90, task="chat")
    for _ in range(2):  # as it is written, and as it is found again
        found = stored(renderer, settings)
        assert plain(found) == plain(held)
        assert find(found, renderer) == find(held, renderer)
        assert found.problems == held.problems
        assert found.parts.leaked == (30 if "eval" in how else 0)


def test_few_answers_are_choices_and_an_error_of_length_names_all(renderer: Renderer, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"question {n} " * (1 + n % 3), "completion": ["yes", "no", "perhaps"][n % 3]} for n in range(90)
    ]
    path = write(tmp_path / "pairs.jsonl", rows)
    settings = DataSettings(train=(str(path),))
    assert stored(renderer, settings).choices == ("no", "perhaps", "yes")
    strict = settings.model_copy(update={"over_length": "error"})
    with pytest.raises(DataError) as ours:
        stored(renderer, strict, length=40)
    with pytest.raises(DataError) as theirs:
        prepare(form_sides(strict), strict, renderer, 40, task="chat")
    assert ours.value.problems == theirs.value.problems


def count_writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    times: list[int] = []
    original = chats._Writing.write

    def counted(self: Any, writer: StoreWriter) -> dict[str, Any]:
        times.append(1)
        return original(self, writer)

    monkeypatch.setattr(chats._Writing, "write", counted)
    return times


def test_rows_are_encoded_once_for_what_their_tokens_depend_on(
    renderer: Renderer, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = count_writes(monkeypatch)
    settings = DataSettings(train=(str(file),))
    stored(renderer, settings)
    stored(renderer, settings.model_copy(update={"held_out": 0.4}))  # another split needs no other tokens
    moved = file.rename(file.with_name("moved.jsonl"))
    found = stored(renderer, DataSettings(train=(str(moved),)))
    assert len(times) == 1
    places = [str(found.train.examples[0].where), found.problems[0].where, found.train.kept[0].where.path]
    assert all(str(moved) in place for place in places)
    stored(renderer, DataSettings(train=(str(moved),)), length=80)
    renderer.tokenizer.chat_template += "{# another #}"
    stored(renderer, DataSettings(train=(str(moved),)))
    moved.write_text(moved.read_text(encoding="utf-8").replace("doctor", "Doctor"), encoding="utf-8")
    stored(renderer, DataSettings(train=(str(moved),)))
    assert len(times) == 4


def test_a_start_reads_each_source_once_and_no_record(
    renderer: Renderer, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = DataSettings(train=(str(file),))
    stored(renderer, settings)
    records: list[int] = []
    monkeypatch.setattr(store.Store, "record", lambda self, number: records.append(number))
    monkeypatch.setattr(chats, "CHOICES_MAX", 1)  # more answers than could be choices
    hashed: list[Path] = []
    original = files.sha256
    for room in (store, origin):
        monkeypatch.setattr(room, "sha256", lambda path: hashed.append(path) or original(path))
    found = stored(renderer, settings)
    assert len(found.watch.kept)
    assert len(found.proof.kept)
    assert records == []
    was = original(file)
    file.write_text(file.read_text(encoding="utf-8").replace("doctor", "Doctor"), encoding="utf-8")
    # What a run writes down is the hash of what its rows were made from, also where the file changed since.
    assert origin._describe_file(found.formed[0].files[0])["sha256"] == was != original(file)
    assert hashed.count(file) == 1
    assert len(hashed) == 1 + len(json.loads(next(store_folder().glob(f"*/{store.MANIFEST}")).read_text())["files"])


@pytest.mark.parametrize("name", ["ids.bin", "weights.bin", "records.jsonl", "digest.npy", "manifest.json"])
@pytest.mark.parametrize("damage", ["flipped", "short", "gone"])
def test_a_damaged_store_is_made_anew(
    renderer: Renderer, file: Path, name: str, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = DataSettings(train=(str(file),))
    whole = plain(stored(renderer, settings))
    times = count_writes(monkeypatch)
    (folder,) = [path for path in store_folder().iterdir() if path.is_dir()]
    damaged = bytearray((folder / name).read_bytes())
    damaged[len(damaged) // 2] ^= 255
    (folder / name).write_bytes(damaged if damage == "flipped" else damaged[:-3])
    if damage == "gone":
        (folder / name).unlink()
    assert plain(stored(renderer, settings)) == whole
    assert len(times) == 1


def test_of_two_that_write_the_same_store_the_first_wins(renderer: Renderer) -> None:
    def fill(writer: StoreWriter, told: str) -> dict[str, Any]:
        writer.set_tokens(10, None)
        return {"told": told}

    def slower(writer: StoreWriter) -> dict[str, Any]:
        assert find_store("key", lambda other: fill(other, "first")).known == {"told": "first"}
        return fill(writer, "second")

    assert find_store("key", slower).known == {"told": "first"}
    assert [path.name for path in store_folder().iterdir()] == ["key"]

    def failing(writer: StoreWriter) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_store("other", failing)
    assert [path.name for path in store_folder().iterdir()] == ["key"]


def test_the_oldest_stores_make_room(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(writer: StoreWriter) -> dict[str, Any]:
        writer.set_tokens(10, None)
        writer.add_record("x" * 10_000)
        return {}

    monkeypatch.setattr(store, "STORES_BYTES", 35_000)
    old = find_store("a", fill)
    find_store("b", fill)
    for name, age in (("a", 100), ("b", 200)):
        os.utime(store_folder() / name / "manifest.json", (age, age))
    find_store("a", fill)  # of use again
    find_store("c", fill)
    assert sorted(path.name for path in store_folder().iterdir()) == ["a", "c"]
    for name in (".tmp-e-x", "e"):  # written by another process
        (store_folder() / name).mkdir()
        (store_folder() / name / "manifest.json").touch()
    (store_folder() / "e" / "ids.bin").symlink_to("gone")  # and deleted by it: listed, and gone when it is looked at
    monkeypatch.setattr(store, "STORES_BYTES", 0)
    find_store("d", fill)
    assert sorted(path.name for path in store_folder().iterdir()) == [".tmp-e-x", "d", "e"]
    assert old.record(0) == "x" * 10_000  # what is open can still be read


def test_a_stream_leaves_to_memory_what_it_cannot_take(renderer: Renderer, file: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"q {n}", "completion": "a"} for n in range(40)]
    late = write(tmp_path / "late.jsonl", [*rows_of_all_kinds()[:16], *rows])
    settings = DataSettings(train=(str(late),))
    found = chats.Chats(
        chats.find_files(settings.train), (), form_sides(DataSettings(train=(str(file),))).train.detection
    )
    assert prepare_chats(found, settings, renderer, 90) is None
    with pytest.raises(DataError, match="several formats"):
        form_sides(settings)
    text = write(tmp_path / "text.jsonl", [{"text": "a"}])
    assert find_chats(DataSettings(train=(str(text),)), "auto", "auto") is None
    assert find_chats(DataSettings(train=(str(file),)), "supervised", "auto") is None


def test_the_hash_of_a_large_file_is_remembered_until_it_is_touched(
    renderer: Renderer, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "REMEMBERED_BYTES", 10)
    times: list[Path] = []
    original = store.sha256
    monkeypatch.setattr(store, "sha256", lambda path: times.append(path) or original(path))
    first = file_hash(file)
    assert (file_hash(file), len(times)) == (first, 2)  # written a moment ago: not to be trusted yet
    monkeypatch.setattr(store, "SETTLED_NS", -(10**15))
    file_hash(file)
    assert (file_hash(file), len(times)) == (first, 3)
    times_of_file = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    file.write_text(file.read_text(encoding="utf-8").replace("doctor", "rector"), encoding="utf-8")
    os.utime(file, ns=times_of_file)  # the same size and time
    assert file_hash(file) == original(file) != first


def test_a_row_of_a_store_is_read_from_disk(renderer: Renderer, file: Path) -> None:
    found = stored(renderer, DataSettings(train=(str(file),)))
    rows = found.train.examples
    kept = found.train.kept
    assert [str(e.where) for e in rows[2:4]] == [str(rows[2].where), str(rows[3].where)]
    assert kept[-1] == kept[len(kept) - 1]
    assert content_hash(kept[0]) == hashes_of(kept)[0]
    with pytest.raises(IndexError):
        rows[len(rows)]
    count, tokens = len(rows), int(found.train.lengths.sum())
    rows += [rows[0]]
    assert (len(rows), int(rows.lengths.sum()) - tokens) == (count + 1, rows[0].token_count)
    assert np.array_equal(rows[count].segments[0].ids, rows[0].segments[0].ids)
