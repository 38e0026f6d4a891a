"""Documents -> examples of segments: text to continue, in pieces of at most a length, none of it lost.

A piece begins with the last token of the piece before, which is read there and not predicted again; so every token of a
document but its first is predicted exactly once, however it is cut.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headstart.data.encode import Encoder, Tokens
from headstart.data.records import Document
from headstart.data.render import Renderer
from headstart.data.segments import ROWS_AT_ONCE, Example, Segment, Segmented
from headstart.errors import Problem

WORD = re.compile(r"\S+")
FIT_CHARACTERS = 2_000_000
MANY_PIECES = 3


@dataclass(frozen=True)
class Fit:
    """How well a tokenizer fits a text: tokens a word, and the share of words that fall into more than three pieces."""

    tokens_per_word: float
    split_frac: float

    def __str__(self) -> str:
        return f"{self.tokens_per_word:.2f} tokens a word, {self.split_frac:.1%} of words in more than {MANY_PIECES} pieces"


def segment_documents(
    documents: Sequence[Document],
    renderer: Renderer,
    *,
    max_length: int,
    over_length: str = "split",
    positions: str = "restart",
    whole: bool = False,
) -> Segmented:
    """Encode documents; those over `max_length` tokens are split, dropped, cut or an error, as said.

    To train on, each piece is an example of its own and a document ends in the token that ends a text. With `whole` a
    document is one example of all its pieces, without that token: what is scored is the text.

    Raises DataError with every document that is over the length where `over_length` is `error`.
    """
    result = Segmented()
    for start in range(0, len(documents), ROWS_AT_ONCE):
        part = documents[start : start + ROWS_AT_ONCE]
        encoded = renderer.encode(renderer.document(document.content, end=not whole) for document in part)
        for document, tokens in zip(part, encoded, strict=True):
            length = len(tokens.ids)
            if length - (not whole) < 2:
                what = "the text is one token, so nothing can be predicted"
                result.problems.append(Problem("row.empty_text", what, str(document.where), "delete the row"))
                continue
            if length > max_length and over_length in ("drop", "error"):
                result.dropped.append((document.where, length))
                continue
            cut = ""
            if length > max_length and over_length == "cut":
                cut = renderer.decode(tokens.ids[max_length:].tolist())
                tokens = Tokens(tokens.ids[:max_length], tokens.trained[:max_length])  # noqa: PLW2901
            pieces = split_tokens(tokens, max_length, positions)
            groups = [tuple(pieces)] if whole else [(piece,) for piece in pieces]
            result.examples += [Example(document.where, group, cut) for group in groups]
            result.kept += [document] * len(groups)
    if over_length == "error":
        result.reject_dropped(max_length, "split, drop or cut")
    return result


def split_tokens(tokens: Tokens, max_length: int, positions: str = "restart") -> list[Segment]:
    """Cut a sequence into pieces of at most `max_length` tokens (never fewer than 2), each overlapping the one before by one."""
    weights = tokens.trained.astype(np.float32)
    pieces = []
    start = 0
    max_length = max(2, max_length)
    while start == 0 or start + 1 < len(tokens.ids):
        part = weights[start : start + max_length].copy()
        part[0] = 0.0
        first = start if positions == "continue" else 0
        pieces.append(Segment(tokens.ids[start : start + max_length], part, first))
        start += max_length - 1
    return pieces


def measure_fit(documents: Sequence[Document], renderer: Encoder) -> Fit:
    """Return how well the tokenizer fits the first two million characters."""
    words: Counter[str] = Counter()
    characters = 0
    for document in documents:
        words.update(WORD.findall(document.content[: FIT_CHARACTERS - characters]))
        characters += len(document.content)
        if characters >= FIT_CHARACTERS:
            break
    pieces = [len(ids) for ids in renderer.encode_words(list(words))]
    counts = np.array(list(words.values()))
    total = max(1, int(counts.sum()))
    lengths = np.array(pieces)
    return Fit(float((lengths * counts).sum() / total), float(counts[lengths > MANY_PIECES].sum() / total))
