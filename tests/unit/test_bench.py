"""The bench's own arithmetic: what a ratio is, when losses agree, and that a fast wrong answer meets no bar."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from bench.judge import MEASURES, Bar, Round, Spread, agreement, compare
from bench.page import write_page
from bench.results import keep_outcomes
from bench.rows import spread
from bench.runner import Outcome
from bench.works import CONTENDERS, LINES, Line

ABOUT: dict[str, Any] = {
    "date": "2000-01-01",
    "machine": {"platform": "p", "processor": "c", "cores": 2, "memory_bytes": 8e9},
    "size": "usual",
    "repeats": 3,
    "threads": 2,
    "rows": {"chat": "made up"},
    "python": "3",
}


def steps(rate: float, first_s: float = 1.0, **more: Any) -> Round:
    """Return a round of three steps of 100 tokens, the last two at `rate`."""
    ends = (first_s, first_s + 100 / rate, first_s + 200 / rate)
    return Round((3.0, 2.0, 1.0), (100, 100, 100), 0.0, ends, **more)


def test_a_rate_leaves_the_first_step_out_and_counts_real_tokens() -> None:
    assert steps(50.0, first_s=10.0).rate == pytest.approx(50)
    assert steps(50.0, first_s=10.0).whole_rate == pytest.approx(300 / 14)
    assert Round((1.0,), (100,), 1.0, (3.0,)).rate == pytest.approx(50)


def test_a_ratio_is_the_median_over_pairs_and_not_the_ratio_of_medians() -> None:
    # The machine is three times as slow in the second round: each pair says 2, but the medians would say 3.
    ours = [steps(60.0), steps(20.0), steps(90.0)]
    theirs = [steps(30.0), steps(10.0), steps(20.0)]
    assert compare("speed", ours, theirs) == Spread(pytest.approx(2.0), pytest.approx(2.0), pytest.approx(4.5))
    with pytest.raises(ValueError):
        compare("speed", ours, theirs[:2])


def test_an_epoch_of_preferences_counts_the_reference_and_the_first_step() -> None:
    ours = Round(begin_s=10.0, ends_s=(12.0, 16.0), extra={"reference_s": 4.0})
    theirs = Round(begin_s=0.0, ends_s=(20.0, 35.0))
    assert MEASURES["epoch_speed"](ours, theirs) == pytest.approx(3.5)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ([3.0, 2.0, 1.02], [3.0, 2.0, 1.0]),
        ([3.0, 2.0], [3.0, 2.0, 1.0]),
        ([], []),
        ([3.0, math.nan], [3.0, math.nan]),
        ([3.0, math.inf], [3.0, math.inf]),
    ],
    ids=["far", "fewer", "none", "nan", "inf"],
)
def test_losses_that_differ_do_not_agree(ours: list[float], theirs: list[float]) -> None:
    assert not agreement(ours, theirs, 0.01).ok


def test_losses_within_the_tolerance_agree() -> None:
    found = agreement([3.0, 2.01], [3.0, 2.0], 0.01)
    assert found.ok
    assert found.worst == pytest.approx(0.005)


def test_a_fast_wrong_answer_meets_no_bar() -> None:
    line = Line("w", "speed", "speed", "headstart-lora", "trl-lora-1", Bar(2.0))
    right = Outcome(line, Spread(3.0, 3.0, 3.0), agreement([1.0], [1.0]))
    wrong = Outcome(line, Spread(3.0, 3.0, 3.0), agreement([1.0], [1.1]))
    assert (right.met, right.verdict) == (True, "met")
    assert (wrong.met, wrong.verdict) == (False, "losses differ")
    assert Outcome(line, said="not installed: x").verdict == "not installed: x"


def test_bars_hold_from_their_side() -> None:
    assert Bar(2.0).met(2.0)
    assert not Bar(2.0).met(1.99)
    assert Bar(0.6, at_least=False).met(0.6)
    assert not Bar(0.6, at_least=False).met(0.61)
    assert not Bar(2.0).met(math.nan)
    assert not Bar(0.6, at_least=False).met(math.nan)


def test_the_ideal_of_shared_rows_is_the_ratio_of_tokens() -> None:
    shared = steps(180.0, extra={"computed": [25, 25, 25]})
    unshared = steps(50.0, extra={"computed": [100, 100, 100]})
    assert compare("share_of_ideal", [shared], [unshared]).median == pytest.approx(3.6 / 4)


def test_the_share_of_products_counts_what_a_step_needs() -> None:
    size = {"linear": 1_000, "adapter": 10, "head": 500}
    ours = Round(tokens=(9, 100), ends_s=(1.0, 3.0), extra={"size": size, "computed": [9, 80], "targets": [9, 20]})
    needed = 80 * (4 * 1_000 + 6 * 10) + 20 * 4 * 500
    machine = Round(extra={"best_flops": float(needed)})
    assert MEASURES["share_of_products"](ours, machine) == pytest.approx(0.5)


def test_a_plan_misses_by_as_much_on_either_side() -> None:
    for planned in (110, 90):
        found = Round(extra={"planned_bytes": planned, "run_peak_bytes": 100, "planned_s": planned, "taken_s": 100})
        assert MEASURES["planned_memory"](found, found) == pytest.approx(0.1)
        assert MEASURES["planned_time"](found, found) == pytest.approx(0.1)


def test_every_line_names_contenders_and_measures_that_there_are() -> None:
    package = Path(__file__).parents[2] / "bench" / "contenders"
    for line in LINES:
        assert line.measure in MEASURES
        assert {line.ours, line.theirs} <= set(CONTENDERS)
    for contender in CONTENDERS.values():
        assert contender.missing or (package / f"{contender.script}.py").exists()


def test_rows_are_taken_evenly() -> None:
    assert spread(list(range(10)), 5) == [0, 2, 4, 6, 8]
    assert spread([1, 2], 5) == [1, 2]


def test_the_page_says_what_was_reached_and_what_was_not_run(tmp_path: Path) -> None:
    line = next(line for line in LINES if line.work == "sft-lora")
    outcome = Outcome(line, Spread(1.5, 1.4, 1.6), agreement([1.0], [1.002]))
    rounds = {f'["{name}", 0, null]': steps(50.0, peak_bytes=10**9) for name in (line.ours, line.theirs)}
    keep_outcomes(tmp_path / "results", "sft-lora", [outcome], rounds, ABOUT)
    write_page(tmp_path / "results", tmp_path)
    page = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    assert f"| sft-lora | {line.text} | at least 2 | **1.500** [1.400, 1.600] | 0.20% | missed |" in page
    assert "| dpo | DPO LoRA, one epoch, the reference pass counted | at least 3.5 |  |  | not run |" in page
    assert "| sft-lora | headstart, LoRA | 1 | 50 | 60 | 1.00 GB |" in page
    assert (tmp_path / "benchmarks" / "bars.svg").read_text(encoding="utf-8").startswith("<svg xmlns=")
