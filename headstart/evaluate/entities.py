"""Entities in tags: what stands together under BIO, and how many were found. As seqeval counts them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

OUTSIDE = "O"
BIO = {"S": "B", "U": "B", "E": "I", "L": "I"}  # BIOES and BILOU say the same with more marks


class Entity(NamedTuple):
    """Words `begin` to `end` (not included) of a type."""

    type: str
    begin: int
    end: int


def has_entities(tags: Sequence[str]) -> bool:
    """Tell whether tags are BIO, and not plain ones."""
    return any(tag.startswith(("B-", "I-", "S-", "U-")) for tag in tags)


def entities(tags: Sequence[str]) -> Iterator[Entity]:
    """Yield the entities of a row of BIO tags, an I- without a B- before it included (the lenient way of conlleval)."""
    begin, kind = 0, ""
    for place, tag in enumerate([*tags, OUTSIDE]):
        mark, _, name = tag.partition("-") if "-" in tag else (tag, "", "")
        mark = BIO.get(mark, mark)
        goes_on = mark == "I" and name == kind
        if kind and not goes_on:
            yield Entity(kind, begin, place)
        if mark in ("B", "I") and not (goes_on and kind):
            begin = place
        kind = name if mark in ("B", "I") else ""


def count_entities(truth: Sequence[str], found: Sequence[str]) -> NDArray[np.float64]:
    """Return how many entities were found rightly, how many were told and how many there are, [3]."""
    there, told = set(entities(truth)), set(entities(found))
    return np.array([len(there & told), len(told), len(there)], np.float64)
