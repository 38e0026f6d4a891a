"""Conversations -> examples of segments: token ids, and a weight for each as a target."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headstart.data.encode import Run, Tokens
from headstart.data.read import Where
from headstart.data.records import Conversation
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

    `label` is what a row as a whole is held against: the number of its class, -1 where it has none, or float32 [C]; or
    what each of its segments is, [segments, C].
    `image` is what is seen in place of tokens; its segment then only says how much there is to see.
    """

    where: Where
    segments: tuple[Segment, ...]
    cut: str = ""
    label: int | NDArray[Any] = -1
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
    """What became of the records: `examples` and `kept` go together; `dropped` are those over the length.

    Both are lists, or read from disk row by row (`store.StoredRows`), where what is asked here is known of all rows.
    """

    examples: Any = field(default_factory=list)
    kept: Any = field(default_factory=list)
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
        known = _known(self.examples, "cut")
        return sum(bool(example.cut) for example in self.examples) if known is None else known

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The tokens of each example."""
        return lengths_of(self.examples)

    @property
    def longest(self) -> int:
        """The tokens of the longest segment."""
        known = _known(self.examples, "longest")
        return max((len(s) for e in self.examples for s in e.segments), default=0) if known is None else known

    @property
    def highest_id(self) -> int:
        """The highest token."""
        known = _known(self.examples, "highest_id")
        return max((int(s.ids.max()) for e in self.examples for s in e.segments), default=0) if known is None else known

    @property
    def target_count(self) -> int:
        """How many tokens are predicted."""
        known = _known(self.examples, "target_count")
        return sum(example.target_count for example in self.examples) if known is None else known

    def where_spelled(self, spells: Callable[[str], bool]) -> list[str]:
        """Return the places of the rows with a text that `spells` something."""
        known = _known(self.kept, "where_spelled")
        return [str(r.where) for r in self.kept if any(map(spells, r.texts))] if known is None else known(spells)


def _known(rows: Any, name: str) -> Any:
    """Return what rows on disk know of themselves; None of a list."""
    return None if isinstance(rows, list) else getattr(rows, name)


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
    parts = (conversations[start : start + ROWS_AT_ONCE] for start in range(0, len(conversations), ROWS_AT_ONCE))
    for outcomes in encode_rows(parts, renderer, max_length=max_length, over_length=over_length):
        for outcome in outcomes:
            outcome.add_to(result)
    if over_length == "error":
        result.reject_dropped(max_length, "drop or cut")
    return result


class Outcome(NamedTuple):
    """What became of a conversation: an example, or the length for which it is dropped, or what is wrong with it.

    `conversation` is what was encoded: shorter than it was given where it was cut.
    """

    conversation: Conversation
    example: Example | None
    length: int = 0
    problem: Problem | None = None

    def add_to(self, result: Segmented) -> None:
        """Add this row to the others."""
        if self.problem is not None:
            result.problems.append(self.problem)
        elif self.example is None:
            result.dropped.append((self.conversation.where, self.length))
        else:
            result.examples.append(self.example)
            result.kept.append(self.conversation)


def encode_rows(
    parts: Iterable[Sequence[Conversation]], renderer: Renderer, *, max_length: int, over_length: str = "drop"
) -> Iterator[list[Outcome]]:
    """Yield what becomes of each part of many conversations.

    While one part is encoded, which holds no lock of Python's, the next is read and rendered.
    """
    waiting: _Part | None = None
    with ThreadPoolExecutor(1) as encoder:
        for conversations in parts:
            rendered = [renderer.training(conversation) for conversation in conversations]
            runs = [one for row in rendered if not isinstance(row, Problem) for one in row]
            part = _Part(conversations, rendered, encoder.submit(renderer.encode, runs))
            if waiting is not None:
                yield waiting.outcomes(renderer, max_length, over_length)
            waiting = part
        if waiting is not None:
            yield waiting.outcomes(renderer, max_length, over_length)


@dataclass(frozen=True)
class _Part:
    """Conversations on their way: what they are rendered to, and their tokens to come."""

    conversations: Sequence[Conversation]
    rendered: Sequence[list[list[Run]] | Problem]
    tokens: Future[list[Tokens]]

    def outcomes(self, renderer: Renderer, max_length: int, over_length: str) -> list[Outcome]:
        encoded = iter(self.tokens.result())
        found = []
        for conversation, sequences in zip(self.conversations, self.rendered, strict=True):
            if isinstance(sequences, Problem):
                found.append(Outcome(conversation, None, problem=sequences))
            else:
                row = _Rendered(conversation, [next(encoded) for _ in sequences])
                found.append(row.outcome(renderer, max_length, over_length))
        return found


class _Rendered(NamedTuple):
    """A conversation with its encoded sequences, and what was cut away from it."""

    conversation: Conversation
    tokens: list[Tokens]
    cut: str = ""

    @property
    def longest(self) -> int:
        return max([len(item.ids) for item in self.tokens])

    def outcome(self, renderer: Renderer, max_length: int, over_length: str) -> Outcome:
        fitting: _Rendered | None = self
        if self.longest > max_length:
            fitting = _shorten(self.conversation, renderer, max_length) if over_length == "cut" else None
        if fitting is None:
            return Outcome(self.conversation, None, self.longest)
        segments = tuple([_segment(tokens) for tokens in fitting.tokens])
        return Outcome(fitting.conversation, Example(self.conversation.where, segments, fitting.cut))


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
