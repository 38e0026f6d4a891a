"""Which trials there are and how long each is trained, by hand-made figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from headstart.energy import EnergyMeter
from headstart.errors import UsageError
from headstart.evaluate.score import RowScores
from headstart.rate import Tried, judge, paired, plan_probe
from headstart.report.reasons import scratch_words
from headstart.report.trials import curve_page, scratch_page, seeds_page, sweep_page
from headstart.trials.curve import Curve
from headstart.trials.halving import Grid, Range, cost, find_proposals, parse_over, plan_rungs, promote
from headstart.trials.scratch import Cost, Reached, Scratch, first_at, untouched_points
from headstart.trials.seeds import Spread
from headstart.trials.study import Outcome, Point, same_rows
from tests.unit.test_report import PAYLOADS


@pytest.mark.parametrize(
    ("trials", "rungs"),
    [
        (1, [(1, 1)]),
        (2, [(2, 1)]),
        (3, [(3, 1 / 3), (1, 1)]),
        (8, [(8, 1 / 3), (2, 1)]),
        (9, [(9, 1 / 9), (3, 1 / 3), (1, 1)]),
        (27, [(27, 1 / 27), (9, 1 / 9), (3, 1 / 3), (1, 1)]),
    ],
)
def test_each_rung_takes_as_much_as_the_others(trials: int, rungs: list[tuple[int, float]]) -> None:
    """The first bracket of Hyperband's table (Li et al., 2018) for eta = 3, as shares of the last rung."""
    assert [(rung.trials, pytest.approx(rung.share)) for rung in plan_rungs(trials)] == rungs


def test_a_budget_makes_the_first_rungs_shorter_and_never_the_last() -> None:
    rungs = plan_rungs(9, 2.0)
    assert cost(rungs) == pytest.approx(2.0, abs=1e-6)
    assert rungs[-1].share == 1
    assert rungs[0].share < rungs[1].share < 1 / 3
    assert plan_rungs(9, 5.0) == plan_rungs(9)  # more than is needed changes nothing
    with pytest.raises(UsageError, match="budget"):
        plan_rungs(9, 1.0)


def test_the_least_loss_goes_on_and_what_failed_never_does() -> None:
    assert promote([0.5, None, 0.2, 0.5, 0.1], 3) == [4, 2, 0]
    assert promote([None, None, 0.3], 2) == [2]


def test_values_and_ranges_are_read_as_typed() -> None:
    over = parse_over(["optim.lr=1e-5..1e-3", "lora.rank=4..64", "method=lora, full,lora"])
    assert over == {"optim.lr": Range(1e-5, 1e-3), "lora.rank": Range(4, 64), "method": ["lora", "full"]}
    assert isinstance(over["lora.rank"].low, int)
    for text in ("optim.lr", "=1", "a=", "a=1,,2", "a=3..1", "a=1..inf", "a=x..y"):
        with pytest.raises(UsageError):
            parse_over([text])
    with pytest.raises(UsageError):
        parse_over(["a=1", "a=2"])


def test_a_grid_is_every_combination_or_some_drawn_without_luck() -> None:
    over = {"a": ["1", "2"], "b": ["x", "y", "z"]}
    grid = Grid(over, None, 0)
    assert [tuple(grid.propose().values()) for _ in range(grid.count)] == [(a, b) for a in "12" for b in "xyz"]
    some = [Grid(over, 4, seed) for seed in (7, 7, 8)]
    drawn = [[tuple(grid.propose().values()) for _ in range(grid.count)] for grid in some]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 4


def test_draws_learn_from_what_they_are_told_and_are_the_same_again() -> None:
    pytest.importorskip("optuna")
    over = {"optim.lr": Range(1e-5, 1e-1), "lora.rank": Range(4, 64), "method": ["lora", "full"]}

    def draw(seed: int) -> list[dict[str, object]]:
        found, proposals = [], find_proposals(over, 40, seed)
        for number in range(proposals.count):
            values = dict(proposals.propose())
            found.append(values)
            # The best is at 1e-3; every seventh fails.
            proposals.tell(None if number % 7 == 6 else abs(float(f"{values['optim.lr']:e}".partition("e")[2]) + 3))
        return found

    found = draw(0)
    assert found == draw(0) != draw(1)
    assert all(1e-5 <= v["optim.lr"] <= 1e-1 and v["lora.rank"] in range(4, 65) for v in found)
    near = [abs(float(f"{v['optim.lr']:e}".partition("e")[2]) + 3) < 1 for v in found]
    assert sum(near[20:]) > sum(near[:20])


def scores(*nll: float) -> RowScores:
    return RowScores(np.array(nll), np.ones(len(nll)))


def test_a_rate_is_taken_only_where_it_is_clearly_better() -> None:
    rows = np.linspace(1.0, 2.0, 16)
    either = 0.2 * (-1) ** np.arange(16)  # row by row in either way, nothing on average
    usual = Tried(1e-3, scores(*rows))
    luck = Tried(2e-3, scores(*(rows - 0.01 + either)))
    clear = Tried(5e-4, scores(*(rows - 0.2)))
    beyond = Tried(2.5e-4, scores(*(rows - 0.21 + either)))
    gone = Tried(4e-3, None)
    assert judge([usual, luck, gone], 1e-3)[0] is usual
    assert judge([clear, usual, luck, gone], 1e-3)[0] is clear
    assert judge([beyond, clear, usual], 1e-3)[0] is clear  # the best is no clearer, and farther from what is usual
    wild = Tried(
        8e-4, scores(*(rows - 0.2 + 13 * (np.arange(16) == 3)))
    )  # one row blew up, so that nothing is clear of it
    assert judge([clear, wild, usual], 1e-3)[0] is clear
    assert "the last that was tried" in judge([clear, usual], 1e-3)[1]
    assert judge([Tried(1e-3, None), clear], 1e-3)[0] is clear
    assert judge([usual], 1e-3)[0] is usual
    assert judge([gone, Tried(1e-3, None)], 1e-3)[0].rate == 1e-3


def test_a_paired_difference_and_its_error_are_those_of_scipy() -> None:
    draw = np.random.default_rng(0)
    first, second = draw.normal(2, 1, 20), draw.normal(1.8, 1, 20)
    gap, error = paired(scores(*first), scores(*second))
    assert gap / error == pytest.approx(stats.ttest_rel(first, second).statistic)


@pytest.mark.parametrize("total", [0, 50, 119, 120, 199, 200, 1_000, 10_000])
def test_a_probe_takes_a_tenth_of_the_run_at_most(total: int) -> None:
    multiples, steps = plan_probe(total)
    assert len(multiples) * steps <= 0.1 * total
    assert bool(steps) == (total >= 120)
    assert not steps or (4 <= steps <= 50 and 1.0 in multiples)


def test_the_spread_over_seeds_is_students() -> None:
    values = [0.31, 0.35, 0.30]
    spread = Spread.of(values)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (spread.low, spread.high) == (pytest.approx(low), pytest.approx(high))


def test_a_loss_is_reached_at_the_first_point_at_or_below_it() -> None:
    points = [Point(1, 10, 1.0, 2.0), Point(2, 20, 2.0, 1.0), Point(3, 30, 3.0, 1.5)]
    assert first_at(points, 1.5) is points[1]
    assert first_at(points, 0.5) is None


def test_energy_is_summed_over_packages_and_follows_a_counter_that_began_anew(tmp_path: Path) -> None:
    def write(zone: str, name: str, used: int) -> None:
        folder = tmp_path / zone
        folder.mkdir(exist_ok=True)
        for file, value in (("name", name), ("energy_uj", used), ("max_energy_range_uj", 10_000_000)):
            (folder / file).write_text(f"{value}\n")

    write("intel-rapl:0", "package-0", 9_000_000)
    write("intel-rapl:1", "package-1", 1_000_000)
    write("intel-rapl:0:0", "core", 0)
    write("intel-rapl:2", "psys", 0)
    meter = EnergyMeter(tmp_path)
    for zone, name, used in (
        ("intel-rapl:0", "package-0", 500_000),  # over its range: 1.5 J
        ("intel-rapl:1", "package-1", 3_000_000),
        ("intel-rapl:0:0", "core", 5_000_000),
        ("intel-rapl:2", "psys", 5_000_000),
    ):
        write(zone, name, used)
    assert meter.take() == pytest.approx(3.5)
    assert meter.take() == 0
    assert EnergyMeter(tmp_path / "none").take() is None


def outcome(run: str, *losses: float, watched: tuple[int, int] = (8, 8), accuracy: float | None = None) -> Outcome:
    points = [Point(step, 10 * step, 1.0 * step, loss) for step, loss in enumerate(losses, 1)]
    result = None if accuracy is None else {"after": {"accuracy": {"value": accuracy}}}
    return Outcome(run, {}, points, watched=watched, result=result)


def test_a_trial_is_what_its_best_weights_are_and_is_read_back_as_it_was() -> None:
    found = outcome("a", 2.0, 1.0, 1.5)
    assert found.loss == 1.0
    told = json.loads(json.dumps(found.to_json()))
    assert json.loads(json.dumps(Outcome.from_json(told).to_json())) == told
    assert replace(found, failed="not finite").loss is None


def test_trials_that_were_scored_on_other_rows_are_not_compared() -> None:
    same_rows([outcome("a", 1.0), outcome("b", 2.0), outcome("failed", watched=(0, 0))], "--over")
    for other in ((7, 8), (8, 9)):  # rows that were dropped; targets of another tokenizer
        with pytest.raises(UsageError, match="scored on other rows"):
            same_rows([outcome("a", 1.0), outcome("b", 1.0, watched=other)], "--over")


@pytest.mark.parametrize(
    ("tuned", "random", "reached"),
    [
        ((0.5, 0.8, 0.9), (0.2, 0.4, 0.6), (0.6, 1_000, 100)),
        ((0.5, 0.8, 0.9), (0.2, 0.4, 0.4), (0.4, 100, 10)),  # as good with fewer rows
        ((0.5, 0.5, 0.5), (0.2, 0.4, 0.6), (0.6, 1_000, None)),
        ((0.5, None, 0.9), (None, None, 0.8), (0.8, 1_000, 1_000)),
    ],
)
def test_what_random_weights_reached_took_so_many_rows_with_the_head_start(
    tuned: tuple[float, ...], random: tuple[float, ...], reached: tuple[float, int, int | None]
) -> None:
    ways = ([outcome("run", accuracy=value) for value in values] for values in (tuned, random))
    found = Curve(Path("curve"), "accuracy", False, [10, 100, 1_000], *ways).reached
    assert found is not None
    assert tuple(found.values()) == reached


def pages(text: str) -> dict[str, str]:
    """Draw each page of runs whose folder, settings and faults spell `text`."""
    score = {"value": 0.5, "low": 0.4, "high": 0.6}
    result = {"verdict": "better", "difference": {"metric": "accuracy", **score}}
    result |= {side: {"accuracy": score} for side in ("before", "after", "differences")}
    whole = replace(outcome(text, 2.0, 1.0), settings={text: text, "seed": 0}, result=result).to_json()
    failed = {**outcome(text).to_json(), "failed": text, "loss": None, "settings": {text: text, "seed": 1}}
    curve = {
        "curve": "x",
        "metric": "accuracy",
        "rows": [3, 9],
        "tuned": [failed, whole],
        "random": [],
        "reached": None,
    }
    point = {"step": 1, "tokens": 10, "train_s": 1.0, "loss": 1.0}
    reached = [{"loss": 1.0, "whose": text, "tuned": point, "random": None}]
    cost = {"train_s": 1.0, "cost": 0.5, "energy_j": None}
    scratch = {"run": text, "tuned": whole, "random": whole, "reached": reached, "saved": None, "price": 2.0}
    rungs = [{"share": 1.0, "trials": [whole, failed]}]
    return {
        "sweep": sweep_page({"sweep": "x", "over": {text: []}, "full_runs": 2.0, "rungs": rungs, "winner": whole}),
        "curve": curve_page(curve),
        "scratch": scratch_page({**scratch, "costs": {"tuned": cost, "random": cost}, "page": "x/page.html"}, None),
        "seeds": seeds_page(
            {
                "runs": "x",
                "metric": "accuracy",
                "verdicts": ["better"],
                "failed": 1,
                "spread": None,
                "seeds": [whole, failed],
            }
        ),
    }


@pytest.mark.parametrize("payload", PAYLOADS)
def test_what_a_study_was_given_is_text_on_its_page(payload: str) -> None:
    for name, page in pages(payload).items():
        assert not any(tag in page for tag in ("<script", "<img", "<svg onload", "</pre><svg")), name


def test_a_page_says_what_was_not_measured_and_what_failed() -> None:
    found = pages("odd")
    assert "not reached" in found["scratch"]
    assert "not measured" in found["scratch"]  # energy
    assert "The head start saved nothing" in found["scratch"]
    assert all("failed: odd" in found[name] for name in ("sweep", "curve", "seeds"))


def test_what_the_untouched_model_could_took_no_training() -> None:
    before = {"perplexity": {"high": 19.0}, "nll": {"value": 2.8, "low": 2.7, "high": 2.9}}
    (start,) = untouched_points({"before": before})
    assert (start.tokens, start.loss) == (0, 2.9)
    assert untouched_points({"before": {"accuracy": {"high": 0.1}}}) == []

    def scratch(tuned: Point | None) -> Scratch:
        reached = [Reached(8.7, "the best from random weights", tuned, Point(50, 71_562, 9.0, 8.7))]
        cost = Cost(1.0, None, None)
        return Scratch(Path("x"), outcome("run", 2.6), outcome("random", 8.7), reached, (cost, cost), None, None)

    at_once = scratch(start)
    assert (at_once.at_once, at_once.saved) == (True, None)
    assert scratch_words(at_once.to_json()).endswith("the untouched model was there before any training")
    assert "There before any training" in scratch_page(at_once.to_json(), None)
    later = scratch(Point(10, 35_781, 4.0, 8.0))
    assert (later.at_once, later.saved) == (False, 2.0)
    assert "which the run never did" in scratch_words(scratch(None).to_json())
