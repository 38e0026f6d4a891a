"""Models on the same rows: what each scored, the paired differences, and where the settings of their runs differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headstart.evaluate.compare import Compared, compare_all, to_json
from headstart.evaluate.flips import Flips, find_flips
from headstart.evaluate.graders.forms import Grader
from headstart.evaluate.graders.rows import pair_grades
from headstart.evaluate.measure import PER_TOKEN, Measured
from headstart.evaluate.robust import Robust
from headstart.evaluate.wins import Wins, find_wins


@dataclass(frozen=True)
class Evaluated:
    """A model on the rows of some data: what it did on each, and its metrics with their intervals."""

    model: str
    measured: Measured
    metrics: Mapping[str, Mapping[str, Any]]
    notes: Sequence[str] = ()
    robust: Robust | None = None

    def to_json(self) -> dict[str, Any]:
        """The metrics and rows as plain values."""
        return {**self.summary(), "rows": self.measured.to_json()}

    def summary(self) -> dict[str, Any]:
        """The same without the rows."""
        robust = self.robust.to_json() if self.robust else "not measured"
        return {"model": self.model, "metrics": dict(self.metrics), "robust": robust, "notes": list(self.notes)}


@dataclass(frozen=True)
class Pair:
    """Two models on the same rows: each metric of both with the difference (second minus first), what flipped, and whose answers win."""

    a: str
    b: str
    compared: Sequence[Compared]
    flips: Flips | None
    wins: Sequence[Wins] = ()

    def to_json(self) -> dict[str, Any]:
        """The differences and flips as plain values."""
        flips = self.flips.to_json() if self.flips else None
        differences = to_json(self.compared)["differences"]
        wins = [item.to_json() for item in self.wins]
        return {"a": self.a, "b": self.b, "differences": differences, "flips": flips, "wins": wins}


@dataclass(frozen=True)
class Versus:
    """Several models on the same rows: each one against the first, and where the settings of their runs differ.

    `settings` holds for each setting that differs its value in each model's run, None where a model isn't of one.
    """

    models: Sequence[Evaluated]
    pairs: Sequence[Pair]
    settings: Mapping[str, Sequence[Any]]

    @property
    def rows(self) -> int:
        """How many rows they were scored on."""
        return len(self.models[0].measured.rows)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "models": [model.summary() for model in self.models],
            "rows": self.rows,
            "pairs": [pair.to_json() for pair in self.pairs],
            "settings": {key: list(values) for key, values in self.settings.items()},
        }


def build_versus(
    models: Sequence[Evaluated], settings: Mapping[str, Sequence[Any]], graders: Sequence[Grader] = ()
) -> Versus:
    """Compare each model with the first. A row that one of them wasn't graded on has no grade on any."""
    paired = pair_grades([model.measured for model in models])
    others = zip(models[1:], paired[1:], strict=True)
    pairs = [
        Pair(
            models[0].model,
            other.model,
            _compare(paired[0], measured),
            find_flips(paired[0], measured, graders[0] if graders else None),
            find_wins(paired[0], measured),
        )
        for other, measured in others
    ]
    return Versus(models, pairs, settings)


def _compare(first: Measured, second: Measured) -> list[Compared]:
    before, after = first.metrics(), second.metrics()
    if [row.targets for row in first.rows] != [row.targets for row in second.rows]:
        # Other tokenizers cut other tokens; a loss per token compares only over the same ones.
        before = {name: metric for name, metric in before.items() if name not in PER_TOKEN}
    return compare_all(before, after)
