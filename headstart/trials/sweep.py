"""Several settings tried on a part of a full run each, the best of them trained on, and the last one proven."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headstart.config import Config, Override, as_names, build_config
from headstart.display import Display, in_time
from headstart.errors import DivergedError, Problem, UsageError
from headstart.files import write_atomic, write_json
from headstart.report.trials import sweep_page
from headstart.trials.halving import (
    Drawn,
    Grid,
    Over,
    Range,
    Rung,
    Values,
    cost,
    find_proposals,
    parse_over,
    plan_rungs,
    promote,
)
from headstart.trials.study import (
    Outcome,
    Study,
    free_memory,
    need_evaluations,
    need_watched,
    same_rows,
    study_path,
    vary,
)
from headstart.tune import resume
from headstart.verbs import plan_config

# What decides which rows are scored, or what a loss means: trials that differ in it don't compare.
FIXED = {
    "out": "it is where a run lies",
    "seed": "luck isn't chosen: headstart tune DATA --seeds 3 tells its spread",
    "epochs": "every trial of a rung is trained on as many rows",
    "steps": "every trial of a rung is trained on as many rows",
    "data.rows": "headstart curve DATA tells what more rows give",
    **dict.fromkeys(("data.eval", "data.held_out", "data.group_by"), "other rows would be held out"),
}
FIXED_SECTIONS = {
    "eval": "trials are scored alike",
    "save": "it changes no model",
    "preference": "another objective's loss is on another scale",
}


@dataclass(frozen=True)
class Swept:
    """A sweep: its rungs, the trials of each with what became of them, and the run that came out."""

    path: Path
    over: Mapping[str, Any]
    rungs: Sequence[Rung]
    outcomes: Sequence[Sequence[Outcome]]
    winner: Outcome

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        rungs = [
            {"share": rung.share, "trials": [outcome.to_json() for outcome in found]}
            for rung, found in zip(self.rungs, self.outcomes, strict=True)
        ]
        return {
            "sweep": str(self.path),
            "over": self.over,
            "full_runs": cost(self.rungs),
            "rungs": rungs,
            "winner": self.winner.to_json(),
            "page": str(self.path / "sweep.html"),
        }


def sweep(
    data: str | Path | Sequence[str | Path],
    over: Mapping[str, Sequence[Any] | str],
    *,
    trials: int | None = None,
    budget: float | None = None,
    settings: Mapping[str, Any] | None = None,
    display: Display | None = None,
) -> Swept:
    """Try `over`, dotted keys with the values of each (or a range, `"1e-5..1e-3"`), and carry the best to its end.

    `settings` are those of `tune`, `out` and `model` among them. Trials are told apart by the watched rows; of the proof none
    is scored before the winner is trained. A folder that was begun with the same goes on. Raises what `tune` raises.
    """
    named = {"data.train": as_names(data), **(settings or {})}
    config = build_config(None, [Override(key, value, "argument") for key, value in named.items()])
    texts = [f"{key}={v if isinstance(v, str) else ','.join(map(str, v))}" for key, v in over.items()]
    return sweep_config(config, parse_over(texts), trials, budget, display or Display())


def sweep_config(config: Config, over: Over, trials: int | None, budget: float | None, display: Display) -> Swept:
    """Sweep over settings that lie under each trial's own."""
    _check(config, over)
    proposals = find_proposals(over, trials, config.settings.seed)
    rungs = plan_rungs(proposals.count, budget)
    path = study_path("sweep", config)
    told = {key: str(values) if isinstance(values, Range) else list(values) for key, values in over.items()}
    study = Study(path, config, {"over": told, "trials": trials, "budget": budget})
    with study.begun():
        full = _full_run(config, over, rungs, display)
        outcomes: list[list[Outcome]] = []
        entrants: list[tuple[int, Values]] = []
        for place, rung in enumerate(rungs):
            _say_rung(display, place, rung)
            share = {key: _part(amount, rung.share) for key, amount in full.items()}
            found = []
            for number, own in entrants if place else _first(proposals):
                outcome = study.carry_out(f"rung-{place + 1}/{number:02d}", {**own, **share}, display, prove=False)
                _say_trial(display, number, own, outcome)
                found.append((number, own, outcome))
                if not place:
                    proposals.tell(outcome.loss)
            outcomes.append([outcome for *_, outcome in found])
            same_rows(outcomes[-1], "--over")
            on = rungs[place + 1].trials if place + 1 < len(rungs) else 1
            best = promote([outcome.loss for outcome in outcomes[-1]], on)
            _need_one(best, outcomes[-1])
            entrants = [found[at][:2] for at in best]
        winner = _prove(study, outcomes[-1][best[0]], display)
        swept = Swept(path, told, rungs, outcomes, winner)
        write_json(path / "sweep.json", swept.to_json())
        write_atomic(path / "sweep.html", sweep_page(swept.to_json()))
        return swept


def _first(proposals: Grid | Drawn) -> Iterator[tuple[int, Values]]:
    """Yield the trials of the first rung, each once what became of the one before it was told."""
    for number in range(1, proposals.count + 1):
        yield number, proposals.propose()


def _check(config: Config, over: Over) -> None:
    """Raise UsageError with every setting that can't be swept over, and every value that it can't have."""
    need_evaluations(config)
    problems = []
    for key, values in over.items():
        why = FIXED.get(key) or FIXED_SECTIONS.get(key.partition(".")[0])
        if why:
            problems.append(
                Problem("usage.flag", f"`{key}` can't be swept over: {why}", "--over", f"leave out `{key}`")
            )
            continue
        if key == "batch_size" and config.given("steps"):
            cure = "say how long a full run is in epochs: --epochs 3"
            what = "`steps` is given, and steps of other sizes are other amounts of training"
            problems.append(Problem("config.bad_value", what, "batch_size", cure))
        for value in (values.low, values.high) if isinstance(values, Range) else values:
            try:
                vary(config, {key: value})
            except UsageError as error:
                problems += error.problems
    if problems:
        raise UsageError(problems)


def _full_run(config: Config, over: Over, rungs: Sequence[Rung], display: Display) -> dict[str, float]:
    """Return how long a full run is, as the setting that says so, as `tune` would decide it; say what the sweep takes."""
    first = {key: values.low if isinstance(values, Range) else values[0] for key, values in over.items()}
    job = plan_config(vary(config, first), Display(live=False, whole=display, name="plan"))
    plan, settings = job.plan(), job.config.settings
    need_watched(plan["watch_rows"])
    del job
    free_memory()
    display.title(f"sweep: {rungs[0].trials} trials in {len(rungs)} rungs, {cost(rungs):.1f} full runs in all")
    rows = (
        f"{plan['train_rows']:,} to train on, {plan['watch_rows']:,} to choose by, {plan['proof_rows']:,} for the proof"
    )
    display.fact("rows", rows)
    display.fact("a full run", f"{plan['epochs']:g} epochs, about {in_time(plan['train_s'])} of training")
    display.fact("in all", f"about {in_time(plan['train_s'] * cost(rungs))} of training, if trials take alike")
    return {"steps": settings.steps} if settings.steps else {"epochs": settings.epochs or 1.0}


def _part(amount: float, share: float) -> float:
    """Return a part of a full run: of steps a whole number."""
    return max(1, round(amount * share)) if isinstance(amount, int) else amount * share


def _need_one(best: Sequence[int], found: Sequence[Outcome]) -> None:
    """Raise DivergedError where no trial of a rung came through."""
    if best:
        return
    cure = "lower optim.lr, or lower what the trials vary"
    raise DivergedError(Problem("numbers.not_finite", outcome.failed, outcome.run, cure) for outcome in found)


def _prove(study: Study, best: Outcome, display: Display) -> Outcome:
    """Carry the winner to its end: only now rows of the proof are scored."""
    display.title(f"the best: {told_settings(best.settings)}")
    resume(Path(best.run), display)
    return study.read_again(best)


def _say_rung(display: Display, place: int, rung: Rung) -> None:
    display.title(f"rung {place + 1}: {rung.trials} trials, each {rung.share:.0%} of a full run")


def _say_trial(display: Display, number: int, own: Mapping[str, Any], outcome: Outcome) -> None:
    loss = outcome.loss
    told = f"failed: {outcome.failed}" if loss is None else f"loss {loss:.4f} on the watched rows"
    display.line(f"  {number:02d}  {told_settings(own):<44} {told}")


def say_swept(display: Display, found: Swept) -> None:
    """Say where the sweep lies, and what came out."""
    display.title(f"of {found.rungs[0].trials} trials the best: {told_settings(found.winner.settings)}")
    display.fact("run", found.winner.run)
    display.fact("all trials", str(found.path / "sweep.html"))


def told_settings(settings: Mapping[str, Any]) -> str:
    """Return settings as a user writes them, without how long a trial is."""
    return " ".join(f"{key}={value}" for key, value in settings.items() if key not in ("epochs", "steps"))
