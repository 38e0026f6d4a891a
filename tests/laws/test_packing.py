"""Packed = one by one, shared prefix = unshared, any split into packs gives the step's gradient: loss and every gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from headstart.data.forest import build_packs
from headstart.data.segments import Example
from headstart.engine.engine import Engine
from headstart.engine.forward import PackReader
from headstart.evaluate.generate import generate
from headstart.models.attention import Forest, can_pack, forest_attention, register
from headstart.objectives.tokens import nll
from tests.conftest import example
from tests.twins import CONFIGS, PACKED, VOCAB, twin

# transformers computes norms and rotary embeddings in float32 whatever the model's own type, which sets the limit here.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}

Grads = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def rows(seed: int = 0) -> list[Example]:
    """Return rows that share prefixes three levels deep, some alike from the first token to the last."""
    chance = np.random.default_rng(seed)
    a, b, c = (chance.integers(3, VOCAB, 16).tolist() for _ in range(3))
    made = []
    for prefix in (a, a + b, a + b + c, a + b + c, a + b, [], []):
        ids = prefix + chance.integers(3, VOCAB, int(chance.integers(3, 20))).tolist()
        weights = [0.0] + [float(chance.random() < 0.7) * (1 + float(chance.random())) for _ in ids[1:]]
        made.append(example(ids, weights))
    return [*made, made[2]]


def plain(model: Any, examples: Sequence[Example]) -> tuple[float, Grads]:
    """Return the loss sum and the gradients of rows run one by one through transformers alone."""
    model.set_attn_implementation("eager")
    model.zero_grad()
    total = 0.0
    for row in examples:
        for segment in row.segments:
            ids = torch.from_numpy(segment.ids.astype(np.int64))
            logprobs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            picked = logprobs[:-1].gather(1, ids[1:, None])[:, 0]
            loss = -(picked * torch.from_numpy(segment.weights[1:])).sum()
            loss.backward()
            total += float(loss.detach())
    return total, grads(model)


def packed(model: Any, examples: Sequence[Example], **how: Any) -> tuple[float, Grads]:
    """Return the same from our packs."""
    reader = PackReader(model)
    engine = Engine(reader, dict(model.named_parameters()), nll)
    model.zero_grad()
    how = {"tokens_per_pack": 10_000, **how}
    total = sum(engine.forward_backward(pack).loss for pack in build_packs(examples, **how))
    return total, grads(model)


def grads(model: Any) -> Grads:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: tuple[float, Grads], theirs: tuple[float, Grads], tolerance: float) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        error = (ours[1][name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert error < tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", PACKED)
def test_packed_equals_one_by_one(name: str, dtype: torch.dtype) -> None:
    model = twin(name, dtype)
    assert can_pack(model)
    assert_same(packed(model, rows()), plain(model, rows()), TOLERANCE[dtype])


@pytest.mark.parametrize(
    "how", [{"share": False}, {"tokens_per_pack": 60}, {"tokens_per_pack": 1}, {"one_row": True}], ids=str
)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_any_split_into_packs_gives_the_same_gradient(name: str, how: dict[str, Any]) -> None:
    model = twin(name)
    # 1e-9: the same arithmetic in another order; well under what transformers' own float32 parts cost above.
    assert_same(packed(model, rows(), **how), packed(model, rows()), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_in_mixed_precision_the_gradient_is_that_of_full_precision(name: str, dtype: torch.dtype) -> None:
    """Rotary embeddings leave the queries and keys of float32 weights wider than the values."""
    model = twin(name, dtype)
    (pack,) = build_packs(rows(), 10_000)
    ours = Engine(PackReader(model, bfloat16=True), dict(model.named_parameters()), nll).forward_backward(pack)
    whole = twin(name, torch.float32)
    theirs = packed(whole, rows())
    assert ours.loss == pytest.approx(theirs[0], rel=1e-2)
    found = torch.cat([gradient.flatten().float() for gradient in grads(model).values()])
    wanted = torch.cat([gradient.flatten() for gradient in theirs[1].values()])
    assert (found - wanted).norm() < 0.1 * wanted.norm()


def test_shared_prefixes_are_computed_once() -> None:
    packs = build_packs(rows(), 10_000)
    unshared = build_packs(rows(), 10_000, share=False)
    # Three blocks of 16 tokens that 6, 5 and 3 rows open with, and one row that stands twice.
    longest = max(len(row.segments[0]) for row in rows()[2:3])
    assert len(unshared[0]) - len(packs[0]) >= 16 * (5 + 4 + 2) + (longest - 48) // 8 * 8 - 16
    assert sum(pack.row_tokens for pack in packs) == sum(row.token_count for row in rows())


def test_order_of_rows_does_not_change_the_gradient() -> None:
    model = twin("qwen3")
    assert_same(packed(model, rows()[::-1]), packed(model, rows()), 1e-6)


def test_an_architecture_that_ignores_the_forest_is_found_out_and_trains_one_row_at_a_time() -> None:
    model = twin("falcon")
    assert not can_pack(model)
    assert_same(packed(model, rows(), one_row=True), plain(model, rows()), 1e-6)


@pytest.mark.parametrize("broken", ["sees_all", "forgets_ancestors"])
def test_wrong_attention_is_found_out(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def sees_all(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, forest: Forest, **rest: Any) -> Any:
        return forest_attention(
            module, q, k, v, mask, forest=Forest([q.shape[2]], [-1], torch.arange(q.shape[2])), **rest
        )

    def forgets_ancestors(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, forest: Forest, **rest: Any
    ) -> Any:
        lengths = forest.nodes.length
        roots = Forest(lengths, [-1] * len(lengths), torch.arange(q.shape[2]))
        return forest_attention(module, q, k, v, mask, forest=roots, **rest)

    broken_attention: Callable[..., Any] = {"sees_all": sees_all, "forgets_ancestors": forgets_ancestors}[broken]
    model = twin("llama")
    from transformers import AttentionInterface

    from headstart.models.attention import IMPLEMENTATION

    monkeypatch.setitem(AttentionInterface._global_mapping, IMPLEMENTATION, broken_attention)
    assert not can_pack(model)


def test_every_architecture_of_the_law_is_there() -> None:
    wanted = [
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma2",
        "gemma3",
        "phi3",
        "olmo2",
        "smollm3",
        "granite",
        "cohere",
        "gpt2",
        "gpt_neox",
    ]
    assert set(wanted) <= set(CONFIGS)


def test_a_window_that_stands_in_the_mask_alone_is_noticed() -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "sliding_window": 20}
    config = transformers.PhimoeConfig(**shape, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    assert not can_pack(transformers.PhimoeForCausalLM(config))


def test_answers_stay_within_the_positions_of_the_model() -> None:
    model = twin("gpt2", torch.float32)  # 256 learned positions: one more is an error
    prompts = [[5] * 250, [6] * 3]
    answers = generate(model, prompts, (96,), [40, 8], length=256)
    assert [len(answer.ids) for answer in answers] == [6, 8]
    alone = [
        generate(model, [prompt], (96,), [limit], length=256)[0] for prompt, limit in zip(prompts, (40, 8), strict=True)
    ]
    assert alone == answers
