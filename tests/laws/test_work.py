"""Needed operations = those that torch counts, without what is made anew or masked away."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from headstart.data.forest import Pack, build_packs
from headstart.data.read import Where
from headstart.data.segments import Example, Segment
from headstart.engine.engine import Engine
from headstart.engine.forward import LabelReader, PackReader
from headstart.engine.work import best_rate, pairs, probe_pack, read_shape
from headstart.models import native
from headstart.models.adapt import Lora, adapt
from headstart.models.attention import register
from headstart.models.blocks import Nodes
from headstart.objectives.labels import class_losses, summed
from headstart.objectives.tokens import nll
from tests.conftest import example
from tests.twins import VOCAB, twin

PREFIX = [5, 9, 11, 3, 8, 20, 31, 7, 12, 13, 14, 15, 16, 17, 18, 19]


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def rows() -> list[Example]:
    """Rows of which some share a prefix, and of whose tokens a half are targets."""
    tails = [list(range(20 + n, 32 + 3 * n)) for n in range(4)]
    return [example(PREFIX + t, [0.0] * 20 + [1.0] * (len(t) - 4), line=n) for n, t in enumerate(tails)]


def brute_force_pairs(pack: Pack, window: int) -> int:
    nodes = Nodes.of(pack.length, pack.parent, pack.positions)
    paths = [set(nodes.path(node)) for node in range(len(pack.length))]
    distance = pack.positions[:, None] - pack.positions[None, :]
    seen = np.array([[other in paths[owner] for other in nodes.owner] for owner in nodes.owner]) & (distance >= 0)
    return int((seen & (distance < window) if window else seen).sum())


@pytest.mark.parametrize("window", [0, 6])
def test_pairs_are_those_that_the_masks_let_through(window: int) -> None:
    (pack,) = build_packs(rows(), 1000)
    assert len(pack.length) > len(rows())  # a prefix is shared
    assert pairs(pack, window) == brute_force_pairs(pack, window)


@pytest.mark.parametrize("method", ["full", "lora", "lora on o_proj", "lora on down_proj"])
def test_a_causal_step_needs_what_torch_counts(method: str) -> None:
    targets = (method.removeprefix("lora on "),) if " on " in method else ("all-linear",)
    adapted = adapt(twin("llama"), None if method == "full" else Lora(4, 8, 0.0, targets), seed=0)
    engine = Engine(PackReader(adapted.model), adapted.trainable(), nll)
    # A row by itself through transformers' own layers: all of its products are those that torch knows to count.
    engine.reader.packing = "none"
    (pack,) = build_packs(rows()[3:], 1000)
    shape = read_shape(engine.reader, probe_pack(engine.reader, rows()))
    assert shape is not None
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        engine.forward_backward(pack)
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    # Logits that the backward pass of a trained head makes anew are counted and not needed.
    again = 2 * len(pack.sources) * 32 * VOCAB if method == "full" else 0
    attention = sum(layer.per_pair for layer in shape.attention) * pairs(pack)
    assert shape.operations(pack) - attention == counts["aten.mm"] + counts.get("aten.addmm", 0) - again
    assert sum(layer.per_pair for layer in shape.attention) * len(pack) ** 2 == counts["aten.bmm"]


def test_an_encoder_with_a_head_needs_all_that_torch_counts() -> None:
    small = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.BertConfig(**small, num_attention_heads=4, num_labels=5)
    model = transformers.BertForSequenceClassification(config)
    engine = Engine(LabelReader(model), dict(model.named_parameters()), summed(class_losses, None))
    made = [Segment(np.arange(3, 13 + 4 * n, dtype=np.int32), np.zeros(10 + 4 * n, np.float32)) for n in range(3)]
    labelled = [Example(Where("rows", n), (segment,), label=n) for n, segment in enumerate(made)]
    engine.reader.packing = "none"
    (pack,) = engine.reader.build_packs(labelled[2:], 1000)
    shape = read_shape(engine.reader, probe_pack(engine.reader, labelled))
    assert shape is not None
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        engine.forward_backward(pack)
    assert shape.operations(pack) == counter.get_total_flops()


@pytest.mark.parametrize("targets", ["all", 130, 6])
def test_long_rows_are_looked_at_cut_down(targets: Any) -> None:
    reader = PackReader(twin("llama"))
    tails = [[3 + n % 60 for n in range(length)] for length in (400, 430)]
    long = [
        example(PREFIX + t, None if targets == "all" else [0.0] * (len(t) + 16 - targets) + [1.0] * targets)
        for t in tails
    ]
    pack = probe_pack(reader, long)
    assert len(pack) < 80
    assert len({1, len(pack), len(pack.sources), len(pack.begins)}) == 4
    short, whole = read_shape(reader, pack), read_shape(reader, reader.build_packs(long, 10_000)[0])
    assert short is not None
    assert whole is not None
    assert short.products == whole.products


def test_a_rate_is_that_of_a_product_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = PackReader(twin("llama", torch.float32))
    shape = read_shape(reader, probe_pack(reader, rows()))
    assert shape is not None
    asked = []
    monkeypatch.setattr(native, "find", lambda: asked.append(1))
    for fast in (False, True):
        assert 1e6 < best_rate(shape, 256, torch.float32, "cpu", fast=fast) < 1e15
        assert bool(asked) is fast  # without fast layers the kernels aren't even compiled
