"""Preference runs watched: what is told of answers, against values worked out by hand, and what ends a run."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from headstart.display import Display
from headstart.engine.loop import Progress, Watched, _judge
from headstart.evaluate.compare import compare
from headstart.evaluate.generate import drawn
from headstart.evaluate.metrics import _rate
from headstart.evaluate.watch import Look, divergence, find_signs, repetition
from headstart.evaluate.wins import Wins, count_wins
from headstart.tune import _Session


def test_repetition_is_the_part_of_n_grams_that_stood_before() -> None:
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(0.2)  # five, of which 1 2 3 4 stands twice
    assert repetition([7] * 23) == pytest.approx(19 / 20)
    assert repetition([1, 2, 3]) == repetition([]) == 0.0


def test_divergence_is_that_of_the_distributions_that_were_drawn_from() -> None:
    """Tokens that stand in proportion to their probability: the mean is then the sum over the distribution."""
    tuned, untouched = np.log([0.5, 0.5, 0.25, 0.25]), np.log([0.25, 0.25, 0.25, 0.5])
    assert divergence(tuned, untouched) == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(0.5))
    assert divergence(tuned, tuned) == 0.0


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.log(torch.tensor([0.5, 0.0, 0.3, 0.2]))
    draws = [(n + 0.5) / 1000 for n in range(1000)]
    ids, logprobs = drawn(logits.expand(1000, 4), draws)
    assert torch.bincount(ids, minlength=4).tolist() == [500, 0, 300, 200]
    assert logprobs[ids == 2].tolist() == pytest.approx([math.log(0.3)] * 300)
    assert drawn(torch.log(torch.tensor([[0.0, 1.0, 0.0]])).expand(2, 3), [0.0, 1 - 2**-53])[0].tolist() == [1, 1]


BEFORE = {
    "watch_chosen_logprob": -50.0,
    "sample_tokens": 20.0,
    "sample_repetition": 0.1,
    "sample_stop_rate": 0.75,
    "sample_kl": 0.0,
    "chosen_tokens": 30.0,
    "prompts": 8.0,
}


@pytest.mark.parametrize(
    ("now", "signs"),
    [
        ({}, []),
        ({"watch_chosen_logprob": -54.0}, []),
        ({"watch_chosen_logprob": -56.0}, [("likelihood", False)]),
        ({"watch_chosen_logprob": -101.0}, [("likelihood", True)]),
        ({"sample_tokens": 44.0}, []),
        ({"sample_tokens": 46.0}, [("length", False)]),
        ({"sample_tokens": 4.0}, [("silence", False)]),
        ({"sample_tokens": 0.0}, [("silence", True)]),
        ({"sample_repetition": 0.35}, [("repetition", False)]),
        ({"sample_repetition": 0.65}, [("repetition", True)]),
        ({"sample_stop_rate": 0.375}, []),
        ({"sample_stop_rate": 0.25}, [("stops", False)]),
        ({"sample_stop_rate": 0.0}, [("stops", True)]),
        ({"sample_stop_rate": 0.0, "prompts": 4.0}, [("stops", False)]),
        ({"sample_kl": 1.5}, [("divergence", False)]),
        ({"sample_kl": 3.5}, [("divergence", False)]),  # far, and on the way to what is chosen
        ({"sample_kl": 3.5, "watch_chosen_logprob": -51.0}, [("divergence", True)]),
    ],
)
def test_signs_are_told_and_sure_from_their_bounds_on(now: dict[str, float], signs: list[tuple[str, bool]]) -> None:
    before = {**BEFORE, "prompts": now.get("prompts", 8.0)}
    found = find_signs(before, {**BEFORE, "watch_chosen_logprob": -50.0, **now})
    assert [(sign.name, sign.sure) for sign in found] == signs


def test_an_evaluation_of_a_model_that_goes_wrong_is_never_the_best() -> None:
    kept: list[int] = []

    class Hooks:
        def keep_best(self, progress: Progress) -> bool:
            kept.append(progress.step)
            return True

    progress, hooks = Progress(), Hooks()

    def judge(step: int, *watched: Any) -> int:
        progress.step = step
        _judge(progress, Watched(*watched), hooks)  # type: ignore[arg-type]
        return progress.wrong_evals

    assert judge(1, 3.0, "") == 0
    assert judge(2, 2.0, "it repeats") == 1
    assert judge(3, 1.5, None) == 1  # nobody looked: it is as it was
    assert judge(4, 1.0, "it repeats") == 2
    assert (kept, progress.best_step, progress.worse_evals) == ([1], 1, 3)
    assert judge(5, 2.5, "") == 0
    assert kept == [1, 5]


def test_a_win_rate_has_the_interval_of_its_pairs() -> None:
    wins = count_wins("votes", [(0, 1), (0, 1), (1, 0), (1, 1), (0.5, 0.5), (0, 2)])
    assert (wins.wins, wins.losses, wins.ties, wins.rows) == (3, 1, 2, 6)
    # The rate is a half and half the difference of wins and losses, whose interval is that of two rates on the same rows.
    before, after = _rate(np.array([0.0, 0, 1, 1, 0, 0])), _rate(np.array([1.0, 1, 0, 1, 0, 1]))
    pairs = compare("won", before, after)
    assert wins.rate.value == pytest.approx((3 + 2 / 2) / 6)
    assert (wins.rate.low, wins.rate.high) == pytest.approx(
        (0.5 + pairs.difference.low / 2, 0.5 + pairs.difference.high / 2)
    )
    assert wins.p == pytest.approx(2 * (1 + 4) / 2**4)  # at least three of four, on either side
    ties = Wins("votes", 0, 0, 4)
    assert ties.rate.value == 0.5
    assert ties.rate.high - ties.rate.low > 0.2
    assert ties.p == 1.0


def test_where_no_answers_are_drawn_a_sound_evaluation_clears_what_was_before(tmp_path: Path) -> None:
    for answered, cleared in (({}, ""), ({"sample_tokens": 3.0}, None)):
        with (tmp_path / "said.txt").open("w") as file:
            progress = Progress(step=4, untouched={"watch_chosen_logprob": -10.0, "prompts": 0.0, **answered})
            session = SimpleNamespace(progress=progress, display=Display(file, live=False))
            sound, bad = (Look(1.0, {"accuracy": 0.5, "chosen_logprob": value}, {}) for value in (-10.0, -30.0))
            # A run that does draw answers waits for the next ones.
            assert _Session._tell_signs(session, sound) == cleared  # type: ignore[arg-type]
            assert _Session._tell_signs(session, bad)  # type: ignore[arg-type]
