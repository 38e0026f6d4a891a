"""Answers: prompts in, token ids out, in batches, greedily, so that the same model always gives the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headstart.models.attention import use_attention

PROMPTS_AT_ONCE = 16
TOKENS_AT_ONCE = 8192  # of prompts: what their keys and values fill stays small beside the model


@dataclass(frozen=True)
class Answer:
    """The ids of an answer, its stop token left out, and whether the model stopped by itself."""

    ids: list[int]
    stopped: bool


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    limits: Sequence[int],
    length: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """Answer `prompts` (token ids) with the likeliest token at each place, up to a stop token or each one's limit.

    Prompt and answer together stay within `length`, the most tokens that the model can place. Prompts of like limit and
    length go through together; `on_batch(done, total)` is called after each batch.
    """
    model.eval()
    use_attention(model, packed=False)
    limits = [max(1, min(limit, length - len(prompt))) for limit, prompt in zip(limits, prompts, strict=True)]
    order = sorted(range(len(prompts)), key=lambda index: (limits[index], len(prompts[index])))
    answers: dict[int, Answer] = {}
    for batch in _batches(order, prompts, limits, length):
        new = _generate_batch(model, [prompts[index] for index in batch], stop_ids, limits[batch[-1]])
        answers.update(
            (index, cut_at_stop(ids[: limits[index]], stop_ids)) for index, ids in zip(batch, new, strict=True)
        )
        if on_batch:
            on_batch(len(answers), len(order))
    return [answers[index] for index in range(len(prompts))]


def _batches(
    order: Sequence[int], prompts: Sequence[Sequence[int]], limits: Sequence[int], length: int
) -> list[list[int]]:
    """Cut an order into batches: at most `PROMPTS_AT_ONCE` and `TOKENS_AT_ONCE`, each within `length`, padded."""
    batches: list[list[int]] = []
    for index in order:
        batch = [*(batches[-1] if batches else []), index]
        width = max(len(prompts[i]) for i in batch) + max(limits[i] for i in batch)
        if (
            len(batch) > 1
            and len(batch) <= PROMPTS_AT_ONCE
            and width * len(batch) <= TOKENS_AT_ONCE
            and width <= length
        ):
            batches[-1] = batch
        else:
            batches.append([index])
    return batches


def _generate_batch(
    model: Any, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], max_new_tokens: int
) -> list[list[int]]:
    from transformers import GenerationConfig

    pad = stop_ids[0]
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,  # what is left out is taken from the model's own config
        no_repeat_ngram_size=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids),
        pad_token_id=pad,
    )
    with torch.no_grad():
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    new: list[list[int]] = output[:, width:].tolist()
    return new


def cut_at_stop(ids: Sequence[int], stop_ids: Sequence[int]) -> Answer:
    """Return what stands before the first stop token."""
    for place, id_ in enumerate(ids):
        if id_ in stop_ids:
            return Answer(list(ids[:place]), True)
    return Answer(list(ids), False)
