"""What answering will take, in memory and in time, from a few short answers."""

from __future__ import annotations

import time
from collections.abc import Sequence

from headstart.engine.forward import Reader
from headstart.engine.memory import Growth, trace
from headstart.evaluate.generate import PROMPTS_AT_ONCE, TOKENS_AT_ONCE, generate

WIDTHS = (16, 32, 64)
PROMPTS = 4
NEW_TOKENS = 4


def answering_bytes(reader: Reader, prompts: Sequence[int], limits: Sequence[int]) -> int:
    """Return what answering fills at most, for prompts of these tokens with answers of at most `limits`.

    Keys, values and states are measured on a few narrow batches and carried on to the widest.
    """
    widest = max(prompt + limit for prompt, limit in zip(prompts, limits, strict=True))
    at_once = max(1, min(PROMPTS_AT_ONCE, len(prompts), TOKENS_AT_ONCE // widest))
    some = min(PROMPTS, at_once)
    _answer(reader, some, WIDTHS[0], 1)
    traces = [trace(lambda: _answer(reader, some, width, 2)) for width in WIDTHS]  # noqa: B023 (called at once)
    return Growth(traces, WIDTHS).bytes_at(widest) * at_once // some


def answering_s(reader: Reader, prompts: Sequence[int], limits: Sequence[int], forward_s: float) -> float:
    """Return about how long answering takes: the prompts once, then each new token as a pass of its batch.

    A batch goes on until its last answer ends, which is taken to be at its limit.
    """
    order = sorted(range(len(prompts)), key=lambda index: (limits[index], prompts[index]))
    batches: list[list[int]] = []
    for index in order:
        batch = [*(batches[-1] if batches else []), index]
        width = max(prompts[i] for i in batch) + max(limits[i] for i in batch)
        if 1 < len(batch) <= PROMPTS_AT_ONCE and width * len(batch) <= TOKENS_AT_ONCE:
            batches[-1] = batch
        else:
            batches.append([index])
    pace = {size: _pass_s(reader, size) for size in {len(batch) for batch in batches}}
    passes = sum(pace[len(batch)] * max(limits[i] for i in batch) for batch in batches)
    return forward_s * sum(prompts) + passes


def _pass_s(reader: Reader, size: int) -> float:
    """Return the seconds of a pass of one token for each of `size` prompts."""
    taken = [_answer(reader, size, WIDTHS[0], new) for new in (1, 1 + NEW_TOKENS)]
    return max(0.0, taken[1] - taken[0]) / NEW_TOKENS


def _answer(reader: Reader, size: int, width: int, new: int) -> float:
    never = [int(reader.model.config.get_text_config().vocab_size) - 1]  # hardly ever the likeliest
    begun = time.perf_counter()
    generate(reader.model, [[3] * width] * size, never, [new] * size, 1 << 30)
    return time.perf_counter() - begun
