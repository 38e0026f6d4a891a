"""Answers out of a set: each is weighed as the plain model weighs it in its row, whatever template stands around it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headstart.data.labels import find_choices
from headstart.data.read import Where
from headstart.data.records import Conversation, Message
from headstart.data.segments import segment_rows
from headstart.engine.forward import PackReader
from headstart.evaluate.choices import weigh_choices
from headstart.models.attention import register, use_attention
from tests.laws.test_rendering import renderer
from tests.tokens import KINDS

CHOICES = ("the plan", "throat", "a sore throat", "7 !")


def row(number: int, answer: str) -> Conversation:
    asked = Message("user", f"A question {number}, what is the answer?")
    return Conversation(Where("f", number), (asked, Message("assistant", answer, trained=True)))


@pytest.mark.parametrize("name", list(KINDS))
def test_choices_are_weighed_as_the_plain_model_weighs_them(name: str) -> None:
    register()
    own = renderer(name)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(own.tokenizer), **shape)).double()
    rows = [row(number, CHOICES[number % 4]) for number in range(3)]
    examples = segment_rows(rows, own, max_length=500).examples
    found = weigh_choices(PackReader(model), own, rows, examples, CHOICES, 300)
    use_attention(model, packed=False)
    for number in range(3):
        weighed = []
        for choice in CHOICES:
            segment = segment_rows([row(number, choice)], own, max_length=500).examples[0].segments[-1]
            ids = torch.from_numpy(segment.ids.astype(np.int64))[None]
            with torch.no_grad():
                logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
            picked = logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0]
            weighed.append(float((picked * torch.from_numpy(segment.weights[1:])).sum()))
        assert found[number] == pytest.approx(np.exp(weighed) / np.exp(weighed).sum(), rel=1e-6)


def test_answers_are_choices_where_a_few_stand_again_and_again() -> None:
    rows = [row(number, CHOICES[number % 4]) for number in range(16)]
    assert find_choices(rows) == tuple(sorted(CHOICES))
    assert find_choices(rows[:15]) == ()  # fewer than four rows an answer
    assert find_choices([row(number, "same") for number in range(9)]) == ()
    assert find_choices([row(number, "x" * 101 if number % 2 else "y") for number in range(9)]) == ()
