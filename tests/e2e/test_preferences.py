"""Preferences from the outside: pairs, ranked answers and votes are found, learned, proven, carried on with and compared."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import headstart
from headstart.cli import app
from headstart.display import Display
from headstart.evaluate import watch
from headstart.evaluate.measure import Measured
from headstart.evaluate.watch import Sign
from headstart.run import RunFolder
from headstart.tune import resume
from tests.conftest import killed_at
from tests.e2e.test_commands import as_json, call

WORDS = ["sore throat", "plan", "report", "patient", "doctor", "answer", "three days", "reason"]
QUICK = ["-s", "steps=16", "-s", "batch_size=4", "-s", "optim.lr=1e-2", "-s", "eval.generate=2", "-s", "eval.every=8"]
QUICK += ["-s", "data.held_out=24"]  # of which eight are watched


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


def watched(run: headstart.Run, steps: list[dict[str, Any]], page: str) -> None:
    """See that answers were looked at before the first step and after the last, and that both are told."""
    first, *_, last = looks = [look for look in steps if "sample_kl" in look]
    assert (first["step"], last["step"]) == (0, 16)
    # The untouched model, without its adapter or loaded once more, is what it was; and the tuned one is another.
    assert first["sample_kl"] == pytest.approx(0.0, abs=1e-9)
    assert last["sample_kl"] > 0.01
    assert 0 < last["sample_tokens"] <= 60
    assert last["watch_accuracy"] >= first["watch_accuracy"] == 0.5 or "watch_chosen_gain" not in last
    told = run.result["watch"]
    assert (told["prompts"], told["times"], told["stopped"]) == (2, len(looks), "")
    assert 0 < told["seconds"] < run.result["speed"]["eval_s"]
    assert told["last"].items() >= {key: last[key] for key in ("sample_kl", "watch_accuracy")}.items()
    for said in ("Divergence from the untouched model by step. nats a token", "Schulman", "Length of sampled answers"):
        assert said in page
    (wins,) = run.result["wins"]
    assert (wins["by"], wins["rows"]) == ("chrF to the chosen answer", 2)
    assert run.result["reasons"]["happy_users"]["measured"]


def written_otherwise(run: headstart.Run, file: str, page: str) -> None:
    """See that prompts were scored written otherwise, and their answers held against what the untouched model gave them then."""
    (name,) = run.result["robust"]["varied"]  # so short a run pays for one way
    part = run.result["robust"]["varied"][name]
    assert (name, part["metric"]) == ("no punctuation", "preference_accuracy")
    assert part["untouched"]["value"] == 0.5
    assert part["varied"]["value"] > 0.8
    assert "Inputs written otherwise" in page
    assert "no punctuation" in page
    before, after = (
        Measured.from_json(as_rows(run.path / "evaluation" / f"{side}.json"), "preference")
        for side in ("before", "after")
    )
    assert len(after.variants()[name].rows) == part["rows"] >= 8
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    model, tokenizer = headstart.load("smollm2-135m")
    right = []
    for was, now in zip(before.variants()[name].rows, after.variants()[name].rows, strict=True):
        own, row = before.own[now.varied or 0], json.loads(lines[int(now.where.rpartition(":")[2]) - 1])
        assert (now.asked, own.asked) == (row["prompt"].removesuffix("?"), row["prompt"])
        answers = row.get("responses") or [row[side] for side in ("chosen", "rejected", "completion") if side in row]
        # By the untouched model in plain transformers, each answer alone.
        plain = [logprob(model, tokenizer, now.asked, answer) for answer in answers]
        assert [[reference for *_, reference in side.found] for side in (was, now)] == [pytest.approx(plain)] * 2
        assert [reference for *_, reference in own.found] != pytest.approx(plain)
        gains = [value - reference for (value, *_), reference in zip(now.found, plain, strict=True)]
        scores = row.get("scores") or [float(row.get("label", 1.0)), 0.0][: len(answers)]
        pairs = [(x, y) for x in range(len(gains)) for y in range(len(gains)) if scores[x] > scores[y]]
        alone = (gains[0] > 0) == (scores[0] > 0)
        right.append(float(np.mean([gains[x] > gains[y] for x, y in pairs])) if len(gains) > 1 else float(alone))
    assert part["varied"]["value"] == pytest.approx(np.mean(right))


def logprob(model: Any, tokenizer: Any, asked: str, answer: str) -> float:
    """Return the log-probability of an answer with the token that ends it, by plain transformers."""
    asks = [{"role": "user", "content": asked}]
    prompt = tokenizer.apply_chat_template(asks, tokenize=False, add_generation_prompt=True)
    sides = [tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, f"{answer}<|im_end|>")]
    ids = torch.tensor([[*sides[0], *sides[1]]])
    with torch.no_grad():
        found = model(input_ids=ids).logits.log_softmax(-1)
    return float(found[0, len(sides[0]) - 1 : -1].gather(-1, ids[0, len(sides[0]) :, None]).sum())


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
    watched(run, steps, page)
    written_otherwise(run, file, page)
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
    assert versus["pairs"][0]["wins"][0]["value"] == 0.5
    assert call("chat", str(run.path), "--ask", "3 plan?").exit_code == 0


def test_people_vote_between_two_models_and_what_they_prefer_is_learned(tiny_home: Path) -> None:
    first = tune(rows("pairs"), "runs/one", "-s", "eval.guard=off")
    Path("asked.txt").write_text("".join(f"{n} plan?\n" for n in range(20)), encoding="utf-8")
    command = ["chat", "smollm2-135m", str(first.path), "--compare", "--prompts", "asked.txt"]
    command += ["--max-tokens", "6", "--temperature", "1"]  # the untouched model's likeliest tokens are all white space
    runner = CliRunner()
    held = runner.invoke(app, command, input="1\n2\ntie\n" + "1\n" * 9, catch_exceptions=False)
    assert held.exit_code == 0, held.output
    assert "12 now, 12 on these two in all" in held.output
    assert not re.search(r"smollm|runs/one", held.output.partition("\nvotes\n")[0])
    more = runner.invoke(app, [*command, "--json"], input="both bad\n" + "2\n" * 8, catch_exceptions=False)
    found = json.loads(more.stdout)
    assert (found["cast"], found["wins"]["rows"], found["wins"]["by"]) == (9, 21, "votes")
    kept = [json.loads(line) for line in Path("votes.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(kept) >= 12
    assert all(row["chosen_by"] != row["rejected_by"] for row in kept)
    run = tune("votes.jsonl", "runs/two", "-s", "eval.guard=off", "-s", "steps=1", "-s", "data.held_out=5")
    assert run.result["rows"]["train"] + run.result["rows"]["proof"] <= len(kept)
    code, error = as_json("chat", "smollm2-135m", "--compare")
    assert (code, error["problems"][0]["code"]) == (2, "usage.flag")


def test_a_run_that_surely_goes_wrong_ends_and_keeps_the_best_before(
    tiny_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signs(before: Any, now: dict[str, float]) -> list[Sign]:
        assert before["sample_kl"] < 1e-9
        return [Sign("repetition", "answers repeat all that they said", sure=True)] if looks.pop(0) else []

    looks = [False, True, True]
    monkeypatch.setattr(sys.modules["headstart.tune"], "find_signs", signs)
    every = ["-s", "eval.every=2", "-s", "eval.guard=off", "-s", "eval.patience=0"]
    monkeypatch.setattr(watch, "TIME_FRAC", 100.0)  # look each time
    run = tune(rows("pairs"), "runs/one", *every)
    assert looks == []
    assert (run.result["steps"]["end"], run.result["steps"]["taken"], run.result["steps"]["best"]) == ("wrong", 6, 2)
    assert run.result["watch"]["signs"] == [
        {"step": 4, "name": "repetition", "said": "answers repeat all that they said", "sure": True}
    ]
    assert "two evaluations in a row: answers repeat" in run.result["watch"]["stopped"]
    said = (run.path / "log.txt").read_text(encoding="utf-8")
    assert "step 4: it goes wrong: answers repeat all that they said; lower optim.lr" in said
    assert "the best model was that of step 2; it is kept" in said
    assert "stopped early" in run.report.read_text(encoding="utf-8")
    best = load_file(run.path / "checkpoints" / "best-000002" / "state.safetensors")
    saved = load_file(run.path / "model" / "adapter_model.safetensors")
    assert sorted(map(float, (t.sum() for t in best.values()))) == sorted(map(float, (t.sum() for t in saved.values())))


@pytest.mark.parametrize("sort", ["pairs", "votes"])
def test_killed_and_resumed_is_never_stopped(tiny_home: Path, sort: str) -> None:
    file = rows(sort)
    more = ["-s", "lora.dropout=0.1", "-s", "engine.tokens_per_pack=64", "-s", "save.every=4", "-s", "eval.guard=off"]
    run = tune(file, "runs/one", *more)
    # Nothing is left of the first run's reference: the second makes its own, and goes on from that.
    for cached in (tiny_home.parent / "home" / "references").glob("*.json"):
        cached.unlink()
    with killed_at(11):
        assert call("tune", file, "-o", "runs/two", *QUICK, *more).exit_code == 130
    resume(Path("runs/two"), Display())
    for name in ("model/adapter_model.safetensors", "evaluation/after.json", "evaluation/reference.json"):
        assert (run.path / name).read_bytes() == Path("runs/two", name).read_bytes(), name
    seen = [
        [
            {k: v for k, v in line.items() if k.startswith(("watch_", "sample_"))}
            for line in RunFolder(path).read_metrics()
        ]
        for path in (run.path, Path("runs/two"))
    ]
    assert seen[0] == seen[1]
    if sort != "pairs":
        return
    # To look at answers changes nothing that is learned.
    unseen = tune(file, "runs/three", *more, "-s", "eval.generate=0")
    assert unseen.result["watch"]["times"] == 0
    name = "model/adapter_model.safetensors"
    assert (unseen.path / name).read_bytes() == (run.path / name).read_bytes()


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
    (varied,) = result["robust"]["varied"].values()
    assert (varied["metric"], varied["untouched"]["value"]) == ("reward_accuracy", 0.5)
    assert varied["varied"]["value"] > 0.9
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
