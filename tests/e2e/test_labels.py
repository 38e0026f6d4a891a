"""Labels from the outside: found, trained, proven by accuracy and macro F1, predicted, reloaded by plain transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import headstart
from headstart.errors import ModelError
from headstart.models.load import load_model
from headstart.models.source import find_model
from tests.e2e.test_commands import as_json, call, run_card

KINDS = {"plan": ["What is the plan?", "The plan is short."], "throat": ["a sore throat", "The throat is sore."]}
QUICK = ["-s", "steps=30", "-s", "batch_size=8", "-s", "eval.every=10", "-s", "optim.lr=5e-3", "-s", "data.held_out=20"]


@pytest.fixture
def labels(tiny_home: Path) -> Path:
    """Return a table of eighty texts of two classes."""
    lines = ["text,label"]
    for n in range(40):
        lines += [f"{texts[n % 2]} {n},{label}" for label, texts in KINDS.items()]
    path = tiny_home / "labels.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("method", ["full", "lora"])
def test_labels_in_and_a_classifier_out(labels: Path, method: str) -> None:
    result = call("tune", "labels.csv", "--method", method, "-o", "runs/labels", *QUICK)
    assert result.exit_code == 0, result.output
    for said in ("labels (certain): 80 of 80 rows", "2 classes", "accuracy", "macro F1", "better"):
        assert said in result.stdout
    run = headstart.Run(Path("runs/labels"))
    assert (run.result["kind"], run.result["difference"]["metric"]) == ("supervised", "accuracy")
    assert run.result["labels"] == ["plan", "throat"]
    assert run.model.config.id2label == {0: "plan", 1: "throat"}
    report = run.report.read_text()
    assert "Taken for another" in report
    # Some proof rows are scored written otherwise, too, before and after.
    varied = run.result["robust"]["varied"]
    assert "a greeting before it" in varied
    assert all(part["rows"] >= 8 for part in varied.values())  # of typing errors, say, there are too few
    assert all(0 <= part["varied"]["value"] <= part["clean"]["value"] == 1 for part in varied.values())
    assert run.result["reasons"]["different_situations"]["measured"]
    assert "Inputs written otherwise" in report
    # What headstart predicts is what the card's lines give, without headstart.
    assert as_json("predict", "runs/labels", "labels.csv", "-o", "found.jsonl")[0] == 0
    found = [json.loads(line) for line in Path("found.jsonl").read_text().splitlines()]
    assert len(found) == 80
    assert sum(row["prediction"] == row["label"] for row in found) > 70
    printed = run_card(run.path, repr(found[3]["text"]))
    (told,) = json.loads(printed.replace("'", '"'))
    assert told["label"] == found[3]["prediction"]
    assert told["score"] == pytest.approx(found[3]["probability"], abs=1e-3)


def test_eval_compare_and_check_know_labels(labels: Path) -> None:
    assert call("check", "labels.csv", "--show", "1").stdout.count("label plan") == 1
    assert call("tune", "labels.csv", "-o", "runs/labels", *QUICK).exit_code == 0
    code, found = as_json("eval", "runs/labels", "labels.csv", "--robust")
    assert code == 0
    varied = found["robust"]["varied"]
    assert {"upper case", "a greeting before it"} <= set(varied)
    assert all(item["metric"] == "accuracy" and 0 < item["rows"] <= 80 for item in varied.values())
    assert 0 <= found["robust"]["outside_auroc"]["low"] <= found["robust"]["outside_auroc"]["high"] <= 1
    right = sum(row["answer"] == row["reference"] for row in found["rows"])
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(right / 80)
    code, versus = as_json("compare", "runs/labels", "runs/labels/model", "labels.csv")
    assert (code, versus["pairs"][0]["differences"]["accuracy"]["value"]) == (0, 0)
    result = call("eval", "smollm2-135m", "labels.csv")
    assert result.exit_code == 1
    assert "no classifier" in result.stderr


def test_bad_labels_are_named(labels: Path) -> None:
    labels.write_text(labels.read_text() + "a text without,\n", encoding="utf-8")
    code, found = as_json("check", "labels.csv")
    assert code == 3
    assert [problem["where"] for problem in found["problems"]] == ["labels.csv:82:label"]
    rows = [f'{{"text": "text {n}", "label": {0.5 if n < 3 else chr(34) + "ab"[n % 2] + chr(34)}}}' for n in range(30)]
    Path("mixed.jsonl").write_text("\n".join(rows))
    code, found = as_json("check", "mixed.jsonl")
    assert code == 3
    assert [problem["code"] for problem in found["problems"]] == ["row.label"] * 3
    Path("one.csv").write_text("text,label\n" + "".join(f"text {n},same\n" for n in range(20)))
    result = call("check", "one.csv")
    assert result.exit_code == 3
    assert "every row to train on has the label 'same'" in result.stderr
    # A class that training never sees is named, counts as wrong, and breaks nothing.
    Path("held.csv").write_text(
        "text,label\n" + "".join(f"What? {n},{'new' if n < 3 else 'plan'}\n" for n in range(30))
    )
    labels.write_text("\n".join(labels.read_text().splitlines()[:-1]) + "\n", encoding="utf-8")
    result = call("tune", "labels.csv", "--eval-data", "held.csv", "-o", "runs/unseen", *QUICK[:-2])
    assert result.exit_code == 0, result.output
    assert "3 rows to score on have labels that training never sees, and count as wrong: 'new'" in result.stdout


def test_predict_writes_nothing_where_a_row_has_no_text(labels: Path) -> None:
    assert call("tune", "labels.csv", "-o", "runs/labels", *QUICK, "-s", "steps=1").exit_code == 0
    Path("bad.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    result = call("predict", "runs/labels", "bad.jsonl", "-o", "found.jsonl")
    assert result.exit_code == 3
    assert "bad.jsonl:2:text" in result.stderr
    Path("bad.jsonl").write_text('{"text": "a"}\n{"text": " "}\n')
    result = call("predict", "runs/labels", "bad.jsonl", "-o", "found.jsonl")
    assert result.exit_code == 3
    assert "bad.jsonl:2: the text is empty" in result.stderr
    assert not list(Path().glob("*found*"))


def test_a_model_is_not_taken_for_one_of_another_kind(labels: Path) -> None:
    assert call("tune", "labels.csv", "-o", "runs/labels", *QUICK, "-s", "steps=1").exit_code == 0
    for model, said in (("runs/labels", "is a classifier"), ("minilm", "no chat template")):
        result = call("chat", model, "--ask", "hello")
        assert result.exit_code == 1
        assert said in result.stderr
    assert call("predict", "smollm2-135m", "labels.csv", "-o", "found.jsonl").exit_code == 1
    with pytest.raises(ModelError, match="holds no weights for"):
        load_model(find_model("minilm"), "cpu")


def test_where_not_all_rows_are_scored_none_is_favoured(labels: Path) -> None:
    """A file that is sorted by class would else be scored on its first classes alone."""
    lines = labels.read_text(encoding="utf-8").splitlines()
    labels.write_text(
        "\n".join([lines[0], *sorted(lines[1:], key=lambda line: line.rpartition(",")[2])]), encoding="utf-8"
    )
    settings = {"eval.rows": 8, "data.held_out": 40, "steps": 1, "eval.every": 0}
    proof = headstart.plan("labels.csv", model="minilm", settings=settings).proof
    assert {record.label for record in proof.kept} == {"plan", "throat"}
    assert len(proof.examples) == 8
