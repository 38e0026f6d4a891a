"""What a row can be: a conversation to answer in, a document to continue, a text with a label. Each knows its place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headstart.data.read import Where


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `trained` tells whether an assistant's turn is learned; `tool_calls` hold parsed arguments."""

    role: str
    content: str
    trained: bool = False
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tool_call_id: str = ""
    name: str = ""


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
        turns = [(m.role, m.content, list(m.tool_calls)) for m in self.messages]
        return json.dumps([turns, list(self.tools)], ensure_ascii=False, sort_keys=True)

    @property
    def texts(self) -> list[str]:
        """The texts that people wrote."""
        return [message.content for message in self.messages]


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


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text with its class."""

    where: Where
    text: str
    label: str
    group: str | None = None

    @property
    def content(self) -> str:
        """All that the row asks; rows that differ in their label only are the same question."""
        return self.text

    @property
    def texts(self) -> list[str]:
        """The texts that people wrote."""
        return [self.text]


Record = Conversation | Document | Labelled
