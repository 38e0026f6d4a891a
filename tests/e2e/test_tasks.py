"""Every task from the outside: found, trained, proven, predicted, scored again, reloaded by plain libraries."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import headstart
from headstart.data.masking import COPIES
from headstart.data.read import Where
from headstart.data.records import Document
from headstart.display import Display
from headstart.evaluate.robust import vary
from headstart.models.source import find_model
from headstart.tune import resume
from tests.conftest import killed_at
from tests.e2e.test_commands import as_json, call, run_card

QUICK = ["-s", "steps=24", "-s", "batch_size=8", "-s", "eval.every=8", "-s", "optim.lr=1e-2", "-s", "data.held_out=20"]


def write(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def low(number: int) -> bool:
    return number < 25


def numbers(chance: random.Random) -> list[int]:
    return [chance.randrange(50) for _ in range(3)]


def tune(file: str, *more: str, task: str, kind: str = "supervised", better: bool = True) -> headstart.Run:
    result = call("tune", file, "-o", "runs/one", *QUICK, *more)
    assert result.exit_code == 0, result.output
    run = headstart.Run(Path("runs/one"))
    assert (run.result["kind"], run.result["task"]) == (kind, task)
    if better:
        guard = run.result["guard"]  # a tiny model that is trained so hard may rightly be found to lose the rest
        lost = isinstance(guard, dict) and guard["verdict"] == "lost"
        assert run.result["verdict"] == "worse" if lost else run.result["verdict"] in ("better", "no_gain")
        difference = run.result["difference"]
        worse_is_more = difference["metric"] in ("bits_per_byte", "nll")
        assert (difference["value"] < 0) == worse_is_more, difference
    assert run.report.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    return run


def score_again(run: headstart.Run, file: str) -> dict[str, Any]:
    """Return what eval finds on the rows of a file, having checked that compare with itself finds no difference."""
    code, found = as_json("eval", str(run.path), file)
    assert code == 0
    code, versus = as_json("compare", str(run.path), str(run.path / "model"), file)
    assert code == 0
    assert all(item["value"] == pytest.approx(0, abs=1e-9) for item in versus["pairs"][0]["differences"].values())
    metrics: dict[str, Any] = found["metrics"]
    return metrics


def predict(run: headstart.Run, file: str) -> list[dict[str, Any]]:
    assert as_json("predict", str(run.path), file, "-o", "found.jsonl")[0] == 0
    return [json.loads(line) for line in Path("found.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_tags(tiny_home: Path, method: str) -> None:
    chance = random.Random(0)
    lines = []
    for _ in range(80):
        lines += [f"{n} {'B-low' if low(n) else 'O'}" for n in numbers(chance)] + [""]
    Path("words.conll").write_text("\n".join(lines), encoding="utf-8")
    run = tune("words.conll", "-m", "minilm", "--method", method, task="tagging")
    assert run.result["difference"]["metric"] == "entity_f1"
    assert "Entities" in run.report.read_text(encoding="utf-8")
    found = predict(run, "words.conll")
    right = sum(t == p for row in found for t, p in zip(row["tags"], row["tags"], strict=True))
    assert right == 240
    write("plain.jsonl", [{"tokens": "3 41 text"}])
    (told,) = predict(run, "plain.jsonl")
    assert len(told["tags"]) == 3
    assert [e["text"] for e in told["entities"]] == [
        word for word, tag in zip(["3", "41", "text"], told["tags"], strict=True) if tag == "B-low"
    ]
    metrics = score_again(run, "words.conll")
    assert metrics["entity_f1"]["value"] > 0.5
    # The card's lines, without headstart, give the very same entities.
    printed = run_card(run.path, repr("3 41 text"))
    assert [
        item["word"] for item in eval(printed, {"np": np, "__builtins__": {}}) if item["entity_group"] == "low"
    ] == [entity["text"] for entity in told["entities"]]


def test_several_classes(tiny_home: Path) -> None:
    chance = random.Random(0)
    rows = []
    for _ in range(90):
        three = [number // 10 * 10 for number in numbers(chance)]
        labels = [name for name, number in (("zero", 0), ("forty", 40)) if number in three]
        rows.append({"text": " ".join(map(str, three)), "label": labels})
    # Whether a word is there is learned by all of five seeds in so many steps, one of the two classes at least.
    settings = ["-s", "steps=200", "-s", "optim.lr=5e-3", "-s", "eval.patience=0"]
    run = tune(write("rows.jsonl", rows), "-m", "minilm", *settings, task="multilabel")
    assert run.result["labels"] == ["forty", "zero"]
    config = transformers.AutoConfig.from_pretrained(run.path / "model")
    assert config.problem_type == "multi_label_classification"
    assert 0 < config.headstart_labels["threshold"] < 1
    found = predict(run, "rows.jsonl")
    for row in found[:20]:
        above = [n for n, p in row["probabilities"].items() if p >= config.headstart_labels["threshold"]]
        assert row["predictions"] == above
    assert score_again(run, "rows.jsonl")["micro_f1"]["value"] > 0.4
    # Columns of 0 and 1 say the same.
    flags = [
        {"text": row["text"], "zero": int("zero" in row["label"]), "forty": int("forty" in row["label"])}
        for row in rows
    ]
    write("flags.jsonl", flags)
    found = as_json("check", "flags.jsonl", "-m", "minilm", "-s", "data.label=zero,forty")
    assert found[0] == 0
    assert "labels (given)" in found[1]["formats"][0]


def test_numbers(tiny_home: Path) -> None:
    chance = random.Random(0)
    rows = [{"text": f"{n}", "price": 1000.5 + 10 * n} for n in (chance.randrange(50) for _ in range(120))]
    write("rows.jsonl", rows)
    run = tune("rows.jsonl", "-m", "minilm", "-s", "data.label=price", "-s", "steps=60", task="regression")
    assert set(run.result["after"]) == {"r2", "mae", "rmse", "spearman"}
    found = predict(run, "rows.jsonl")
    errors = [abs(row["prediction"] - row["price"]) for row in found]
    # A head that gave standard deviations would be off by a thousand.
    assert np.mean(errors) == pytest.approx(score_again(run, "rows.jsonl")["mae"]["value"], rel=1e-3)
    assert np.mean(errors) < 160
    assert "Told against right" in run.report.read_text(encoding="utf-8")
    printed = json.loads(run_card(run.path, repr(rows[0]["text"])))
    assert printed == [pytest.approx(found[0]["prediction"], rel=1e-3)]


def test_pairs_of_texts(tiny_home: Path) -> None:
    chance = random.Random(0)
    rows = []
    for _ in range(80):
        a, b = chance.randrange(50), chance.randrange(50)
        rows.append({"sentence1": f"{a} text", "sentence2": f"{b}", "label": "low" if low(b) else "high"})
    # At this rate each of twelve seeds learns, and has 60 to 76 of all rows right; of the twelve that are held out the untouched
    # model may have eight right by chance, so that a difference says nothing.
    settings = ["-s", "steps=60", "-s", "optim.lr=3e-3"]
    run = tune(write("rows.jsonl", rows), "-m", "minilm", *settings, task="classification", better=False)
    found = predict(run, "rows.jsonl")
    assert sum(row["prediction"] == row["label"] for row in found) > 55
    model = transformers.AutoModelForSequenceClassification.from_pretrained(run.path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.path / "model")
    with torch.no_grad():
        logits = model(**tokenizer(rows[0]["sentence1"], rows[0]["sentence2"], return_tensors="pt")).logits[0]
    assert model.config.id2label[int(logits.argmax())] == found[0]["prediction"]


def test_masked_tokens_and_going_on_after_a_stop(tiny_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(0)
    rows = [{"text": " ".join(str(n % 4) for n in range(k, k + 30))} for k in (chance.randrange(50) for _ in range(80))]
    write("rows.jsonl", rows)
    run = tune("rows.jsonl", "-m", "minilm", task="masked", kind="unsupervised")
    assert run.result["difference"]["metric"] == "bits_per_byte"
    before, after = (run.result[side]["bits_per_byte"]["value"] for side in ("before", "after"))
    assert after < before
    again = score_again(run, "rows.jsonl")["bits_per_byte"]["value"]
    assert again == pytest.approx(after, rel=0.3)
    # White space is no token of this model's: the same bits are of more bytes then.
    (told,) = as_json("eval", str(run.path), "rows.jsonl", "--robust")[1]["robust"]["varied"].items()
    name, part = told
    spaced = [vary(Document(Where("", 1), row["text"]), name) for row in rows]
    more = sum(len(row.texts[0]) for row in spaced) / sum(len(row["text"]) for row in rows)
    assert (name, part["metric"], part["clean"]["value"]) == ("white space", "bits_per_byte", pytest.approx(again))
    assert part["varied"]["value"] == pytest.approx(again / more)
    (variant,) = headstart.plan("rows.jsonl", model="minilm", settings={"steps": 400}).data.variants
    assert (variant.name, {len(example.segments) for example in variant.rows.examples}) == (name, {COPIES})
    transformers.AutoModelForMaskedLM.from_pretrained(run.path / "model")
    # What is masked follows from a row's place in the run, so a run that goes on ends with the same weights.
    with killed_at(14):
        assert call("tune", "rows.jsonl", "-m", "minilm", "-o", "runs/two", *QUICK).exit_code == 130
    resume(Path("runs/two"), Display())
    weights = [Path(f"runs/{name}/model/model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("form", ["pairs", "scores", "texts"])
def test_embeddings(tiny_home: Path, form: str) -> None:
    chance = random.Random(0)
    rows: list[dict[str, Any]] = []
    for n in range(80):
        a = n % 50
        fitting = f"text {a} {chance.randrange(50)}"
        if form == "pairs":
            rows.append({"anchor": f"{a} {chance.randrange(50)}", "positive": fitting})
        elif form == "scores":
            b = chance.randrange(50)
            rows.append({"sentence1": f"{a}", "sentence2": f"{b}", "score": 5.0 if low(a) == low(b) else 1.5})
        else:
            rows.append({"text": f"{a} {a} {a} {chance.randrange(50)} {a} {a}"})
    write("rows.jsonl", rows)
    more = [] if form == "pairs" else ["-s", "task=embedding"]
    kind = "unsupervised" if form == "texts" else "supervised"
    run = tune("rows.jsonl", "-m", "minilm", *more, task="embedding", kind=kind, better=False)
    metrics = score_again(run, "rows.jsonl")
    assert set(metrics) == {"spearman" if form == "scores" else "recall_at_1", "cross_entropy"} | (
        {"recall_at_10", "mrr"} if form != "scores" else set()
    )
    # The folder says to sentence-transformers how it is pooled, and plain transformers loads its weights.
    pooling = json.loads((run.path / "model" / "1_Pooling" / "config.json").read_text())
    assert pooling["pooling_mode_mean_tokens"]
    assert [
        part["type"].rpartition(".")[2] for part in json.loads((run.path / "model" / "modules.json").read_text())
    ] == [
        "Transformer",
        "Pooling",
        "Normalize",
    ]
    transformers.AutoModel.from_pretrained(run.path / "model")
    # The untouched model can be compared with, on the same rows.
    assert as_json("compare", "minilm", str(run.path), "rows.jsonl")[0] == 0
    code, error = as_json("eval", str(run.path), "rows.jsonl", "--robust")
    assert (code, error["problems"][0]["where"]) == (2, "--robust")
    assert "no input that could be written otherwise" in error["problems"][0]["what"]


@pytest.fixture
def pictures(tiny_home: Path) -> str:
    """Return a folder of dark and bright images."""
    from PIL import Image as Pillow

    chance = np.random.default_rng(0)
    for number in range(60):
        name, base = ("dark", 20) if number % 2 else ("bright", 180)
        path = Path("pictures") / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Pillow.fromarray((base + chance.integers(0, 60, (24, 36, 3))).astype(np.uint8)).save(path)
    return "pictures"


def test_images(pictures: str) -> None:
    run = tune(pictures, task="images")
    assert run.result["model"]["name"] == "efficientnet-lite0"
    assert run.result["after"]["accuracy"]["value"] > 0.9
    found = predict(run, pictures)
    assert sum(row["prediction"] == row["label"] for row in found) > 54
    assert score_again(run, pictures)["accuracy"]["value"] > 0.9
    assert "Confusion matrix" in run.report.read_text(encoding="utf-8")
    model, tokenizer = headstart.load(str(run.path))
    assert tokenizer is None
    assert model.config.id2label == {0: "bright", 1: "dark"}
    # Tuned again from what was tuned, to other classes: the head begins anew.
    Path(pictures, "dark").rename(Path(pictures, "night"))
    assert call("tune", pictures, "-m", str(run.path), "-o", "runs/two", *QUICK, "-s", "steps=1").exit_code == 0


def test_random_weights_show_what_the_head_start_is_worth(tiny_home: Path) -> None:
    rows = [{"text": f"{n % 50}", "label": "low" if low(n % 50) else "high"} for n in range(90)]
    write("rows.jsonl", rows)
    run = tune("rows.jsonl", "-m", "minilm", "-s", "weights=random", task="classification", better=False)
    assert run.result["weights"] == "random"
    kept = transformers.AutoModel.from_pretrained(find_model("minilm").path).state_dict()
    ours = transformers.AutoModel.from_pretrained(run.path / "model").state_dict()
    key = "embeddings.word_embeddings.weight"
    assert float((kept[key] - ours[key]).abs().max()) > 0.02  # one-tenth of a step apart it would be the same start
    result = call("tune", "rows.jsonl", "-m", "minilm", "-s", "weights=random", "--method", "lora", *QUICK)
    assert (result.exit_code, "an adapter on random weights" in result.stderr) == (2, True)


def test_answers_out_of_a_set_are_scored_as_classes(tiny_home: Path) -> None:
    rows = [{"prompt": f"{n} days?", "completion": "sore throat" if low(n % 50) else "plan"} for n in range(100)]
    write("rows.jsonl", rows)
    run = tune("rows.jsonl", "-s", "steps=60", task="chat", kind="instruction")
    assert run.result["labels"] == ["plan", "sore throat"]
    assert run.result["difference"]["metric"] == "accuracy"
    assert {"nll", "macro_f1", "calibration"} < set(run.result["after"])
    assert "What is taken for what" in run.report.read_text(encoding="utf-8")
    assert "accuracy" in score_again(run, "rows.jsonl")
    free = tune_free()
    assert "rouge_l" in free["after"]
    assert "accuracy" not in free["after"]


def tune_free() -> dict[str, Any]:
    assert (
        call("tune", "rows.jsonl", "-o", "runs/free", *QUICK, "-s", "eval.choices=off", "-s", "steps=1").exit_code == 0
    )
    return headstart.Run(Path("runs/free")).result


@pytest.mark.parametrize(
    ("rows", "more", "said"),
    [
        ([{"tokens": ["a"], "tags": ["O", "O"]}], [], "1 words and 2 tags"),
        ([{"text": "a", "label": "x"}], ["-s", "task=masked"], "not masked"),
        (
            [{"text": "a", "label": 1.5}, {"text": "b", "label": 2}],
            ["-s", "data.class_weights=balanced"],
            "task is regression",
        ),
        ([{"text": "a"}], ["-s", "task=tagging"], "no row has a column 'tokens'"),
    ],
)
def test_what_cannot_be_is_said(tiny_home: Path, rows: list[dict[str, Any]], more: list[str], said: str) -> None:
    result = call("tune", write("rows.jsonl", rows * 20), "-m", "minilm", *QUICK, *more)
    assert result.exit_code in (2, 3)
    assert said in result.stderr


@pytest.mark.parametrize(
    ("name", "method"),
    [("chatml", "full"), ("llama3", "lora"), ("gemma", "lora"), ("mistral", "full"), ("alpaca", "lora")],
)
def test_a_base_model_is_given_a_template_by_name(tiny_home: Path, name: str, method: str) -> None:
    """Its tokens are learned, embeddings included, and what is saved knows the template without being told."""
    home = tiny_home.parent / "home" / "models" / "smollm2-135m"
    for file in home.glob("chat_template*"):
        file.unlink()
    config = json.loads((home / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (home / "tokenizer_config.json").write_text(json.dumps(config))
    rows = [{"prompt": f"{n} days?", "completion": f"The answer is {n} days."} for n in range(60)]
    write("rows.jsonl", rows)
    result = call("tune", "rows.jsonl", *QUICK)
    assert (result.exit_code, "-s data.template=chatml" in result.stderr) == (1, True)
    run = tune("rows.jsonl", "--method", method, "-s", f"data.template={name}", task="chat", kind="instruction")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.path / "model")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
    )
    assert asked.endswith({"chatml": "assistant\n", "llama3": "\n\n", "gemma": "model\n"}.get(name, asked[-5:]))
    code, said = as_json("chat", str(run.path), "--ask", "7 days?", "--max-tokens", "20")
    assert code == 0
    assert run_card(run.path, '"7 days?"').rstrip("\n") == said["answer"].rstrip("\n")
    stop = run.result["stop_ids"][-1] if name in ("llama3", "gemma") else None
    if stop is not None:
        before = transformers.AutoModelForCausalLM.from_pretrained(home).get_input_embeddings().weight
        after = run.model.get_input_embeddings()(torch.tensor([stop])).detach()[0]
        assert stop >= len(before) or float((after - before[stop]).abs().max()) > 1e-3


def test_other_data_is_mixed_in_and_scored_on_its_own(tiny_home: Path) -> None:
    write("rows.jsonl", [{"prompt": f"{n} days?", "completion": f"The answer is {n} days."} for n in range(60)])
    write("general.jsonl", [{"text": f"The patient has a sore throat for {n} days."} for n in range(30)])
    run = tune("rows.jsonl", "-s", "data.mix=general.jsonl=0.5", task="chat", kind="instruction")
    result = run.result
    # 20 of 60 rows are held out: 40, and 20 beside them.
    assert result["rows"]["train"] == 60
    assert "bits_per_byte of general.jsonl" in result["differences"]
    assert result["differences"]["bits_per_byte of general.jsonl"]["rows"] == 6
    assert (
        result["after"]["bits_per_byte of general.jsonl"]["value"]
        < result["before"]["bits_per_byte of general.jsonl"]["value"]
    )
    assert "bits per byte of general.jsonl" in run.report.read_text(encoding="utf-8")
    data = json.loads((run.path / "data.json").read_text())
    assert [Path(file["name"]).name for file in data["files"]] == ["rows.jsonl", "general.jsonl"]
    assert any("20 rows mixed in; 6 others to score on" in note for note in data["notes"])
    for value, code, said in (("general.jsonl", 2, "no path with a weight"), ("labels.jsonl=1", 3, "can't be mixed")):
        write("labels.jsonl", [{"text": str(n), "label": "ab"[n % 2]} for n in range(9)])
        result = call("tune", "rows.jsonl", "-s", f"data.mix={value}", *QUICK)
        assert (result.exit_code, said in result.stderr) == (code, True)
