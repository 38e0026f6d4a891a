"""A few things on the built-in models themselves, and on real data where it is at hand."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from headstart.config import DataSettings
from headstart.data.feed import content_hash
from headstart.data.forest import build_packs
from headstart.data.formats import Named, format_rows
from headstart.data.prepare import form_rows
from headstart.data.read import Row, find_files, read
from headstart.data.render import Renderer
from headstart.data.segments import segment_rows
from headstart.demo.generate import HELD_OUT_ROWS, TRAIN_ROWS, write_data
from headstart.display import Display
from headstart.engine.forward import PackReader
from headstart.evaluate.score import score_rows
from headstart.models.load import load_model, load_tokenizer, stop_ids
from headstart.models.source import BUILT_IN, find_model
from headstart.tune import tune

pytestmark = pytest.mark.real
DEMO = Path(__file__).parents[2] / "headstart" / "demo"


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    source = find_model("smollm2-135m")
    tokenizer = load_tokenizer(source)
    return Renderer(tokenizer, stop_ids(source, tokenizer))


def test_the_demo_data_is_what_its_generator_makes(tmp_path: Path) -> None:
    write_data(tmp_path)
    rows = []
    for name in ("visits.jsonl", "visits_held_out.jsonl"):
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes()
        formed = form_rows([str(DEMO / name)], DataSettings())
        rows.append({content_hash(c) for c in formed.formatted.examples})
    assert [len(part) for part in rows] == [TRAIN_ROWS, HELD_OUT_ROWS]
    assert not rows[0] & rows[1]


def test_the_built_in_models_are_what_they_say() -> None:
    from transformers import AutoModel

    source = find_model("smollm2-135m")
    model = load_model(source, "cpu").model
    assert sum(p.numel() for p in model.parameters()) == BUILT_IN["smollm2-135m"].parameters
    encoder = AutoModel.from_pretrained(find_model("minilm").path)
    assert sum(p.numel() for p in encoder.parameters()) == BUILT_IN["minilm"].parameters
    assert not list(source.path.glob("*.gguf"))


def test_real_dialogues_are_rendered_as_the_tokenizer_itself_does(renderer: Renderer, mts_dialog: Path) -> None:
    rows = [item for item in read(find_files([str(mts_dialog / "validation.csv")])) if isinstance(item, Row)]
    with (mts_dialog / "validation.csv").open(encoding="utf-8-sig", newline="") as file:
        assert [row.fields for row in rows] == list(csv.DictReader(file))
    formatted = format_rows(rows, named=Named("As '{section_header}':\n{dialogue}", "{section_text}"))
    assert len(formatted.examples) == 100
    segmented = segment_rows(formatted.examples, renderer, max_length=8192)
    for row, item in zip(formatted.examples, segmented.examples, strict=True):
        turns = [{"role": m.role, "content": m.content} for m in row.messages]
        theirs = renderer.tokenizer.apply_chat_template(turns, return_dict=False)
        ours = item.segments[0].ids.tolist()
        assert theirs[: len(ours)] == ours
        assert ours[-1] in renderer.stop_ids


def test_real_rows_score_the_same_packed_and_one_by_one(renderer: Renderer) -> None:
    rows = form_rows([str(DEMO / "visits.jsonl")], DataSettings()).formatted.examples[:6]
    examples = segment_rows(rows, renderer, max_length=8192).examples
    model = load_model(find_model("smollm2-135m"), "cpu").model
    packed = score_rows(PackReader(model), examples, 4096)
    (pack,) = build_packs(examples, 4096)
    assert len(pack) < pack.row_tokens  # the system prompt is shared
    for number, item in enumerate(examples):
        ids = torch.from_numpy(item.segments[0].ids.astype(np.int64))[None]
        weights = torch.from_numpy(item.segments[0].weights[1:])
        model.set_attn_implementation("sdpa")
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
        alone = -(logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0] * weights).sum()
        assert packed.nll[number] == pytest.approx(float(alone), rel=1e-4)


def test_a_few_steps_on_the_built_in_model_already_prove_a_gain(tmp_path: Path) -> None:
    settings = {
        "steps": 6,
        "batch_size": 4,
        "optim.lr": 1.5e-3,
        "eval.rows": 10,
        "eval.generate": 0,
        "eval.every": 0,
        "eval.guard": "off",
        "data.held_out": 10,
    }
    with (tmp_path / "said.txt").open("w") as file:
        run = tune(DEMO / "visits.jsonl", out=tmp_path / "run", settings=settings, display=Display(file, live=False))
    assert run.result["verdict"] == "better"
    assert run.result["after"]["nll"]["high"] < run.result["before"]["nll"]["low"]
    assert run.result["tokens"]["shared_frac"] > 0.1
