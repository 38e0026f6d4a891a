"""Classifiers: packed = the plain model row by row, values and gradients, for decoders and encoders; the result reloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sklearn.metrics import f1_score

from headstart.data.read import Where
from headstart.data.segments import Example, Segment
from headstart.engine.engine import Engine
from headstart.engine.forward import LabelReader
from headstart.evaluate.compare import ClassMetric
from headstart.evaluate.score import classify_rows, score_rows
from headstart.models.adapt import Lora, adapt
from headstart.models.attention import register, use_attention
from headstart.models.save import save_result
from headstart.objectives.labels import cross_entropy
from tests.tokens import make_tokenizer
from tests.twins import _SMALL

CLASSES = 5
_ENCODER = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_LABELS = {"num_labels": CLASSES}
TWINS: dict[str, tuple[Any, str]] = {
    "llama": (lambda: transformers.LlamaConfig(**_SMALL, **_LABELS), "forest"),
    "qwen2": (lambda: transformers.Qwen2Config(**_SMALL, **_LABELS), "forest"),
    "mistral": (lambda: transformers.MistralConfig(**_SMALL, **_LABELS, sliding_window=6), "forest"),
    "bert": (lambda: transformers.BertConfig(**_ENCODER, **_LABELS), "roots"),
    "electra": (lambda: transformers.ElectraConfig(**_ENCODER, **_LABELS, embedding_size=32), "roots"),
    "roberta": (lambda: transformers.RobertaConfig(**_ENCODER, **_LABELS), "roots"),
    "modernbert": (
        lambda: transformers.ModernBertConfig(**_ENCODER, **_LABELS, local_attention=4, cls_token_id=1, sep_token_id=2),
        "none",
    ),
}


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def twin(name: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    config = TWINS[name][0]()
    for key in list(vars(config)):  # dropout would make two passes differ
        if "dropout" in key and isinstance(getattr(config, key), float):
            setattr(config, key, 0.0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def rows() -> list[Example]:
    """Return rows of which some share their first tokens, as labelled prompts do."""
    chance = np.random.default_rng(0)
    shared = chance.integers(3, 97, 16)
    found = []
    for line in range(9):
        ids = np.concatenate([shared[: 8 * (line % 3)], chance.integers(3, 97, 2 + line)]).astype(np.int32)
        found.append(Example(Where("f", line), (Segment(ids, np.zeros(len(ids), np.float32)),), label=line % CLASSES))
    return found


@pytest.mark.parametrize("name", list(TWINS))
def test_packed_is_the_plain_model_row_by_row(name: str) -> None:
    model = twin(name)
    reader = LabelReader(model)
    assert reader.packing == TWINS[name][1]
    engine = Engine(reader, dict(model.named_parameters()), cross_entropy)
    packs = reader.build_packs(rows(), 60)
    assert (len(packs) < len(rows())) == reader.packs
    total = sum(engine.forward_backward(pack).loss for pack in packs)
    ours = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    found = classify_rows(reader, rows(), 60)
    losses = score_rows(reader, rows(), 60)
    model.zero_grad()
    use_attention(model, packed=False)
    model.eval()
    theirs = 0.0
    for number, row in enumerate(rows()):
        ids = torch.from_numpy(row.segments[0].ids.astype(np.int64))[None]
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([row.label]))
        output.loss.backward()
        theirs += float(output.loss.detach())
        assert found[number] == pytest.approx(output.logits[0].softmax(-1).detach().numpy(), abs=1e-6)
        assert losses.nll[number] == pytest.approx(float(output.loss.detach()), rel=1e-5)
    assert total == pytest.approx(theirs, rel=1e-6)
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            error = (ours[key] - parameter.grad).abs().max() / parameter.grad.abs().max().clamp_min(1e-9)
            assert float(error) < 1e-5, key


def test_a_label_that_is_unknown_weighs_nothing() -> None:
    reader = LabelReader(twin("bert"))
    known = rows()
    strange = Example(Where("f", 99), known[0].segments, label=-1)
    scores = score_rows(reader, [*known, strange], 60)
    assert scores.targets.tolist() == [1.0] * len(known) + [0.0]
    assert scores.mean == pytest.approx(score_rows(reader, known, 60).mean)


@pytest.mark.parametrize("lora", [None, Lora(4, 8.0, 0.0, ("all-linear",))], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_what_is_saved_is_loaded_by_plain_transformers(name: str, lora: Lora | None, tmp_path: Path) -> None:
    model = twin(name, torch.float32)
    names = {number: f"class {number}" for number in range(CLASSES)}
    model.config.id2label, model.config.label2id = names, {value: key for key, value in names.items()}
    adapted = adapt(model, lora, 0, task=None)
    reader = LabelReader(adapted.model)
    engine = Engine(reader, adapted.trainable(), cross_entropy)
    for pack in reader.build_packs(rows(), 1000):
        engine.forward_backward(pack)
    engine.optim_step(1e-2)
    found = classify_rows(reader, rows(), 1000)
    save_result(adapted.saved, make_tokenizer("chatml"), (), tmp_path / "model")
    assert classify_rows(reader, rows(), 1000) == pytest.approx(found)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert loaded.config.id2label == names
    for number, row in enumerate(rows()):
        ids = torch.from_numpy(row.segments[0].ids.astype(np.int64))[None]
        with torch.no_grad():
            again = loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].softmax(-1).numpy()
        assert again == pytest.approx(found[number], abs=1e-4)


def test_macro_f1_is_that_of_scikit_learn() -> None:
    chance = np.random.default_rng(3)
    for classes in (2, 7, 20):
        truth, found = chance.integers(0, classes, (2, 50))
        metric = ClassMetric.of([str(t) for t in truth], [str(f) for f in found])
        draws = chance.integers(0, 50, (20, 50))
        theirs = [f1_score(truth[draw], found[draw], average="macro", zero_division=0) for draw in draws]
        assert metric.over(draws) == pytest.approx(np.array(theirs))
