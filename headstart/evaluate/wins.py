"""Who wins: the answers of two models, or of one before and after, held against each other row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headstart.evaluate.compare import (
    Interval,
    Ratio,
    cluster,
    has_groups,
    interval,
    paired_difference,
    paired_p,
    sign_test,
)
from headstart.evaluate.measure import Measured, RowResult
from headstart.evaluate.metrics import chrf

BY_LIKENESS = {"preference": "chrF to the chosen answer", "chat": "chrF to the reference"}

Score = Callable[[RowResult], float | None]


@dataclass(frozen=True)
class Wins:
    """How often the second of two answers is the better one, by what `by` says, how often the worse, and how often neither."""

    by: str
    wins: int
    losses: int
    ties: int
    over_groups: tuple[Interval, float] | None = None

    @property
    def rows(self) -> int:
        """How many rows were decided on."""
        return self.wins + self.losses + self.ties

    @property
    def rate(self) -> Interval:
        """The win rate, a tie counting half: a half, and half of by how much more often it wins than it loses.

        So its interval is that of a difference between pairs (Agresti and Min, 2005); of rows in groups, that over groups.
        """
        if self.over_groups:
            return self.over_groups[0]
        gap = paired_difference(self.wins, self.losses, self.rows)
        return Interval(*(0.5 + bound / 2 for bound in (gap.value, gap.low, gap.high)))

    @property
    def p(self) -> float:
        """How likely so uneven a count is by chance (the sign test, ties left out; of rows in groups, by swaps of whole groups)."""
        return self.over_groups[1] if self.over_groups else sign_test(self.wins, self.losses)

    def to_json(self) -> dict[str, Any]:
        """The counts with the rate as plain values."""
        counts = {"by": self.by, "wins": self.wins, "losses": self.losses, "ties": self.ties, "rows": self.rows}
        return {**counts, **self.rate.to_json(), "p": self.p, "grouped": self.over_groups is not None}


def count_wins(by: str, scores: Iterable[tuple[float, float]], groups: Sequence[str] = ()) -> Wins:
    """Count who wins, from the score of the first and of the second on each row; rows of one group stand or fall together."""
    pairs = list(scores)
    won = np.array([(1.0 + np.sign(b - a)) / 2 for a, b in pairs])
    wins, losses = int((won == 1).sum()), int((won == 0).sum())
    over_groups = None
    if has_groups(groups):
        rate = interval(cluster(Ratio(won, np.ones(len(won)), right=True), groups))
        over_groups = rate, paired_p(1 - won, won, groups)
    return Wins(by, wins, losses, len(pairs) - wins - losses, over_groups)


def find_wins(first: Measured, second: Measured) -> list[Wins]:
    """Return how often the second side's own answers beat the first's: by each grader, or by likeness where there are none.

    Rows count that both answered freely and that a grader graded on both sides; where there are none, nothing is returned.
    """
    pairs = [
        (a, b)
        for a, b in zip(first.own, second.own, strict=True)
        if a.answer is not None and b.answer is not None and a.probability is None and second.task in BY_LIKENESS
    ]
    names = dict.fromkeys(name for a, b in pairs for name in a.grades if name in b.grades)
    ways: dict[str, Score] = {name: lambda row, name=name: row.grades.get(name) for name in names}  # type: ignore[misc]
    if not names and pairs:
        ways = {BY_LIKENESS[second.task]: lambda row: chrf(row.answer or "", row.reference)}
    found = []
    for name, score in ways.items():
        both = [(x, y, b.group) for a, b in pairs if (x := score(a)) is not None and (y := score(b)) is not None]
        if both:
            found.append(count_wins(name, [(x, y) for x, y, _ in both], [group for *_, group in both]))
    return found
