"""Answers: prompts in, token ids out, in batches, greedily, so that the same model always gives the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headstart.models.attention import use_attention

PROMPTS_AT_ONCE = 16


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
    on_batch: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """Answer `prompts` (token ids) with the likeliest token at each place, up to a stop token or each one's limit.

    Prompts of like limit and length go through together; `on_batch(done, total)` is called after each batch.
    """
    model.eval()
    use_attention(model, packed=False)
    order = sorted(range(len(prompts)), key=lambda index: (limits[index], len(prompts[index])))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), PROMPTS_AT_ONCE):
        batch = order[start : start + PROMPTS_AT_ONCE]
        new = _generate_batch(model, [prompts[index] for index in batch], stop_ids, limits[batch[-1]])
        answers.update(
            (index, cut_at_stop(ids[: limits[index]], stop_ids)) for index, ids in zip(batch, new, strict=True)
        )
        if on_batch:
            on_batch(len(answers), len(order))
    return [answers[index] for index in range(len(prompts))]


def _generate_batch(
    model: Any, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], max_new_tokens: int
) -> list[list[int]]:
    from transformers import GenerationConfig

    pad = stop_ids[0]
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(stop_ids), pad_token_id=pad
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
