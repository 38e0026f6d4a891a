"""Graders as a user meets them: in a run, in `eval` with its kept predictions, in `compare`, and as errors."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from headstart import evaluate
from headstart.errors import RunError
from headstart.evaluate.predictions import Predictions
from tests.e2e.test_commands import as_json, call

HIT = {"type": "string_check", "name": "hit", "operation": "like", "input": "{{sample.output_text}}", "reference": "{{item.word}}"}  # fmt: skip
LONG = {"type": "python", "name": "long", "source": "def grade(sample, item):\n    return len(sample['output_text'])"}
PICKY = {"type": "python", "name": "picky", "source": "def grade(sample, item):\n    return 1 / (item['n'] % 2)"}


@pytest.fixture
def data(tiny_home: Path) -> Path:
    """Return forty rows with a column that isn't read, in the working folder, and a file of graders."""
    words = ["plan", "report", "patient", "doctor"]
    rows = [
        {"prompt": f"{n} {words[n % 4]}?", "completion": f"The {words[n % 4]}.", "word": words[n % 4], "n": n}
        for n in range(40)
    ]
    path = tiny_home / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Path("graders.json").write_text(json.dumps([HIT, LONG]))
    Path("picky.json").write_text(json.dumps(PICKY))
    return path


@pytest.fixture
def run(data: Path) -> Path:
    settings = ["-s", "steps=4", "-s", "eval.generate=4", "-s", "eval.choices=off", "-s", "eval.graders=graders.json,picky.json"]  # fmt: skip
    result = call("tune", "data.jsonl", "-o", "runs/one", *settings)
    assert result.exit_code == 0, result.output
    assert "picky could not grade every answer" in result.stdout
    return Path("runs/one")


def rows_of(run: Path, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run / "evaluation" / f"{name}.json").read_text())
    return found


def test_a_run_is_graded_before_and_after_in_pairs_by_the_same_graders(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = json.loads((run / "result.json").read_text())
    for side in ("before", "after"):
        answered = [row for row in rows_of(run, side) if row["answer"] is not None]
        assert 0 < len(answered) <= 4
        assert result[side]["long"]["value"] == pytest.approx(sum(len(r["answer"]) for r in answered) / len(answered))
        assert all(row["grades"]["long"] == len(row["answer"]) for row in answered)
    even = sum(row["answer"] is not None and int(row["asked"].split()[0]) % 2 == 0 for row in rows_of(run, "after"))
    odd = result["answered"] - even
    assert result["differences"].get("picky", {"rows": 0})["rows"] == odd  # only these could be graded
    assert not even or result["ungraded"]["picky"]["after"] == even
    page = (run / "report.html").read_text()
    assert "long" in page
    assert "ZeroDivisionError" in page

    for file in (run / "result.json", run / "evaluation" / "after.json"):
        file.unlink()
    kept = Path("graders.json").read_text()
    Path("graders.json").write_text(json.dumps([HIT, {**LONG, "time_limit_s": 5}]))
    result = call("resume", str(run))
    assert result.exit_code == 1
    assert "the graders aren't those that scored before" in result.stderr
    Path("graders.json").write_text(kept)
    run = run.absolute()
    monkeypatch.chdir(run.parent)  # a run names its graders so that they are found from anywhere
    assert call("resume", str(run)).exit_code == 0


def test_eval_keeps_every_prediction_with_its_row_and_goes_on(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headstart.verbs.KEPT_AT_ONCE", 15)
    flags = [
        "eval",
        "smollm2-135m",
        "data.jsonl",
        "--answers",
        "20",
        "--grader",
        "graders.json",
        "-s",
        "eval.choices=off",
    ]
    code, whole = as_json(*flags, "-o", "whole")
    assert code == 0
    write, died = Predictions.write, []

    def die(self: Predictions, number: int, *more: Any) -> None:
        died.append(number)
        if len(died) == 3:
            raise KeyboardInterrupt
        write(self, number, *more)

    monkeypatch.setattr(Predictions, "write", die)
    assert call(*flags, "-o", "cut").exit_code == 130
    assert died == [0, 1, 2]
    code, gone_on = as_json(*flags, "-o", "cut")
    assert (code, died[3:]) == (0, [2])
    assert gone_on == whole
    assert as_json(*flags, "-o", "cut")[1] == whole  # finished: nothing is made anew
    assert died[4:] == []
    table = pq.read_table("cut/predictions.parquet").to_pylist()
    assert [row["where"] for row in table] == [f"data.jsonl:{n}" for n in range(1, 41)]
    assert [json.loads(row["item"])["n"] for row in table] == list(range(40))
    answered = [row for row in table if row["answer"] is not None]
    assert len(answered) == 20
    assert all(row["grade.hit"] == (json.loads(row["item"])["word"] in row["answer"]) for row in answered)
    assert whole["metrics"]["long"]["value"] == pytest.approx(sum(len(r["answer"]) for r in answered) / 20)
    assert not Path("cut/parts").exists()
    result = call(*flags[:4], "19", *flags[5:], "-o", "cut")
    assert (result.exit_code, "of other answers" in result.stderr) == (1, True)


def test_predictions_never_take_the_place_of_other_files(data: Path) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("x")
    with pytest.raises(RunError, match="not empty"):
        evaluate("smollm2-135m", "data.jsonl", answers=0, out="mine")


def test_compare_takes_several_models_and_shows_what_flipped_and_whose_settings_differ(run: Path) -> None:
    shutil.copytree(run, "runs/two")
    config = Path("runs/two/config.yaml")
    config.write_text(config.read_text().replace("rank: 16", "rank: 4"))
    flags = [
        "compare",
        "smollm2-135m",
        "runs/one",
        "runs/two",
        "data.jsonl",
        "--answers",
        "12",
        "-s",
        "eval.choices=off",
    ]
    long = {**LONG, "pass_threshold": 30}
    Path("long.json").write_text(json.dumps(long))
    code, found = as_json(*flags, "--grader", "long.json", "-o", "<page>.html")
    assert code == 0
    assert [model["model"] for model in found["models"]] == ["smollm2-135m", "runs/one", "runs/two"]
    assert [(pair["a"], pair["b"]) for pair in found["pairs"]] == [("smollm2-135m", "runs/one"), ("smollm2-135m", "runs/two")]  # fmt: skip
    assert found["settings"]["lora.rank"] == [None, 16, 4]
    assert "seed" not in found["settings"]
    for pair in found["pairs"]:
        flips = pair["flips"]
        assert flips["by"] == "long at least 30"
        assert flips["rows"] == 12
        assert all(len(flip["a"]) < 30 <= len(flip["b"]) for flip in flips["fixed"])
        assert all(len(flip["b"]) < 30 <= len(flip["a"]) for flip in flips["broken"])
        gap = pair["differences"]["long"]["value"]
        one, two = (next(m for m in found["models"] if m["model"] == pair[side])["metrics"]["long"]["value"] for side in "ab")  # fmt: skip
        assert gap == pytest.approx(two - one)
    page = Path("<page>.html").read_text()
    assert "long at least 30" in page
    assert not re.search(r"https?://|url\(|@import|<link|<script|<iframe", page)
    assert "lora.rank" in call(*flags).stdout


def test_rows_whose_own_answer_does_not_pass_are_left_out_of_a_mended_file(data: Path) -> None:
    code, found = as_json("check", "data.jsonl", "--fix", "--grader", "graders.json", "--min", "1", "-o", "all.jsonl")
    assert (code, found["mended"]["rows"], found["mended"]["unfit"]) == (0, 40, 0)
    said = ["check", "data.jsonl", "--fix", "--grader", "picky.json"]
    result = call(*said, "-o", "odd.jsonl")
    assert "picky could not grade every answer (20)" in result.stdout
    assert "20 by graders" in result.stdout
    rows = [json.loads(line) for line in Path("odd.jsonl").read_text().splitlines()]
    assert [row["n"] for row in rows] == list(range(1, 40, 2))
    assert rows[0] == json.loads(data.read_text().splitlines()[1])
    assert call(*said, "--min", "1.5", "-o", "none.jsonl").exit_code == 3  # no row is left
    assert call("check", "data.jsonl", "--fix", "--min", "1", "-o", "x.jsonl").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["eval", "smollm2-135m", "data.jsonl", "--grader", "none.json"], 2, "can't be read"),
        (["eval", "smollm2-135m", "data.jsonl", "--grader", "typo.json"], 2, "did you mean 'string_check'"),
        (["eval", "smollm2-135m", "data.jsonl", "--grader", "column.json"], 3, "no item.words"),
        (["eval", "smollm2-135m", "data.jsonl", "--grader", "taken.json"], 2, "measured anyway"),
        (["tune", "data.jsonl", "-s", "eval.graders=column.json", "-o", "runs/x"], 3, "no item.words"),
        (["tune", "data.jsonl", "-s", "eval.graders=graders.json", "-s", "eval.generate=0"], 2, "has no effect"),
        (["eval", "smollm2-135m", "texts.txt", "--grader", "graders.json"], 2, "no answer to grade"),
        (["compare", "smollm2-135m", "data.jsonl"], 2, "1 models"),
        (["compare", "smollm2-135m", "smollm2-135m"], 2, "0 data files"),
        (["compare", "smollm2-135m", "smollm2-135m", "data.jsonl", "-o", "page.txt"], 2, "compare.html"),
    ],
)
def test_what_is_wrong_with_graders_is_said_before_anything_is_done(
    data: Path, arguments: list[str], code: int, said: str
) -> None:
    Path("typo.json").write_text(json.dumps({**HIT, "type": "string_chek"}))
    Path("column.json").write_text(json.dumps({**HIT, "reference": "{{item.words}}"}))
    Path("taken.json").write_text(json.dumps({**HIT, "name": "rouge_l"}))
    Path("texts.txt").write_text("a text\n\nanother text\n")
    result = call(*arguments)
    assert (result.exit_code, said in result.stderr) == (code, True), result.output
    assert "to mend:" in result.stderr
    assert not Path("runs").exists()
