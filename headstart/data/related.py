"""Texts that belong together -> examples: a segment each, in the model's frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from headstart.data.encode import Encoder
from headstart.data.labels import no_tokens
from headstart.data.records import Document, Related
from headstart.data.segments import ROWS_AT_ONCE, Example, Segment, Segmented
from headstart.errors import DataError, Problem


def as_related(document: Document, *, halves: bool) -> Related:
    """Return a text as a row of texts that belong together: itself twice, or its halves, by which it is scored."""
    if not halves:
        return Related(document.where, (document.content, document.content), group=document.group)
    words = document.content.split()
    middle = -(-len(words) // 2)
    parts = " ".join(words[:middle]), " ".join(words[middle:]) or document.content
    return Related(document.where, parts, group=document.group)


def scale_scores(rows: Sequence[Related], like: Sequence[Related]) -> list[Related]:
    """Return rows whose scores lie between 0 and 1, where the lowest and the highest of `like` lie.

    Without scores in `like` they are scaled by their own. Raises DataError where all scores are the same.
    """
    scores = [row.score for row in like if row.score is not None] or [
        row.score for row in rows if row.score is not None
    ]
    if not scores:
        return list(rows)
    low, high = min(scores), max(scores)
    if low == high:
        cure = "give pairs that differ in it, or leave the score out: then each pair is one that fits"
        raise DataError(Problem("labels.one", f"every score is {low:g}", "data.label", cure))
    return [row if row.score is None else replace(row, score=(row.score - low) / (high - low)) for row in rows]


def segment_related(
    rows: Sequence[Related], encoder: Encoder, *, max_length: int, over_length: str = "drop"
) -> Segmented:
    """Encode texts that belong together; rows with a text over `max_length` tokens are dropped, cut or an error.

    Raises DataError with every row over the length where `over_length` is `error`.
    """
    result = Segmented()
    room = max_length - encoder.frame_length(1)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE]
        encoded = iter(encoder.encode_texts([text for row in part for text in row.texts]))
        for row in part:
            texts = [next(encoded) for _ in row.texts]
            if not all(texts):
                result.problems.append(no_tokens(row))
                continue
            longest = max(map(len, texts))
            if longest > room and over_length != "cut":
                result.dropped.append((row.where, longest + max_length - room))
                continue
            cut = encoder.decode([id_ for text in texts for id_ in text[room:]])
            framed = [np.array(encoder.frame_texts([text[:room]])[0], np.int32) for text in texts]
            segments = tuple(Segment(ids, np.zeros(len(ids), np.float32)) for ids in framed)
            score = np.array([np.nan if row.score is None else row.score], np.float32)
            result.examples.append(Example(row.where, segments, cut, score))
            result.kept.append(row)
    if over_length == "error":
        result.reject_dropped(max_length, "drop or cut")
    return result
