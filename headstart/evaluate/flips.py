"""Rows that a run put right, and rows that it put wrong."""

from __future__ import annotations

from typing import Any

from headstart.evaluate.measure import Measured, RowResult
from headstart.evaluate.metrics import exact_match, won


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
    right = [(_is_right(b, after.task), _is_right(a, after.task)) for b, a in zip(before.own, after.own, strict=True)]
    known = [(was, now) for was, now in right if was is not None and now is not None]
    return [float(now) - float(was) for was, now in known] if any(map(any, known)) else []


def _is_right(row: RowResult, task: str) -> bool | None:
    """Tell whether a row was answered rightly, or its better answer gained the most; None where it wasn't answered."""
    if task == "preference":
        return won(row.truth, row.found) == 1.0
    if row.answer is None:
        return None
    if task == "multilabel":
        return set(row.truth) == set(row.found)
    return bool(exact_match(row.answer, row.reference))
