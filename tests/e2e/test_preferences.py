"""Preferences from the outside: pairs, ranked answers and votes are found, learned, proven, carried on with and compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import headstart
from headstart.display import Display
from headstart.tune import resume
from tests.conftest import killed_at
from tests.e2e.test_commands import as_json, call

WORDS = ["sore throat", "plan", "report", "patient", "doctor", "answer", "three days", "reason"]
QUICK = ["-s", "steps=16", "-s", "batch_size=4", "-s", "optim.lr=1e-2", "-s", "eval.generate=2", "-s", "eval.every=8"]


def rows(sort: str) -> str:
    """Return a file of questions to which short answers are better than those that go on."""
    made: list[dict[str, Any]] = []
    for n in range(72):
        asked, good, bad = (
            f"{n} {WORDS[n % 8]}?",
            f"The {WORDS[n % 8]}.",
            f"The {WORDS[n % 8]} and the doctor, the doctor.",
        )
        if sort == "pairs":
            made.append({"prompt": asked, "chosen": good, "rejected": bad})
        elif sort == "ranked":
            made.append({"prompt": asked, "responses": [bad, good, "No answer."], "scores": [1, 3, 2]})
        else:
            made.append({"prompt": asked, "completion": good if n % 2 else bad, "label": bool(n % 2)})
    name = f"{sort}.jsonl"
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return name


def tune(file: str, out: str, *more: str) -> headstart.Run:
    result = call("tune", file, "-o", out, *QUICK, *more)
    assert result.exit_code == 0, result.output
    return headstart.Run(Path(out))


@pytest.mark.parametrize(
    ("sort", "more"),
    [
        ("pairs", ["--method", "full"]),
        ("ranked", ["-s", "preference.objective=simpo"]),
        ("votes", []),
    ],
)
def test_what_is_preferred_gains(tiny_home: Path, sort: str, more: list[str]) -> None:
    file = rows(sort)
    run = tune(file, "runs/one", *more)
    assert (run.result["kind"], run.result["task"], run.result["verdict"]) == ("preference", "preference", "better")
    before, after = run.result["before"], run.result["after"]
    assert run.result["difference"]["metric"] == "preference_accuracy"
    assert before["preference_accuracy"]["value"] == 0.5
    assert after["preference_accuracy"]["value"] > 0.8
    gap = {
        side: values["chosen_logprob"]["value"] - values["rejected_logprob"]["value"]
        for side, values in (("a", before), ("b", after))
    }
    assert gap["b"] > gap["a"]
    steps = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(0 <= step["accuracy"] <= 1 for step in steps if "loss" in step)
    page = run.report.read_text(encoding="utf-8")
    assert "Preference accuracy is how often" in page
    assert "Pairs that gained least" in page
    free = "preference.objective=simpo" in more
    assert ("Chosen and rejected answers by step" in page) != free
    assert (run.path / "evaluation" / "reference.json").exists() != free
    assert (run.result["speed"]["reference_s"] > 0) != free
    assert "text-generation" in (run.path / "README.md").read_text(encoding="utf-8")
    # The same ruler without a reference, and the model by itself.
    code, found = as_json("eval", str(run.path), file)
    assert code == 0
    assert found["metrics"]["wanted_auroc" if sort == "votes" else "likelier"]["value"] > 0.5
    assert "preference_accuracy" not in found["metrics"]
    code, versus = as_json("compare", str(run.path), str(run.path / "model"), file)
    assert code == 0
    assert all(item["value"] == pytest.approx(0, abs=1e-9) for item in versus["pairs"][0]["differences"].values())
    assert call("chat", str(run.path), "--ask", "3 plan?").exit_code == 0


@pytest.mark.parametrize("sort", ["pairs", "votes"])
def test_killed_and_resumed_is_never_stopped(tiny_home: Path, sort: str) -> None:
    file = rows(sort)
    more = ["-s", "lora.dropout=0.1", "-s", "engine.tokens_per_pack=64", "-s", "save.every=4"]
    run = tune(file, "runs/one", *more)
    # Nothing is left of the first run's reference: the second makes its own, and goes on from that.
    for cached in (tiny_home.parent / "home" / "references").glob("*.json"):
        cached.unlink()
    with killed_at(11):
        assert call("tune", file, "-o", "runs/two", *QUICK, *more).exit_code == 130
    resume(Path("runs/two"), Display())
    for name in ("model/adapter_model.safetensors", "evaluation/after.json", "evaluation/reference.json"):
        assert (run.path / name).read_bytes() == Path("runs/two", name).read_bytes(), name


def test_what_cannot_be_had_is_said_before_anything_is_trained(tiny_home: Path) -> None:
    for file, setting, said in (
        (rows("votes"), "preference.objective=dpo", "only one"),
        (rows("votes"), "batch_size=1", "several"),
        (rows("pairs"), "data.mix=votes.jsonl=0.2", "can't be mixed"),
    ):
        code, error = as_json("tune", file, "-o", "runs/no", "-s", setting)
        assert code in (2, 3)
        assert said in error["problems"][0]["what"]
    lines = [json.dumps({"prompt": f"{n}?", "completion": "b"}) for n in range(20)]
    Path("chat.jsonl").write_text("\n".join(lines), encoding="utf-8")
    code, error = as_json("tune", "chat.jsonl", "--kind", "preference")
    assert code == 3
    assert "data.rejected" in error["problems"][0]["cure"]
    code, error = as_json("tune", "chat.jsonl", "-s", "preference.beta=0.3")
    assert code == 2
    assert error["problems"][0]["code"] == "config.no_effect"
