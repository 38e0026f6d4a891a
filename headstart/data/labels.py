"""Labelled texts -> examples: the tokens of a text as the model frames it, and the number of its class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from headstart.data.encode import Encoder
from headstart.data.records import Labelled
from headstart.data.segments import ROWS_AT_ONCE, Example, Segment, Segmented
from headstart.errors import DataError, Problem

SHOWN = 3
UNEVEN = 10


def find_classes(records: Sequence[Labelled]) -> tuple[str, ...]:
    """Return the classes of the rows to train on, in order: by number where all are numbers.

    Raises DataError where there is only one.
    """
    found = {record.label for record in records}
    if len(found) < 2:
        what = f"every row to train on has the label {next(iter(found))!r}"
        raise DataError(Problem("labels.one", what, "data.label", "give rows of two classes or more"))
    numbers = all(label.lstrip("-").isdigit() for label in found)
    return tuple(sorted(found, key=lambda label: (int(label), label) if numbers else (0, label)))


def label_notes(train: Sequence[Labelled], held: Sequence[Labelled]) -> list[str]:
    """Return what people should know of the classes: how many, how even, which are rare, which are unseen."""
    counts = Counter(record.label for record in train)
    common, rare = counts.most_common()[0], counts.most_common()[-1]
    notes = [f"{len(counts):,} classes, of {rare[1]:,} ({rare[0]!r}) to {common[1]:,} ({common[0]!r}) rows to train on"]
    if common[1] > UNEVEN * rare[1]:
        notes.append("the classes are uneven: look at macro F1, which counts each class alike")
    single = sorted(label for label, count in counts.items() if count == 1)
    if single:
        notes.append(f"{len(single):,} classes have one row to train on: {_some(single)}")
    unseen = sorted({record.label for record in held} - set(counts))
    if unseen:
        rows = sum(record.label in unseen for record in held)
        notes.append(
            f"{rows:,} rows to score on have labels that training never sees, and count as wrong: {_some(unseen)}"
        )
    return notes


def _some(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - SHOWN:,} more" if len(labels) > SHOWN else ""
    return ", ".join(map(repr, labels[:SHOWN])) + more


def segment_labelled(
    records: Sequence[Labelled],
    encoder: Encoder,
    classes: Sequence[str],
    *,
    max_length: int,
    over_length: str = "drop",
) -> Segmented:
    """Encode labelled texts; those over `max_length` tokens are dropped, cut at their end or an error, as said.

    A label that is none of `classes` gets the number -1. Raises DataError with every row over the length where
    `over_length` is `error`.
    """
    numbers = {label: number for number, label in enumerate(classes)}
    result = Segmented()
    before, behind = encoder.frame
    for start in range(0, len(records), ROWS_AT_ONCE):
        part = records[start : start + ROWS_AT_ONCE]
        for record, inner in zip(part, encoder.encode_texts([record.text for record in part]), strict=True):
            room = max_length - len(before) - len(behind)
            if len(inner) > room and over_length != "cut":
                result.dropped.append((record.where, len(inner) + len(before) + len(behind)))
                continue
            ids = np.array([*before, *inner[:room], *behind], np.int32)
            segment = Segment(ids, np.zeros(len(ids), np.float32))
            cut = encoder.decode(inner[room:]) if len(inner) > room else ""
            result.examples.append(Example(record.where, (segment,), cut, numbers.get(record.label, -1)))
            result.kept.append(record)
    if over_length == "error":
        result.reject_dropped(max_length, "drop or cut")
    return result
