"""A run goes on with new rows: what it held out stays held out and is scored, what it learned is learned again in part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import headstart
from headstart.config import Override
from headstart.data.feed import content_hash
from headstart.dataset import Data, build_data
from headstart.display import Display
from headstart.errors import DataError, UsageError
from headstart.files import read_json, sha256
from headstart.lineage import read_known
from headstart.models.source import find_model
from headstart.run import RunFolder
from headstart.tune import resume, start, tune
from headstart.update import update, update_config
from headstart.verify import differences
from tests.conftest import killed_at

QUICK = {"batch_size": 4, "steps": 8, "eval.every": 4, "data.held_out": 16, "engine.threads": 1, "eval.guard": "off"}
WORDS = ["sore throat", "plan", "report", "patient", "doctor", "answer", "three days", "reason"]


@pytest.fixture
def quiet(tmp_path: Path) -> Display:
    with (tmp_path / "said.txt").open("w") as file:
        yield Display(file, live=False)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def turns(asked: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def new_rows(old: Path, run: Path) -> list[dict[str, Any]]:
    """Return rows that are new, and behind them a row that the run held out and one that it learned."""
    rows = [turns(f"{WORDS[n % 8]} {n}!", f"A {WORDS[n % 8]}.") for n in range(24)]
    known = [json.loads(line) for line in old.read_text().splitlines()]
    held = {int(row["where"].rpartition(":")[2]) for row in RunFolder(run).read_evaluation("after") or []}
    learned = read_known_parts(run)
    return [*rows, known[min(held) - 1], known[int(learned.rpartition(":")[2]) - 1]]


def read_known_parts(run: Path) -> str:
    """Return the place of a row that a run learned."""
    settings = RunFolder(run).read_config().settings
    mixed = settings.model_copy(update={"data": settings.data.model_copy(update={"mix": (f"{run}=1",)})})
    (old,) = read_known(mixed, find_model(settings.model), settings.task).olds
    return str(old.train[0].where)


def hashes(records: Any) -> set[str]:
    return {content_hash(record) for record in records}


def built(run: Path, data: Path, replay: float = 0.5, **settings: Any) -> Data:
    given = [Override(key, value, "test") for key, value in {"data.train": [str(data)], **settings}.items()]
    return build_data(update_config(run, replay, given))


@pytest.fixture
def old(small_data: Path, tiny_model: Path, tmp_path: Path, quiet: Display) -> headstart.Run:
    return tune(small_data, model=str(tiny_model), out=tmp_path / "old", settings=QUICK, display=quiet)


def test_an_update_goes_on_from_the_run_and_scores_both(
    old: headstart.Run, small_data: Path, tmp_path: Path, quiet: Display
) -> None:
    data = write(tmp_path / "new.jsonl", new_rows(small_data, old.path))
    run = update(old.path, data, out=tmp_path / "one", settings={"optim.lr": 1e-2}, display=quiet)
    result, record = run.result, read_json(RunFolder(run.path).data_file)
    assert set(result["old"]["parts"]) == {"old"}
    part = result["old"]["parts"]["old"]
    # It begins as what the run came to: the old rows are scored as that run's own were at its end.
    assert part["before"]["value"] == pytest.approx(old.result["after"]["nll"]["value"], rel=1e-6)
    assert part["rows"] == old.result["rows"]["proof"] == 8
    assert part["bound"] == pytest.approx(0.05 * max(0.0, -old.result["differences"]["nll"]["value"]))
    assert part["before"]["value"] != part["after"]["value"]
    assert result["before"]["nll of old"] == part["before"]
    assert record["dropped"]["held_before"] == record["dropped"]["trained_before"] == 1
    lineage = result["lineage"]
    assert lineage["run"] == str(old.path)
    assert lineage["result_sha256"] == sha256(RunFolder(old.path).result_file)
    assert [file["sha256"] for file in lineage["data"]] == [sha256(small_data)]
    assert lineage["replay"] == 0.3
    for page in (run.report, run.path / "README.md"):
        assert str(old.path) in page.read_text(), page
    assert "What it learned before" in run.report.read_text()
    assert result["reasons"]["up_to_date"]["measured"]
    # Who goes on from it keeps the rows of both runs where they were.
    more = write(tmp_path / "more.jsonl", [turns(f"Once more {n}?", f"It is {n}.") for n in range(20)])
    one, two = built(run.path, more).prepared.mixed
    assert (one.name, two.name) == ("one", "old")
    scored = {row["where"] for row in RunFolder(run.path).read_evaluation("after") or [] if not row["part"]}
    assert {str(row.where) for row in one.proof.kept} == scored
    assert {str(row.where) for row in two.proof.kept} == {
        row["where"] for row in RunFolder(old.path).read_evaluation("after") or []
    }
    # A run that is killed goes on to the same bits, though its data is that of two runs.
    with pytest.raises(KeyboardInterrupt), killed_at(4):
        update(old.path, data, out=tmp_path / "two", settings={"optim.lr": 1e-2}, display=quiet)
    resume(tmp_path / "two", quiet)
    assert differences(run.path, tmp_path / "two") == []


def test_what_was_held_out_stays_so_and_what_is_learned_again_follows_from_seed_and_content(
    old: headstart.Run, small_data: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "new.jsonl", new_rows(small_data, old.path))
    first = built(old.path, data)
    prepared, (mixed,) = first.prepared, first.prepared.mixed
    assert mixed.old is not None
    held_before, learned_before = hashes([*mixed.old.watch, *mixed.old.proof]), hashes(mixed.old.train)
    assert len(held_before) == 16
    assert not held_before & learned_before
    own_held = hashes([*prepared.parts.watch, *prepared.parts.proof])
    assert not hashes(prepared.train.kept) & (held_before | own_held)
    assert not own_held & learned_before
    assert hashes(mixed.proof.kept) == hashes(mixed.old.proof)
    assert hashes(mixed.train.kept) <= learned_before
    assert len(mixed.train.kept) == round(0.5 * (len(prepared.train.kept) - len(mixed.train.kept)))
    # Another order of the file changes nothing; another seed does.
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join(reversed(lines)))
    again, other = (built(old.path, data, seed=seed).prepared.mixed[0].train.kept for seed in (0, 1))
    assert hashes(again) == hashes(mixed.train.kept) != hashes(other)


def test_data_that_changed_is_refused_or_left_unmeasured(
    old: headstart.Run, small_data: Path, tmp_path: Path, quiet: Display
) -> None:
    data = write(tmp_path / "new.jsonl", new_rows(small_data, old.path))
    small_data.write_text(small_data.read_text() + json.dumps(turns("More?", "Yes.")) + "\n")
    with pytest.raises(DataError, match="not what it was when the run began") as error:
        built(old.path, data)
    assert error.value.problems[0].code == "data.changed"
    assert "--replay 0" in error.value.problems[0].cure
    small_data.unlink()
    with pytest.raises(DataError, match="the file is gone"):
        built(old.path, data)
    run = update(old.path, data, replay=0, out=tmp_path / "one", settings={"optim.lr": 1e-2}, display=quiet)
    assert run.result["old"] == "not measured"
    assert run.result["verdict"] != "better"
    assert run.result["reasons"]["up_to_date"]["says"] == "not measured"
    with pytest.raises(UsageError, match="trains further as it is"):
        start(
            update_config(old.path, 0, [Override("data.train", [str(data)], "x"), Override("lora.rank", 4, "x")]), quiet
        )


def test_old_pairs_are_told_by_one_measure_before_and_after(tiny_model: Path, tmp_path: Path, quiet: Display) -> None:
    def pairs(first: int) -> list[dict[str, Any]]:
        return [
            {"prompt": f"{WORDS[n % 8]} {n}?", "chosen": f"A {WORDS[n % 8]}.", "rejected": f"No {n % 3}."}
            for n in range(first, first + 48)
        ]

    first, second = write(tmp_path / "first.jsonl", pairs(0)), write(tmp_path / "second.jsonl", pairs(100))
    few = {**QUICK, "data.rows": 20, "eval.generate": 0}
    one = tune(first, model=str(tiny_model), out=tmp_path / "old", settings=few, display=quiet)
    # How many rows the run took is its own: what it didn't learn isn't learned again as if it had.
    (known,) = built(one.path, second).prepared.mixed
    assert "of the 20 rows that it learned" in " ".join(note for formed in known.formed for note in formed.notes)
    run = update(one.path, second, out=tmp_path / "new", display=quiet)
    part = run.result["old"]["parts"]["old"]
    # The run's rows have no reference now, so the likelier answer counts, on both sides: at first as the run left it.
    assert part["metric"] == "likelier"
    assert part["before"]["value"] == one.result["after"]["likelier"]["value"]


def test_a_classifier_keeps_its_classes_and_learns_new_ones(tiny_encoder: Path, tmp_path: Path, quiet: Display) -> None:
    def rows(names: list[str], first: int) -> list[dict[str, Any]]:
        return [{"text": f"text {(first + n) % 50} {n % 50}", "label": names[n % len(names)]} for n in range(40)]

    first = write(tmp_path / "first.jsonl", rows(["b", "d"], 0))
    one = tune(first, model=str(tiny_encoder), out=tmp_path / "old", settings={**QUICK, "steps": 4}, display=quiet)
    second = write(tmp_path / "second.jsonl", rows(["d"], 7))
    run = update(one.path, second, out=tmp_path / "new", display=quiet)
    part = run.result["old"]["parts"]["old"]
    assert part["metric"] == "accuracy"
    assert part["before"] == one.result["after"]["accuracy"]
    assert run.result["labels"] == ["b", "d"]  # though new rows have one
    assert run.result["lineage"]["replay"] == 1  # of classes more than of texts
    third = write(tmp_path / "third.jsonl", rows(["a", "d"], 9))
    data = built(one.path, third)
    assert data.prepared.labels is not None
    assert data.prepared.labels.names == ("a", "b", "d")
