"""The data check: what is in the data, what is wrong with it and where, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from headstart.data.documents import Fit
from headstart.data.encode import Encoder
from headstart.data.images import Look
from headstart.data.prepare import Prepared
from headstart.data.quality import Finding, look_through
from headstart.data.records import Record
from headstart.data.segments import Example, Segmented
from headstart.errors import Problem

LONGEST = 10


@dataclass(frozen=True, slots=True)
class Heavy:
    """A row that costs much: its tokens, and their part of all."""

    where: str
    tokens: int
    frac: float


@dataclass(frozen=True)
class Findings:
    """What the check found. Lengths are in tokens; `control_rows` spell a control token in their content.

    `longest` are the rows that cost most, `quality` what hurts though it can be trained on.
    """

    formats: Sequence[str]
    rows: int
    usable: int
    train: int
    held_out: int
    duplicates: int
    leaked: int
    dropped: int
    cut: int
    control_rows: Sequence[str]
    tokens: int
    targets: int
    length_median: int
    length_p95: int
    length_longest: int
    longest: Sequence[Heavy]
    quality: Sequence[Finding]
    fit: Fit | None
    notes: Sequence[str]
    problems: Sequence[Problem]

    def to_json(self) -> dict[str, Any]:
        """The findings as plain values."""
        return {**asdict(self), "problems": [problem.to_json() for problem in self.problems]}


class Stretch(NamedTuple):
    """Neighbouring tokens of one kind as text: `trained`, `context` or `cut`."""

    text: str
    kind: str


def find(prepared: Prepared, renderer: Encoder | Look) -> Findings:
    """Look through prepared data."""
    parts = (prepared.train, prepared.watch, prepared.proof)
    lengths = np.concatenate([part.lengths for part in parts])
    spells = renderer.spells_control if isinstance(renderer, Encoder) else bool
    spelled = [where for part in parts for where in part.where_spelled(spells)]
    return Findings(
        formats=[str(formed.detection) for formed in prepared.formed],
        rows=sum(formed.rows for formed in prepared.formed),
        usable=len(lengths),
        train=len(prepared.train.examples),
        held_out=len(lengths) - len(prepared.train.examples),
        duplicates=prepared.parts.duplicates,
        leaked=prepared.parts.leaked,
        dropped=sum(len(part.dropped) for part in parts),
        cut=sum(part.cut for part in parts),
        control_rows=spelled,
        tokens=int(lengths.sum()),
        targets=sum(part.target_count for part in parts),
        length_median=int(np.median(lengths)),
        length_p95=int(np.quantile(lengths, 0.95)),
        length_longest=int(lengths.max()),
        longest=_find_longest(parts),
        quality=look_through(_with_sides(prepared)),
        fit=prepared.fit,
        notes=[note for formed in prepared.formed for note in formed.notes],
        problems=prepared.problems,
    )


def _find_longest(parts: Sequence[Segmented]) -> list[Heavy]:
    """Return the rows of the most tokens, of equals the first."""
    lengths = np.concatenate([part.lengths for part in parts])
    order = np.argsort(-lengths, kind="stable")[:LONGEST]
    ends = np.cumsum([len(part.examples) for part in parts])
    found = []
    for place in order.tolist():
        number = int(np.searchsorted(ends, place, side="right"))
        example = parts[number].examples[place - int(ends[number])]
        found.append(Heavy(str(example.where), int(lengths[place]), int(lengths[place]) / int(lengths.sum())))
    return found


def _with_sides(prepared: Prepared) -> Iterator[tuple[Record, bool]]:
    """Yield all rows, each with whether it is held out."""
    parts = prepared.parts
    held = {record.where for part in (parts.watch, parts.proof) for record in part}
    if prepared.parts.held_out is None:
        yield from ((record, False) for record in prepared.formed[0].records)
        yield from ((record, True) for record in prepared.formed[1].records)
    else:
        yield from ((record, record.where in held) for record in prepared.formed[0].records)


def show_tokens(example: Example, renderer: Encoder) -> list[Stretch]:
    """Return an example as stretches of text: what is trained, what is only read, and what was cut away."""
    stretches = []
    for segment in example.segments:
        pairs = zip(segment.ids.tolist(), (segment.weights > 0).tolist(), strict=True)
        for trained, group in groupby(pairs, key=lambda pair: pair[1]):
            text = renderer.decode_raw([id_ for id_, _ in group])
            stretches.append(Stretch(text, "trained" if trained else "context"))
    return [*stretches, Stretch(example.cut, "cut")] if example.cut else stretches
