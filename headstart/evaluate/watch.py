"""Preference tuning watched: likelihoods and sampled answers on the way, and the signs that it goes wrong.

Pairs say which of two answers is the better one, and nothing of all the others. So they can be satisfied by a model that
finds the chosen answers less likely, too (Razin et al., 2024, arXiv:2410.08847), says more and more (Park et al., 2024,
arXiv:2403.19159), or has gone far from where it began (Gao et al., 2022, arXiv:2210.10760). The loss shows none of that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from headstart.data.read import Where
from headstart.data.records import Preference
from headstart.data.render import Renderer
from headstart.data.segments import Example, Segment, Segmented
from headstart.engine.engine import Sums
from headstart.engine.forward import PackReader, PreferenceReader
from headstart.engine.plan import FORWARD_COST
from headstart.evaluate.generate import Answer, Draws, OnBatch, generate
from headstart.evaluate.guard import BOUND
from headstart.evaluate.measure import choose_answered
from headstart.evaluate.score import known_of, score_answers
from headstart.models.load import model_length
from headstart.objectives.preference import Answers, tell

PROMPTS = 8  # that are answered each time: they go through the weights together, so fewer would hardly be faster
LIMIT_OVER_CHOSEN = 2.0  # an answer may be twice as long as the chosen one, so that it can be seen to grow
LIMIT_EXTRA = 16
TIME_FRAC = 0.1  # of training: as much as scoring the watched rows may take
PASS_TOKENS = 40  # that go forward in the time of a pass of one token a prompt, which has all weights to read
LEAST_TIMES = 1  # at the end of a run that is too short for a tenth
NGRAM = 4

Untouched = Callable[[], AbstractContextManager[PackReader]]


@dataclass(frozen=True)
class Look:
    """What was seen at one evaluation: the loss on the watched rows, what is told of them, and of answers where any were drawn."""

    loss: float
    rows: Mapping[str, float]
    answers: Mapping[str, float]

    @property
    def values(self) -> dict[str, float]:
        """All of it by name, as the metrics hold it."""
        return {**{f"watch_{name}": value for name, value in self.rows.items()}, **self.answers}


@dataclass(frozen=True)
class Watch:
    """The watched rows, and a few of their prompts that are answered by draws which are the same each time.

    `chosen_tokens` is how long the chosen answers to these are, in the mean; answers are drawn at every `every`th evaluation,
    `times` in all.
    """

    reader: PreferenceReader
    examples: Sequence[Example]
    wheres: Sequence[Where]
    prompts: Sequence[Sequence[int]]
    limits: Sequence[int]
    stop_ids: Sequence[int]
    chosen_tokens: float
    draws: Draws
    every: int
    times: int

    def score(self, tokens_per_pack: int, on_pack: OnBatch | None = None) -> tuple[float, dict[str, float]]:
        """Return the loss of the watched rows and what `tell` says of them, each a mean."""
        outputs = torch.from_numpy(np.concatenate(score_answers(self.reader, self.examples, tokens_per_pack, on_pack)))
        known = torch.from_numpy(known_of(self.examples))
        losses, weights = self.reader.losses(outputs, known)
        free = bool(known[:, 2].isnan().all())
        return float(losses.sum() / weights.sum()), Sums(told=tell(Answers.of(outputs, known), free=free)).means

    def answer(
        self, untouched: Untouched, tokens_per_pack: int, tokens_at_once: int | None, on_batch: OnBatch | None = None
    ) -> dict[str, float]:
        """Draw an answer to each prompt, and return how long they are, how much they repeat, how many end, and how far they are
        from those of the untouched model.
        """
        model = self.reader.model
        length, head = model_length(model.config), self.reader.answer_head
        found = generate(
            model,
            self.prompts,
            self.stop_ids,
            self.limits,
            length,
            on_batch,
            tokens_at_once=tokens_at_once,
            head=head,
            draws=self.draws,
        )
        rows = [_as_example(*row) for row in zip(self.wheres, self.prompts, found, strict=True)]
        packs = self.reader.beside.build_packs(rows, tokens_per_pack)
        tuned = [self.reader.beside.forward(pack) for pack in packs]
        with untouched() as reader:
            before = [reader.forward(pack) for pack in packs]
        return {
            "sample_tokens": float(np.mean([len(answer.ids) for answer in found])),
            "sample_repetition": float(np.mean([repetition(answer.ids) for answer in found])),
            "sample_stop_rate": float(np.mean([answer.stopped for answer in found])),
            "sample_kl": divergence(torch.cat(tuned).double().numpy(), torch.cat(before).double().numpy()),
        }


def build_watch(
    reader: PreferenceReader, renderer: Renderer, rows: Segmented, count: int, seed: int, evaluations: int, tokens: int
) -> Watch:
    """Return what is watched: all `rows`, and at most `count` of their prompts, those of the least hashes.

    `evaluations` are those of the run, and `tokens` go through the model in training: answers are drawn so often that they take
    a tenth of its time. That follows from counts alone, so that a run again does the same.
    """
    kept = [row for row in rows.kept if isinstance(row, Preference)]
    chosen = choose_answered(kept, min(count, PROMPTS))
    prompts = [renderer.prompt(kept[n].prompt, kept[n].tools) for n in chosen]
    aims = [rows.examples[n].segments[kept[n].best].target_count for n in chosen]
    limits = [int(aim * LIMIT_OVER_CHOSEN) + LIMIT_EXTRA for aim in aims]
    draws = np.random.default_rng(seed).random((len(chosen), max(limits, default=0)))
    cost = PASS_TOKENS * max(limits, default=0) + 3 * sum(map(len, prompts)) + 2 * sum(limits)
    affordable = max(LEAST_TIMES, int(TIME_FRAC * tokens / FORWARD_COST / max(1, cost)))
    every = max(1, math.ceil(evaluations / affordable))
    times = 1 + math.ceil(evaluations / every)  # the untouched model, each of these, and the end
    wheres = [kept[n].where for n in chosen]
    mean = float(np.mean(aims or [0]))
    return Watch(reader, rows.examples, wheres, prompts, limits, renderer.stop_ids, mean, draws, every, times)


def _as_example(where: Where, prompt: Sequence[int], answer: Answer) -> Example:
    """Return a drawn answer as a row of which every token is predicted, the one that ends it too."""
    own = [*answer.ids, *([] if answer.stop is None else [answer.stop])]
    ids = np.array([*prompt, *own], np.int32)
    weights = np.array([0.0] * len(prompt) + [1.0] * len(own), np.float32)
    return Example(where, (Segment(ids, weights),))


def repetition(ids: Sequence[int], size: int = NGRAM) -> float:
    """Return which part of the n-grams of an answer it has said before: 1 - distinct / all (Welleck et al., 2019, arXiv:1908.04319:
    seq-rep-n). 0 where it has none.
    """
    grams = [tuple(ids[n : n + size]) for n in range(len(ids) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def divergence(tuned: Any, untouched: Any) -> float:
    """Return the divergence KL(tuned || untouched) in nats a token, from log-probabilities of tokens that the tuned model drew, [L].

    The mean of (r - 1) - log r, with r what the untouched model finds a token likely over what the tuned one does: without bias,
    never below 0, and of less spread than -log r (Schulman, 2020, "Approximating KL Divergence": k3).
    """
    ratio = untouched - tuned
    return float(np.mean(np.expm1(ratio) - ratio)) if len(ratio) else 0.0


# --- signs ---


@dataclass(frozen=True)
class Sign:
    """A sign that it goes wrong, in words, and whether it surely does."""

    name: str
    said: str
    sure: bool

    def to_json(self, step: int) -> dict[str, Any]:
        """The sign with its step."""
        return {"step": step, **asdict(self)}


# From where on a sign is told, and from where on it is sure that something goes wrong.
LESS_LIKELY = (BOUND, 1.0)  # the part by which the chosen answers' loss grew: as the guard's; twice the loss
LONGER = (
    0.5,
    math.inf,
)  # the part by which answers exceed the untouched model's and the chosen ones: long may be right
SHORTER = (0.75, 0.98)  # the part by which they fall below both: to next to nothing
REPEATS = (0.2, 0.5)  # more of what is said was said before; people's text has 0.005 (Welleck et al., 2019, table 2)
STOPS_LESS = (0.4, 0.7)  # fewer answers end by themselves: of eight, six or more (the sign test's p is then below 0.05)
# Nats a token: what it says is e (20) times as likely to it as to the untouched model. Of another style, chosen answers may lie that
# far, so it is sure only where it went there and not nearer to these.
FAR = (1.0, 3.0)
LEAST_PROMPTS = 6  # of fewer, nothing that answers show is sure
LEAST_TOKENS = 4  # answers of fewer can't shrink


def find_signs(before: Mapping[str, float], now: Mapping[str, float]) -> list[Sign]:
    """Return the signs that it goes wrong, from what `Look.values` held `before` training and holds now.

    Beside it `before` has `chosen_tokens`, how long the chosen answers are, and how many `prompts` are answered.
    """
    found: list[Sign | None] = []
    grown = 0.0
    if "watch_chosen_logprob" in now and "watch_chosen_logprob" in before:
        grown = now["watch_chosen_logprob"] / before["watch_chosen_logprob"] - 1
        found.append(_sign("likelihood", grown, LESS_LIKELY, f"the chosen answers' own loss grew by {grown:.0%}"))
    if "sample_tokens" in now and "sample_tokens" in before:
        tokens, own, chosen = now["sample_tokens"], before["sample_tokens"], before["chosen_tokens"]
        lengths = f"{tokens:.0f} tokens, the untouched model's {own:.0f}, chosen ones {chosen:.0f}"
        longer, least = tokens / max(own, chosen, 1.0) - 1, min(own, chosen)
        shorter = 1 - tokens / least if least >= LEAST_TOKENS else 0.0
        again = now["sample_repetition"] - before["sample_repetition"]
        fewer = before["sample_stop_rate"] - now["sample_stop_rate"]
        ends = f"{now['sample_stop_rate']:.0%} of the answers end by themselves, {before['sample_stop_rate']:.0%} did"
        far = (FAR[0], FAR[1] if grown > 0 else math.inf)
        of_answers = [
            _sign("length", longer, LONGER, f"answers grow longer: {lengths}"),
            _sign("silence", shorter, SHORTER, f"answers shrink: {lengths}"),
            _sign("repetition", again, REPEATS, f"answers repeat {now['sample_repetition']:.0%} of what they said"),
            _sign("stops", fewer, STOPS_LESS, ends),
            _sign(
                "divergence", now["sample_kl"], far, f"it is {now['sample_kl']:.1f} nats a token from where it began"
            ),
        ]
        enough = before["prompts"] >= LEAST_PROMPTS
        found += [replace(sign, sure=sign.sure and enough) for sign in of_answers if sign is not None]
    return [sign for sign in found if sign is not None]


def _sign(name: str, value: float, bounds: tuple[float, float], said: str) -> Sign | None:
    told, sure = bounds
    return Sign(name, said, value > sure) if value > told else None
