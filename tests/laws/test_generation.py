"""The laws of answering: each prompt is answered as transformers answers it alone, whatever else is in flight."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from headstart.data.prefixes import build_prefixes
from headstart.evaluate import generate as generation
from headstart.evaluate.generate import Answer, generate
from headstart.models.adapt import Lora, adapt
from headstart.models.attention import register, use_attention
from headstart.models.decode import Cache, Row
from headstart.models.fast import speed_up
from tests.twins import PACKED, VOCAB, twin

STOPS = (5, 6)
LENGTH = 256


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def asked(seed: int = 0) -> tuple[list[list[int]], list[int]]:
    """Return prompts of mixed length, and their limits.

    Seven begin with the same 70 tokens and four with 90 more: both longer than the twins' windows of six. One stands twice, one is the beginning of another, one leaves little room.
    """
    chance = random.Random(seed)

    def some(count: int) -> list[int]:
        return [chance.randrange(3, VOCAB) for _ in range(count)]

    a, b = some(70), some(90)
    prompts = [a + some(n) for n in (3, 17, 30)] + [a + b + some(n) for n in (2, 5, 9, 14)]
    prompts += [prompts[1], prompts[2][:-1], *map(some, (1, 2, 60, 250))]
    return prompts, [chance.randrange(8, 24) for _ in prompts]


def alone(model: Any, prompt: Sequence[int], limit: int, stops: Sequence[int] = STOPS) -> Answer:
    """Return the answer of transformers' own greedy search to a prompt by itself, with its log-probabilities."""
    use_attention(model, packed=False)
    config = transformers.GenerationConfig(
        max_new_tokens=min(limit, LENGTH - len(prompt)),
        eos_token_id=list(stops),
        pad_token_id=stops[0],
        output_logits=True,
        return_dict_in_generate=True,
    )
    ids = torch.tensor([prompt])
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    new = output.sequences[0, len(prompt) :].tolist()
    logprobs = [float(step[0].double().log_softmax(-1)[id_]) for step, id_ in zip(output.logits, new, strict=True)]
    end = next((place for place, id_ in enumerate(new) if id_ in stops), len(new))
    return Answer(new[:end], end < len(new), logprobs[:end])


def test_what_is_drawn_follows_from_the_numbers_of_each_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = twin("llama").eval()
    prompts, limits = asked()
    draws = np.random.default_rng(0).random((len(prompts), max(limits)))
    together = generate(model, prompts, STOPS, limits, LENGTH, draws=draws)
    assert len({tuple(answer.ids[:3]) for answer in together}) > 8  # no two are the same because their numbers are
    few = generate(model, prompts[4:6], STOPS, limits[4:6], LENGTH, draws=draws[4:6])
    assert_same(few, together[4:6])
    monkeypatch.setattr(generation, "_find_head", lambda *_: None)
    padded = generate(model, prompts, STOPS, limits, LENGTH, draws=draws)  # through transformers' own generate
    assert padded == together
    assert [answer.stop for answer in padded] == [answer.stop for answer in together]


def assert_same(ours: Sequence[Answer], theirs: Sequence[Answer]) -> None:
    assert list(ours) == list(theirs)
    for mine, its in zip(ours, theirs, strict=True):
        # transformers hands out logits in float32.
        assert mine.logprobs == pytest.approx(its.logprobs, abs=1e-4)


@pytest.mark.parametrize("name", PACKED)
def test_each_prompt_is_answered_as_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = twin(name).eval()
    prompts, limits = asked()
    # Stop at what two rows say before their limits.
    stops = [alone(model, prompts[number], 8, (VOCAB,)).ids[place] for number, place in ((0, 3), (5, 5))]
    theirs = [alone(model, prompt, limit, stops) for prompt, limit in zip(prompts, limits, strict=True)]
    assert {answer.stopped for answer in theirs} == {True, False}
    assert len({len(answer.ids) for answer in theirs}) > 4
    # All at once; a few at a time, so that rows come in while others are in flight; one after the other. Prefixes kept
    # once, and copied into each row.
    for tokens, keep_once in ((None, 200), (500, 200), (500, 1 << 30), (1, 200)):
        monkeypatch.setattr(generation, "KEEP_ONCE", keep_once)
        assert_same(generate(model, prompts, stops, limits, LENGTH, tokens_at_once=tokens), theirs)


def test_an_answer_does_not_depend_on_what_else_is_in_flight() -> None:
    model = twin("gemma2").eval()
    prompts, limits = asked()
    together = generate(model, prompts, STOPS, limits, LENGTH)
    for number in (0, 5, 11):
        (single,) = generate(model, [prompts[number]], STOPS, [limits[number]], LENGTH)
        assert single == together[number]
        # What transformers computes in float32 whatever the model's type sets the limit.
        assert single.logprobs == pytest.approx(together[number].logprobs, abs=1e-5)


def test_unmerged_adapters_answer_as_they_are() -> None:
    model = twin("llama")
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, lora)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter) * 0.3
    base = adapted.get_base_model().eval()
    prompts, limits = asked()
    theirs = [alone(base, prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    with adapted.disable_adapter():
        assert generate(base, prompts, STOPS, limits, LENGTH) != theirs
    assert_same(generate(base, prompts, STOPS, limits, LENGTH), theirs)


def test_shared_prefixes_are_read_once_and_no_padding_is() -> None:
    model = twin("llama").eval()
    prompts, limits = asked()
    generate(model, prompts, STOPS, limits, LENGTH)
    read: list[int] = []
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _, args, __: read.append(args[0].numel()))
    cost = _tokens_of_trials(model, read)
    answers = generate(model, prompts, STOPS, limits, LENGTH)
    hook.remove()
    shared = sum((node.end - node.begin) * (len(node.prompts) - 1) for node in build_prefixes(prompts).nodes)
    assert shared >= 70 * (9 - 1) + 90 * (4 - 1)
    # The last new token of a row, its stop token too, is not read.
    new = sum(len(answer.ids) - (not answer.stopped) for answer in answers)
    assert sum(read) == cost + sum(map(len, prompts)) - shared + new


def _tokens_of_trials(model: Any, read: list[int]) -> int:
    """Return how many tokens it takes to find out how a model can be read."""
    assert generation._find_head(model, LENGTH) is not None
    generation.tokens_kept(model)
    cost = sum(read)
    read.clear()
    return cost


def test_what_is_kept_stays_within_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[tuple[int, int]] = []

    class Watched(Cache):
        def read(self, new: Sequence[Row]) -> torch.Tensor:
            hidden = super().read(new)
            kept.append((self.tokens_with([]), len(self.rows)))
            return hidden

    monkeypatch.setattr(generation, "Cache", Watched)
    prompts, limits = asked()
    generate(twin("llama").eval(), prompts, STOPS, limits, LENGTH, tokens_at_once=500)
    assert max(rows for _, rows in kept) > 2
    assert all(tokens <= 500 or rows == 1 for tokens, rows in kept)


def test_an_architecture_that_can_not_be_packed_is_answered_by_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "Cache", None)
    model = twin("falcon").eval()
    prompts, limits = asked()
    theirs = [alone(model, prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    assert generate(model, prompts, STOPS, limits, LENGTH) == theirs


def test_rows_are_not_mixed_where_a_long_one_turns_the_positions_of_all() -> None:
    half = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = twin("phi3").config
    config.rope_parameters = {"rope_type": "longrope", "rope_theta": 10000.0, **half}
    config.original_max_position_embeddings = 32
    config.rope_parameters["original_max_position_embeddings"] = 32
    model = transformers.Phi3ForCausalLM(config).eval()
    assert generation._find_head(model, 32) is not None
    assert generation._find_head(model, 33) is None


def test_nothing_asked_is_nothing_answered() -> None:
    assert generate(twin("llama").eval(), [], STOPS, [], LENGTH) == []


@pytest.mark.parametrize("lora", [None, Lora(4, 8, 0.0, ("all-linear",))], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma2", "granite"])
def test_fused_layers_answer_as_plain_ones(name: str, lora: Lora | None) -> None:
    adapted = adapt(twin(name), lora, seed=1)
    with torch.no_grad():
        for key, parameter in adapted.trainable().items():
            if "lora_B" in key:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    model = adapted.model.double()
    chance = np.random.default_rng(0)
    prompts = [[5] * 20 + chance.integers(3, VOCAB, int(n)).tolist() for n in (3, 9, 30, 1)]
    plain = generate(model, prompts, (), [12] * 4, length=256)
    assert speed_up(model).layers == 2
    assert generate(model, prompts, (), [12] * 4, length=256) == plain
