"""What the house's ideas are worth, on models made in code: ratios so large that no noise of a machine hides them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from headstart.data.forest import Pack, build_packs
from headstart.data.segments import Example
from headstart.engine.engine import Engine
from headstart.engine.forward import PackReader
from headstart.models.attention import register
from headstart.objectives.tokens import nll
from tests.conftest import example

ROOT = Path(__file__).parents[2]
VOCAB = 512
ROUNDS = 3


@pytest.fixture(scope="module")
def model() -> Any:
    register()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config)


def engine_of(model: Any) -> Engine:
    return Engine(PackReader(model), dict(model.named_parameters()), nll)


def rows_of(lengths: list[int], seed: int = 0) -> list[Example]:
    chance = np.random.default_rng(seed)
    return [example(chance.integers(3, VOCAB, length).tolist()) for length in lengths]


def quickest(*works: Callable[[], float]) -> tuple[list[float], list[float]]:
    """Return the least seconds of each work over rounds in turns, and the loss of each."""
    losses = [work() for work in works]  # the first time pays for memory that is touched for the first time
    taken = [[0.0] * ROUNDS for _ in works]
    for number in range(ROUNDS):
        for times, work in zip(taken, works, strict=True):
            begun = time.perf_counter()
            work()
            times[number] = time.perf_counter() - begun
    return [min(times) for times in taken], losses


def run_packs(engine: Engine, packs: list[Pack]) -> float:
    sums = engine.forward_backward_all(packs)
    engine.discard()
    return sums.loss / sums.count


def run_padded(model: Any, rows: list[Example]) -> float:
    """Do with transformers alone what a collator and a loss over labels do: all rows as long as the longest."""
    longest = max(row.token_count for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    for place, row in zip(ids, rows, strict=True):
        place[: row.token_count] = torch.from_numpy(row.segments[0].ids.astype(np.int64))
    mask = (ids != 0).long()
    model.set_attn_implementation("sdpa")
    loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    loss.backward()
    model.zero_grad()
    return float(loss.detach())


def test_packed_rows_of_mixed_length_cost_what_their_tokens_cost(model: Any) -> None:
    rows = rows_of([512, 96, 64, 48, 40, 32, 24, 24])
    engine = engine_of(model)
    packs = engine.reader.build_packs(rows, 1024)
    padded_tokens = len(rows) * max(row.token_count for row in rows)
    assert padded_tokens / sum(map(len, packs)) > 4
    (packed_s, padded_s), losses = quickest(lambda: run_packs(engine, packs), lambda: run_padded(model, rows))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert padded_s / packed_s > 1.5


def test_eight_answers_to_a_long_prompt_cost_one_prompt(model: Any) -> None:
    chance = np.random.default_rng(0)
    prompt = chance.integers(3, VOCAB, 384).tolist()
    rows = [
        example(prompt + chance.integers(3, VOCAB, 16).tolist(), [0.0] * len(prompt) + [1.0] * 16) for _ in range(8)
    ]
    engine = engine_of(model)
    shared, unshared = build_packs(rows, 1024), build_packs(rows, 1024, share=False)
    assert sum(map(len, unshared)) / sum(map(len, shared)) > 6
    (shared_s, unshared_s), losses = quickest(lambda: run_packs(engine, shared), lambda: run_packs(engine, unshared))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert unshared_s / shared_s > 2


HEAD = """
import gc, sys
import psutil
import torch
from bench.contenders.common import peak_bytes
from headstart.models.head import Head
torch.set_num_threads(1)
torch.manual_seed(0)
T, D, V = 2048, 32, 49152
module = torch.nn.Linear(D, V, bias=False)
hidden = torch.randn(T, D, requires_grad=True)
ids = torch.randint(V, (T,))
gc.collect()
before = psutil.Process().memory_info().rss
if sys.argv[1] == "chunks":
    loss = -Head(module).logprobs(hidden, torch.arange(T), ids).sum()
else:
    loss = torch.nn.functional.cross_entropy(module(hidden), ids, reduction="sum")
loss.backward()
print(peak_bytes() - before, float(loss.detach()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak begins at what the parent had")
def test_the_head_in_chunks_never_holds_the_logits_of_all_tokens() -> None:
    grown, losses = {}, {}
    for how in ("chunks", "dense"):
        done = subprocess.run([sys.executable, "-c", HEAD, how], cwd=ROOT, capture_output=True, text=True, check=True)
        size, loss = done.stdout.split()
        grown[how], losses[how] = int(size), float(loss)
    logits_bytes = 2048 * 49152 * 4
    assert losses["chunks"] == pytest.approx(losses["dense"], rel=1e-4)
    assert grown["dense"] > 2 * logits_bytes  # the logits, and their gradient
    assert grown["chunks"] < logits_bytes
    assert grown["dense"] / grown["chunks"] > 4
