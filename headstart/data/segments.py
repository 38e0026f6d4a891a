"""Conversations -> examples of segments: token ids, and a weight for each as a target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from headstart.data.encode import Run, Tokens
from headstart.data.read import Where
from headstart.data.records import Conversation, Record
from headstart.data.render import Renderer
from headstart.errors import DataError, Problem

ROWS_AT_ONCE = 512


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens that are read in order. `ids` int32 [n]; `weights` float32 [n], of token i as a target.

    A weight of 0 means that the token is read and not predicted. By itself a token is predicted from the one before it,
    so the first never is; with `targets` int32 [n] what is told stands at the token itself: its tag, or what a mask hides.
    `types` int32 [n] tells which text of a pair a token is of. `first` is the position of the first token. `asked` is
    `weights` with what can't be learned for want of a known target: tags that training never saw.
    """

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    first: int = 0
    targets: NDArray[np.int32] | None = None
    types: NDArray[np.int32] | None = None
    asked: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def target_count(self) -> int:
        """How many tokens are predicted."""
        return int(np.count_nonzero(self.weights))


@dataclass(frozen=True, slots=True)
class Image:
    """An image file, the part of it that is seen (left, top, right, bottom, as parts of 1), and whether it is mirrored."""

    path: str
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    mirrored: bool = False


@dataclass(frozen=True, slots=True)
class Example:
    """A row as the engine sees it: its segments (one, or one an answer), and what was cut away from its context.

    `label` is what a row as a whole is held against: the number of its class, -1 where it has none, or float32 [C].
    `image` is what is seen in place of tokens; its segment then only says how much there is to see.
    """

    where: Where
    segments: tuple[Segment, ...]
    cut: str = ""
    label: int | NDArray[np.float32] = -1
    image: Image | None = None

    @property
    def token_count(self) -> int:
        """Tokens of all segments, shared ones counted each time."""
        return sum(map(len, self.segments))

    @property
    def target_count(self) -> int:
        """Tokens that are predicted."""
        return sum(segment.target_count for segment in self.segments)


@dataclass
class Segmented:
    """What became of the records: `examples` and `kept` go together; `dropped` are those over the length."""

    examples: list[Example] = field(default_factory=list)
    kept: list[Record] = field(default_factory=list)
    dropped: list[tuple[Where, int]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def reject_dropped(self, max_length: int, choices: str) -> None:
        """Raise DataError with every row that is over the length."""
        cure = f"raise data.max_length, or choose -s data.over_length={choices}"
        if self.dropped:
            raise DataError(
                Problem("row.too_long", f"{length:,} tokens, over {max_length:,}", str(where), cure)
                for where, length in self.dropped
            )

    @property
    def cut(self) -> int:
        """How many examples lost context."""
        # Of rows that lie on disk, that was told when they were written.
        return sum(bool(example.cut) for example in self.examples) if isinstance(self.examples, list) else 0

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The tokens of each example."""
        return lengths_of(self.examples)

    @property
    def target_count(self) -> int:
        """How many tokens are predicted."""
        if isinstance(self.examples, list):
            return sum(example.target_count for example in self.examples)
        return int(self.examples.target_count)


def lengths_of(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Return the tokens of each example, without reading those that lie on disk."""
    known = getattr(examples, "lengths", None)
    return known if known is not None else np.array([example.token_count for example in examples], np.int64)


def segment_rows(
    conversations: Sequence[Conversation],
    renderer: Renderer,
    *,
    max_length: int,
    over_length: str = "drop",
) -> Segmented:
    """Render and encode conversations; those over `max_length` tokens are dropped, cut or an error, as said.

    Raises DataError with every row that is over the length where `over_length` is `error`.
    """
    result = Segmented()
    for row in _rendered(conversations, renderer, result.problems):
        fitting: _Rendered | None = row
        if row.longest > max_length:
            fitting = _shorten(row.conversation, renderer, max_length) if over_length == "cut" else None
        if fitting is None:
            result.dropped.append((row.conversation.where, row.longest))
        else:
            segments = tuple(map(_segment, fitting.tokens))
            result.examples.append(Example(row.conversation.where, segments, fitting.cut))
            result.kept.append(fitting.conversation)
    if over_length == "error":
        result.reject_dropped(max_length, "drop or cut")
    return result


class _Rendered(NamedTuple):
    """A conversation with its encoded sequences, and what was cut away from it."""

    conversation: Conversation
    tokens: list[Tokens]
    cut: str = ""

    @property
    def longest(self) -> int:
        return max(len(item.ids) for item in self.tokens)


def _rendered(
    conversations: Sequence[Conversation], renderer: Renderer, problems: list[Problem]
) -> Iterator[_Rendered]:
    """Yield each conversation with its encoded sequences, encoding many rows at once."""
    for start in range(0, len(conversations), ROWS_AT_ONCE):
        rows: list[tuple[Conversation, list[list[Run]]]] = []
        for conversation in conversations[start : start + ROWS_AT_ONCE]:
            sequences = renderer.training(conversation)
            if isinstance(sequences, Problem):
                problems.append(sequences)
            else:
                rows.append((conversation, sequences))
        encoded = iter(renderer.encode(runs for _, sequences in rows for runs in sequences))
        for conversation, sequences in rows:
            yield _Rendered(conversation, [next(encoded) for _ in sequences])


def _segment(tokens: Tokens) -> Segment:
    weights = tokens.trained.astype(np.float32)
    weights[:1] = 0.0
    return Segment(tokens.ids, weights)


def _shorten(conversation: Conversation, renderer: Renderer, max_length: int) -> _Rendered | None:
    """Cut the end of the longest context turn until the row fits; None where that is not enough."""
    context = [index for index, message in enumerate(conversation.messages) if not message.trained]
    if not context:
        return None
    longest = max(context, key=lambda index: len(conversation.messages[index].content))
    text = conversation.messages[longest].content
    fitting: _Rendered | None = None
    low, high = 1, len(text) - 1
    while low <= high:
        middle = (low + high) // 2
        messages = list(conversation.messages)
        messages[longest] = replace(messages[longest], content=text[:middle])
        shorter = replace(conversation, messages=tuple(messages))
        sequences = renderer.training(shorter)
        if isinstance(sequences, Problem):
            return None
        rendered = _Rendered(shorter, renderer.encode(sequences), text[middle:])
        if rendered.longest <= max_length:
            fitting, low = rendered, middle + 1
        else:
            high = middle - 1
    return fitting
