"""Comparison: known intervals, coverage on simulated data, verdicts that can't be had by accident."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score

from bench.coverage import CASES, simulate
from headstart.evaluate import compare as compare_module
from headstart.evaluate.compare import (
    ClassMetric,
    Clustered,
    Compared,
    Interval,
    Metric,
    Ratio,
    cluster,
    compare,
    compare_all,
    interval,
    paired_p,
    verdict,
    whole,
)
from headstart.evaluate.measure import RowResult
from headstart.evaluate.metrics import chrf, exact_match, rouge_l, task_metrics


def mean(values: object) -> Metric:
    array = np.asarray(values, float)
    return Ratio(array, np.ones(len(array)), right=bool(np.isin(array, (0, 1)).all()))


def test_rows_that_all_left_a_tie_have_an_interval_as_wide_as_their_rate() -> None:
    before = Ratio(np.full(16, 0.5), np.ones(16))
    found = compare("preference_accuracy", before, Ratio(np.ones(16), np.ones(16), right=True))
    # Wilson's lower bound of n of n is n / (n + z^2).
    assert found.difference.low == pytest.approx(16 / (16 + 1.959964**2) - 0.5, abs=1e-6)
    assert (found.difference.value, found.difference.high, found.before.low) == (0.5, 0.5, 0.5)
    assert found.p == pytest.approx(2 * 0.5**16)
    assert found.direction == 1


def test_the_interval_is_that_of_scipy() -> None:
    chance = np.random.default_rng(1)
    before, after = chance.normal(0, 1, 60), chance.normal(0.4, 1.2, 60)
    ours = compare("x", mean(before), mean(after)).difference
    theirs = stats.bootstrap(
        (after - before,), np.mean, n_resamples=20_000, method="percentile", rng=2
    ).confidence_interval
    wider = stats.t.ppf(0.975, 59) / stats.norm.ppf(0.975) * np.sqrt(60 / 59)  # Hesterberg (2015)
    middle = (after - before).mean()
    theirs = theirs._replace(low=middle + (theirs.low - middle) * wider, high=middle + (theirs.high - middle) * wider)
    assert ours.value == pytest.approx((after - before).mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.02)
    assert ours.high == pytest.approx(theirs.high, abs=0.02)


LEVEL_OF_30 = 1 - 2 * stats.norm.cdf(
    np.sqrt(30 / 29) * stats.t.ppf(0.025, 29)
)  # as far out as Student's (Hesterberg, 2015)


def test_the_interval_of_a_skewed_mean_holds_bca() -> None:
    values = np.random.default_rng(3).normal(0, 1, 30)
    changes = np.random.default_rng(4).exponential(1, 30)
    bounds = [
        stats.bootstrap((changes,), np.mean, confidence_level=LEVEL_OF_30, n_resamples=40_000, method=method, rng=1)
        for method in ("percentile", "BCa")
    ]
    lows, highs = zip(*(found.confidence_interval for found in bounds), strict=True)
    ours = compare("mean", mean(values), mean(values + changes)).difference
    assert (ours.low, ours.high) == pytest.approx((min(lows), max(highs)), abs=0.02)
    assert highs[1] > highs[0] + 0.05


@pytest.mark.parametrize("seed", [3, 8])
def test_the_interval_of_macro_f1_holds_students_over_the_jackknife(seed: int) -> None:
    """Of a class that is met once or twice in sixteen rows; a difference can't be over 1."""
    chance = np.random.default_rng(seed)
    truth = chance.choice(3, 16, p=[0.6, 0.3, 0.1])
    told = [np.where(chance.random(16) < right, truth, chance.integers(0, 3, 16)) for right in (0.4, 0.9)]

    def gap(rows: np.ndarray) -> float:
        first, second = (f1_score(truth[rows], side[rows], average="macro") for side in told)
        return float(second - first)

    value, left = gap(np.arange(16)), np.array([gap(np.delete(np.arange(16), row)) for row in range(16)])
    half = stats.t.ppf(0.975, 15) * np.sqrt(15 / 16 * ((left - left.mean()) ** 2).sum())
    ours = compare("macro_f1", *(ClassMetric(truth, side, 3) for side in told)).difference
    assert (ours.low, ours.high) == pytest.approx((value - half, min(1.0, value + half)))


def test_no_bound_lies_beyond_what_a_difference_can_be() -> None:
    truth = np.array([0] * 7 + [1])
    sides = [np.zeros(8, int), truth]  # the only row of a class, and all that it decides
    for name, most in (("macro_f1", 1.0), ("mcc", 2.0)):
        before, after = (ClassMetric(truth, side, 2, name) for side in sides)
        found = compare(name, before, after).difference
        assert found.high == most
        assert (
            compare(name, *(cluster(side, ["g", "g", *"abcdef"]) for side in (before, after))).difference.high == most
        )


def test_of_very_many_rows_none_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """To leave out each of ten thousand rows once is to look at a hundred million."""
    monkeypatch.setattr(compare_module, "RESAMPLES", 10)
    monkeypatch.setattr(compare_module, "SWAPS", 10)
    drawn: set[int] = set()

    class Watched(Ratio):
        def over(self, draws: np.ndarray) -> np.ndarray:
            drawn.add(draws.shape[1])
            return super().over(draws)

    for rows in (1_000, 1_003):
        values = np.random.default_rng(0).exponential(size=(2, rows))
        compare("x", *(Watched(side, np.ones(rows)) for side in values))
    assert drawn == {999, 1_000, 1_003}


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


@pytest.mark.parametrize("case", ["mean, normal", "mean, skewed", "loss per token", "right or wrong"])
def test_the_interval_covers_the_truth_and_false_alarms_are_rare(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Of 16 rows; the percentile bootstrap alone covers 92.1, 88.9, 90.5 and 88.4%, and calls 9.0, 9.8, 9.6 and 1.1% by chance."""
    monkeypatch.setattr(compare_module, "RESAMPLES", 400)
    monkeypatch.setattr(compare_module, "SWAPS", 400)
    trials = 1_500
    for tally in simulate(*CASES[case], rows=16, trials=trials, seed=5).values():
        error = 3 * np.sqrt(0.05 * 0.95 / trials)
        assert tally.covered / trials > 0.95 - error
        assert tally.called / trials < 0.05 + error
        assert tally.verdicts / trials < 0.05 + error


def test_a_verdict_over_several_metrics_is_no_likelier_wrong_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_module, "RESAMPLES", 400)
    monkeypatch.setattr(compare_module, "SWAPS", 1_000)
    chance, trials, alarms = np.random.default_rng(8), 500, 0
    for _ in range(trials):
        before, after = ({f"m{n}": mean(chance.normal(size=12)) for n in range(6)} for _ in range(2))
        alarms += verdict(compare_all(before, after), "m0") in ("better", "worse")
    assert alarms / trials < 0.05 + 3 * np.sqrt(0.05 * 0.95 / trials)  # six at 5% each would be 26%


def test_swaps_give_the_chance_that_going_through_all_of_them_gives() -> None:
    chance = np.random.default_rng(4)
    tokens = np.ceil(chance.lognormal(2, 1, 10))
    before, after = chance.lognormal(0, 1, (2, 10)) * tokens
    found = compare("nll", Ratio(before, tokens), Ratio(after, tokens)).p
    flips = np.array([[number >> row & 1 for row in range(10)] for number in range(1 << 10)])
    gaps = np.abs(((after - before) * (1 - 2 * flips)).sum(1))
    exact = float((gaps >= abs((after - before).sum()) - 1e-9).mean())
    assert found == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / compare_module.SWAPS))


def test_what_is_right_or_wrong_is_told_by_counts() -> None:
    before = mean([1] * 8 + [0] * 12)
    after = mean([1] * 7 + [0] * 3 + [1] * 10)  # 10 fixed, 1 broken, 9 as before
    found = compare("accuracy", before, after)
    assert found.p == pytest.approx(2 * (1 + 11) / 2**11)  # both tails of 11 coins
    cells = np.array([10.5, 1.5, 7.5, 2.5])  # Agresti and Min: half a row more in each cell
    shares = cells / cells.sum()
    gap = shares[0] - shares[1]
    half = stats.norm.ppf(0.975) * np.sqrt((shares[0] + shares[1] - gap**2) / cells.sum())
    assert (found.difference.low, found.difference.high) == pytest.approx((gap - half, gap + half))
    assert found.difference.value == pytest.approx(9 / 20)
    few = compare("accuracy", mean([0] * 16), mean([1] * 5 + [0] * 11))
    assert few.direction == 0  # five rows that all changed alike: one of 16 such sets would
    assert few.p == pytest.approx(2 / 2**5)


def test_rows_that_are_needed_follow_from_the_interval() -> None:
    assert shown("nll", -1, 3).rows_needed == 40 * 4 + 1  # a difference of 1, known to 2
    assert shown("nll", 1, 3).rows_needed is None
    assert shown("nll", 1, 3, rows=5).rows_needed == compare_module.MIN_ROWS


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


def test_one_side_by_itself_has_the_interval_that_a_comparison_gives_it() -> None:
    chance = np.random.default_rng(5)
    for metric in (mean(chance.normal(0, 1, 30)), mean(chance.integers(0, 2, 30))):
        both = compare("x", metric, metric)
        assert interval(metric) == both.before == both.after


def test_a_score_of_zero_everywhere_is_no_rate() -> None:
    """chrF goes to 100: the bounds of a rate would be on another scale."""
    rows = [RowResult(f"f:{n}", 1.0, 1.0, "q", "abc", "xyz", stopped=False) for n in range(8)]
    metrics = task_metrics("chat", rows)
    assert interval(metrics["chrf"]) == interval(metrics["rouge_l"]) == Interval(0.0, 0.0, 0.0)
    wilson = stats.binomtest(0, 8).proportion_ci(method="wilson").high
    assert interval(metrics["exact_match"]).high == interval(metrics["stop_rate"]).high == pytest.approx(wilson)


def grouped_rows(generator: np.random.Generator, groups: int, size: int) -> tuple[np.ndarray, list[str]]:
    """Return values of rows whose groups differ much and whose rows hardly do, of mean 0."""
    means = generator.normal(size=groups).repeat(size)
    return means + 0.2 * generator.normal(size=groups * size), [f"g{n // size}" for n in range(groups * size)]


def test_rows_of_one_group_are_no_independent_witnesses() -> None:
    generator = np.random.default_rng(7)
    covered = {"rows": 0, "groups": 0}
    for _ in range(100):
        values, groups = grouped_rows(generator, 12, 6)
        ratio = Ratio(values, np.ones(len(values)))
        for name, metric in (("rows", ratio), ("groups", cluster(ratio, groups))):
            found = interval(metric)
            covered[name] += found.low <= 0 <= found.high
    assert covered["groups"] >= 89  # 95 of 100, less three standard errors of the simulation
    assert covered["rows"] < 75


def test_a_ratio_over_groups_is_that_over_their_rows() -> None:
    generator = np.random.default_rng(3)
    values, weights = generator.random(40), generator.integers(1, 9, 40).astype(float)
    groups = [f"g{n}" for n in generator.integers(0, 9, 36)] + [""] * 4  # four that stand alone
    ratio = Ratio(values, weights, transform=np.exp)
    summed = cluster(ratio, groups)
    members = [np.flatnonzero(np.array(groups) == name) for name in dict.fromkeys(groups[:36])]
    by_hand = Clustered(ratio, [*members, *(np.array([n]) for n in range(36, 40))])
    assert len(summed) == len(by_hand) == len(members) + 4
    draws = generator.integers(0, len(summed), (50, len(summed)))
    assert summed.over(draws) == pytest.approx(by_hand.over(draws))
    assert whole(summed) == pytest.approx(whole(ratio))
    assert cluster(ratio, [""] * 40) is ratio
    assert cluster(ratio, [str(n) for n in range(40)]) is ratio


def test_other_metrics_are_drawn_and_swapped_by_groups_too() -> None:
    truth = ["a", "b"] * 20
    groups = [f"g{n // 4}" for n in range(40)]
    before = cluster(ClassMetric.of(truth, ["a"] * 40), groups)
    after = cluster(ClassMetric.of(truth, truth), groups)
    assert len(before) == 10
    found = compare("macro_f1", before, after)
    assert (found.rows, found.direction, found.after.value) == (10, 1, 1.0)
    assert found.before.value == pytest.approx(1 / 3)
    joined = before.joined(after)
    assert len(joined) == 20
    assert joined.over(np.arange(10, 20)[None])[0] == 1.0
    fewer = compare("macro_f1", cluster(before.metric, ["g"] * 40), cluster(after.metric, ["g"] * 40))  # type: ignore[attr-defined]
    assert fewer.direction == 0  # one group is one witness


def test_of_a_single_group_no_bounds_are_known_and_nothing_is_decided() -> None:
    truth = ["a", "b"] * 20
    ones = np.ones(40)
    sides = {
        "macro_f1": (ClassMetric.of(truth, ["a"] * 40), ClassMetric.of(truth, truth)),
        "nll": (Ratio(2 * ones, ones), Ratio(ones, ones)),
    }
    for name, pair in sides.items():
        before, after = (cluster(metric, ["g"] * 40) for metric in pair)
        found = compare(name, before, after)
        for side in (found.before, found.after, found.difference, interval(before)):
            assert (side.low, side.high) == (-np.inf, np.inf)
            assert (side.to_json()["low"], side.to_json()["high"]) == (None, None)
        assert (found.rows, found.grouped, found.direction, found.rows_needed) == (1, True, 0, 8)
        assert verdict([found], name) == "not_measured"
    alone = compare("nll", mean([3.0]), mean([2.0]))
    assert (alone.difference.low, alone.grouped) == (-np.inf, False)


def test_a_single_group_that_is_all_right_is_as_sure_as_a_single_row() -> None:
    right = cluster(Ratio(np.ones(40), np.ones(40), right=True), ["g"] * 40)
    wilson = stats.binomtest(1, 1).proportion_ci(method="wilson")
    found = interval(right)
    assert (found.value, found.low, found.high) == pytest.approx((1.0, wilson.low, 1.0))


def test_groups_that_are_all_right_are_as_sure_as_so_many_rows() -> None:
    ones, groups = np.ones(40), [f"g{n // 4}" for n in range(40)]
    right = Ratio(ones, ones, right=True)
    wrong = Ratio(0 * ones, ones, right=True)
    alone = interval(Ratio(np.ones(10), np.ones(10), right=True))
    assert interval(cluster(right, groups)) == alone
    found = compare("accuracy", cluster(wrong, groups), cluster(right, groups))
    assert (
        found.difference
        == compare(
            "accuracy", Ratio(np.zeros(10), np.ones(10), right=True), Ratio(np.ones(10), np.ones(10), right=True)
        ).difference
    )
    assert found.direction == 1
    assert paired_p(0 * ones, ones, groups) == pytest.approx(2 / 2**10, abs=1e-3)  # as the sign test over ten
    assert paired_p(0 * ones, ones, [""] * 40) == pytest.approx(2 / 2**40)


def test_groups_never_make_an_interval_narrower_than_independent_rows() -> None:
    groups = [f"g{n // 5}" for n in range(100)]
    ones, right = np.ones(100), np.ones(100)
    right[3] = 0.0  # one group holds all that varies
    one_wrong = Ratio(right, ones, right=True)
    alone, grouped = interval(one_wrong), interval(cluster(one_wrong, groups))
    assert grouped.low <= alone.low
    assert grouped.high >= alone.high
    all_right = Ratio(ones, ones, right=True)
    by_rows = compare("accuracy", all_right, one_wrong).difference
    by_groups = compare("accuracy", cluster(all_right, groups), cluster(one_wrong, groups)).difference
    assert by_groups.low <= by_rows.low
    assert by_groups.high >= by_rows.high > 0


def test_groups_that_all_left_a_tie_gain_no_more_than_there_is() -> None:
    groups = [f"g{n // 2}" for n in range(40)]
    before, after = Ratio(np.full(40, 0.5), np.ones(40)), Ratio(np.ones(40), np.ones(40), right=True)
    found = compare("preference_accuracy", cluster(before, groups), cluster(after, groups))
    # Wilson's lower bound of n of n is n / (n + z^2), here over twenty groups.
    assert found.difference.low == pytest.approx(20 / (20 + 1.959964**2) - 0.5, abs=1e-6)
    assert (found.difference.value, found.difference.high, found.direction) == (0.5, 0.5, 1)


def test_groups_of_unlike_size_count_as_fewer() -> None:
    rows = ClassMetric.of(["a", "b"] * 50, ["a", "b"] * 50)
    even = cluster(rows, [f"g{n // 10}" for n in range(100)])
    uneven = cluster(rows, ["g"] * 91 + [""] * 9)
    assert (even.rows_that_count, len(uneven)) == (10, 10)
    assert uneven.rows_that_count == pytest.approx(100**2 / (91**2 + 9))
