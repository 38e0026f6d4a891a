"""Reward models: packed = transformers on each answer alone, loss and gradients; what is saved gives the same scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from headstart.data.encode import Encoder
from headstart.data.forest import build_packs
from headstart.data.labels import REWARD
from headstart.data.preferences import label_of, segment_preferences
from headstart.data.read import Where
from headstart.data.records import Message, Preference
from headstart.data.render import Renderer
from headstart.data.segments import Example, Segment
from headstart.engine.engine import Engine
from headstart.engine.forward import RewardReader
from headstart.evaluate.score import score_answers, score_rows
from headstart.models.adapt import Lora, adapt
from headstart.models.attention import register, use_attention
from headstart.models.load import pad_aside
from headstart.models.save import save_result
from headstart.objectives.preference import Terms, preference_losses, preference_objective
from tests.laws.test_packing import assert_same, grads
from tests.tokens import make_tokenizer
from tests.twins import CONFIGS, VOCAB

LOSSES = preference_losses(Terms("reward"))


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def twin(name: str, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    torch.manual_seed(0)
    config = CONFIGS[name]()
    for key, value in {"num_labels": 1, "pad_token_id": 0, **more}.items():
        setattr(config, key, value)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def rows(answers: int = 2, count: int = 5, margin: float = 0.0) -> list[Example]:
    """Return rows whose answers share more than their prompt."""
    chance = np.random.default_rng(0)
    made = []
    for line in range(count):
        prompt = chance.integers(3, VOCAB, 17 + 7 * (line % 3))
        segments = []
        for _ in range(answers):
            ids = np.concatenate([prompt, chance.integers(3, VOCAB, chance.integers(2, 9))]).astype(np.int32)
            segments.append(Segment(ids, np.zeros(len(ids), np.float32)))
        scores = chance.permutation(answers).astype(np.float64)
        made.append(Example(Where("rows", line), tuple(segments), label=label_of(scores.tolist(), margin)))
    return made


def theirs(model: Any, segment: Segment) -> Tensor:
    """Return what transformers gives for an answer alone."""
    use_attention(model, packed=False)
    ids = torch.from_numpy(segment.ids.astype(np.int64))[None]
    reward: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0]
    return reward


def one_by_one(model: Any, examples: list[Example], margin: float) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients as the papers have them: the mean over the pairs of a prompt, summed over prompts."""
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for example in examples:
        rewards, scores = [theirs(model, s) for s in example.segments], np.asarray(example.label)[:, 0]
        pairs = [(a, b) for a in range(len(scores)) for b in range(len(scores)) if scores[a] > scores[b]]
        assert len(pairs) == len(scores) * (len(scores) - 1) / 2
        leads = torch.stack([rewards[a] - rewards[b] for a, b in pairs])
        total = total - torch.log(torch.sigmoid(leads - margin)).mean()
    total.backward()  # type: ignore[no-untyped-call]
    return float(total.detach()), grads(model)


@pytest.mark.parametrize("answers", [2, 4])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "falcon"])
def test_packed_is_transformers_answer_by_answer(name: str, answers: int) -> None:
    margin = 0.5 if answers == 2 else 0.0
    model, examples = twin(name), rows(answers, margin=margin)
    reader = RewardReader(model, LOSSES)
    assert reader.packs == (name != "falcon")
    engine = Engine(
        reader, dict(model.named_parameters()), preference_objective(Terms("reward")), joint=not reader.packs
    )
    model.zero_grad()
    total = engine.forward_backward_all(reader.build_packs(examples, 90))
    assert total.count == len(examples)
    ours = total.loss, grads(model)
    assert score_rows(reader, examples, 90).nll.sum() == pytest.approx(total.loss, rel=1e-6)
    alone = one_by_one(model, examples, margin)
    for gradients in (ours[1], alone[1]):  # what moves all rewards alike has no gradient, but for rounding
        if (bias := gradients.pop("transformer.ln_f.bias", None)) is not None:
            assert bias.norm() < 1e-9
    assert_same(ours, alone, 1e-6)


def test_the_prompt_is_read_once_and_no_pair_is_split() -> None:
    examples = rows(count=9)
    packs = RewardReader(twin("llama"), LOSSES).build_packs(examples, 90)
    held = [set(pack.segment_rows.tolist()) for pack in packs]
    assert sum(map(len, held)) == 9
    shared = [example.segments[0].ids[:8] for example in examples]
    assert sum(map(len, packs)) <= sum(e.token_count for e in examples) - 9 * 2 * len(shared[0])
    assert [len(p) for p in packs] == [len(p) for p in build_packs(examples, 90, whole_rows=True)]


def test_a_model_that_looks_both_ways_is_refused() -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=97, num_labels=1, pad_token_id=0, **shape)
    )
    with pytest.raises(ValueError, match="looks both ways"):
        RewardReader(model, LOSSES)


CHATS = [("the plan", "a sore throat"), ("7 !", "the plan <|im_end|>")]


def preferences() -> list[Preference]:
    return [
        Preference(
            Where("f", n),
            (Message("user", f"why {n}?"),),
            tuple(Message("assistant", said, trained=True) for said in answers),
            (1.0, 0.0),
        )
        for n, answers in enumerate(CHATS)
    ]


@pytest.mark.parametrize("lora", [None, Lora(4, 8.0, 0.0, ("all-linear",))], ids=["full", "lora"])
@pytest.mark.parametrize("template", ["chatml", "llama3"])
def test_what_is_saved_gives_the_same_scores_in_plain_transformers(
    template: str, lora: Lora | None, tmp_path: Path
) -> None:
    """Read through the tokenizer's own chat template, alone and padded to one length."""
    tokenizer = make_tokenizer(template)
    tokenizer.pad_token = tokenizer.eos_token  # as many models have it: rows would end in padding
    renderer = Renderer(tokenizer, [tokenizer.eos_token_id], whole=True)
    examples = segment_preferences(preferences(), renderer, max_length=500).examples
    assert not any(segment.weights.any() for row in examples for segment in row.segments)
    model = twin("llama", torch.float32, vocab_size=len(tokenizer))
    pad_aside(model, tokenizer, {int(s.ids[-1]) for row in examples for s in row.segments})
    adapted = adapt(model, lora, 0, {"score.weight"}, task=None)
    reader = RewardReader(adapted.model, LOSSES)
    engine = Engine(reader, adapted.trainable(), preference_objective(Terms("reward")))
    engine.forward_backward_all(reader.build_packs(examples, 1000))
    engine.optim_step(1e-2)
    ours = np.concatenate(score_answers(reader, examples, 1000))
    save_result(adapted.saved, tokenizer, (), tmp_path / "model", labels=REWARD)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    own = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert loaded.config.num_labels == 1
    said = [text for answers in CHATS[:1] for text in answers]  # without what spells a control token
    chats = [[{"role": "user", "content": "why 0?"}, {"role": "assistant", "content": text}] for text in said]
    with torch.no_grad():
        batch = own.apply_chat_template(chats, return_tensors="pt", return_dict=True, padding=True)
        assert not batch["attention_mask"].all()
        found = loaded(**batch).logits[:, 0].tolist()
        for chat, reward in zip(chats, found, strict=True):
            alone = own.apply_chat_template(chat, return_tensors="pt", return_dict=True)
            assert float(loaded(**alone).logits[0, 0]) == pytest.approx(reward, abs=1e-5)
    assert found == pytest.approx(ours[:2], abs=1e-5)
    assert isinstance(renderer, Encoder)
