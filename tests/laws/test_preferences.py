"""Answers that are preferred: a pair as a forest = its rows one by one, for every objective; k answers; any packing; the start."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headstart.config import OBJECTIVES
from headstart.data.forest import build_packs
from headstart.data.read import Where
from headstart.data.segments import Example, Segment
from headstart.engine.engine import Engine
from headstart.engine.forward import PreferenceReader
from headstart.evaluate.reference import with_references
from headstart.evaluate.score import known_of, score_answers, score_rows
from headstart.models.adapt import Lora, adapt
from headstart.models.attention import register
from headstart.objectives.preference import Terms, preference_losses, preference_objective
from tests.laws.test_packing import assert_same, grads
from tests.twins import VOCAB, twin

ARCHITECTURES = ["llama", "mistral", "gemma2", "qwen3", "gpt2"]


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def terms(objective: str, **more: Any) -> Terms:
    """Return terms in which every part of an objective has a say."""
    smoothed = {"label_smoothing": 0.1} if objective in ("dpo", "robust", "simpo") else {}
    return Terms(objective, **{"beta": 0.3, "margin": 0.2, "likelihood": 0.2, "desirable": 1.5, **smoothed, **more})


def rows(objective: str, answers: int = 2, count: int = 5) -> list[Example]:
    """Return rows of which some share more than their prompt, with references and, for kto, an answer to another prompt."""
    chance = np.random.default_rng(0)
    system = chance.integers(3, VOCAB, 8)
    made = []
    for line in range(count):
        prompt = np.concatenate([system, chance.integers(3, VOCAB, 5 + 7 * (line % 3))])
        begin = chance.integers(3, VOCAB, 9 * (line % 2))  # answers that begin alike
        lengths = chance.integers(2, 9, answers)
        said = [np.concatenate([begin, chance.integers(3, VOCAB, n)]) for n in lengths]
        scores = chance.permutation(answers).astype(np.float64)
        if objective == "kto":
            scores = np.where(scores > (answers - 1) / 2, 1.0, -1.0)
            said, scores = [*said, chance.integers(3, VOCAB, 4)], np.append(scores, np.nan)
        segments = []
        for answer in said:
            ids = np.concatenate([prompt, answer]).astype(np.int32)
            weights = np.zeros(len(ids), np.float32)
            weights[len(prompt) :] = 1.0
            segments.append(Segment(ids, weights))
        label = np.column_stack([scores, chance.normal(-20, 5, len(said))])
        made.append(Example(Where("rows", line), tuple(segments), label=label))
    return made


def one_by_one(model: Any, examples: list[Example], of: Terms) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of answers that go through transformers alone, each with a prompt of its own."""
    model.set_attn_implementation("eager")
    model.zero_grad()
    found = []
    for example in examples:
        for segment in example.segments:
            ids = torch.from_numpy(segment.ids.astype(np.int64))
            logprobs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            picked = logprobs[:-1].gather(1, ids[1:, None])[:, 0]
            found.append((picked * torch.from_numpy(segment.weights[1:])).sum())
    losses, _ = preference_losses(of)(torch.stack(found), torch.from_numpy(known_of(examples)))
    losses.sum().backward()  # type: ignore[no-untyped-call]
    return float(losses.sum().detach()), grads(model)


def packed(model: Any, examples: list[Example], of: Terms, budget: int = 10_000, **how: Any) -> Any:
    """Return the same from our packs."""
    reader = PreferenceReader(model, preference_losses(of))
    joint = of.objective == "kto" or not reader.packs
    engine = Engine(reader, dict(model.named_parameters()), preference_objective(of), joint=joint)
    model.zero_grad()
    packs = reader.build_packs(examples, budget)
    total = engine.forward_backward_all(packs[::-1] if how.get("backwards") else packs)
    assert total.count == len(examples)
    return total.loss, grads(model)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_pair_as_a_forest_is_its_rows_one_by_one(name: str, objective: str) -> None:
    model, of, examples = twin(name), terms(objective), rows(objective)
    ours = packed(model, examples, of)
    assert_same(ours, one_by_one(model, examples, of), 1e-6)


@pytest.mark.parametrize("objective", ["dpo", "simpo", "kto"])
def test_eight_answers_read_their_prompt_once(objective: str) -> None:
    model, of, examples = twin("llama"), terms(objective), rows(objective, answers=8, count=2)
    assert_same(packed(model, examples, of), one_by_one(model, examples, of), 1e-6)
    (pack,) = PreferenceReader(model, preference_losses(of)).build_packs(examples[:1], 1)
    shared = 8  # of 13 tokens, in whole blocks
    assert len(pack) <= examples[0].token_count - (len(examples[0].segments) - 1) * shared


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
@pytest.mark.parametrize("how", [{"budget": 1}, {"budget": 60}, {"budget": 60, "backwards": True}], ids=str)
def test_how_rows_are_packed_does_not_change_the_gradient(objective: str, how: dict[str, Any]) -> None:
    """Of kto, neither does it change the step's estimate of the divergence."""
    model, of, examples = twin("qwen2"), terms(objective), rows(objective)
    assert len(PreferenceReader(model, preference_losses(of)).build_packs(examples, how["budget"])) > 1
    assert_same(packed(model, examples, of, **how), packed(model, examples, of), 1e-6)


def test_no_row_is_split_over_packs() -> None:
    examples = rows("kto", answers=3, count=9)
    for budget in (1, 40, 90, 1000):
        packs = build_packs(examples, budget, whole_rows=True)
        held = [set(pack.segment_rows.tolist()) for pack in packs]
        assert sum(map(len, held)) == len(set().union(*held)) == len(examples)
        assert all(len(pack) <= budget or len(rows_in) == 1 for pack, rows_in in zip(packs, held, strict=True))
        assert sum(len(pack.begins) for pack in packs) == 9 * 4


def test_where_packs_cannot_be_read_answers_go_through_alone_and_meet_again() -> None:
    model, of, examples = twin("falcon"), terms("dpo"), rows("dpo")
    reader = PreferenceReader(model, preference_losses(of))
    assert not reader.packs
    assert len(reader.build_packs(examples, 10_000)) == 10
    assert_same(packed(model, examples, of), one_by_one(model, examples, of), 1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_of_scored_rows_is_that_of_training(objective: str) -> None:
    model, of, examples = twin("llama"), terms(objective), rows(objective)
    scored = score_rows(PreferenceReader(model, preference_losses(of)), examples, 60)
    assert scored.targets.tolist() == [1.0] * len(examples)
    assert scored.nll.sum() == pytest.approx(packed(model, examples, of)[0], rel=1e-6)


@pytest.mark.parametrize("lora", [None, Lora(4, 8.0, 0.0, ("all-linear",))], ids=["full", "lora"])
def test_at_the_start_no_answer_has_gained_and_the_loss_is_ln_2(lora: Lora | None) -> None:
    adapted = adapt(twin("llama", torch.float32), lora, 0)
    of = Terms("dpo")
    reader = PreferenceReader(adapted.model, preference_losses(of))
    examples = rows("dpo")
    known = with_references(examples, [values.tolist() for values in score_answers(reader, examples, 60)])
    total = score_rows(reader, known, 10_000)
    assert total.mean == pytest.approx(math.log(2), abs=1e-6)
    engine = Engine(reader, adapted.trainable(), preference_objective(of))
    told = engine.forward_backward_all(reader.build_packs(known, 60))
    assert told.loss / told.count == pytest.approx(math.log(2), abs=1e-5)
    assert told.means["chosen_gain"] == pytest.approx(0, abs=1e-4)
    assert told.means["rejected_gain"] == pytest.approx(0, abs=1e-4)
    base = PreferenceReader(twin("llama", torch.float32), preference_losses(of))
    assert np.concatenate(score_answers(base, examples, 60)) == pytest.approx(
        np.concatenate([np.asarray(row.label)[:, 1] for row in known]), rel=1e-6
    )
