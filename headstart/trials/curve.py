"""A learning curve: how good a model gets with how many rows, on the same held-out rows; with and without the head start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headstart.begin import WRITES, decide_adapter
from headstart.config import Config, Override, as_names, build_config
from headstart.dataset import Data, build_data
from headstart.display import Display
from headstart.errors import DivergedError, Problem, UsageError
from headstart.files import write_atomic, write_json
from headstart.report.reasons import curve_words
from headstart.report.trials import PRETRAINED, RANDOM, curve_page
from headstart.report.words import VERDICTS, bounds, named
from headstart.trials.retell import read_measured, retell
from headstart.trials.scratch import from_random, need_learnable
from headstart.trials.study import Outcome, Study, same_rows, study_path, vary

ROWS = (10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000)  # as far as there are so many, and then all


@dataclass(frozen=True)
class Curve:
    """Runs on ever more rows, one way or both: `tuned` and `random` are in the order of `rows`."""

    path: Path
    metric: str
    lower_is_better: bool
    rows: Sequence[int]
    tuned: Sequence[Outcome]
    random: Sequence[Outcome] = ()

    def value(self, outcome: Outcome) -> float | None:
        """Return the metric of a run's model; None where it failed."""
        return outcome.result["after"][self.metric]["value"] if outcome.result else None

    @property
    def reached(self) -> dict[str, Any] | None:
        """The best score from random weights, how many rows it took there, and how few with the head start (None: never)."""
        sense = -1 if self.lower_is_better else 1
        scores = [(sense * value, -n) for n, o in zip(self.rows, self.random, strict=False) if (value := self.value(o))]
        if not scores:
            return None
        best, rows = max(scores)
        enough = [
            n
            for n, o in zip(self.rows, self.tuned, strict=True)
            if (v := self.value(o)) is not None and sense * v >= best
        ]
        return {"value": sense * best, "random_rows": -rows, "tuned_rows": min(enough, default=None)}

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "curve": str(self.path),
            "metric": self.metric,
            "lower_is_better": self.lower_is_better,
            "rows": list(self.rows),
            "tuned": [outcome.to_json() for outcome in self.tuned],
            "random": [outcome.to_json() for outcome in self.random],
            "reached": self.reached,
            "page": str(self.path / "curve.html"),
        }


def curve(
    data: str | Path | Sequence[str | Path],
    rows: Sequence[int] | None = None,
    *,
    from_scratch: bool = False,
    settings: Mapping[str, Any] | None = None,
    display: Display | None = None,
) -> Curve:
    """Tune on the first of the rows to train on, ever more of them, and score each on the same held-out rows.

    `settings` are those of `tune`, `out` and `model` among them. What isn't settled, the epochs say, is decided for each
    number of rows. A folder that was begun with the same goes on. Raises what `tune` raises.
    """
    named_values = {"data.train": as_names(data), **(settings or {})}
    config = build_config(None, [Override(key, value, "argument") for key, value in named_values.items()])
    return curve_config(config, rows, display or Display(), from_scratch=from_scratch)


def curve_config(config: Config, rows: Sequence[int] | None, display: Display, *, from_scratch: bool) -> Curve:
    """Draw the learning curve of these settings."""
    counts, data = _counts(config, rows)
    task = data.config.settings.task
    if from_scratch:
        _need_shape(config, data)
    if task in WRITES and not config.given("eval.guard"):
        config = vary(config, {"eval.guard": "off"})  # what it knew before is another question
    path = study_path("curve", config)
    study = Study(path, config, {"rows": counts})
    ways = [("rows", config), *([("random", from_random(config))] if from_scratch else [])]
    with study.begun():
        display.title(f"learning curve: {', '.join(f'{count:,}' for count in counts)} rows")
        found: list[list[Outcome]] = []
        for name, under in ways:
            outcomes = [
                study.carry_out(f"{name}-{count}", {"data.rows": count}, display, prove=True, under=under)
                for count in counts
            ]
            found.append(outcomes)
        same_rows([outcome for outcomes in found for outcome in outcomes], "data")
        drawn = _drawn(path, counts, found)
        write_json(path / "curve.json", drawn.to_json())
        write_atomic(path / "curve.html", curve_page(drawn.to_json()))
        if drawn.tuned[-1].result:
            retell(Path(drawn.tuned[-1].run), "curve", drawn.to_json())
        return drawn


def _drawn(path: Path, counts: Sequence[int], found: Sequence[Sequence[Outcome]]) -> Curve:
    whole = [outcome for outcomes in found for outcome in outcomes if outcome.result]
    if not whole:
        failed = found[0][0]
        cure = "lower optim.lr, or see its log.txt"
        raise DivergedError(Problem("numbers.not_finite", failed.failed, failed.run, cure))
    measured = read_measured(Path(whole[0].run), "after")
    metric = (whole[-1].result or {})["difference"]["metric"]
    return Curve(path, metric, measured.metrics()[metric].lower_is_better, counts, *found)


def _need_shape(config: Config, data: Data) -> None:
    """Raise UsageError where random weights can't learn what is to be learned, or have no shape, before anything is trained."""
    need_learnable(data.config.settings.task, "--from-scratch", "leave it out")
    decide_adapter(from_random(config), data.source)


def _counts(config: Config, rows: Sequence[int] | None) -> tuple[list[int], Data]:
    """Return on how many rows it is trained, the fewest first, and the data. Raises UsageError where there are fewer."""
    if config.given("data.rows"):
        what = "`data.rows` is what varies"
        raise UsageError(Problem("config.no_effect", what, "data.rows", "leave it out, and name several: --rows 10,30"))
    data = build_data(config)
    data.reject_bad_rows()
    there = len(data.prepared.parts.train)
    counts = sorted(set(rows)) if rows else [*(count for count in ROWS if count < there), there]
    if counts[0] < 1 or counts[-1] > there:
        what = f"{', '.join(map(str, counts))} rows, and there are {there:,} to train on"
        raise UsageError(Problem("usage.flag", what, "--rows", f"from 1 to {there}"))
    return counts, data


def say_curve(display: Display, found: Curve) -> None:
    """Say how the model got better with more rows."""
    display.title(f"{named(found.metric)} on the same held-out rows, by the rows trained on")
    for way, outcomes in ((PRETRAINED, found.tuned), (RANDOM, found.random)):
        for count, outcome in zip(found.rows, outcomes, strict=False):
            display.line(f"  {count:>7,} rows {way:<20} {_told(found, outcome)}")
    if said := curve_words(found.to_json()):
        display.line(f"  {said}", "bold")
    display.fact("page", str(found.path / "curve.html"))


def _told(found: Curve, outcome: Outcome) -> str:
    if outcome.result is None:
        return f"failed: {outcome.failed}"
    before, after = (outcome.result[side][found.metric] for side in ("before", "after"))
    return f"{before['value']:.3f} -> {after['value']:.3f} [{bounds(after)}]  {VERDICTS[outcome.result['verdict']]}"
