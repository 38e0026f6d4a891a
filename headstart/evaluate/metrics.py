"""Scores of an answer against its reference, each between 0 and 1 (chrF between 0 and 100)."""

from __future__ import annotations

import re
from collections.abc import Sequence

WORD = re.compile(r"\w+")


def exact_match(answer: str, reference: str) -> float:
    """Return 1 where the two are equal up to white space."""
    return float(answer.split() == reference.split())


def rouge_l(answer: str, reference: str) -> float:
    """Return ROUGE-L F1 over lower-case words (Lin, 2004): the longest common subsequence against both lengths."""
    a, b = WORD.findall(answer.lower()), WORD.findall(reference.lower())
    common = _common_subsequence(a, b)
    return 2 * common / (len(a) + len(b)) if common else 0.0


def chrf(answer: str, reference: str) -> float:
    """Return sentence chrF, 0 to 100, as sacrebleu computes it (Popović, 2015)."""
    import sacrebleu

    return float(sacrebleu.sentence_chrf(answer, [reference]).score)


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        previous = 0
        for place, other in enumerate(b, 1):
            above = row[place]
            row[place] = previous + 1 if word == other else max(above, row[place - 1])
            previous = above
    return row[-1]
