"""Preferences: rows in each of the field's layouts, what makes no pair, and losses against values worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from bench.objectives import STRANGERS, draw_pairs, ours
from headstart.choose import choose_preference
from headstart.config import Override, build_config
from headstart.data.formats import Formatted, Named, format_rows
from headstart.data.preferences import desirable_weight, find_opposed, parted, preference_notes, segment_preferences
from headstart.data.quality import look_through
from headstart.data.read import Row, Where
from headstart.data.records import Message, Preference
from headstart.errors import DataError, UsageError
from headstart.evaluate.flips import count_flips
from headstart.evaluate.measure import Measured, RowResult
from headstart.evaluate.metrics import task_metrics
from headstart.evaluate.reference import find_references, reference_key
from headstart.objectives.preference import (
    PAIRWISE,
    Answers,
    Pairs,
    Terms,
    best_answers,
    find_pairs,
    kto,
    preference_losses,
    tell,
)
from tests.laws.test_rendering import renderer

ASK = {"role": "user", "content": "Hi?"}
GOOD, BAD = {"role": "assistant", "content": "Hello."}, {"role": "assistant", "content": "What?"}


def form(*rows: dict[str, Any], **how: Any) -> Formatted:
    named = Named(**{key: how.pop(key) for key in list(how) if key in Named.__dataclass_fields__})
    return format_rows([Row(Where("f", n), row) for n, row in enumerate(rows, 1)], named=named, **how)


def taken(formatted: Formatted) -> tuple[list[tuple[str, str]], list[str], tuple[float, ...]]:
    assert not formatted.problems
    row = formatted.examples[0]
    assert isinstance(row, Preference)
    assert all(answer.trained for answer in row.answers)
    assert not any(message.trained for message in row.prompt)
    return [(m.role, m.content) for m in row.prompt], [answer.content for answer in row.answers], row.scores


PAIR = ([("user", "Hi?")], ["Hello.", "What?"], (1.0, 0.0))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi?", "chosen": "Hello.", "rejected": "What?"},
        {"question": "Hi?", "chosen": "Hello.", "rejected": "What?"},
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASK], "chosen": GOOD, "rejected": BAD},
        {"prompt": "Hi?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD], "messages": [ASK, GOOD]},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {
            "conversations": [{"from": "human", "value": "Hi?"}],
            "chosen": {"from": "gpt", "value": "Hello."},
            "rejected": {"from": "gpt", "value": "What?"},
        },
        {"chosen": "\n\nHuman: Hi?\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi?\n\nAssistant: What?"},
        {"input": {"messages": [ASK], "tools": []}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
        {"input": {"messages": [ASK]}, "preferred_completion": [GOOD], "non_preferred_completion": [BAD]},
        {"prompt": "Hi?", "responses": ["Hello.", "What?"], "scores": [1, 0]},
    ],
)
def test_pairs_are_found_in_each_layout(row: dict[str, Any]) -> None:
    formatted = form(row, row)
    assert (formatted.detection.format, formatted.detection.task, formatted.detection.kind) == ("preference",) * 3
    assert taken(formatted) == PAIR


def test_what_stands_beside_a_pair_is_read() -> None:
    asked = [("system", "Be kind."), ("user", "Hi?")]
    assert taken(form({"system": "Be kind.", "prompt": "Hi?", "chosen": "a", "rejected": "b"}))[0] == asked
    # A side that brings its own system turn along still has the prompt of the column.
    system = {"role": "system", "content": "Be kind."}
    assert taken(form({"prompt": "Hi?", "chosen": [system, ASK, GOOD], "rejected": [system, ASK, BAD]}))[0] == asked
    alpaca = {"instruction": "Add.", "input": "1 2", "chosen": "3", "rejected": "4"}
    assert taken(form(alpaca))[0] == [("user", "Add.\n\n1 2")]
    transcript = "Human: Hi?\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant: "
    turns = taken(form({"chosen": f"{transcript}Yes: fine", "rejected": f"{transcript}No"}))
    assert turns[0] == [("user", "Hi?"), ("assistant", "Hello."), ("user", "And?")]
    assert turns[1] == ["Yes: fine", "No"]


def test_several_answers_have_scores_or_ranks() -> None:
    three = {"prompt": "Hi?", "responses": ["a", "b", "c"]}
    assert taken(form({**three, "scores": [1, 3, 2.5]}))[2] == (1.0, 3.0, 2.5)
    assert taken(form({**three, "ranks": [1, 3, 2]}))[2] == (-1.0, -3.0, -2.0)
    rated = [{"response": "a", "overall_score": 2.0}, {"response": "b", "overall_score": 4.5}]
    assert taken(form({"instruction": "Hi?", "completions": rated}))[1:] == (["a", "b"], (2.0, 4.5))


@pytest.mark.parametrize("label", [True, 1, "1", "true", "True", 1.0, "1.0", "yes", " Yes", "good"])
def test_lone_answers_are_wanted_or_not(label: Any) -> None:
    formatted = form({"prompt": "Hi?", "completion": "Hello.", "label": label})
    assert taken(formatted) == ([("user", "Hi?")], ["Hello."], (1.0,))
    assert formatted.examples[0].wanted == [True]  # type: ignore[union-attr]


@pytest.mark.parametrize("label", [0.0, "0.0", "no", "bad", "false"])
def test_what_says_no_is_not_wanted(label: Any) -> None:
    assert taken(form({"prompt": "Hi?", "completion": "Hello.", "label": label}))[2] == (0.0,)


def test_whether_a_label_is_a_vote_follows_from_most_labels_or_the_kind() -> None:
    """A question with its answer and a number may be a row to tell that number of."""
    row = {"question": "Hi?", "answer": "Hello."}
    votes, classes, numbers = (
        [{**row, "label": value} for value in some] for some in ((1, 0, 2), (0, 1, 2, 3), (0.5, 1, 0.2))
    )
    assert (form(*votes).detection.task, form(*votes).problems[0].where) == ("preference", "f:3:label")
    assert "--kind supervised" in str(form(*votes).detection)
    for some, task in ((classes, "classification"), (numbers, "regression")):
        formatted = form(*some)
        assert (formatted.detection.task, formatted.detection.certainty, formatted.problems) == (task, "likely", [])
        assert formatted.examples[0].texts == ["Hi?", "Hello."]
    for kind, task in (("supervised", "classification"), ("instruction", "chat"), ("preference", "preference")):
        formatted = form(*votes[:2], kind=kind)
        assert (formatted.detection.task, formatted.problems) == (task, [])


def test_a_margin_is_read_for_reward_models_alone() -> None:
    row = {"prompt": "Hi?", "chosen": "Hello.", "rejected": "What?", "margin": 1.5}
    found = form(row, task="reward")
    assert (found.detection.task, found.notes, found.examples[0].margin) == ("reward", [], 1.5)  # type: ignore[union-attr]
    assert form(row).notes == ["columns not used: margin"]
    assert form(row).examples[0].margin == 0  # type: ignore[union-attr]
    bad = form({**row, "margin": -1}, {**row, "margin": "wide"}, task="reward").problems
    assert [(p.code, p.where) for p in bad] == [("row.pair", "f:1:margin"), ("row.label", "f:2:margin")]
    (example,) = segment_preferences(found.examples, renderer("chatml"), max_length=99).examples  # type: ignore[arg-type]
    assert np.asarray(example.label)[0].tolist() == [1.0, 1.5]


def test_a_class_beside_an_answer_makes_no_preference_and_columns_can_be_named() -> None:
    assert form({"prompt": "Hi?", "completion": "Hello.", "label": "greeting"}).detection.task == "chat"
    row = {"q": "Hi", "good": "Hello.", "bad": "What?"}
    assert taken(form(row, prompt="{q}?", completion="good", rejected="bad")) == PAIR
    asked = {"question": "Hi?", "good": "Hello.", "bad": "What?"}  # a prompt by its usual name needs none
    assert taken(form(asked, completion="good", rejected="bad")) == PAIR
    assert form(asked, {**asked, "good": ""}, completion="good", rejected="bad").problems[0].where == "f:2:good.content"
    with pytest.raises(DataError, match="both answers must be named"):
        form(row, prompt="q", rejected="bad")


SIDE = {"prompt": "Hi?", "chosen": "Hello.", "rejected": "What?"}


@pytest.mark.parametrize(
    ("row", "code", "place", "said"),
    [
        ({"prompt": "Hi?", "responses": [], "scores": []}, "row.pair", "f:2:responses", "0 answers"),
        ({"prompt": "Hi?", "responses": ["a"], "ranks": [1]}, "row.pair", "f:2:responses", "1 answers"),
        ({**SIDE, "rejected": None}, "row.pair", "f:2:rejected", "missing"),
        ({"prompt": "Hi?", "chosen": "Hello."}, "row.pair", "f:2:rejected", "missing"),
        ({**SIDE, "rejected": " Hello.\n"}, "row.pair", "f:2:rejected", "equal"),
        ({**SIDE, "chosen": "  "}, "row.empty_answer", "f:2:chosen.content", "empty"),
        ({"chosen": "a", "rejected": "b"}, "row.pair", "f:2", "nothing is asked"),
        ({**SIDE, "chosen": [ASK, GOOD, GOOD]}, "row.pair", "f:2:chosen", "more than one turn"),
        ({**SIDE, "chosen": [ASK]}, "row.role", "f:2:chosen", "ends with a turn of user"),
        ({**SIDE, "chosen": [{"role": "judge", "content": "a"}]}, "row.role", "f:2:chosen[0].role", "'judge'"),
        (
            {"chosen": [ASK, GOOD], "rejected": [{**ASK, "content": "Hm?"}, BAD]},
            "row.pair",
            "f:2:rejected",
            "another than",
        ),
        ({**SIDE, "rejected": [{**ASK, "content": "Hm?"}, BAD]}, "row.pair", "f:2:rejected", "another than"),
        ({"prompt": [ASK, GOOD], "chosen": "a", "rejected": "b"}, "row.pair", "f:2", "ends with an answer"),
        ({"prompt": "Hi?", "responses": ["a", "b"], "scores": [1]}, "row.pair", "f:2:scores", "2 answers and 1"),
        ({"prompt": "Hi?", "responses": ["a", "b"], "scores": [1, 1]}, "row.pair", "f:2", "no answer is better"),
        ({"prompt": "Hi?", "responses": ["a", "b"], "scores": [1, None]}, "row.label", "f:2:scores[1]", "None"),
        ({"prompt": "Hi?", "completion": "a", "label": 2}, "row.label", "f:2:label", "2 where true or false"),
        ({"prompt": "Hi?", "completion": "a", "label": None}, "row.label", "f:2:label", "no label"),
    ],
)
def test_what_is_no_pair_is_named(row: dict[str, Any], code: str, place: str, said: str) -> None:
    (problem,) = form(SIDE, row, format="preference").problems
    assert (problem.code, problem.where) == (code, place)
    assert said in problem.what
    assert problem.cure


def preference(*answers: str, scores: tuple[float, ...] = (1.0, 0.0), asked: str = "Q?", line: int = 1) -> Preference:
    said = tuple(Message("assistant", answer, trained=True) for answer in answers)
    return Preference(Where("f", line), (Message("user", asked),), said, scores, group=asked)


def test_rows_of_one_prompt_stay_together_and_turned_round_pairs_are_named() -> None:
    formatted = form(SIDE, {**SIDE, "chosen": "What?", "rejected": "Hello."}, {**SIDE, "prompt": "Who?"})
    first, turned, other = formatted.examples
    assert first.group == turned.group != other.group
    found = {
        finding.kind: [str(row) for row in finding.rows]
        for finding in look_through((r, False) for r in formatted.examples)
    }
    assert found["contradiction"] == ["f:2 (line 1)"]
    assert "duplicate" not in found


def test_rows_that_prefer_the_opposite_of_an_earlier_one_are_told() -> None:
    """Also where more answers stand beside the two, and not where another prompt is asked."""
    ranked = preference("b", "c", "a", scores=(3.0, 2.0, 1.0), line=4)
    some = [preference("a", "b"), preference("a", "b", line=2), preference("b", "a", asked="Who?", line=3), ranked]
    assert [(str(row.where), str(first.where)) for row, first in find_opposed(some)] == [("f:4", "f:1")]
    assert preference_notes(some) == [
        "1 rows prefer an answer to one that an earlier row to the same prompt prefers to it: first f:4, against f:1"
    ]


def test_rows_that_all_ask_the_same_can_be_split() -> None:
    same = [preference(f"yes {n}", f"no {n}", line=n) for n in range(3)]
    assert [row.group for row in parted(same)] == [None] * 3
    other = preference("a", "b", asked="Other?")
    assert [row.group for row in parted([*same, other])] == ["Q?"] * 3 + ["Other?"]


def test_length_bias_is_told() -> None:
    long = [preference("a long answer", "short", asked=f"{n}?", line=n) for n in range(17)]
    short = [preference("short", "a long answer", asked=f"{n} then?", line=n) for n in range(20)]
    (note,) = preference_notes([*long, *short[:3]])
    # Wilson: (0.85 + z^2 / 40) / (1 + z^2 / 20) = 0.794, and 1.96 * sqrt(0.85 * 0.15 / 20 + z^2 / 1600) / 1.192 = 0.154 on either side
    assert note.startswith("the longer answer wins in 17 of 20 pairs (85%, 95% interval 64% to 95%): length may be")
    assert preference_notes(short)[0].endswith("are the sides swapped?")
    (even,) = preference_notes([*long[:10], *short[:10]])
    assert "50%" in even
    assert "learned" not in even
    assert preference_notes(long) == []  # too few to tell
    lone = [preference("a", scores=(1.0,))] * 3
    assert "never seen" in preference_notes(lone, unpaired=True)[0]
    assert desirable_weight([*lone, preference("b", scores=(0.0,))]) == pytest.approx(1 / 3)
    assert desirable_weight([*lone[:1], preference("b", scores=(0.0,))]) == 1.0


# --- segments ---


def test_every_answer_is_a_segment_of_which_the_answer_is_trained() -> None:
    own = renderer("chatml")
    row = preference("the plan", "a sore throat", "7 !", scores=(2.0, 3.0, 1.0))
    (example,) = segment_preferences([row], own, max_length=500).examples
    assert np.asarray(example.label)[:, 0].tolist() == [2.0, 3.0, 1.0]
    assert np.isnan(np.asarray(example.label)[:, 1]).all()
    prompt = own.prompt(row.prompt)
    for segment, answer in zip(example.segments, row.answers, strict=True):
        assert segment.ids[: len(prompt)].tolist() == prompt
        trained = segment.ids[segment.weights > 0].tolist()
        assert segment.ids.tolist() == prompt + trained
        assert own.decode(trained[:-1]) == answer.content
        assert trained[-1] in own.stop_ids


def test_no_row_is_trained_of_which_one_side_is_too_long() -> None:
    own = renderer("chatml")
    rows = [preference("the plan", "no", asked="why " * 9, line=1), preference("the plan", "a plan " * 40, line=2)]
    limit = 60
    made = segment_preferences(rows, own, max_length=limit)
    assert [str(example.where) for example in made.examples] == ["f:1"]
    assert [str(where) for where, _ in made.dropped] == ["f:2"]
    with pytest.raises(DataError):
        segment_preferences(rows, own, max_length=limit, over_length="error")
    shorter = max(len(s) for s in made.examples[0].segments) - 3
    (cut,) = segment_preferences(rows[:1], own, max_length=shorter, over_length="cut").examples
    first, second = cut.segments
    assert cut.cut
    assert max(map(len, cut.segments)) <= shorter
    # Both were cut alike: what stands before the answers is one prompt.
    begin = [int(np.flatnonzero(segment.weights)[0]) for segment in (first, second)]
    assert first.ids[: begin[0]].tolist() == second.ids[: begin[1]].tolist()


def test_an_answer_to_another_prompt_stands_behind_and_does_not_follow_the_order_of_rows() -> None:
    own = renderer("chatml")
    rows = [preference(f"{n}", scores=(float(n % 2),), asked=f"Q {n}?", line=n) for n in range(5)]

    def partners(some: list[Preference]) -> dict[int, list[int]]:
        made = segment_preferences(some, own, max_length=500, unpaired=True)
        for example in made.examples:
            assert len(example.segments) == 2
            own_score, strange = np.asarray(example.label)[:, 0]
            assert own_score == (1.0 if example.where.line % 2 else -1.0)
            assert math.isnan(strange)
        return {example.where.line: example.segments[1].ids.tolist() for example in made.examples}

    assert partners(rows) == partners(rows[::-1])
    alone = segment_preferences(rows[:1], own, max_length=500, unpaired=True).examples
    assert [len(example.segments) for example in alone] == [1]


# --- losses, by hand ---

# Log-probabilities -10 (5 tokens) and -14 (8 tokens), the reference's -12 and -13: gains 2 and -1, a lead of 3, per token
# 2/5 + 1/8 = 0.525; per token the answers have -2 and -1.75.
PAIRS = Pairs(*(torch.tensor([value], dtype=torch.float64) for value in (-10.0, -14.0, -12.0, -13.0, 5.0, 8.0)))


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def log_odds(p: float) -> float:
    return math.log(p / (1 - p))


@pytest.mark.parametrize(
    ("objective", "terms", "value"),
    [
        ("dpo", {"beta": 0.5}, softplus(-1.5)),
        ("dpo", {"beta": 0.5, "label_smoothing": 0.2}, 0.8 * softplus(-1.5) + 0.2 * softplus(1.5)),
        ("dpo_norm", {"beta": 5.0}, softplus(-2.625)),
        ("hinge", {"beta": 0.1}, 0.7),
        ("hinge", {"beta": 0.5}, 0.0),
        ("ipo", {"beta": 0.5}, (0.525 - 1.0) ** 2),
        (
            "robust",
            {"beta": 0.5, "label_smoothing": 0.2},
            (0.8 * softplus(-1.5) - 0.2 * softplus(1.5)) / 0.6,
        ),
        ("simpo", {"beta": 2.0, "margin": 1.0}, softplus(1.5)),
        ("cpo", {"beta": 0.1}, softplus(-0.4)),
        # Rewards -10 and -14 in the place of log-probabilities, margins -12 and -13 in that of references.
        ("reward", {}, softplus(-3.0)),
        ("reward", {"label_smoothing": 0.1}, 0.9 * softplus(-3.0) + 0.1 * softplus(3.0)),
        ("orpo", {"beta": 0.1}, 0.1 * softplus(log_odds(math.exp(-1.75)) - log_odds(math.exp(-2.0)))),
    ],
)
def test_losses_of_pairs_are_those_worked_out_by_hand(objective: str, terms: dict[str, float], value: float) -> None:
    assert float(PAIRWISE[objective](PAIRS, Terms(objective, **terms))) == pytest.approx(value, rel=1e-12)


# What TRL 1.16.0 gives for twelve drawn pairs, the mean (`python -m bench.objectives`); orpo in float32.
OF_TRL = {
    "dpo": 0.655481145,
    "dpo_norm": 0.589262120,
    "hinge": 0.851496161,
    "ipo": 2.094131504,
    "robust": 0.605979865,
    "simpo": 0.951996674,
    "cpo": 1.345364712,
    "orpo": 0.047544155,
    "kto": 0.604784611,
}


@pytest.mark.parametrize(("objective", "value"), OF_TRL.items())
def test_losses_are_those_of_trl(objective: str, value: float) -> None:
    assert ours(objective, draw_pairs(), STRANGERS) == pytest.approx(value, rel=1e-7)


def test_dpo_has_the_gradient_of_its_paper() -> None:
    """-beta * sigmoid(-beta * lead) for the chosen answer, its negative for the rejected one."""
    chosen, rejected = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (-10.0, -14.0))
    pairs = Pairs(chosen, rejected, PAIRS.ref_chosen, PAIRS.ref_rejected, PAIRS.chosen_tokens, PAIRS.rejected_tokens)
    PAIRWISE["dpo"](pairs, Terms(beta=0.5)).sum().backward()  # type: ignore[no-untyped-call]
    assert chosen.grad is not None
    assert rejected.grad is not None
    slope = 0.5 / (1 + math.exp(1.5))
    assert (float(chosen.grad), float(rejected.grad)) == (pytest.approx(-slope), pytest.approx(slope))


def test_kto_holds_gains_against_the_mean_of_strangers_through_which_no_gradient_goes() -> None:
    gains = torch.tensor([2.0, -1.0], dtype=torch.float64)
    strangers = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)
    losses = kto(gains, torch.tensor([True, False]), strangers, Terms("kto", beta=0.5, desirable=1.5))
    sigmoid = [1 / (1 + math.exp(-x)) for x in (0.5 * (2 - 1), 0.5 * (1 + 1))]
    assert losses.tolist() == pytest.approx([1.5 * (1 - sigmoid[0]), 1 - sigmoid[1]])
    assert not losses.requires_grad
    below = kto(gains, torch.tensor([True, False]), torch.tensor([-3.0]), Terms("kto", beta=0.5))
    assert below.tolist() == pytest.approx([1 - 1 / (1 + math.exp(-1.0)), 1 - 1 / (1 + math.exp(-0.5))])


def test_of_ranked_answers_all_pairs_count_and_a_row_weighs_one() -> None:
    nan = math.nan
    row = torch.tensor([0, 1, 0, 1, 0, 2])
    score = torch.tensor([2.0, 1.0, 3.0, 0.0, 2.0, nan])
    better, worse = find_pairs(row, score)
    assert sorted(zip(better.tolist(), worse.tolist(), strict=True)) == [(1, 3), (2, 0), (2, 4)]
    known = torch.tensor([[7, 3, -1.0, 2], [7, 1, -2.0, 4], [7, 2, -1.0, 1], [9, 0, -4.0, 2], [9, 1, -5.0, 2]]).double()
    logprobs = torch.tensor([-1.0, -2.5, -3.0, -4.0, -3.0], dtype=torch.float64)
    losses, weights = preference_losses(Terms("dpo", beta=1.0, likelihood=0.5))(logprobs, known)
    # Gains of the first row 0, -0.5, -2: leads 0.5, 2 and, of the middle two, -1.5; of the second row 0 and 2: a lead of 2.
    first = (softplus(-0.5) + softplus(-2.0) + softplus(1.5)) / 3 + 0.5 * 1.0 / 2
    assert losses.tolist() == pytest.approx([first, softplus(-2.0) + 0.5 * 3.0 / 2])
    assert weights.tolist() == [1.0, 1.0]
    assert best_answers(Answers.of(logprobs, known)).tolist() == [0, 4]


def test_what_is_watched_is_told_of_pairs_and_of_lone_answers() -> None:
    known = torch.tensor([[0, 1, -1.0, 2], [0, 0, -2.0, 2], [1, 1, -1.0, 1], [1, 0, -1.0, 1]]).double()
    logprobs = torch.tensor([-0.5, -3.0, -1.0, -1.0], dtype=torch.float64)
    told = {name: (value[0] / value[1]).item() for name, value in tell(Answers.of(logprobs, known)).items()}
    assert told == {
        "accuracy": 0.75,  # one pair leads, one is a tie
        "lead": 0.75,  # 0.5 + 1 and nothing
        "chosen_logprob": -0.75,
        "chosen_per_token": -0.625,
        "chosen_gain": 0.25,
        "rejected_logprob": -2.0,
        "rejected_per_token": -1.25,
        "rejected_gain": -0.5,
    }
    lone = torch.tensor([[0, 1, -1.0, 2], [0, math.nan, 0, 2], [1, -1, -2.0, 2], [2, -1, -2.0, 2]]).double()
    told = {n: v.tolist() for n, v in tell(Answers.of(torch.tensor([-0.5, -9, -3.0, -1.0]).double(), lone)).items()}
    assert told["accuracy"] == [2.0, 3.0]
    assert told["rejected_gain"] == [0.0, 2.0]


# --- what is measured ---


class Scored:
    answer = None
    bytes = 0
    group = ""

    def __init__(self, truth: list[float], found: list[tuple[float, int, float | None]]) -> None:
        self.truth, self.found = truth, found


def values(rows: list[Scored]) -> dict[str, float]:
    metrics = task_metrics("preference", rows)
    return {name: float(metric.over(np.arange(len(metric))[None])[0]) for name, metric in metrics.items()}


def test_accuracy_is_who_gained_more_and_likelier_needs_no_reference() -> None:
    gained = Scored([1.0, 0.0], [(-9.0, 3, -10.0), (-4.0, 2, -3.0)])
    tie = Scored([0.0, 1.0], [(-8.0, 4, -8.0), (-6.0, 2, -6.0)])
    found = values([gained, tie])
    assert found == {
        "preference_accuracy": 0.75,
        "likelier": 0.0,  # -3 against -2, -3 against -2
        "margin": pytest.approx((-5.0 + 2.0) / 2),
        "chosen_logprob": pytest.approx((-9.0 - 6.0) / 2),
        "rejected_logprob": pytest.approx((-4.0 - 8.0) / 2),
    }
    unknown = Scored([1.0, 0.0], [(-3.0, 3, None), (-4.0, 2, None)])
    assert "preference_accuracy" not in values([unknown])
    assert values([unknown])["likelier"] == 1.0
    decides = {name: metric.decides for name, metric in task_metrics("preference", [gained]).items()}
    assert [name for name, does in decides.items() if not does] == ["chosen_logprob", "rejected_logprob"]
    # Pairs and votes beside each other are told each by itself.
    voted = [Scored([1.0], [(-2.0, 2, None)]), Scored([0.0], [(-6.0, 2, None)])]
    assert {"likelier": 1.0, "wanted_auroc": 1.0}.items() <= values([unknown, *voted]).items()
    lone = [Scored([1.0], [(-2.0, 2, -3.0)]), Scored([0.0], [(-6.0, 2, -5.0)]), Scored([0.0], [(-1.0, 2, -2.0)])]
    assert values(lone)["preference_accuracy"] == pytest.approx(2 / 3)
    assert values(lone)["wanted_auroc"] == 0.5  # above one unwanted answer, below the other


def test_a_reward_model_is_right_where_the_better_answer_has_more() -> None:
    rows = [
        Scored([1.0, 0.0], [(2.0, 1, 0.0), (0.5, 1, 0.0)]),
        Scored([1.0, 3.0, 2.0], [(0.0, 1, 0.0), (1.0, 1, 0.0), (4.0, 1, 0.0)]),
        Scored([0.0, 1.0], [(1.0, 1, 0.0), (1.0, 1, 0.0)]),
    ]
    for row, loss in zip(rows, (0.2, 0.9, 0.7), strict=True):
        row.nll, row.targets = loss, 1.0  # type: ignore[attr-defined]
    metrics = task_metrics("reward", rows)
    found = {name: float(metric.over(np.arange(len(metric))[None])[0]) for name, metric in metrics.items()}
    leads = [1.5, (1.0 - 3.0 + 4.0) / 3, 0.0]  # of the second row: 1 over 0, 1 over 4, 4 over 0
    assert found == {
        "reward_accuracy": pytest.approx((1 + 2 / 3 + 0.5) / 3),
        "reward_margin": pytest.approx(sum(leads) / 3),
        "cross_entropy": pytest.approx(0.6),
    }
    assert not metrics["reward_margin"].decides


# --- settings ---


def chosen(lone: int = 0, **settings: Any) -> Any:
    given = [Override(f"preference.{key}", value, "-s") for key, value in settings.items()]
    return choose_preference(build_config(None, given), lone).settings.preference


def test_what_is_left_out_follows_from_rows_and_objective() -> None:
    assert (chosen().objective, chosen().beta, chosen().likelihood) == ("dpo", 0.1, 0.2)
    assert chosen(lone=3).objective == "kto"
    assert (chosen(objective="orpo").likelihood, chosen(objective="simpo").beta) == (1.0, 2.0)
    assert chosen(likelihood=0).likelihood == 0
    assert (chosen(objective="reward").beta, chosen(objective="reward").likelihood) == (None, None)
    for wrong, said in (
        ({"lone": 3, "objective": "dpo"}, "only one"),
        ({"objective": "reward", "beta": 0.3}, "has no effect"),
        ({"objective": "robust"}, "is dpo"),
        ({"objective": "ipo", "label_smoothing": 0.1}, "has no effect"),
    ):
        with pytest.raises(UsageError, match=said):
            chosen(**wrong)  # type: ignore[arg-type]


# --- references ---


def test_references_are_computed_once_for_the_same_rows_model_and_settings(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("HEADSTART_HOME", str(tmp_path / "home"))
    rows = segment_preferences(
        [preference("a", "b"), preference("7", "!", line=2)], renderer("chatml"), max_length=99
    ).examples
    key = reference_key(rows, ["model", 1])
    assert key != reference_key(rows[::-1], ["model", 1])
    assert key != reference_key(rows, ["model", 2])
    calls = []

    def compute() -> list[list[float]]:
        calls.append(1)
        return [[-1.0, -0.1], [-3.0, -4.0]]

    own = tmp_path / "run" / "reference.json"
    found = find_references(key, own, compute, 512)
    assert find_references(key, own, compute, 256) == found  # a run goes on from its own, whatever its packs are cut to
    assert find_references(key, tmp_path / "other.json", compute, 512) == found
    assert len(calls) == 1
    find_references(key, tmp_path / "third.json", compute, 256)
    own.write_text("{damaged")
    assert find_references(key, own, compute, 512) == found
    assert len(calls) == 2
    assert find_references("another", own, compute, 512) == found
    assert len(calls) == 3


def test_rows_that_all_left_a_tie_are_fixed_by_chance_as_often_as_broken() -> None:
    def told(gains: list[float]) -> Measured:
        rows = [RowResult(f"f:{n}", -1.0, 1.0, truth=[1.0, 0.0], found=[(g, 3, 0.0), (0.0, 2, 0.0)]) for n, g in enumerate(gains)]  # fmt: skip
        return Measured(rows, "preference")

    found = count_flips(told([0.0] * 20), told([1.0, -1.0] * 10))
    assert (found["fixed"], found["broken"], found["p"]) == (10, 10, 1.0)


def test_rows_that_are_fixed_are_those_whose_better_answer_gained_the_most() -> None:
    def told(gain: float, task: str = "preference") -> Measured:
        row = RowResult("f:1", -1.0, 1.0, "q", "a", truth=[1.0, 0.0], found=[(-9.0 + gain, 3, -9.0), (-4.0, 2, -4.0)])
        return Measured([row], task)

    assert count_flips(told(0.0), told(2.0))["fixed"] == 1  # a tie is not won
    assert count_flips(told(2.0), told(-1.0))["broken"] == 1
    assert count_flips(told(0.0), told(-1.0))["broken"] == 1  # nor is it lost
    several = [
        Measured([RowResult("f:1", 1.0, 1.0, "q", "b, a", "x", truth=["b", "a"], found=found)], "multilabel")
        for found in ([], ["a", "b"])
    ]
    assert count_flips(*several)["fixed"] == 1
