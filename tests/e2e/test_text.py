"""Unlabelled text from the outside: found, trained, proven in bits per byte, resumed, and continued by plain libraries."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import headstart
from headstart.data.read import Where
from headstart.data.records import Document
from headstart.dataset import end_of
from headstart.evaluate.measure import Measured
from headstart.evaluate.robust import OF_TEXT, vary
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
    steps = ["-s", "steps=60"]  # which pay for rows that are written otherwise
    result = call("tune", "texts.jsonl", "--method", method, "-o", "runs/text", *QUICK, *steps, *lr)
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
    _written_otherwise(found, report)
    assert run_card(Path("runs/text"), '"The plan"')


def _written_otherwise(result: dict[str, Any], report: str) -> None:
    """See that texts were scored written otherwise, before and after, in bits per byte of the text that they are then."""
    varied = result["robust"]["varied"]
    assert {"typing errors", "lower case"} <= set(varied) <= set(OF_TEXT)
    assert all((part["metric"], part["rows"] >= 8) == ("bits_per_byte", True) for part in varied.values())
    assert "Inputs written otherwise" in report
    assert "it is the difference to the untouched model that tells" in report
    assert "least is gained with" in result["reasons"]["different_situations"]["says"]
    assert "--robust" in result["reasons"]["different_situations"]["how"]
    measured = Measured.from_json(read_json(Path("runs/text/evaluation/after.json")), "causal")
    model, tokenizer = headstart.load("runs/text")
    for name, part in varied.items():
        nll = size = 0.0
        for row in measured.variants()[name].rows:
            text = measured.own[row.varied or 0].asked
            assert row.asked == vary(Document(Where("", 1), text), name).content != text  # type: ignore[union-attr]
            # By a plain model, in pieces of 16 tokens that overlap by one; the first token is read and not predicted.
            ids = tokenizer(row.asked, return_tensors="pt").input_ids
            for start in range(0, ids.shape[1] - 1, 15):
                piece = ids[:, start : start + 16]
                with torch.no_grad():
                    nll += model(input_ids=piece, labels=piece).loss.item() * (piece.shape[1] - 1)
            size += len(row.asked.encode()) - len(tokenizer.decode(ids[0, :1]).encode())
        assert part["varied"]["value"] == pytest.approx(nll / math.log(2) / size, rel=1e-4)


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
    code, found = as_json("eval", "runs/text", "texts.jsonl", "--robust")
    assert code == 0
    robust = found["robust"]["varied"]
    assert set(robust) == set(OF_TEXT) - {"fields in another order"}  # these texts have none
    assert robust["upper case"]["rows"] == 60
    assert robust["upper case"]["clean"]["value"] == pytest.approx(found["metrics"]["bits_per_byte"]["value"])
    assert robust["upper case"]["varied"]["low"] > robust["upper case"]["clean"]["high"]  # it never saw capitals


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


def test_a_text_that_gets_longer_than_the_positions_of_the_model_is_not_written_so(tiny_home: Path) -> None:
    # Of 480 tokens and more each; the tokenizer knows no words in capitals, and spells them out.
    rows = [{"text": f"{n} " + "The plan is short. " * 60} for n in range(60)]
    Path("long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {"data.positions": "continue", "data.max_length": 64, "steps": 1000, "eval.guard": "off"}
    variants = {v.name: v.rows.examples for v in headstart.plan("long.jsonl", settings=settings).data.variants}
    assert "no punctuation" in variants
    assert "upper case" not in variants
    assert all(end_of(example) <= 512 for examples in variants.values() for example in examples)
    restart = headstart.plan("long.jsonl", settings={**settings, "data.positions": "restart"}).data.variants
    assert "upper case" in {v.name for v in restart}


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
