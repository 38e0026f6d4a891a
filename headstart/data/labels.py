"""Labelled texts -> examples: the tokens of a text as the model frames it, and what is told of it as numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.data.encode import Encoder
from headstart.data.records import Conversation, Label, Labelled, Picture, Record, Tagged
from headstart.data.segments import ROWS_AT_ONCE, Example, Segment, Segmented
from headstart.errors import DataError, Problem

SHOWN = 3
UNEVEN = 10
OUTSIDE = "O"
ANSWERS_REPEATED, ANSWER_MAX, CHOICES_MAX = 4, 100, 1_000  # an answer's rows at least, its characters, answers in all


@dataclass(frozen=True)
class Labels:
    """What a model tells: the classes (or tags, or the names of numbers) in order, and how often training sees each.

    Numbers are learned as (value - `mean`) / `spread`, both over the rows to train on. `threshold` is the probability
    from which one of several classes is told.
    """

    task: str
    names: tuple[str, ...]
    counts: tuple[int, ...] = ()
    mean: tuple[float, ...] = ()
    spread: tuple[float, ...] = ()
    threshold: float = 0.5

    def encode(self, label: Label) -> int | NDArray[np.float32]:
        """Return a label as what outputs are held against; a class that isn't known is -1, or in no place."""
        if self.task == "regression":
            # Of a row that is yet to be labelled, the mean stands in.
            numbers = np.array([float(value) for value in label] or self.mean, np.float64)
            standard: NDArray[np.float32] = ((numbers - self.mean) / np.array(self.spread)).astype(np.float32)
            return standard
        if self.task == "multilabel":
            return np.array([float(name in label) for name in self.names], np.float32)
        return self._numbers.get(str(label), -1)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    def class_weights(self) -> list[float]:
        """Return what a row of each class weighs, so that all classes together weigh alike ("balanced" of scikit-learn)."""
        total = sum(self.counts)
        return [total / (len(self.counts) * max(1, count)) for count in self.counts]

    def to_json(self) -> dict[str, Any]:
        """The labels as plain values."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> Labels:
        """Read what `to_json` gave."""
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return Labels(**known)


REWARD = Labels("reward", ("reward",))  # what a reward model tells of an answer


def classes_of(record: Record) -> Sequence[str]:
    """Return the classes that a row has: one, several, or those of its tags."""
    if isinstance(record, Tagged):
        return record.tags
    if isinstance(record, Picture):
        return (record.label,)
    if isinstance(record, Labelled):
        return (record.label,) if isinstance(record.label, str) else [v for v in record.label if isinstance(v, str)]
    return ()


def find_labels(records: Sequence[Record], task: str, names: Sequence[str] = (), known: Labels | None = None) -> Labels:
    """Return what the rows to train on tell; classes in order, by number where all are numbers.

    `names` are those of the columns of numbers. `known` is what the model tells already: its classes stay, and so does a scale
    of its own. Raises DataError where there is only one class, or a number that never changes.
    """
    known = known if known is not None and known.task == task else None
    if task == "regression":
        found = _find_numbers([r for r in records if isinstance(r, Labelled)], names)
        scaled = known is not None and known.names == found.names and known.mean != (0.0,) * len(found.names)
        return replace(found, mean=known.mean, spread=known.spread) if known and scaled else found
    counts = Counter(name for record in records for name in classes_of(record))
    counts.update(dict.fromkeys(known.names if known else (), 0))
    if len(counts) < (1 if task == "multilabel" else 2):
        only = f"the label {next(iter(counts))!r}" if counts else "no label"
        what = f"every row to train on has {only}"
        raise DataError(Problem("labels.one", what, "data.label", "give rows of two classes or more"))
    numbers = all(label.lstrip("-").isdigit() for label in counts)
    ordered = sorted(counts, key=lambda label: (int(label), label) if numbers else (0, label))
    return Labels(task, tuple(ordered), tuple(counts[name] for name in ordered))


def _find_numbers(records: Sequence[Labelled], names: Sequence[str]) -> Labels:
    widths = Counter(len(record.label) for record in records)
    width = widths.most_common(1)[0][0]
    odd = [record.where for record in records if len(record.label) != width]
    if odd:
        cure = f"{width} numbers a row"
        raise DataError(Problem("row.label", f"not {width} numbers, as others have", str(where), cure) for where in odd)
    values = np.array([record.label for record in records], np.float64)
    mean, spread = values.mean(0), values.std(0)
    if not (spread > 0).all():
        what = "a number to learn is the same in every row to train on"
        raise DataError(Problem("labels.one", what, "data.label", "give rows that differ in it"))
    known = tuple(names) if len(names) == width else tuple(f"number {n + 1}" for n in range(width))
    return Labels("regression", known, (), tuple(mean.tolist()), tuple(spread.tolist()))


def find_choices(records: Sequence[Record]) -> tuple[str, ...]:
    """Return the answers of conversations, in order, where a few stand again and again: then they are classes."""
    rows = [record for record in records if isinstance(record, Conversation)]
    if any(message.reasoning for row in rows for message in row.messages):
        return ()  # what is told depends on what was thought
    return choose_answers(Counter(row.messages[-1].content for row in rows))


def choose_answers(answers: Mapping[str, int]) -> tuple[str, ...]:
    """Return answers, each with the number of its rows, in order, where a few stand again and again."""
    repeated = sum(answers.values()) >= ANSWERS_REPEATED * len(answers)
    short = all(answer.strip() and len(answer) <= ANSWER_MAX for answer in answers)
    return tuple(sorted(answers)) if repeated and short and 1 < len(answers) <= CHOICES_MAX else ()


def label_notes(train: Sequence[Record], held: Sequence[Record], labels: Labels) -> list[str]:
    """Return what people should know of the labels: how many, how even, which are rare, which are unseen."""
    if labels.task == "regression":
        return [
            f"{name}: mean {mean:.4g}, standard deviation {spread:.4g} over the rows to train on"
            for name, mean, spread in zip(labels.names, labels.mean, labels.spread, strict=True)
        ]
    counts = Counter(dict(zip(labels.names, labels.counts, strict=True)))
    common, rare = counts.most_common()[0], counts.most_common()[-1]
    what = "words" if labels.task == "tagging" else "rows"
    noun = "tags" if labels.task == "tagging" else "classes"
    notes = [
        f"{len(counts):,} {noun}, of {rare[1]:,} ({rare[0]!r}) to {common[1]:,} ({common[0]!r}) {what} to train on"
    ]
    if labels.task == "tagging":
        notes += _tag_notes([record for record in (*train, *held) if isinstance(record, Tagged)])
    elif common[1] > UNEVEN * rare[1]:
        cure = "-s data.class_weights=balanced lets rare ones weigh more"
        notes.append(f"the classes are uneven: look at macro F1, which counts each class alike; {cure}")
    single = sorted(label for label, count in counts.items() if count == 1)
    if single:
        notes.append(f"{len(single):,} {noun} have one {what[:-1]} to train on: {_some(single)}")
    unseen = sorted({name for record in held for name in classes_of(record)} - set(counts))
    if unseen:
        rows = sum(any(name in unseen for name in classes_of(record)) for record in held)
        notes.append(
            f"{rows:,} rows to score on have labels that training never sees, and count as wrong: {_some(unseen)}"
        )
    return notes


def _tag_notes(records: Sequence[Tagged]) -> list[str]:
    inside = [record.where for record in records if begins_inside(record.tags)]
    if not inside:
        return []
    return [
        f"{len(inside):,} rows have an entity that begins with I-, not B-; it is read as an entity all the same, first {inside[0]}"
    ]


def begins_inside(tags: Sequence[str]) -> bool:
    """Tell whether a tag I-X follows neither B-X nor I-X."""
    before = [OUTSIDE, *tags]
    return any(tag.startswith("I-") and last[2:] != tag[2:] for last, tag in zip(before, tags, strict=False))


def _some(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - SHOWN:,} more" if len(labels) > SHOWN else ""
    return ", ".join(map(repr, labels[:SHOWN])) + more


def segment_labelled(
    records: Sequence[Labelled], encoder: Encoder, labels: Labels | None, *, max_length: int, over_length: str = "drop"
) -> Segmented:
    """Encode labelled texts; those over `max_length` tokens are dropped, cut at their end or an error, as said.

    Of a pair the longer text is cut. Without `labels` the rows are yet to be labelled. Raises DataError with every row
    over the length where `over_length` is `error`.
    """
    result = Segmented()
    for start in range(0, len(records), ROWS_AT_ONCE):
        part = records[start : start + ROWS_AT_ONCE]
        encoded = encoder.encode_texts([text for record in part for text in record.texts])
        place = 0
        for record in part:
            texts = encoded[place : place + len(record.texts)]
            place += len(record.texts)
            if not all(texts):
                result.problems.append(no_tokens(record))
                continue
            room = max_length - encoder.frame_length(len(texts))
            over = sum(map(len, texts)) - room
            if over > 0 and over_length != "cut":
                result.dropped.append((record.where, max_length + over))
                continue
            kept, cut = _cut(texts, room) if over > 0 else (texts, [])
            ids, types = encoder.frame_texts(kept)
            segment = Segment(
                np.array(ids, np.int32),
                np.zeros(len(ids), np.float32),
                types=np.array(types, np.int32) if any(types) else None,
            )
            if labels and labels.task == "regression" and record.label and len(record.label) != len(labels.names):
                what = f"{len(record.label)} numbers where {len(labels.names)} are learned"
                result.problems.append(
                    Problem("row.label", what, str(record.where), f"{len(labels.names)} numbers a row")
                )
                continue
            label = labels.encode(record.label) if labels else -1
            result.examples.append(Example(record.where, (segment,), encoder.decode(cut), label))
            result.kept.append(record)
    if over_length == "error":
        result.reject_dropped(max_length, "drop or cut")
    return result


def no_tokens(record: Record) -> Problem:
    """Return what is wrong with a text of which a tokenizer keeps nothing: of lone joiners, say."""
    return Problem("row.empty_text", "the text gives no token", str(record.where), "delete the row")


def _cut(texts: Sequence[list[int]], room: int) -> tuple[list[list[int]], list[int]]:
    """Cut the end of the longest text until all fit, and return what was cut."""
    kept = [list(text) for text in texts]
    cut: list[int] = []
    while sum(map(len, kept)) > room:
        longest = max(kept, key=len)
        over = sum(map(len, kept)) - room
        second = sorted(map(len, kept))[-2] if len(kept) > 1 else 0
        take = min(over, max(1, len(longest) - second))
        cut = longest[-take:] + cut
        del longest[-take:]
    return kept, cut


def segment_tagged(
    records: Sequence[Tagged], encoder: Encoder, labels: Labels, *, max_length: int, over_length: str = "drop"
) -> Segmented:
    """Encode words with tags: each word's first token is held against its tag.

    Rows over `max_length` tokens are dropped, cut at their end or an error, as said; a word that gives no token at all
    is a problem of its row. Raises DataError with every row over the length where `over_length` is `error`.
    """
    result = Segmented()
    for start in range(0, len(records), ROWS_AT_ONCE):
        part = records[start : start + ROWS_AT_ONCE]
        for record, pieces in zip(part, encoder.encode_split([record.words for record in part]), strict=True):
            if empty := [n for n, piece in enumerate(pieces) if not piece]:
                result.problems.append(_no_token(record, empty[0]))
                continue
            before, behind = encoder.frame
            room = max_length - len(before) - len(behind)
            if over_length == "cut":
                pieces[0] = pieces[0][:room]  # of a first word that doesn't fit, what does
            ends = np.cumsum([len(piece) for piece in pieces])
            fitting = int(np.searchsorted(ends, room, side="right"))
            if fitting < len(pieces) and (over_length != "cut" or not fitting):
                result.dropped.append((record.where, int(ends[-1]) + max_length - room))
                continue
            ids = np.array([*before, *(id_ for piece in pieces[:fitting] for id_ in piece), *behind], np.int32)
            firsts = len(before) + np.concatenate([[0], ends[: fitting - 1]]).astype(np.int64)
            numbers = np.array([labels.encode(tag) for tag in record.tags[:fitting]], np.int32)
            targets, weights = np.zeros(len(ids), np.int32), np.zeros(len(ids), np.float32)
            # A tag that training never saw has no loss; it still counts as an entity that isn't found.
            targets[firsts], weights[firsts] = np.maximum(numbers, 0), numbers >= 0
            asked = np.zeros(len(ids), np.float32)
            asked[firsts] = 1.0
            cut = " ".join(record.words[fitting:])
            result.examples.append(Example(record.where, (Segment(ids, weights, targets=targets, asked=asked),), cut))
            result.kept.append(record)
    if over_length == "error":
        result.reject_dropped(max_length, "drop or cut")
    return result


def _no_token(record: Tagged, number: int) -> Problem:
    what = f"the word {record.words[number]!r} gives no token"
    return Problem("row.tags", what, record.where.field(f"word[{number}]"), "delete the word and its tag")
