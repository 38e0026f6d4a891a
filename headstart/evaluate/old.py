"""Old rows: what a run that goes on from another made of the rows that were held out of that one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headstart.evaluate.compare import MIN_ROWS, Compared, compare
from headstart.evaluate.guard import FEW, KEPT, LOST, UNCLEAR
from headstart.evaluate.measure import Measured

# The part of what a run had gained on its rows that may go: what is kept is nineteen twentieths. As non-inferiority is judged:
# by a fraction of the effect that was shown (FDA, "Non-Inferiority Clinical Trials to Establish Effectiveness", 2016).
BOUND = 0.05


@dataclass(frozen=True)
class OldPart:
    """A run's held-out rows before and after, and by how much they may get worse (`bound`, in the metric's own unit)."""

    name: str
    compared: Compared
    bound: float

    @property
    def verdict(self) -> str:
        """Return `lost` where it is certain that more than the bound went, `kept` where it is certain that it didn't."""
        if self.compared.rows < MIN_ROWS:
            return FEW
        sense = -1 if self.compared.lower_is_better else 1
        gap = self.compared.difference
        low, high = sorted((sense * gap.low, sense * gap.high))
        if self.compared.direction < 0 and high < -self.bound:
            return LOST
        return KEPT if low >= -self.bound else UNCLEAR

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        found = self.compared
        sides = {"before": found.before, "after": found.after, "difference": found.difference}
        return {
            "metric": found.name,
            **{name: side.to_json() for name, side in sides.items()},
            "bound": self.bound,
            "rows": found.rows,
            "grouped": found.grouped,
            "verdict": self.verdict,
        }


def compare_old(before: Measured, after: Measured, gains: Mapping[str, Mapping[str, float]]) -> list[OldPart]:
    """Compare the rows of each run that `gains` names: the difference that it had made in each metric of them."""
    first, second = before.parts(), after.parts()
    found = []
    for name, gained in gains.items():
        if name not in first or name not in second:
            continue
        metric, was = first[name]
        gain = gained.get(metric, 0.0) * (-1 if was.lower_is_better else 1)
        found.append(OldPart(name, compare(metric, was, second[name][1]), BOUND * max(0.0, gain)))
    return found


def old_result(parts: Sequence[OldPart]) -> dict[str, Any]:
    """Return old rows as the result holds them: their verdict is that of the worst part."""
    verdicts = [part.verdict for part in parts]
    worst = next(name for name in (LOST, UNCLEAR, FEW, KEPT) if name in verdicts)
    return {"verdict": worst, "bound": BOUND, "parts": {part.name: part.to_json() for part in parts}}
