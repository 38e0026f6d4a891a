"""Rows that a run put right, and rows that it put wrong."""

from __future__ import annotations

from typing import Any

from headstart.evaluate.measure import Measured, RowResult
from headstart.evaluate.metrics import exact_match


def count_flips(before: Measured, after: Measured) -> dict[str, Any]:
    """Return how many rows went from wrong to right (`fixed`) and back (`broken`), with McNemar's exact p (1947).

    Of texts, numbers and embeddings, which are neither right nor wrong, and where no answer is ever the reference: on how
    many rows the loss fell and rose, with the p of the sign test.
    """
    from scipy.stats import binomtest

    metric, changes = "right", _right(before, after)
    if not changes:
        metric, changes = "loss", [b.nll - a.nll for b, a in zip(before.own, after.own, strict=True)]
    fixed, broken = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    p = float(binomtest(fixed, fixed + broken).pvalue) if fixed + broken else 1.0
    return {"metric": metric, "fixed": fixed, "broken": broken, "rows": len(changes), "p": p}


def _right(before: Measured, after: Measured) -> list[float]:
    """Return for each row that was answered how much righter it is: 1, 0 or -1; nothing where rows can't be right."""
    if after.task in ("causal", "masked", "regression", "embedding"):
        return []
    pairs = [
        (b, a) for b, a in zip(before.own, after.own, strict=True) if b.answer is not None and a.answer is not None
    ]
    right = [(_is_right(b), _is_right(a)) for b, a in pairs]
    return [a - b for b, a in right] if any(map(any, right)) else []


def _is_right(row: RowResult) -> float:
    return exact_match(row.answer or "", row.reference)
