"""What the head start saved: the same network trained from random weights, on the same rows in the same order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from headstart.config import Config, LoraSettings, Override, Settings, build_config
from headstart.display import Display, in_time
from headstart.errors import DivergedError, Problem, UsageError
from headstart.evaluate.compare import tell_metric
from headstart.evaluate.measure import Measured, grouped_like
from headstart.evaluate.versus import Evaluated, Pair, build_versus
from headstart.files import read_json, write_atomic, write_json
from headstart.origin import find_changes, refuse
from headstart.report.trials import PRETRAINED, RANDOM, energy_words, scratch_page
from headstart.run import Run, RunFolder
from headstart.trials.retell import read_measured, retell
from headstart.trials.study import Outcome, Point, Study, need_evaluations, need_watched, read_outcome, same_rows

# What is decided anew for random weights: all of them train, at a rate and in packs that suit that.
ANEW: Mapping[str, Any] = {
    "weights": "random",
    "method": "full",
    "optim.lr": None,
    "engine.tokens_per_pack": None,
    "engine.checkpointing": "auto",
}
ALONE: Mapping[str, Any] = {
    "out": None,
    "eval.patience": 0,  # so that it has the whole budget
    "eval.generate": 0,
    "eval.graders": (),
    "eval.guard": ("off",),
}


@dataclass(frozen=True)
class Reached:
    """A loss on the watched rows, whose it is, and when each of the two came to it, None where it never did."""

    loss: float
    whose: str
    tuned: Point | None
    random: Point | None


@dataclass(frozen=True)
class Cost:
    """What training took: seconds, what they cost at a price an hour, and joules of the processor, where they were told."""

    train_s: float
    cost: float | None
    energy_j: float | None


@dataclass(frozen=True)
class Scratch:
    """A run beside the same network from random weights."""

    path: Path
    tuned: Outcome
    random: Outcome
    reached: Sequence[Reached]
    costs: tuple[Cost, Cost]
    price: float | None
    pair: Pair | None

    @property
    def saved(self) -> float | None:
        """How many times the tokens random weights took for the best that they reached; None where the run never did, or at once."""
        best = self.reached[0]
        return best.random.tokens / best.tuned.tokens if best.tuned and best.tuned.tokens and best.random else None

    @property
    def at_once(self) -> bool:
        """Tell whether the untouched model was already as good as random weights got."""
        best = self.reached[0].tuned
        return best is not None and not best.tokens

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        tuned, random = self.costs
        return {
            "run": self.tuned.run,
            "tuned": self.tuned.to_json(),
            "random": self.random.to_json(),
            "reached": [asdict(item) for item in self.reached],
            "saved": self.saved,
            "at_once": self.at_once,
            "price": self.price,
            "costs": {"tuned": asdict(tuned), "random": asdict(random)},
            "differences": self.pair.to_json()["differences"] if self.pair else None,
            "page": str(self.path / "from_scratch.html"),
        }


def compare_scratch(
    run: str | Path,
    display: Display,
    *,
    out: str | None = None,
    price: float | None = None,
    reach: Sequence[float] = (),
    settings: Mapping[str, Any] | None = None,
) -> Scratch:
    """Train a run's network from random weights, as much and on the same rows, and hold the two against each other.

    `price` is that of an hour, `reach` are losses to look for. What is found goes into the run's result and report, too.
    Raises UsageError where there is nothing to compare, RunError where the run isn't finished, and what `tune` raises.
    """
    path = Path(run)
    config = scratch_config(path, settings or {})
    place = Path(out) if out else path.with_name(f"{path.name}-from-scratch")
    study = Study(place, config, {"run": str(path.absolute())})
    with study.begun():
        display.title("the same network from random weights")
        random = study.carry_out("random", {}, display, prove=True)
    if random.failed:
        cure = "a lower rate, -s optim.lr=1e-4, in another folder, -o"
        raise DivergedError(Problem("numbers.not_finite", random.failed, random.run, cure))
    tuned = read_outcome(path, {})
    same_rows([tuned, random], "--from-scratch")
    found = _hold(place, tuned, random, price, reach)
    write_json(place / "from_scratch.json", found.to_json())
    write_atomic(place / "from_scratch.html", scratch_page(found.to_json(), found.pair))
    retell(path, "from_scratch", found.to_json())
    return found


def scratch_config(run: Path, own: Mapping[str, Any]) -> Config:
    """Return a run's settings as they are for random weights. Raises what `compare_scratch` does before it trains."""
    folder = RunFolder.open(run)
    result, config = Run(run).result, folder.read_config()
    need_evaluations(config)
    need_watched(result["rows"]["watch"])
    if result["weights"] == "random":
        raise UsageError(Problem("usage.flag", "the run began with random weights", str(run), "a run that didn't"))
    need_learnable(result["task"], str(run), "the run that it was tuned from")
    refuse([c for c in find_changes(read_json(folder.data_file), config) if c.kind == "data"], ())
    under = from_random(config.fixed(), ALONE)
    return build_config(None, [Override(key, value, "argument") for key, value in own.items()], under)


def need_learnable(task: str, where: str, cure: str) -> None:
    """Raise UsageError where random weights can't learn what is to be learned."""
    if task == "preference":
        what = "preferences are learned by a model that writes, which random weights don't"
        raise UsageError(Problem("usage.flag", what, where, cure))


def from_random(config: Config, more: Mapping[str, Any] | None = None) -> Config:
    """Return settings as they are for random weights; `more` are others that are as if nobody had given them."""
    settings = config.settings.model_dump()
    settings["lora"] = LoraSettings().model_dump()
    anew = {**ANEW, **(more or {})}
    for key, value in anew.items():
        section, _, name = key.rpartition(".")
        (settings[section] if section else settings)[name] = value
    lost = ("lora.", *anew)
    sources = {key: source for key, source in config.sources.items() if not key.startswith(lost)}
    return Config(Settings.model_validate(settings), {**sources, "weights": "trial"})


def _hold(path: Path, tuned: Outcome, random: Outcome, price: float | None, reach: Sequence[float]) -> Scratch:
    losses = [(random.loss, f"the best {RANDOM}"), (tuned.loss, f"the best {PRETRAINED}")]
    losses += [(loss, "asked for") for loss in reach]
    sides = [*untouched_points(tuned.result or {}), *tuned.points], random.points
    reached = [
        Reached(loss, whose, *(first_at(points, loss) for points in sides))
        for loss, whose in losses
        if loss is not None
    ]
    costs = (_cost(tuned, price), _cost(random, price))
    return Scratch(path, tuned, random, reached, costs, price, _pair(tuned, random))


def untouched_points(result: Mapping[str, Any]) -> list[Point]:
    """Return where a run stood before its first step: at most at the upper bound of the untouched model's loss on the proof rows.

    It isn't scored on the watched rows; which of these are which follows from hashes, so that both are drawn alike.
    """
    losses = [result["before"][name] for name in ("nll", "cross_entropy") if name in result.get("before", {})]
    return [Point(0, 0, 0.0, loss["high"]) for loss in losses[:1] if loss["high"] is not None]


def first_at(points: Sequence[Point], loss: float) -> Point | None:
    """Return the first point at which a loss was reached; None where it never was."""
    return next((point for point in points if point.loss <= loss), None)


def _cost(outcome: Outcome, price: float | None) -> Cost:
    energy = (outcome.result or {}).get("speed", {}).get("energy_j")
    hours = outcome.train_s / 3600
    return Cost(
        outcome.train_s, None if price is None else price * hours, energy if isinstance(energy, float) else None
    )


def _pair(tuned: Outcome, random: Outcome) -> Pair | None:
    """Compare the two on the rows of the proof; None where these aren't the same ones."""
    sides = []
    for name, outcome in ((RANDOM, random), (PRETRAINED, tuned)):
        measured = read_measured(Path(outcome.run), "after")
        own = Measured(measured.own, measured.task)  # what it knew before is none of random weights
        values = {key: tell_metric(metric) for key, metric in own.metrics().items()}
        sides.append(Evaluated(name, own, values))
    if [row.where for row in sides[0].measured.rows] != [row.where for row in sides[1].measured.rows]:
        return None
    sides = [replace(side, measured=grouped_like(side.measured, sides[0].measured)) for side in sides]
    return build_versus(sides, {}).pairs[0]


def say_scratch(display: Display, found: Scratch) -> None:
    """Say what the head start saved."""
    display.title(f"{found.tuned.run} beside random weights, on the watched rows")
    for name, outcome, cost in ((PRETRAINED, found.tuned, found.costs[0]), (RANDOM, found.random, found.costs[1])):
        spent = [f"{outcome.tokens:,} tokens", in_time(cost.train_s), *cost_words(cost)]
        display.fact(name, f"loss {outcome.loss:.4f}; {', '.join(spent)}")
    for item in found.reached:
        tuned, random = (f"{p.tokens:,} tokens" if p else "not reached" for p in (item.tuned, item.random))
        display.line(f"  loss {item.loss:.4f} ({item.whose}): {PRETRAINED} {tuned}, {RANDOM} {random}")
    if found.at_once:
        display.line(f"  {PRETRAINED} it was there before any training", "bold")
    elif found.saved is not None:
        display.line(f"  the head start reached it with {found.saved:.1f} times fewer tokens", "bold")
    display.fact("page", str(found.path / "from_scratch.html"))


def cost_words(cost: Cost) -> list[str]:
    """Return what training cost beside time, where that is known."""
    price = [f"cost {cost.cost:.4g}"] if cost.cost is not None else []
    return [*price, f"energy {energy_words(cost.energy_j)}"]
