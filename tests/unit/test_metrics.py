"""Metrics of labelled rows are those of scikit-learn, scipy and seqeval, over the rows and over any draw of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from seqeval.metrics import f1_score as entity_f1
from seqeval.metrics.sequence_labeling import get_entities
from sklearn import metrics as theirs

from headstart.evaluate.compare import (
    Calibration,
    ClassMetric,
    Compared,
    Interval,
    Metric,
    Rank,
    SeveralF1,
    compare_all,
    verdict,
)
from headstart.evaluate.entities import count_entities, entities
from headstart.evaluate.measure import Measured, RowResult, first_of, grouped_like, short_group
from headstart.evaluate.metrics import best_threshold, task_metrics
from tests.conftest import conversation, example

ASKED = conversation("Hello", "Hi.")
TAGS = ["O", "B-a", "I-a", "B-b", "I-b", "B-a-x", "I-a-x"]
DRAWS = np.random.default_rng(5).integers(0, 60, (8, 60))


def test_class_metrics_are_those_of_scikit_learn() -> None:
    chance = np.random.default_rng(1)
    for classes in (2, 6):
        truth, found = chance.integers(0, classes, (2, 60))
        names = [[f"c{n}" for n in side] for side in (truth, found)]
        for name, score in (
            ("macro_f1", lambda t, f: theirs.f1_score(t, f, average="macro")),
            ("weighted_f1", lambda t, f: theirs.f1_score(t, f, average="weighted")),
            ("mcc", theirs.matthews_corrcoef),
        ):
            ours = ClassMetric.of(*names, name).over(DRAWS)
            assert ours == pytest.approx([score(truth[d], found[d]) for d in DRAWS]), name


def test_ranks_are_those_of_scipy_and_scikit_learn() -> None:
    chance = np.random.default_rng(2)
    truth, scores = chance.integers(0, 2, 60).astype(float), chance.integers(0, 9, 60) / 9
    ours = Rank(truth, scores, "auroc").over(DRAWS)
    assert ours == pytest.approx([theirs.roc_auc_score(truth[d], scores[d]) for d in DRAWS])
    numbers = np.round(scores + chance.normal(0, 0.3, 60), 1)
    ours = Rank(numbers, scores).over(DRAWS)
    assert ours == pytest.approx([spearmanr(numbers[d], scores[d]).statistic for d in DRAWS])
    assert Rank(np.ones(60), scores, "auroc").over(DRAWS).tolist() == [0.5] * 8
    assert Rank(np.ones(60), scores).over(DRAWS).tolist() == [0.0] * 8


def test_several_classes_are_scored_as_by_scikit_learn() -> None:
    chance = np.random.default_rng(3)
    truth, found = chance.random((2, 60, 4)) < 0.4
    ours = SeveralF1(truth, found).over(DRAWS)
    assert ours == pytest.approx([theirs.f1_score(truth[d], found[d], average="macro", zero_division=0) for d in DRAWS])
    names = np.array(["a", "b", "c", "d"])
    rows = [
        RowResult("f:1", 1.0, 1.0, truth=names[t].tolist(), found=names[f].tolist())
        for t, f in zip(truth, found, strict=True)
    ]
    found_metrics = task_metrics("multilabel", rows)
    assert found_metrics["micro_f1"].over(DRAWS) == pytest.approx(
        [theirs.f1_score(truth[d], found[d], average="micro") for d in DRAWS]
    )
    assert found_metrics["all_right"].over(DRAWS) == pytest.approx(
        [theirs.accuracy_score(truth[d], found[d]) for d in DRAWS]
    )


def test_the_threshold_is_the_best_of_all() -> None:
    chance = np.random.default_rng(4)
    truth = (chance.random((40, 3)) < 0.3).astype(float)
    outputs = chance.normal(size=(40, 3)) + 1.5 * truth - 2
    probabilities = 1 / (1 + np.exp(-outputs))
    ours = theirs.f1_score(truth, probabilities >= best_threshold(outputs, truth), average="micro")
    assert ours == max(theirs.f1_score(truth, probabilities >= p, average="micro") for p in probabilities.ravel())
    coarse = np.round(outputs)  # many are equal
    told = 1 / (1 + np.exp(-coarse)) >= best_threshold(coarse, truth)
    ways = [theirs.f1_score(truth, coarse >= value, average="micro") for value in np.unique(coarse)]
    assert theirs.f1_score(truth, told, average="micro") == max(ways)
    # The first of four that are equal is right: alone it would have an F1 of 2/3, all four have 1/3 and all five 4/7.
    assert best_threshold(np.array([[0.0, 0.0, 0.0, 0.0, -9.0]]), np.array([[1.0, 0.0, 0.0, 0.0, 1.0]])) < 1e-3


def test_numbers_are_scored_as_by_scikit_learn() -> None:
    chance = np.random.default_rng(5)
    truth = chance.normal(30, 5, (60, 1))
    found = truth + chance.normal(0, 2, (60, 1))
    rows = [RowResult("f:1", 1.0, 1.0, truth=t, found=f) for t, f in zip(truth.tolist(), found.tolist(), strict=True)]
    whole = np.arange(60)[None]
    ours = {name: float(metric.over(whole)[0]) for name, metric in task_metrics("regression", rows).items()}
    assert ours["r2"] == pytest.approx(theirs.r2_score(truth, found))
    assert ours["mae"] == pytest.approx(theirs.mean_absolute_error(truth, found))
    assert ours["rmse"] == pytest.approx(theirs.root_mean_squared_error(truth, found))
    assert ours["spearman"] == pytest.approx(spearmanr(truth, found).statistic)


def test_calibration_is_how_far_confidence_lies_from_being_right() -> None:
    # Four rows told with 0.95, three of them right; two with 0.55, none right: 4/6 x 0.20 + 2/6 x 0.55.
    sure = np.array([0.95] * 4 + [0.55] * 2)
    metric = Calibration(sure, np.array([1.0, 1, 1, 0, 0, 0]))
    assert metric.over(np.arange(6)[None]) == pytest.approx([4 / 6 * 0.2 + 2 / 6 * 0.55])
    assert metric.over(np.array([[0, 0, 0, 0]])) == pytest.approx([0.05])


def test_no_verdict_rests_on_calibration() -> None:
    def compared(name: str, low: float, decides: bool) -> Compared:
        value = Interval(low + 0.05, low, low + 0.1)
        return Compared(name, value, value, value, name == "calibration", 50, decides)

    better, worse = compared("accuracy", 0.3, True), compared("calibration", 0.1, False)
    assert (better.direction, worse.direction) == (1, -1)
    assert verdict([better, worse], "accuracy") == "better"


@given(
    st.lists(st.tuples(st.lists(st.sampled_from(TAGS), min_size=1, max_size=9), st.randoms()), min_size=1, max_size=6)
)
@settings(max_examples=300, deadline=None)
def test_entities_are_those_of_seqeval(cases: list[tuple[list[str], object]]) -> None:
    truth = [tags for tags, _ in cases]
    found = [[chance.choice([tag, tag, "O", "B-a", "I-b"]) for tag in tags] for tags, chance in cases]  # type: ignore[attr-defined]
    for tags in (*truth, *found):
        assert [(e.type, e.begin, e.end - 1) for e in entities(tags)] == get_entities(tags)
    hits, told, there = sum(count_entities(t, f) for t, f in zip(truth, found, strict=True))  # type: ignore[misc]
    if told + there:
        assert 2 * hits / (told + there) == pytest.approx(entity_f1(truth, found, zero_division=0))


def test_metrics_of_rows_without_any_entity_are_zero_and_finite() -> None:
    rows = [
        RowResult(f"f:{n}", 1.0, 2.0, truth=["O", "B-a"] if not n else ["O", "O"], found=["O", "O"]) for n in range(9)
    ]
    found = task_metrics("tagging", rows)
    assert {item.name: item.after.value for item in compare_all(found, found)}["entity_f1"] == 0
    plain = [RowResult("f:1", 1.0, 2.0, truth=["DET", "NOUN"], found=["DET", "VERB"])] * 9
    assert list(task_metrics("tagging", plain)) == ["tag_accuracy", "nll"]


def test_bioes_and_bilou_say_what_bio_says() -> None:
    wanted = [("a", 0, 1), ("b", 1, 4)]
    for tags in (["B-a", "B-b", "I-b", "I-b"], ["S-a", "B-b", "I-b", "E-b"], ["U-a", "B-b", "I-b", "L-b"]):
        assert [tuple(entity) for entity in entities(tags)] == wanted


def test_numbers_that_are_all_the_same_have_no_r2() -> None:
    rows = [RowResult("f:1", 1.0, 1.0, truth=[3.0], found=[float(n)]) for n in range(9)]
    assert "r2" not in task_metrics("regression", rows)
    assert best_threshold(np.zeros((4, 2)), np.zeros((4, 2))) == 0.5


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression", "tagging", "embedding", "causal"])
def test_rows_before_and_after_stand_behind_each_other_as_they_are(task: str) -> None:
    """Swaps of before and after are made so: also where each side meets classes of its own."""
    chance = np.random.default_rng(6)

    def side(names: str) -> dict[str, Metric]:
        rows = []
        for number in range(30):
            a, b = (names[n] for n in chance.integers(0, len(names), 2))
            truth: list[object] = [a, b] if task != "regression" else [float(number)]
            found: list[object] = [b] if task != "regression" else [float(number + chance.normal())]
            if task == "tagging":
                truth, found = [f"B-{a}", "O"], [f"B-{b}", "O"]
            if task == "embedding":
                truth, found = [], [int(chance.integers(1, 5))]
            more = {"truth": truth, "found": found, "bytes": 9 if task == "causal" else 0}
            rows.append(RowResult(f"r:{number}", chance.random(), 1.0, "", a, b, True, probability=0.5, **more))
        return task_metrics(task, rows)

    before, after = side("abc"), side("bcd")
    own = np.arange(30)[None]
    for name in before.keys() & after.keys():
        joined = before[name].joined(after[name])
        assert len(joined) == 60
        if task == "multilabel" and name == "macro_f1":  # a class of the other side is there too, with an F1 of 0
            expected = [metric.over(own)[0] * 3 / 4 for metric in (before[name], after[name])]
        else:
            expected = [metric.over(own)[0] for metric in (before[name], after[name])]
        assert [joined.over(own)[0], joined.over(own + 30)[0]] == pytest.approx(expected), name


def test_rows_that_an_older_version_kept_have_the_groups_of_the_same_rows_now() -> None:
    old = Measured([RowResult(f"f:{n}", 1.0, 1.0) for n in range(4)], "chat")
    guard = RowResult("g:1", 1.0, 1.0, part="general text", guard=True)
    new = Measured([*(replace(row, group="ab"[n // 2]) for n, row in enumerate(old.rows)), guard], "chat")
    assert [row.group for row in grouped_like(old, new).rows] == ["a", "a", "b", "b"]
    assert grouped_like(Measured(old.rows[:3], "chat"), new).rows == old.rows[:3]  # of other rows nothing is known


def test_a_group_that_is_a_whole_prompt_is_kept_as_its_hash() -> None:
    names = [short_group(replace(ASKED, group=group)) for group in (None, "patient 7", "p" * 900, "p" * 901)]
    assert names[:2] == ["", "patient 7"]
    assert len(set(names)) == 4
    assert max(map(len, names)) == 40


def test_words_are_kept_of_documents_up_to_a_number_of_tokens() -> None:
    rows = [example([1] * size) for size in (4, 6, 1)]
    assert [first_of(some, most, 10) for some, most in ((rows, 32), (rows, 1), (rows[::-1], 32), ([], 32))] == [
        2,
        1,
        2,
        0,
    ]
