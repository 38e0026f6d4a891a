"""Preferences from the outside: pairs, ranked answers and votes are found, learned, proven, carried on with and compared."""

from __future__ import annotations

import json
import math
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


def test_a_reward_model_puts_answers_in_order_is_a_grader_and_goes_further(tiny_home: Path) -> None:
    file = rows("pairs")
    reward = ["-s", "preference.objective=reward", "-s", "eval.generate=0"]
    run = tune(file, "runs/rm", *reward, "--method", "lora")
    result = run.result
    assert (result["kind"], result["task"], result["verdict"]) == ("preference", "reward", "better")
    # The head begins at zero: chance would be right about all pairs of such rows, or about none.
    assert result["before"]["reward_accuracy"]["value"] == 0.5
    assert result["before"]["cross_entropy"]["value"] == pytest.approx(math.log(2))
    assert result["difference"]["metric"] == "reward_accuracy"
    assert result["new_head"]
    assert result["after"]["reward_accuracy"]["value"] > 0.9
    assert result["after"]["reward_margin"]["value"] > 0 > result["differences"]["cross_entropy"]["high"]
    page = run.report.read_text(encoding="utf-8")
    assert "Pairs in the least right order" in page
    assert "begins at zero" in page
    card = (run.path / "README.md").read_text(encoding="utf-8")
    # The card's own lines give what `predict` gives.
    held = {row["where"].rpartition(":")[2] for row in as_rows(run.path / "evaluation" / "after.json")}
    row = json.loads(Path(file).read_text(encoding="utf-8").splitlines()[int(min(held)) - 1])
    Path("one.jsonl").write_text(json.dumps(row), encoding="utf-8")
    assert call("predict", str(run.path), "one.jsonl", "-o", "told.jsonl").exit_code == 0
    told = as_rows(Path("told.jsonl"))[0]["rewards"]
    assert told[0] > told[1]
    code = card.partition("```python\n")[2].partition("```")[0]
    code = code.replace('"user", "content": "..."', f'"user", "content": {row["prompt"]!r}')
    code = code.replace('"assistant", "content": "..."', f'"assistant", "content": {row["chosen"]!r}')
    printed: list[float] = []
    exec(code, {"print": printed.append})  # as a reader of the card would
    assert printed == [pytest.approx(told[0], abs=1e-4)]
    # Answers are scored that nobody has told apart; a lone one has one reward.
    loose = [{"prompt": row["prompt"], "responses": [row["chosen"], row["chosen"]]}] * 2
    Path("loose.jsonl").write_text("".join(json.dumps(r) + "\n" for r in loose), encoding="utf-8")
    assert call("predict", str(run.path), "loose.jsonl", "-o", "loose_told.jsonl").exit_code == 0
    assert as_rows(Path("loose_told.jsonl"))[1]["rewards"] == [pytest.approx(told[0], abs=1e-5)] * 2
    Path("lone.jsonl").write_text(json.dumps({"prompt": row["prompt"], "completion": row["chosen"]}), encoding="utf-8")
    assert call("predict", str(run.path), "lone.jsonl", "-o", "lone_told.jsonl").exit_code == 0
    assert as_rows(Path("lone_told.jsonl"))[0]["reward"] == pytest.approx(told[0], abs=1e-5)
    code_, found = as_json("eval", str(run.path), file)
    assert (code_, found["metrics"]["reward_accuracy"]["value"] > 0.9) == (0, True)
    # As a grader, of rows whose own answer is good or bad.
    mixed = [{"prompt": json.loads(line)["prompt"], "completion": json.loads(line)[side]}
             for n, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines()) for side in [("chosen", "rejected")[n % 2]]]  # fmt: skip
    Path("chat.jsonl").write_text("".join(json.dumps(r) + "\n" for r in mixed), encoding="utf-8")
    Path("rm.json").write_text(json.dumps({"type": "reward_model", "name": "rm", "model": "runs/rm"}), encoding="utf-8")
    code_, error = as_json("check", "chat.jsonl", "--fix", "--grader", "rm.json", "-o", "kept.jsonl")
    assert (code_, error["problems"][0]["where"]) == (2, "--min")
    middle = sum(told) / 2
    assert (
        call("check", "chat.jsonl", "--fix", "--grader", "rm.json", "--min", str(middle), "-o", "kept.jsonl").exit_code
        == 0
    )
    kept = [r["completion"].count("doctor") < 2 for r in as_rows(Path("kept.jsonl"))]
    assert sum(kept) > 0.9 * len(kept) > 20
    against = {"type": "reward_model", "name": "wins", "model": "runs/rm", "against": "{{row.reference}}"}
    Path("wins.json").write_text(json.dumps(against), encoding="utf-8")
    code_, found = as_json("eval", "smollm2-135m", "chat.jsonl", "--answers", "4", "--grader", "wins.json")
    assert code_ == 0
    assert 0 < found["metrics"]["wins"]["value"] < 1
    # Its head goes on with what it knows.
    again = tune(file, "runs/again", "-m", "runs/rm", "-s", "eval.generate=0", "--method", "full")
    assert (again.result["task"], again.result["new_head"]) == ("reward", False)
    assert again.result["before"]["reward_accuracy"]["value"] == result["after"]["reward_accuracy"]["value"]


def as_rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    found: list[dict[str, Any]] = json.loads(text) if text.startswith("[") else list(map(json.loads, text.splitlines()))
    return found


def test_a_run_goes_on_from_the_adapter_of_another(tiny_home: Path, small_data: Path) -> None:
    """What it begins with, and is held against, is the base with that adapter, not the bare base."""
    first = tune(str(small_data), "runs/chat", "-s", "lora.rank=4", "-s", "optim.lr=3e-2")
    file = rows("pairs")
    code, known = as_json("eval", "runs/chat", file, "--answers", "0")
    wanted = {row["where"]: [value for value, *_ in row["found"]] for row in known["rows"]}
    code, bare = as_json("eval", "smollm2-135m", file, "--answers", "0")
    assert code == 0
    for out, more in (("runs/on", ["--method", "lora"]), ("runs/whole", ["--method", "full"])):
        run = tune(file, out, "-m", "runs/chat", *more)
        before = {r["where"]: [value for value, *_ in r["found"]] for r in as_rows(run.path / "evaluation" / "before.json") if not r["part"]}  # fmt: skip
        assert before
        for where, values in before.items():
            assert values == pytest.approx(wanted[where], rel=1e-4)
            assert values != pytest.approx(
                next(r for r in bare["rows"] if r["where"] == where)["found"][0][0], rel=1e-2
            )
        assert run.result["before"]["preference_accuracy"]["value"] == 0.5
        assert run.result["base"]["name"] == first.result["model"]["path"]
        adapter = run.path / "model" / "adapter_config.json"
        assert adapter.exists() == (out == "runs/on")
        assert "runs/chat" in (run.path / "README.md").read_text(encoding="utf-8")
        assert call("chat", out, "--ask", "3 plan?").exit_code == 0
    own = json.loads((first.path / "model" / "adapter_config.json").read_text(encoding="utf-8"))
    found = json.loads(Path("runs/on/model/adapter_config.json").read_text(encoding="utf-8"))
    assert (found["r"], found["base_model_name_or_path"]) == (4, own["base_model_name_or_path"])
    code, error = as_json("tune", file, "-o", "runs/no", "-m", "runs/chat", "-s", "lora.rank=8")
    assert (code, error["problems"][0]["where"]) == (2, "lora.rank")
