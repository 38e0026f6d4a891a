"""Layers of encoders, fused = plain: outputs, every gradient, and where something is dropped out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from headstart.engine.engine import Engine
from headstart.engine.forward import LabelReader
from headstart.models.adapt import Lora, adapt
from headstart.models.attention import register
from headstart.models.fast import slow_down
from headstart.models.layers import PostNormLayer
from headstart.objectives.labels import cross_entropy
from tests.laws.test_labels import _ENCODER, _LABELS, rows

_DISTIL = {"vocab_size": 97, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}
ENCODERS: dict[str, Any] = {
    "bert": lambda: transformers.BertConfig(**_ENCODER, **_LABELS),
    "bert-relu": lambda: transformers.BertConfig(**_ENCODER, **_LABELS, hidden_act="relu"),
    "bert-gelu_new": lambda: transformers.BertConfig(**_ENCODER, **_LABELS, hidden_act="gelu_new"),
    "electra": lambda: transformers.ElectraConfig(**_ENCODER, **_LABELS, embedding_size=24),
    "roberta": lambda: transformers.RobertaConfig(**_ENCODER, **_LABELS),
    "distilbert": lambda: transformers.DistilBertConfig(**_DISTIL, **_LABELS, pad_token_id=0),
}


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def encoder(name: str, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(ENCODERS[name]())
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.double()


def step(reader: LabelReader, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the gradients and the loss of rows in packs."""
    engine = Engine(reader, parameters, cross_entropy)
    engine.discard()
    total = sum(engine.forward_backward(pack).loss for pack in reader.build_packs(rows(), 40))
    found = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    return {"loss": torch.tensor(total, dtype=torch.float64), **found}


@pytest.mark.parametrize("lora", [None, Lora(4, 8.0, 0.0, ("all-linear",))], ids=["full", "lora"])
@pytest.mark.parametrize("name", list(ENCODERS))
def test_fused_encoders_equal_plain_ones(name: str, lora: Lora | None) -> None:
    adapted = adapt(encoder(name), lora, seed=1, task=None)
    parameters = adapted.trainable()
    with torch.no_grad():
        for key, parameter in parameters.items():
            if "lora_B" in key:  # at its start an adapter adds nothing, and hides what is wrong
                parameter.normal_(0, 0.1)
    adapted.model.double()
    reader = LabelReader(adapted.model)
    plain = step(reader, parameters)
    assert reader.speed_up().layers == 2
    fused = step(reader, parameters)
    slow_down(reader.model)
    again = step(reader, parameters)
    assert fused.keys() == plain.keys()
    for key, wanted in plain.items():
        largest = wanted.abs().max().clamp_min(1e-9)
        assert float((fused[key] - wanted).abs().max() / largest) < 1e-7, key
        assert float((again[key] - wanted).abs().max() / largest) < 1e-12, key


@pytest.mark.parametrize("lora", [None, Lora(4, 8.0, 0.0, ("all-linear",))], ids=["full", "lora"])
def test_fused_encoders_train_as_plain_ones_over_several_steps(lora: Lora | None) -> None:
    trained = []
    for fast in (False, True):
        adapted = adapt(encoder("bert"), lora, seed=1, task=None)
        adapted.model.double()
        reader = LabelReader(adapted.model)
        if fast:
            reader.speed_up()
        engine = Engine(reader, adapted.trainable(), cross_entropy)
        for _ in range(5):
            engine.forward_backward_all(reader.build_packs(rows(), 40))
            engine.optim_step(1e-2)
        trained.append({name: p.detach().clone() for name, p in adapted.trainable().items()})
    for name, plain in trained[0].items():
        torch.testing.assert_close(trained[1][name], plain, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_each_dropout_stands_where_the_plain_layer_has_it(name: str) -> None:
    """One at a time drops everything, so that there is no chance in what comes out."""
    model, plain = encoder(name, dropout=0.1), encoder(name, dropout=0.1)
    reader, other = LabelReader(model), LabelReader(plain)
    assert reader.speed_up().layers == 2
    (pack,) = reader.build_packs(rows(), 1000)
    ours, theirs = ([m for m in net.modules() if isinstance(m, nn.Dropout)] for net in (model, plain))
    assert [m.p for m in ours] == [0.1] * len(ours)
    reader.train()
    other.train()
    differ = 0
    untouched = other.forward(pack)
    for number in range(len(ours)):
        for modules in (ours, theirs):
            for place, module in enumerate(modules):
                module.p = float(place == number)
        reader.train()
        other.train()
        given = other.outputs(pack)
        torch.testing.assert_close(reader.outputs(pack), given, rtol=1e-7, atol=1e-9)
        differ += not torch.allclose(given, untouched)
    assert differ >= 2 * (2 if name == "distilbert" else 3)


def test_a_layer_that_drops_out_where_none_is_known_stays_plain() -> None:
    model = encoder("bert", dropout=0.1)
    layer = model.bert.encoder.layer[0]
    strange = nn.Dropout(0.1)
    layer.strange = strange
    whole = layer.forward
    layer.forward = lambda x, *args, **kwargs: strange(whole(x, *args, **kwargs))
    assert LabelReader(model).speed_up().layers == 1


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu_10", "mish"])
def test_an_activation_that_is_none_of_the_known_ones_is_not_taken_for_one(activation: str) -> None:
    """With small weights they all give nearly the same."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**_ENCODER, **_LABELS, hidden_act=activation)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    assert LabelReader(model).speed_up().layers == 0


def test_the_last_layer_computes_what_the_head_reads() -> None:
    model = encoder("bert")
    reader = LabelReader(model)
    reader.speed_up()
    first, last = (layer.forward for layer in model.bert.encoder.layer)
    assert isinstance(first, PostNormLayer)
    assert isinstance(last, PostNormLayer)
    assert (first.last, last.last) == (False, True)
    (pack,) = reader.build_packs(rows(), 1000)
    widths = []
    model.bert.encoder.layer[1].register_forward_hook(lambda *call: widths.append(call[2].shape[1]))
    reader.forward(pack)
    assert widths == [len(rows())]
