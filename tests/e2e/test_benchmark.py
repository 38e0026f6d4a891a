"""Benchmarks: what the harness's own model gives is what ours gives, in packs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from headstart.benchmark import Asking, benchmark, to_json
from headstart.engine.forward import PackReader
from headstart.errors import UsageError
from headstart.evaluate import harness
from headstart.evaluate.harness import cut_at, read_scores, score_continuations

TASKS = {
    "choose": """
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "said": """
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
""",
}


def test_continuations_score_as_the_model_scores_them_alone(tiny_model: Path) -> None:
    model, packed = (transformers.AutoModelForCausalLM.from_pretrained(tiny_model).eval() for _ in range(2))
    chance = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(5, 60, (n,), generator=chance).tolist()  # noqa: E731
    context = draw(9)
    pairs = [(context, draw(n)) for n in (1, 3, 2)] + [(draw(4), draw(5)), (context, [])]
    with torch.no_grad():
        likeliest = model.generate(torch.tensor([context]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    pairs.append((context, likeliest[0, len(context) :].tolist()))
    found = score_continuations(PackReader(packed), pairs, 64)
    for (before, after), (logprob, greedy) in zip(pairs, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*before, *after]])).logits[0].log_softmax(-1)[len(before) - 1 : -1]
        expected = sum(float(row[token]) for row, token in zip(logits, after, strict=False))
        assert logprob == pytest.approx(expected, abs=1e-4)
        assert greedy == all(int(row.argmax()) == token for row, token in zip(logits, after, strict=False))
    assert [greedy for _, greedy in found][-2:] == [True, True]
    assert not all(greedy for _, greedy in found)


def test_a_metric_that_is_no_mean_over_documents_gets_no_interval() -> None:
    samples = [{"doc_id": n, "filter": "none", "metrics": ["acc", "f1"], "acc": n % 2, "f1": 0.5} for n in range(4)]
    results = {"acc,none": 0.5, "acc_stderr,none": 0.1, "f1,none": 0.9, "alias": "a task"}
    (scores,) = read_scores({"results": {"task": results}, "samples": {"task": samples}})
    assert dict(scores.values) == {"acc": 0.5, "f1": 0.9}
    assert set(scores.metrics) == {"acc"}
    assert scores.documents == 4


def test_an_answer_ends_before_the_first_text_that_ends_it() -> None:
    assert cut_at("one\ntwo. three", [".", "\n"]) == "one"
    assert cut_at("one", ["\n", ""]) == "one"


def test_without_the_harness_it_is_said_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="lm-evaluation-harness isn't installed"):
        benchmark(["tiny"], Asking(["choose"]))


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness")
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"q": f"the {a} and the {b} are", "choices": [f" {b} {a}", f" {a}", " no one"], "gold": n % 3}
        for n, (a, b) in enumerate([("cat", "dog"), ("sun", "moon"), ("red", "green"), ("old", "new")] * 3)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + text.lstrip(), encoding="utf-8")
    return folder


def test_the_harness_gives_what_it_gives_with_its_own_model(
    tasks: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    own = HFLM(
        pretrained=transformers.AutoModelForCausalLM.from_pretrained(tiny_model).eval(), tokenizer=str(tiny_model)
    )
    manager = TaskManager(include_path=str(tasks))
    expected = simple_evaluate(model=own, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)["results"]
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    asking = Asking(list(TASKS), include=tasks)
    out = tmp_path / "out"
    found = benchmark([str(tiny_model), str(copy)], asking, out)
    for task in found[0].tasks:
        wanted = {key.partition(",")[0]: value for key, value in expected[task.task].items() if "stderr" not in key}
        for name, value in task.values.items():
            assert value == pytest.approx(wanted[name], rel=1e-4), (task.task, name)
        assert set(task.metrics) == set(task.values)
    (pair,) = to_json(found)["pairs"]
    assert all(one["value"] == 0 for each in pair["tasks"].values() for one in each.values())
    with monkeypatch.context() as patch:
        patch.setattr(harness, "score_continuations", lambda *_: pytest.fail("asked again"))
        assert to_json(benchmark([str(tiny_model), str(copy)], asking, out)) == to_json(found)
    with pytest.raises(UsageError, match="did you mean choose"):
        benchmark([str(tiny_model)], Asking(["chose"], include=tasks))
