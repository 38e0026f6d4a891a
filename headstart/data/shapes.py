"""Conversations of one shape, which an opaque template writes alike: what stands around their contents is encoded once."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import groupby

from headstart.data.encode import Run
from headstart.data.records import Conversation, Message

# Of each turn its role, whether it has a content, and whether it is trained.
ShapeKey = tuple[tuple[str, bool, bool], ...]
STAND_IN = re.compile("\ue002(\\d+)\ue003")


def shape_of(conversation: Conversation) -> ShapeKey | None:
    """Return the shape of a conversation; None where it is more than turns with a role and a content."""
    if conversation.tools:
        return None
    key = []
    for turn in conversation.messages:
        if turn.tool_calls or turn.tool_call_id or turn.name or turn.reasoning or turn.content.isspace():
            return None
        key.append((turn.role, bool(turn.content), turn.trained))
    return tuple(key)


def stand_in(number: int) -> str:
    """Return what stands for the content of a turn while a shape is learned."""
    return f"\ue002{number}\ue003"


class Shape:
    """How conversations of a shape are written: `sequences` of runs, some of them with stand-ins for contents.

    `strips` [turns] is what the template does to the edges of each content.
    """

    def __init__(self, sequences: Sequence[Sequence[Run]], strips: Sequence[Callable[[str], str] | None]) -> None:
        self._strips = strips
        self._sequences = [list(runs) for runs in sequences]
        self._holes = [
            [(place, STAND_IN.split(run.text)) for place, run in enumerate(runs) if STAND_IN.search(run.text)]
            for runs in self._sequences
        ]

    def fill(self, messages: Sequence[Message]) -> list[list[Run]]:
        """Return the runs of a conversation of this shape."""
        texts = [
            strip(message.content) if strip else message.content
            for message, strip in zip(messages, self._strips, strict=True)
        ]
        filled = []
        for runs, holes in zip(self._sequences, self._holes, strict=True):
            new = list(runs)
            for place, parts in holes:
                # Between what is written stand the numbers of turns.
                text = "".join([texts[int(part)] if odd % 2 else part for odd, part in enumerate(parts)])
                _, control_id, trained, after_control, _ = runs[place]
                new[place] = Run(text, control_id, trained, after_control)
            filled.append(new)
        return filled


def join_known(runs: Sequence[Run], encode: Callable[[Run], tuple[int, ...]]) -> list[Run]:
    """Return runs of which those without a content are encoded, and joined where they are alike."""
    joined: list[Run] = []
    for (holds, trained), group in groupby(runs, lambda run: (bool(STAND_IN.search(run.text)), run.trained)):
        if holds:
            joined += group
        else:
            known = tuple(id_ for run in group for id_ in encode(run))
            joined += [Run("", None, trained, known=known)] if known else []
    return joined
