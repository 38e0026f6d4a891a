"""Comparison: known intervals, coverage on simulated data, verdicts that can't be had by accident."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from headstart.evaluate import compare as compare_module
from headstart.evaluate.compare import Compared, Interval, Metric, Ratio, compare, verdict
from headstart.evaluate.metrics import chrf, exact_match, rouge_l


def mean(values: object) -> Metric:
    array = np.asarray(values, float)
    return Ratio(array, np.ones(len(array)))


def test_the_interval_is_that_of_scipy() -> None:
    chance = np.random.default_rng(1)
    before, after = chance.normal(0, 1, 60), chance.normal(0.4, 1.2, 60)
    ours = compare("x", mean(before), mean(after)).difference
    theirs = stats.bootstrap(
        (after - before,), np.mean, n_resamples=20_000, method="percentile", rng=2
    ).confidence_interval
    assert ours.value == pytest.approx((after - before).mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.02)
    assert ours.high == pytest.approx(theirs.high, abs=0.02)


def test_pairing_counts() -> None:
    base = np.random.default_rng(0).normal(0, 10, 40)
    paired = compare("x", mean(base), mean(base + 0.5)).difference
    assert paired.low == pytest.approx(0.5)
    assert paired.high == pytest.approx(0.5)


def test_a_ratio_weighs_rows_by_their_tokens() -> None:
    metric = Ratio(np.array([10.0, 1.0]), np.array([10.0, 2.0]), lower_is_better=True)
    assert compare("nll", metric, metric).before.value == pytest.approx(11 / 12)


def test_drawing_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=50)
    whole = compare("x", mean(values), mean(values * 2))
    monkeypatch.setattr(compare_module, "DRAWS_AT_ONCE", 50 * 7)
    assert compare("x", mean(values), mean(values * 2)) == whole


def test_the_interval_covers_the_truth_and_false_alarms_are_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_module, "RESAMPLES", 600)
    chance = np.random.default_rng(5)
    trials, rows, truth = 400, 40, 0.2
    covered = alarms = 0
    for _ in range(trials):
        before = chance.normal(0, 1, rows)
        gained = compare("x", mean(before), mean(before + chance.normal(truth, 0.7, rows))).difference
        covered += gained.low <= truth <= gained.high
        nothing = compare("x", mean(before), mean(before + chance.normal(0, 0.7, rows)))
        alarms += verdict([nothing], "x") == "better"
    # Binomial bounds at four standard errors: 95% covered (the percentile bootstrap of 40 rows gives about 94%), and a
    # false "better" in at most 2.5%.
    assert covered / trials > 0.945 - 4 * np.sqrt(0.05 * 0.95 / trials)
    assert alarms / trials < 0.025 + 4 * np.sqrt(0.025 * 0.975 / trials)


def shown(name: str, low: float, high: float, *, lower_is_better: bool = False, rows: int = 40) -> Compared:
    zero = Interval(0, 0, 0)
    return Compared(name, zero, zero, Interval((low + high) / 2, low, high), lower_is_better, rows)


GOOD = shown("nll", -2, -1, lower_is_better=True)
FLAT = shown("nll", -2, 1, lower_is_better=True)
BAD = shown("nll", 1, 2, lower_is_better=True)
FELL = shown("rouge_l", -0.3, -0.1)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([GOOD], "better"),
        ([GOOD, shown("rouge_l", 0.1, 0.2)], "better"),
        ([GOOD, FELL], "no_gain"),
        ([GOOD, replace(FELL, rows=7)], "better"),
        ([FLAT], "no_gain"),
        ([FLAT, FELL], "worse"),
        ([FLAT, replace(FELL, rows=7)], "no_gain"),
        ([BAD], "worse"),
        ([shown("rouge_l", 0.1, 0.2)], "not_measured"),
        ([replace(GOOD, rows=7)], "not_measured"),
        ([], "not_measured"),
    ],
)
def test_verdicts(found: list[Compared], expected: str) -> None:
    assert verdict(found, "nll") == expected


def test_rows_that_differ_in_number_are_refused() -> None:
    with pytest.raises(ValueError, match="2 rows before and 3 after"):
        compare("x", mean([1, 2]), mean([1, 2, 3]))


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("the cat sat on the mat", "the cat is on the mat"),
        ("a b c d", "d c b a"),
        ("Patient: Mr Chen, 75", "patient mr chen 57"),
        ("", "something"),
        ("one two three four five", "one three five"),
    ],
)
def test_rouge_l_is_that_of_the_reference_implementation(answer: str, reference: str) -> None:
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    theirs = rouge_scorer.RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure
    assert rouge_l(answer, reference) == pytest.approx(theirs)


def test_other_text_scores() -> None:
    assert exact_match(" a  b\n", "a b") == 1
    assert exact_match("a b", "a c") == 0
    assert chrf("same text", "same text") == pytest.approx(100)
    assert rouge_l("für Öl", "Für öl") == 1
