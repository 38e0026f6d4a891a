"""Files are whole or not there; checkpoints are as they were written or not used."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from headstart import faults
from headstart.engine.checkpoint import MANIFEST, TENSORS, VALUES, Checkpoints
from headstart.errors import RunError
from headstart.files import (
    BLOCK_BYTES,
    TEMPORARY_PREFIX,
    Lines,
    new_folder,
    read_json,
    remove_folder,
    seconds_per_byte,
    take_room,
    write_atomic,
    write_json,
)
from headstart.run import RunFolder


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "old")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def fail() -> None:
        with new_folder(target) as folder:
            (folder / "a").write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not list(tmp_path.iterdir())
    with new_folder(target) as folder:
        (folder / "a").write_text("first")
    with new_folder(target) as folder:
        (folder / "b").write_text("second")
    assert [file.name for file in target.iterdir()] == ["b"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    for text in ("old", "new"):
        monkeypatch.setenv(faults.VARIABLE, "folder.aside=EIO" if text == "new" else "")
        with contextlib.suppress(OSError), new_folder(target) as folder:
            (folder / "a").write_text(text)
    assert (target / "a").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_of_several_that_make_one_folder_the_first_wins_and_no_fault_is_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    for text in ("first", "second"):
        with new_folder(target, replace=False) as folder:
            (folder / "a").write_text(text)
    assert (target / "a").read_text() == "first"

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError), new_folder(tmp_path / "other", replace=False):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_folder_is_never_found_half_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, found, delete = tmp_path / "out", [], shutil.rmtree
    target.mkdir()
    (target / "a").write_text("a")

    def deleted(path: Path, **how: bool) -> None:
        found.append(target.exists())
        delete(path, **how)

    monkeypatch.setattr(shutil, "rmtree", deleted)
    remove_folder(target)
    assert (found, list(tmp_path.iterdir())) == ([False], [])


def test_room_that_was_tried_is_given_back(tmp_path: Path) -> None:
    take_room(tmp_path, 1 << 20)
    assert not list(tmp_path.iterdir())


def test_lines_that_the_disk_refused_come_with_the_next_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = Lines(tmp_path / "log")
    lines.add("one")
    monkeypatch.setenv(faults.VARIABLE, "line.made+=ENOSPC")
    for text in ("two", "three"):
        with pytest.raises(OSError, match="No space"):
            lines.add(text)
    assert lines.path.read_text() == "one\n"
    monkeypatch.delenv(faults.VARIABLE)
    lines.add("four")
    assert lines.path.read_text() == "one\ntwo\nthree\nfour\n"


def test_half_a_line_is_taken_back(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    lines = Lines(tmp_path / "log")
    lines.add("one")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
        with pytest.raises(OSError, match="too large"):
            lines.add("a line that is too long")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert lines.path.read_text() == "one\n"
    lines.add("two")
    assert lines.path.read_text() == "one\na line that is too long\ntwo\n"


def test_a_place_to_fail_at_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, "step.nowhere")
    with pytest.raises(ValueError, match=r"there are file\.made"):
        faults.reach("step.forward")


def test_what_is_renamed_was_synced_and_its_folder_is_synced_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename that a power cut keeps must never point to content that it lost."""
    log: list[tuple[str, str]] = []
    sync, rename, replace = os.fsync, Path.rename, Path.replace

    def note(kind: str, path: object) -> None:
        log.append((kind, Path(str(path)).relative_to(tmp_path).as_posix()))

    def synced(handle: int) -> None:
        note("sync", Path(f"/proc/self/fd/{handle}").readlink())
        sync(handle)

    def renamed(path: Path, target: Path) -> Path:
        note("rename", path)
        return (rename if path.is_dir() else replace)(path, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to see which file is synced")
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(Path, "replace", renamed)
    write_atomic(tmp_path / "a.txt", "a")
    (sync_file, moved, sync_parent), log[:] = log[:], []
    assert (sync_file[0], moved[0], sync_parent) == ("sync", "rename", ("sync", "."))
    assert sync_file[1] == moved[1]
    for place, replaces in (("out", True), ("first", False)):
        with new_folder(tmp_path / place, replace=replaces) as folder:
            (folder / "one").write_text("1")
            (folder / "two").write_text("2")
        (*before, moved, after), log[:] = log[:], []
        assert {Path(path).name for kind, path in before if kind == "sync"} == {"one", "two", moved[1]}
        assert (moved[0], after) == ("rename", ("sync", "."))


def test_json_refuses_what_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def fill(checkpoints: Checkpoints, *steps: int, best: int | None = None) -> None:
    for step in steps:
        checkpoints.save(step, {"w": torch.full((3,), float(step))}, {"step": step}, best)


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save_best(1, {"w": torch.ones(1)})
    checkpoints.save_best(2, {"w": torch.ones(1)})
    fill(checkpoints, 1, 2, 3, best=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best-000002", "step-000002", "step-000003"]
    found, problems = checkpoints.load_newest()
    assert (found.step, found.values, not problems) == (3, {"step": 3}, True)
    assert found.tensors["w"].tolist() == [3.0] * 3


def _link(file: Path) -> None:
    """Put a link to the very same bytes in a file's place."""
    file.rename(file.parent.parent / "elsewhere")
    file.symlink_to(file.parent.parent / "elsewhere")


def _replace(new: Path, old: Path) -> None:
    shutil.rmtree(new)
    shutil.copytree(old, new)


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "truncated": lambda new, old: (new / TENSORS).write_bytes((new / TENSORS).read_bytes()[:-4]),
    "one bit": lambda new, old: (new / TENSORS).write_bytes((new / TENSORS).read_bytes()[:-1] + b"\x01"),
    "values changed": lambda new, old: (new / VALUES).write_text((new / VALUES).read_text().replace("3", "4")),
    "deleted": lambda new, old: (new / TENSORS).unlink(),
    "empty manifest": lambda new, old: (new / MANIFEST).write_text(""),
    "no manifest": lambda new, old: (new / MANIFEST).unlink(),
    "manifest of another step": lambda new, old: shutil.copy(old / MANIFEST, new / MANIFEST),
    "another step": _replace,
    "swapped": lambda new, old: shutil.copy(old / TENSORS, new / TENSORS),
    "of the future": lambda new, old: (new / MANIFEST).write_text(
        json.dumps({**read_json(new / MANIFEST), "format": 99})
    ),
    "a page of zeros": lambda new, old: (new / TENSORS).write_bytes(bytes((new / TENSORS).stat().st_size)),
    "a link": lambda new, old: _link(new / TENSORS),
    "other files": lambda new, old: (new / MANIFEST).write_text(json.dumps({**read_json(new / MANIFEST), "files": {}})),
    "a list": lambda new, old: (new / MANIFEST).write_text("[]"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_used(tmp_path: Path, damage: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    fill(checkpoints, 1, 2, 3)
    DAMAGES[damage](tmp_path / "step-000003", tmp_path / "step-000002")
    found, problems = checkpoints.load_newest()
    assert found.step == 2
    assert [(p.code, Path(p.where).name) for p in problems] == [("checkpoint.damaged", "step-000003")]
    assert ("bytes and not" in problems[0].what) == (damage == "truncated")
    assert (tmp_path / "damaged-step-000003").is_dir()
    shutil.copytree(tmp_path / "damaged-step-000003", tmp_path / "step-000003", symlinks=True)
    assert checkpoints.load_newest()[0].step == 2  # and once more, beside the first
    assert (tmp_path / "damaged-step-000003-2").is_dir()


def test_no_whole_checkpoint_is_an_error_that_names_each(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    fill(checkpoints, 1)
    (tmp_path / "step-000001" / TENSORS).write_bytes(b"")
    with pytest.raises(RunError) as error:
        checkpoints.load_newest()
    assert [p.code for p in error.value.problems] == ["checkpoint.damaged", "checkpoint.none"]


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let the system refuse to write larger files."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_rust_says_of_the_system_is_a_fault_of_the_system(tmp_path: Path) -> None:
    """As the libraries do that write tensors and tokenizers."""
    words = Tokenizer(WordLevel({f"{number:04}": number for number in range(1000)}))
    for write in (lambda path: save_file({"a": torch.ones(1000)}, path), lambda path: words.save(str(path))):
        with (
            pytest.raises(OSError, match="File too large") as error,
            files_of_at_most(2000),
            new_folder(tmp_path / "a") as made,
        ):
            write(made / "b")
        assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(tmp_path / "a"))
    with pytest.raises(KeyError, match="b"), new_folder(tmp_path / "a"):
        {"a": 1}["b"]
    assert not list(tmp_path.iterdir())


def test_the_pace_of_a_disk_that_refuses_is_not_known(tmp_path: Path) -> None:
    with files_of_at_most(2000):
        assert seconds_per_byte(tmp_path) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("free_bytes", "size"), [(0, None), (4 * BLOCK_BYTES - 1, None), (9 * BLOCK_BYTES, 2.25 * BLOCK_BYTES)]
)
def test_the_pace_of_a_disk_is_taken_in_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_bytes: int, size: float | None
) -> None:
    written = []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free_bytes))
    monkeypatch.setattr(Path, "write_bytes", lambda _, content: written.append(len(content)))
    assert (seconds_per_byte(tmp_path / "run") > 0) == (size is not None)
    assert written == ([] if size is None else [size])
    assert not list(tmp_path.iterdir())


def test_what_a_kill_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for folder in (run.path, run.evaluation, run.checkpoints):
        half = folder / f"{TEMPORARY_PREFIX}step-000002-x"
        half.mkdir(parents=True)
        (half / TENSORS).write_text("half")
        (folder / f"{TEMPORARY_PREFIX}before.json-x").write_text("half")
    with run.locked():
        assert not list(tmp_path.rglob(f"{TEMPORARY_PREFIX}*"))
