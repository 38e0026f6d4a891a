"""Files are whole or not there; checkpoints are as they were written or not used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from headstart.engine.checkpoint import MANIFEST, TENSORS, VALUES, Checkpoints
from headstart.errors import RunError
from headstart.files import TEMPORARY_PREFIX, new_folder, read_json, write_atomic, write_json


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


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "truncated": lambda new, old: (new / TENSORS).write_bytes((new / TENSORS).read_bytes()[:-4]),
    "one bit": lambda new, old: (new / TENSORS).write_bytes((new / TENSORS).read_bytes()[:-1] + b"\x01"),
    "values changed": lambda new, old: (new / VALUES).write_text((new / VALUES).read_text().replace("3", "4")),
    "deleted": lambda new, old: (new / TENSORS).unlink(),
    "empty manifest": lambda new, old: (new / MANIFEST).write_text(""),
    "no manifest": lambda new, old: (new / MANIFEST).unlink(),
    "manifest of another step": lambda new, old: shutil.copy(old / MANIFEST, new / MANIFEST),
    "swapped": lambda new, old: shutil.copy(old / TENSORS, new / TENSORS),
    "of the future": lambda new, old: (new / MANIFEST).write_text(
        json.dumps({**read_json(new / MANIFEST), "format": 99})
    ),
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
    assert (tmp_path / "damaged-step-000003").is_dir()


def test_no_whole_checkpoint_is_an_error_that_names_each(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    fill(checkpoints, 1)
    (tmp_path / "step-000001" / TENSORS).write_bytes(b"")
    with pytest.raises(RunError) as error:
        checkpoints.load_newest()
    assert [p.code for p in error.value.problems] == ["checkpoint.damaged", "checkpoint.none"]


def test_what_a_kill_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    fill(checkpoints, 1)
    half = tmp_path / f"{TEMPORARY_PREFIX}step-000002-x"
    half.mkdir()
    (half / TENSORS).write_text("half")
    assert checkpoints.load_newest()[0].step == 1
    assert not half.exists()
