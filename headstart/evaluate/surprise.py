"""Which words of its text a model is surprised by: what it gave each of them, before and after."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from headstart.data.documents import WORD
from headstart.data.encode import Encoder
from headstart.evaluate.score import Floats

if TYPE_CHECKING:
    from headstart.evaluate.measure import Measured

WORD_ROWS = 32  # documents of which it is kept what each word was given
SHOWN = 12
# Times that a word is to stand there, where enough do: what stands once tells more of its sentence than of it.
OFTEN = 3
LETTERS_MOST = 40  # of a word: what is longer is an address, or of a script that parts no words
EDGES = re.compile(r"^[\W_]+|[\W_]+$")
LETTER = re.compile(r"[^\W\d_]")

Words = list[tuple[str, float]]


def word_losses(text: str, losses: Floats, renderer: Encoder) -> Words:
    """Return the words of a text with what their tokens lost in all, in nats.

    `losses` [n] are those of the text's last n tokens, in order. A word is written small, without the marks around it; numbers and
    marks are none, nor is what is very long, or a word of which not all was predicted. Empty where it can't be told which token stands where.
    """
    spans = renderer.spans(text)
    unpredicted = len(spans) - len(losses)
    if not spans or unpredicted < 0:
        return []
    found: Words = []
    place = 0
    for word in WORD.finditer(text):
        begin, end = word.span()
        while place < len(spans) and spans[place][1] <= begin:
            place += 1
        first, total = place, 0.0
        while place < len(spans) and spans[place][0] < end:
            total += float(losses[place - unpredicted]) if place >= unpredicted else 0.0
            place += 1
        name = EDGES.sub("", word.group()).lower()
        if first >= unpredicted and len(name) <= LETTERS_MOST and LETTER.search(name):
            found.append((name, total))
    return found


def find_surprises(before: Measured, after: Measured) -> dict[str, list[dict[str, Any]]] | None:
    """Return the words that cost most on the mean `before` and `after`, and those on which most was `gained` in all, as dicts.

    Each with its times and both means in nats. None: not measured.
    """
    first, second = _costs(before), _costs(after)
    both: list[dict[str, Any]] = [
        {"word": word, "times": len(costs), "before": float(np.mean(costs)), "after": float(np.mean(second[word]))}
        for word, costs in first.items()
        if word in second
    ]
    often = [item for item in both if item["times"] >= OFTEN]
    items = often if len(often) >= SHOWN else both
    orders: dict[str, Callable[[dict[str, Any]], float]] = {
        "before": lambda item: item["before"],
        "after": lambda item: item["after"],
        "gained": lambda item: item["times"] * (item["before"] - item["after"]),
    }
    return {name: sorted(items, key=order, reverse=True)[:SHOWN] for name, order in orders.items()} if items else None


def _costs(measured: Measured) -> dict[str, list[float]]:
    """Return what each word cost wherever it stands."""
    found: dict[str, list[float]] = {}
    for row in measured.own:
        for word, loss in row.words:
            found.setdefault(word, []).append(loss)
    return found


def few_words(words: Sequence[dict[str, Any]], most: int) -> str:
    """Say what a few words cost before and after, in bits."""
    return ", ".join(f"{item['word']} {in_bits(item['before'])} -> {in_bits(item['after'])}" for item in words[:most])


def in_bits(nats: float) -> str:
    """Return nats as bits, in words."""
    return f"{nats / math.log(2):.1f}"
