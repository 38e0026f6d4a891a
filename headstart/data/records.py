"""What a row can be: a conversation, a document, a text with its label, words with tags, texts that belong together, a
picture, or a prompt with answers of which some are preferred. Each knows its place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headstart.data.read import Where


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `trained` tells whether an assistant's turn is learned; `tool_calls` hold parsed arguments.

    `reasoning` is what the assistant thought before its answer, and `silent` that this is read and not learned;
    `thought` is the reasoning as text in front of the content, for a template that knows none.
    """

    role: str
    content: str
    trained: bool = False
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tool_call_id: str = ""
    name: str = ""
    reasoning: str = ""
    silent: bool = False
    thought: str = ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row of instruction data: turns, of which some are learned, and the tools that were at hand."""

    where: Where
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    group: str | None = None

    @property
    def content(self) -> str:
        """All that the row says."""
        turns = [
            (m.role, m.content, list(m.tool_calls), *([m.reasoning] if m.reasoning else [])) for m in self.messages
        ]
        return json.dumps([turns, list(self.tools)], ensure_ascii=False, sort_keys=True)

    @property
    def texts(self) -> list[str]:
        """The texts that people wrote."""
        return [text for message in self.messages for text in (message.reasoning, message.content) if text]


@dataclass(frozen=True, slots=True)
class Document:
    """A row of unlabelled text."""

    where: Where
    content: str
    group: str | None = None

    @property
    def texts(self) -> list[str]:
        """The texts that people wrote."""
        return [self.content]


Label = str | tuple[str, ...] | tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text, or a pair of texts, with its class, its classes or its numbers."""

    where: Where
    text: str
    label: Label
    group: str | None = None
    pair: str | None = None

    @property
    def content(self) -> str:
        """All that the row asks; rows that differ in their label only are the same question."""
        return self.text if self.pair is None else json.dumps([self.text, self.pair], ensure_ascii=False)

    @property
    def texts(self) -> list[str]:
        """The texts that people wrote."""
        return [self.text] if self.pair is None else [self.text, self.pair]


@dataclass(frozen=True, slots=True)
class Tagged:
    """Words, each with its tag."""

    where: Where
    words: tuple[str, ...]
    tags: tuple[str, ...]
    group: str | None = None

    @property
    def content(self) -> str:
        """All that the row asks."""
        return json.dumps(self.words, ensure_ascii=False)

    @property
    def texts(self) -> list[str]:
        """The texts that people wrote."""
        return list(self.words)


@dataclass(frozen=True, slots=True)
class Related:
    """Texts that belong together: the second fits the first, the third (where there is one) doesn't.

    With a `score`, two texts and how alike they are.
    """

    where: Where
    texts: tuple[str, ...]
    score: float | None = None
    group: str | None = None

    @property
    def content(self) -> str:
        """All that the row says; rows with the same first text may not stand on both sides of a split."""
        return self.texts[0]


@dataclass(frozen=True, slots=True)
class Picture:
    """An image file with its class; `digest` is the hash of its bytes."""

    where: Where
    path: str
    label: str
    digest: str
    group: str | None = None

    @property
    def content(self) -> str:
        """What the file holds: two files with the same bytes are the same picture."""
        return self.digest

    @property
    def texts(self) -> list[str]:
        """No text."""
        return []


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt and answers to it, each with a score: the higher, the better. A lone answer is wanted (1) or not (0).

    `margin` is by how much a reward model is to tell the two apart at least.
    """

    where: Where
    prompt: tuple[Message, ...]
    answers: tuple[Message, ...]
    scores: tuple[float, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    group: str | None = None
    margin: float = 0.0

    @property
    def content(self) -> str:
        """All that the row asks; rows that differ only in which answer is the better one ask the same."""
        return json.dumps([self.asked.content, sorted(map(_said, self.answers))], ensure_ascii=False)

    @property
    def texts(self) -> list[str]:
        """The texts that people wrote."""
        return [text for m in (*self.prompt, *self.answers) for text in (m.reasoning, m.content) if text]

    @property
    def asked(self) -> Conversation:
        """The prompt alone."""
        return Conversation(self.where, self.prompt, self.tools)

    @property
    def conversations(self) -> list[Conversation]:
        """The prompt with each of the answers."""
        return [Conversation(self.where, (*self.prompt, a), self.tools, self.group) for a in self.answers]

    @property
    def best(self) -> int:
        """The number of the answer with the highest score, of equals the first."""
        return self.scores.index(max(self.scores))

    @property
    def wanted(self) -> list[bool]:
        """Which answers are wanted: a lone one if its score says so, of several the best."""
        least = 0.5 if len(self.answers) == 1 else max(self.scores)
        return [score >= least for score in self.scores]


def _said(message: Message) -> str:
    return json.dumps(
        [message.reasoning, message.content, list(message.tool_calls)], ensure_ascii=False, sort_keys=True
    )


Record = Conversation | Document | Labelled | Tagged | Related | Picture | Preference
