"""Answers out of a known set: which of them a model thinks likeliest, each weighed whole, the prompt read once for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from headstart.data.records import Conversation
from headstart.data.render import Renderer
from headstart.data.segments import Example, Segment, segment_rows
from headstart.engine.forward import Reader
from headstart.evaluate.score import Floats, score_rows, softmax


def last_answer(segment: Segment) -> tuple[int, int]:
    """Return where the last stretch of trained tokens begins and ends."""
    trained = np.flatnonzero(segment.weights)
    begin = trained[np.flatnonzero(np.diff(trained, prepend=-2) > 1)[-1]]
    return int(begin), int(trained[-1]) + 1


def weigh_choices(
    reader: Reader,
    renderer: Renderer,
    conversations: Sequence[Conversation],
    examples: Sequence[Example],
    choices: Sequence[str],
    tokens_per_pack: int,
    on_pack: Callable[[int, int], None] | None = None,
) -> Floats:
    """Return for each row the probability of each of `choices` as its last answer, its stop token included, [N, C].

    Probabilities are among the choices: what generation constrained to them would draw from. An answer's tokens don't
    depend on what stands before it, so each is encoded once.
    """
    if not examples:
        return np.zeros((0, len(choices)))
    answers = [_encode(renderer, conversations[0], choice) for choice in choices]
    rows = []
    for example in examples:
        segment = example.segments[-1]
        prompt = segment.ids[: last_answer(segment)[0]]
        for answer in answers:
            ids = np.concatenate([prompt, answer])
            weights = np.concatenate([np.zeros(len(prompt)), np.ones(len(answer))]).astype(np.float32)
            rows.append(Example(example.where, (Segment(ids, weights, segment.first),)))
    scores = score_rows(reader, rows, tokens_per_pack, on_pack)
    return softmax(-scores.nll.reshape(len(examples), len(choices)))


def _encode(renderer: Renderer, conversation: Conversation, choice: str) -> NDArray[np.int32]:
    last = max(index for index, message in enumerate(conversation.messages) if message.trained)
    messages = list(conversation.messages[: last + 1])
    messages[last] = replace(messages[last], content=choice)
    made = segment_rows([replace(conversation, messages=tuple(messages))], renderer, max_length=1 << 30)
    segment: Segment = made.examples[0].segments[-1]
    begin, end = last_answer(segment)
    return segment.ids[begin:end]
