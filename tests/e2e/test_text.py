"""Unlabelled text from the outside: found, trained, proven in bits per byte, resumed, and continued by plain libraries."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import headstart
from headstart.files import read_json
from tests.conftest import killed_at
from tests.e2e.test_commands import as_json, call, run_card

WORDS = ["sore throat", "plan", "report", "patient", "doctor", "answer", "three days", "reason"]
QUICK = [
    "-s",
    "steps=12",
    "-s",
    "batch_size=4",
    "-s",
    "eval.every=6",
    "-s",
    "optim.lr=2e-2",
    "-s",
    "data.max_length=16",
]


@pytest.fixture
def texts(tiny_home: Path) -> Path:
    """Return a file of sixty documents, of which some are longer than a piece."""
    rows = [
        {"text": " ".join(f"The {word} is short." for word in (WORDS * 2)[n % 8 : n % 8 + 1 + n % 5]) + f" {n}"}
        for n in range(60)
    ]
    path = tiny_home / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("method", ["lora", "full"])
def test_text_in_and_fewer_bits_per_byte_out(texts: Path, method: str) -> None:
    lr = [] if method == "lora" else ["-s", "optim.lr=5e-3"]
    result = call("tune", "texts.jsonl", "--method", method, "-o", "runs/text", *QUICK, *lr)
    assert result.exit_code == 0, result.output
    for said in ("text (certain): 60 of 60 rows", "tokens a word", "bits per byte", "better"):
        assert said in result.stdout
    found = headstart.Run(Path("runs/text")).result
    assert (found["kind"], found["difference"]["metric"]) == ("unsupervised", "bits_per_byte")
    assert set(found["before"]) == {"nll", "perplexity", "bits_per_byte"}
    assert found["after"]["bits_per_byte"]["high"] < found["before"]["bits_per_byte"]["low"]
    # Every document is scored whole, and each piece of one is trained.
    record = read_json(Path("runs/text/data.json"))
    assert record["rows"]["train"] > 40 > record["rows"]["proof"]
    report = Path("runs/text/report.html").read_text()
    assert "Gained most" in report
    assert "bits per byte" in report
    assert "Most surprising before" in report
    for item in found["words"]["before"]:
        assert item["times"] >= 1
        assert item["before"] > 0
        assert f"<td>{item['word']}</td>" in report
    assert found["words"]["gained"][0]["word"] in found["reasons"]["matching_data"]["says"]
    assert run_card(Path("runs/text"), '"The plan"')


def test_the_other_verbs_read_text_too(texts: Path) -> None:
    shown = call("check", "texts.jsonl", "--show", "1", "-s", "data.max_length=16").stdout
    assert re.search(r"The⟦ [a-z ]+ is short\.", shown)
    code, plan = as_json("plan", "texts.jsonl", *QUICK)
    assert (code, plan["steps"]) == (0, 12)
    assert call("tune", "texts.jsonl", "-o", "runs/text", *QUICK).exit_code == 0
    code, versus = as_json("compare", "smollm2-135m", "runs/text", "texts.jsonl")
    assert code == 0
    assert versus["rows"] == 60
    assert versus["pairs"][0]["differences"]["bits_per_byte"]["direction"] == 1
    assert call("chat", "runs/text", "--ask", "The plan", "--max-tokens", "3").exit_code == 0
    refused = call("eval", "runs/text", "texts.jsonl", "--robust")
    assert refused.exit_code == 2
    assert "no input that could be written otherwise" in refused.stderr


def test_a_kind_that_the_rows_are_not_of_is_refused(texts: Path) -> None:
    result = call("tune", "texts.jsonl", "--kind", "instruction")
    assert result.exit_code == 3
    assert "which is for unsupervised fine-tuning (causal), not instruction" in result.stderr
    assert call("tune", "texts.jsonl", "-s", "kind=instruction", "-s", "data.text=text").exit_code == 2
    assert call("tune", "texts.jsonl", "-s", "data.positions=continue", *QUICK, "-s", "steps=1").exit_code == 0


def test_a_run_and_eval_cut_documents_alike(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headstart.dataset.DOCUMENT_TOKENS", 12)
    lines = texts.read_text(encoding="utf-8").splitlines(keepends=True)
    Path("train.jsonl").write_text("".join(lines[:40]), encoding="utf-8")
    Path("held.jsonl").write_text("".join(lines[40:]), encoding="utf-8")
    settings = [*QUICK[:-2], "-s", "steps=1", "-s", "eval.every=0"]
    code, result = as_json("tune", "train.jsonl", "--eval-data", "held.jsonl", "-o", "runs/text", *settings)
    assert code == 0
    found = as_json("eval", "runs/text", "held.jsonl")[1]["metrics"]["bits_per_byte"]["value"]
    assert found == pytest.approx(result["after"]["bits_per_byte"]["value"], rel=1e-5)


def test_positions_that_the_model_does_not_have_are_refused(tiny_home: Path) -> None:
    rows = [{"text": f"{n} " + "The plan is short. " * 200} for n in range(20)]
    Path("long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = call("check", "long.jsonl", "-s", "data.positions=continue")
    assert result.exit_code == 3
    assert "the model has 512 positions" in result.stderr
    assert call("check", "long.jsonl").exit_code == 0


def test_a_corpus_on_disk_is_tuned_on_and_gone_on_with(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are those of the same rows in memory, and a run that was stopped goes on to the same ones."""
    from headstart.data import corpus

    quick = [
        "-s",
        "steps=12",
        "-s",
        "batch_size=4",
        "-s",
        "eval.every=4",
        "-s",
        "data.held_out=0.3",
        "-s",
        "save.every=4",
    ]
    monkeypatch.setattr(corpus, "STREAM_BYTES", 10)
    with killed_at(7):
        assert call("tune", "texts.jsonl", "-o", "runs/killed", *quick).exit_code == 130
    assert call("tune", "texts.jsonl", "-o", "runs/disk", *quick).exit_code == 0
    assert call("resume", "runs/killed").exit_code == 0
    monkeypatch.setattr(corpus, "STREAM_BYTES", 1 << 40)
    assert call("tune", "texts.jsonl", "-o", "runs/memory", *quick).exit_code == 0
    weights = [next(Path(f"runs/{n}/model").glob("*.safetensors")).read_bytes() for n in ("killed", "disk", "memory")]
    assert weights[0] == weights[1] == weights[2]
