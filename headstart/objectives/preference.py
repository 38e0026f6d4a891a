"""Losses of answers of which some are preferred: pairs of a better and a worse one, or answers that are wanted or not.

A log-probability is that of a whole answer, the sum over its tokens; a gain is by how much it exceeds the reference's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from headstart.objectives.labels import RowLosses
from headstart.objectives.tokens import Total

ROW, SCORE, REFERENCE, TOKENS = range(4)  # columns of what is known of each answer
REFERENCE_FREE = ("simpo", "orpo", "cpo", "reward")


@dataclass(frozen=True)
class Terms:
    """What an objective is asked for. `beta` scales rewards (orpo: the odds' part; ipo: the penalty), `margin` is simpo's.

    `label_smoothing` is the part of pairs that may be the wrong way round, `likelihood` the weight of the chosen answer's own
    loss per token, `desirable` that of a wanted answer against an unwanted one (kto).
    """

    objective: str = "dpo"
    beta: float = 0.1
    margin: float = 0.0
    label_smoothing: float = 0.0
    likelihood: float = 0.0
    desirable: float = 1.0


@dataclass(frozen=True)
class Pairs:
    """A better and a worse answer to one prompt, [N] each: log-probabilities, those of the reference, and tokens."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def lead(self) -> Tensor:
        """How much more the chosen answer gained than the rejected one."""
        return (self.chosen - self.ref_chosen) - (self.rejected - self.ref_rejected)

    @property
    def lead_per_token(self) -> Tensor:
        """The same of gains per token."""
        return (self.chosen - self.ref_chosen) / self.chosen_tokens - (
            self.rejected - self.ref_rejected
        ) / self.rejected_tokens

    @property
    def per_token(self) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities per token."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


def _sigmoid(logits: Tensor, smoothing: float) -> Tensor:
    """Return -log sigmoid, with the part `smoothing` of it turned round (conservative DPO; Mitchell, 2023)."""
    return -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)


def dpo(pairs: Pairs, terms: Terms) -> Tensor:
    """Return -log sigmoid(beta * lead) (Rafailov et al., 2023, arXiv:2305.18290, eq. 7)."""
    return _sigmoid(terms.beta * pairs.lead, terms.label_smoothing)


def dpo_norm(pairs: Pairs, terms: Terms) -> Tensor:
    """Return DPO's loss of gains per token (Lambert et al., 2024, arXiv:2411.15124, eq. 6: length-normalized DPO)."""
    return _sigmoid(terms.beta * pairs.lead_per_token, terms.label_smoothing)


def hinge(pairs: Pairs, terms: Terms) -> Tensor:
    """Return max(0, 1 - beta * lead) (SLiC: Zhao et al., 2023, arXiv:2305.10425; with a reference: Liu et al., 2309.06657)."""
    return torch.relu(1 - terms.beta * pairs.lead)


def ipo(pairs: Pairs, terms: Terms) -> Tensor:
    """Return (lead - 1 / (2 beta))^2 (Azar et al., 2023, arXiv:2310.12036, eq. 17), of gains per token.

    The paper's lead is that of whole answers, whose square grows with their length; its authors' own results are of means
    over tokens, as TRL's `ipo` is too.
    """
    return (pairs.lead_per_token - 1 / (2 * terms.beta)).square()


def robust(pairs: Pairs, terms: Terms) -> Tensor:
    """Return DPO's loss, unbiased where a known part of the pairs is turned round (Chowdhury et al., 2024, arXiv:2403.00409)."""
    right, wrong = F.logsigmoid(terms.beta * pairs.lead), F.logsigmoid(-terms.beta * pairs.lead)
    turned = terms.label_smoothing
    return -((1 - turned) * right - turned * wrong) / (1 - 2 * turned)


def simpo(pairs: Pairs, terms: Terms) -> Tensor:
    """Return -log sigmoid(beta * difference per token - margin), without a reference (Meng et al., 2024, arXiv:2405.14734)."""
    chosen, rejected = pairs.per_token
    return _sigmoid(terms.beta * (chosen - rejected) - terms.margin, terms.label_smoothing)


def orpo(pairs: Pairs, terms: Terms) -> Tensor:
    """Return -beta * log sigmoid(log odds ratio) (Hong et al., 2024, arXiv:2403.07691, eq. 7), of probabilities per token.

    The paper's other part, the chosen answer's own loss, is the likelihood term, with weight 1.
    """
    chosen, rejected = pairs.per_token
    return -terms.beta * F.logsigmoid((chosen - rejected) - (_log_rest(chosen) - _log_rest(rejected)))


def _log_rest(logprobs: Tensor) -> Tensor:
    """Return log(1 - p) of log p."""
    return torch.log(-torch.expm1(logprobs.clamp(max=-1e-6)))


def cpo(pairs: Pairs, terms: Terms) -> Tensor:
    """Return -log sigmoid(beta * difference) (Xu et al., 2024, arXiv:2401.08417, eq. 3), without a reference.

    The paper's other part, the chosen answer's own loss, is the likelihood term, with weight 1.
    """
    return _sigmoid(terms.beta * (pairs.chosen - pairs.rejected), terms.label_smoothing)


def reward(pairs: Pairs, terms: Terms) -> Tensor:
    """Return -log sigmoid(r_chosen - r_rejected - margin): Bradley and Terry's model of who wins, 1952.

    So reward models are learned (Christiano et al., 2017, arXiv:1706.03741; of k answers all pairs: Ouyang et al., 2022,
    arXiv:2203.02155, eq. 1; by how much one is better as a margin: Touvron et al., 2023, arXiv:2307.09288, eq. 2). Rewards
    stand in the place of log-probabilities, and the margin in that of the chosen answer's reference.
    """
    return _sigmoid(pairs.lead, terms.label_smoothing)


PAIRWISE: dict[str, Callable[[Pairs, Terms], Tensor]] = {
    "dpo": dpo,
    "dpo_norm": dpo_norm,
    "hinge": hinge,
    "ipo": ipo,
    "robust": robust,
    "simpo": simpo,
    "orpo": orpo,
    "cpo": cpo,
    "reward": reward,
}


def kto(gains: Tensor, wanted: Tensor, strangers: Tensor, terms: Terms) -> Tensor:
    """Return each answer's loss (Ethayarajh et al., 2024, arXiv:2402.01306, eq. 8): `gains`, `wanted` (bool) [N].

    `strangers` [M] are gains of answers to other prompts; their mean, at least 0, estimates the divergence from the
    reference, to which a gain is compared, and no gradient goes through it. An unwanted answer weighs 1.
    """
    point = strangers.detach().mean().clamp(min=0) if len(strangers) else gains.new_zeros(())
    values = torch.sigmoid(terms.beta * torch.where(wanted, gains - point, point - gains))
    return (1 - values) * torch.where(wanted, terms.desirable, 1.0)


# --- answers as they come out of the model ---


@dataclass(frozen=True)
class Answers:
    """Answers with what is known of each, [S]: `row` counts the rows from 0 on, `score` is NaN of an answer to another prompt.

    Of the log-probabilities alone anything may lie on a GPU: what answers are held against which is known on the host.
    """

    logprobs: Tensor
    row: Tensor
    score: Tensor
    reference: Tensor
    tokens: Tensor

    @staticmethod
    def of(logprobs: Tensor, known: Tensor) -> Answers:
        """Put log-probabilities [S] and `known` [S, 4] (row, score, reference or NaN, tokens) together."""
        _, row = torch.unique(known[:, ROW], return_inverse=True)
        reference = known[:, REFERENCE].nan_to_num(0.0).to(logprobs)
        return Answers(logprobs, row, known[:, SCORE], reference, known[:, TOKENS].clamp(min=1).to(logprobs))

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return int(self.row.max()) + 1

    def take(self, values: Tensor, numbers: Tensor) -> Tensor:
        """Return some of the values of all answers."""
        return values[numbers.to(values.device)]

    def mean_by_row(self, values: Tensor, row: Tensor) -> Tensor:
        """Return the mean over those of `values` [N] that are of a row, for each row; 0 where there are none."""
        count = torch.bincount(row, minlength=self.rows).clamp(min=1)[row]
        there = row.to(values.device)
        return values.new_zeros(self.rows).index_add(0, there, values / count.to(values))

    def pairs(self) -> tuple[Pairs, Tensor]:
        """Return all pairs of answers of which one is better, and their rows, [N]."""
        better, worse = find_pairs(self.row, self.score)
        both = [self.take(v, numbers) for v in (self.logprobs, self.reference) for numbers in (better, worse)]
        tokens = [self.take(self.tokens, numbers) for numbers in (better, worse)]
        return Pairs(*both, *tokens), self.row[better]

    def loss_per_token(self, numbers: Tensor) -> Tensor:
        """Return the negative log-probability per token of some answers, a mean for each row."""
        losses = -self.take(self.logprobs / self.tokens, numbers)
        return self.mean_by_row(losses, self.row[numbers])


def find_pairs(row: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """Return the numbers of the better and of the worse answer of every pair: of one row, with scores that differ."""
    order = torch.argsort(row, stable=True)
    better, worse = [order[:0]], [order[:0]]
    for apart in range(1, int(torch.bincount(row).max())):
        first, second = order[:-apart], order[apart:]
        same = row[first] == row[second]
        for above, below in ((first, second), (second, first)):
            chosen = same & (score[above] > score[below])
            better.append(above[chosen])
            worse.append(below[chosen])
    return torch.cat(better), torch.cat(worse)


def best_answers(answers: Answers) -> Tensor:
    """Return the numbers of the answers that no other of their row is better than."""
    scores = answers.score.nan_to_num(-torch.inf)
    highest = torch.full((answers.rows,), -torch.inf, dtype=scores.dtype)
    highest = highest.scatter_reduce(0, answers.row, scores, "amax")
    return torch.nonzero(answers.score >= highest[answers.row])[:, 0]


def preference_losses(terms: Terms) -> RowLosses:
    """Return the function from log-probabilities [S] and what is known of the answers [S, 4] to the loss and weight of each row.

    Of several ranked answers every pair counts, and a row weighs one.
    """

    def losses(logprobs: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        answers = Answers.of(logprobs, known)
        if terms.objective == "kto":
            found, praised = _kto_by_row(answers, terms), torch.nonzero(answers.score > 0)[:, 0]
        else:
            pairs, row = answers.pairs()
            found, praised = answers.mean_by_row(PAIRWISE[terms.objective](pairs, terms), row), best_answers(answers)
        if terms.likelihood:
            found = found + terms.likelihood * answers.loss_per_token(praised)
        return found, torch.ones_like(found)

    return losses


def _kto_by_row(answers: Answers, terms: Terms) -> Tensor:
    gains = answers.logprobs - answers.reference
    own, strangers = (torch.nonzero(of)[:, 0] for of in (~answers.score.isnan(), answers.score.isnan()))
    wanted = (answers.score[own] > 0).to(gains.device)
    losses = kto(answers.take(gains, own), wanted, answers.take(gains, strangers), terms)
    return answers.mean_by_row(losses, answers.row[own])


def preference_objective(terms: Terms) -> Callable[[Tensor, Tensor], Total]:
    """Return the objective: the sum of the losses of rows, their number, and what becomes of chosen and rejected answers."""
    losses = preference_losses(terms)
    free, told = terms.objective in REFERENCE_FREE, "reward" if terms.objective == "reward" else "logprob"

    def objective(logprobs: Tensor, known: Tensor) -> Total:
        found, weights = losses(logprobs, known)
        return Total(found.sum(), weights.sum(), tell(Answers.of(logprobs.detach(), known), free=free, told=told))

    return objective


def tell(answers: Answers, *, free: bool = False, told: str = "logprob") -> dict[str, Tensor]:
    """Return what to watch, each a sum and a number: log-probabilities of chosen and rejected answers (whole and per token; or
    what is `told` in their place), their gains, by how much the chosen one leads, and accuracy.

    That is how often the better answer gained more than the worse one, a tie counting half; of a lone answer, how often it
    gained if it is wanted, and lost if not. Without a reference (`free`), how often the better one is likelier per token;
    and it leads by as much as it is that.
    """
    if told == "reward":
        gains = answers.logprobs
    else:
        gains = answers.logprobs / answers.tokens if free else answers.logprobs - answers.reference
    better, worse = find_pairs(answers.row, answers.score)
    lone = torch.nonzero(torch.bincount(answers.row[~answers.score.isnan()], minlength=answers.rows)[answers.row] == 1)[
        :, 0
    ]
    lone = lone[~answers.score[lone].isnan()]
    wanted = torch.zeros(len(answers.row), dtype=torch.bool)
    wanted[best_answers(answers)] = True
    wanted[lone] = answers.score[lone] > 0
    sorts = {"chosen": torch.nonzero(wanted)[:, 0], "rejected": torch.nonzero(~wanted & ~answers.score.isnan())[:, 0]}
    sign = torch.where(wanted[lone], 1.0, -1.0).to(gains)
    lead = answers.take(gains, better) - answers.take(gains, worse)
    leads = torch.cat([lead, sign * answers.take(gains, lone)])
    found = {"accuracy": (leads > 0).to(leads) + 0.5 * (leads == 0).to(leads), "lead": lead}
    for name, numbers in sorts.items():
        found[f"{name}_{told}"] = answers.take(answers.logprobs, numbers)
        if told == "logprob":
            found[f"{name}_per_token"] = answers.take(answers.logprobs / answers.tokens, numbers)
        if not free:
            found[f"{name}_gain"] = answers.take(gains, numbers)
    return {name: torch.stack([v.sum(), v.new_tensor(float(len(v)))]) for name, v in found.items()}
