"""What answering will take, in memory and in time, from a few short answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from headstart.engine.forward import Reader
from headstart.engine.memory import Growth, trace
from headstart.evaluate.generate import ROWS_AT_ONCE, generate, tokens_kept

WIDTHS = (16, 32, 64)
PROMPTS = 4
NEW_TOKENS = 4
SIZES = (1, 16)  # prompts in flight at which a pass is timed; others lie on the line through these


def answering_bytes(reader: Reader, prompts: Sequence[int], limits: Sequence[int]) -> int:
    """Return what answering fills at most, for prompts of these tokens with answers of at most `limits`.

    Keys, values and states are measured on a few narrow prompts and carried on to all that are in flight at once.
    """
    rows = sorted((prompt + limit for prompt, limit in zip(prompts, limits, strict=True)), reverse=True)
    tokens = min(sum(rows[:ROWS_AT_ONCE]), max(rows[0], tokens_kept(reader.model)))
    _answer(reader, PROMPTS, WIDTHS[0], 1)
    traces = [trace(lambda: _answer(reader, PROMPTS, width, 2)) for width in WIDTHS]  # noqa: B023 (called at once)
    return Growth(traces, [PROMPTS * (width + 2) for width in WIDTHS]).bytes_at(tokens)


@dataclass(frozen=True)
class Pace:
    """Seconds of a pass of one token: for however many rows, and for each."""

    always_s: float
    row_s: float

    def answering_s(self, prompts: Sequence[int], limits: Sequence[int], forward_s: float) -> float:
        """Return about how long answering takes: the prompts once, then at each step a pass of all that still go on.

        Each answer is taken to go on to its limit; `forward_s` is what a token of a prompt takes.
        """
        passes = 0.0
        for begin in range(0, len(limits), ROWS_AT_ONCE):
            flying = limits[begin : begin + ROWS_AT_ONCE]
            passes += max(flying) * self.always_s + sum(flying) * self.row_s
        return forward_s * sum(prompts) + passes


def measure_pace(reader: Reader) -> Pace:
    """Return how long passes take, from a few of them."""
    one, many = (_pass_s(reader, size) for size in SIZES)
    each = max(0.0, many - one) / (SIZES[1] - SIZES[0])
    return Pace(one - each, each)


def _pass_s(reader: Reader, size: int) -> float:
    """Return the seconds of a pass of one token for each of `size` prompts."""
    taken = [min(_answer(reader, size, WIDTHS[0], new) for _ in range(2)) for new in (1, 1 + NEW_TOKENS)]
    return max(0.0, taken[1] - taken[0]) / NEW_TOKENS


def _answer(reader: Reader, size: int, width: int, new: int) -> float:
    prompts = [[3 + number, *[3] * (width - 1)] for number in range(size)]  # nothing is shared
    never = [int(reader.model.config.get_text_config().vocab_size) - 1]  # hardly ever the likeliest
    begun = time.perf_counter()
    generate(reader.model, prompts, never, [new] * size, 1 << 30, head=reader.answer_head)
    return time.perf_counter() - begun
