"""A run's strength: 0 is the model that it comes from, 1 is the run, and what is written loads in plain peft or transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from typer.testing import CliRunner

import headstart
from headstart.cli import app
from headstart.errors import DataError, UsageError
from headstart.strength import measure_strengths, write_at
from headstart.tune import tune

QUICK = {"batch_size": 4, "steps": 6, "eval.every": 0, "eval.generate": 0, "data.held_out": 10, "engine.threads": 1}


@pytest.fixture
def guard(tmp_path: Path) -> Path:
    file = tmp_path / "guard.jsonl"
    rows = [{"text": f"the patient number {n} has a sore throat and three days of it"} for n in range(9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def made(data: Path, model: Path, out: Path, **more: Any) -> headstart.Run:
    return tune(data, model=str(model), out=out, settings={**QUICK, **more})


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_ends_are_the_base_and_the_run_and_between_lies_the_line(
    small_data: Path, tiny_model: Path, tmp_path: Path, guard: Path, method: str
) -> None:
    lr = 2e-2 if method == "lora" else 5e-3
    run = made(small_data, tiny_model, tmp_path / "run", method=method, **{"optim.lr": lr, "eval.guard": str(guard)})
    found = measure_strengths(str(run.path), strengths=(0.0, 1.0)).to_json()
    zero, one = found["strengths"]
    for side, at in (("before", zero), ("after", one)):
        assert at["value"]["value"] == pytest.approx(run.result[side]["nll"]["value"], rel=1e-5)
    assert found["rows"] == run.result["rows"]["proof"]
    (kept,) = one["guard"]["parts"].values()
    (told,) = run.result["guard"]["parts"].values()
    assert kept["loss"]["value"] == pytest.approx(told["loss"]["value"], rel=1e-4)
    assert found["holds"] == (0.0 if told["verdict"] == "lost" else 1.0)

    write_at(str(run.path), 0.5, tmp_path / "half")
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.arange(3, 23)[None]
    if method == "lora":
        was, now = (load_file(path / "adapter_model.safetensors") for path in (run.path / "model", tmp_path / "half"))
        assert was.keys() == now.keys()
        for name, tensor in was.items():
            assert torch.equal(now[name], tensor * 0.5 if ".lora_B." in name else tensor), name
        half = peft.PeftModel.from_pretrained(base, tmp_path / "half")
        whole = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
        tuned = peft.PeftModel.from_pretrained(whole, run.path / "model").merge_and_unload()
    else:
        half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
        tuned = transformers.AutoModelForCausalLM.from_pretrained(run.path / "model")
    # The law: each weight is its base's, and half of what it became beyond that.
    expected = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    changed = dict(tuned.named_parameters())
    with torch.no_grad():
        for name, weight in expected.named_parameters():
            weight.add_(changed[name] - weight, alpha=0.5)
        torch.testing.assert_close(half(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-5)


def test_strength_as_a_command_writes_a_page_and_a_model(
    tiny_home: Path, small_data: Path, tiny_model: Path, guard: Path
) -> None:
    run = made(small_data, tiny_model, Path("runs/one"), **{"optim.lr": 2e-2, "eval.guard": str(guard)})
    said = CliRunner().invoke(app, ["strength", "runs/one", "-o", "strength.html"])
    assert said.exit_code == 0, said.output
    assert "the guard" in said.output
    page = Path("strength.html").read_text()
    assert page.count("<svg") == 2
    assert "http" not in page
    assert page.count("<tr>") == 6
    said = CliRunner().invoke(app, ["strength", "runs/one", "--at", "0.25", "-o", "quarter", "--json"])
    assert json.loads(said.stdout)["strength"] == 0.25
    assert json.loads(Path("quarter/strength.json").read_text())["run"] == str(run.path.resolve())
    assert headstart.load("quarter")[1] is not None
    for wrong in (["--at", "1.5", "-o", "more"], ["--at", "0.5"], ["-o", "page.txt"]):
        assert CliRunner().invoke(app, ["strength", "runs/one", *wrong]).exit_code == 2, wrong
    small_data.write_text(small_data.read_text() + "\n" + small_data.read_text().splitlines()[0])
    with pytest.raises(DataError, match="not what it was"):
        measure_strengths("runs/one")
    with pytest.raises(UsageError, match="no strength"):
        write_at("runs/one", -0.1, Path("less"))
