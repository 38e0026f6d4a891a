"""Are the losses of preferences those of TRL? The same log-probabilities through both: `bench/.venv/bin/python -m bench.objectives`.

TRL's trainers compute their losses between a model and a logger. So each is given a model that returns the log-probabilities at
hand, and a logger that keeps nothing: what runs in between is TRL's own code.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch

from headstart.objectives.preference import PAIRWISE, Pairs, Terms, kto

ROWS = 12
DPO = {"dpo": "sigmoid", "dpo_norm": "sigmoid_norm", "hinge": "hinge", "ipo": "ipo", "robust": "robust"}
BETAS = {"ipo": 0.3, "dpo_norm": 5.0, "simpo": 2.0}
STRANGERS = torch.linspace(-1, 4, 5, dtype=torch.float64)  # gains of answers to other prompts
SMOOTHING = {"robust": 0.2, "simpo": 0.1, "cpo": 0.1}


def draw_pairs(seed: int = 0) -> Pairs:
    """Return pairs of answers of 3 to 40 tokens, of which some gained and some lost."""
    chance = np.random.default_rng(seed)
    tokens = chance.integers(3, 40, (2, ROWS)).astype(float)
    references = -tokens * chance.uniform(0.5, 3, (2, ROWS))
    return Pairs(
        *map(torch.from_numpy, (*(references + chance.normal(0, 3, (2, ROWS))).clip(max=-1), *references, *tokens))
    )


def stub_trainer(**settings: Any) -> Any:
    """Return what a trainer's loss needs of its trainer, without a model or data."""
    trainer = MagicMock(**settings, aux_loss_enabled=False, precompute_ref_logps=True)
    trainer.accelerator.device = torch.device("cpu")
    trainer.accelerator.gather_for_metrics.side_effect = lambda values: values
    return trainer


def stub_outputs(logprobs: torch.Tensor, lengths: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Return what a model gives for answers of `lengths` tokens that are as likely as said, [S], and which tokens are the answer's."""
    width = int(lengths.max())
    mask = torch.arange(width)[None] >= width - lengths[:, None]
    nothing = torch.zeros(mask.shape, dtype=logprobs.dtype)
    log_probs = nothing + mask * (logprobs / lengths)[:, None]
    outputs = SimpleNamespace(log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=mask)
    return outputs, torch.cat([torch.zeros(len(mask), 1, dtype=torch.bool), mask], 1).long()


def dpo_of_trl(pairs: Pairs, loss: str, beta: float, smoothing: float) -> float:
    from trl import DPOTrainer

    lengths = torch.cat([pairs.chosen_tokens, pairs.rejected_tokens])
    outputs, mask = stub_outputs(torch.cat([pairs.chosen, pairs.rejected]), lengths)
    settings = {
        "beta": beta,
        "label_smoothing": smoothing,
        "loss_types": [loss],
        "loss_weights": [1.0],
        "ld_alpha": None,
    }
    trainer = stub_trainer(**settings, f_divergence_type="reverse_kl", use_weighting=False)
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    inputs |= {"ref_chosen_logps": pairs.ref_chosen, "ref_rejected_logps": pairs.ref_rejected}
    return float(DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False))


def cpo_of_trl(pairs: Pairs, loss: str, terms: Terms) -> float:
    from trl.experimental.cpo import CPOTrainer

    settings = {"alpha": 0.0, "loss_type": loss, "beta": terms.beta, "simpo_gamma": terms.margin}
    trainer = stub_trainer(**settings, label_smoothing=terms.label_smoothing)
    sides = pairs.per_token if loss == "simpo" else (pairs.chosen, pairs.rejected)
    return float(CPOTrainer.cpo_loss(trainer, *sides)[0].mean())


def orpo_of_trl(pairs: Pairs, beta: float) -> float:
    from trl.experimental.orpo import ORPOTrainer

    # What is added to the chosen answer's own loss is the mean, turned round.
    return -float(ORPOTrainer.odds_ratio_loss(stub_trainer(beta=beta), *pairs.per_token)[0].mean())


def kto_of_trl(pairs: Pairs, strangers: torch.Tensor, terms: Terms) -> float:
    from trl import KTOTrainer

    outputs, mask = stub_outputs(
        torch.cat([pairs.chosen, pairs.rejected]), torch.cat([pairs.chosen_tokens, pairs.rejected_tokens])
    )
    settings = {"beta": terms.beta, "loss_type": "kto", "desirable_weight": terms.desirable, "undesirable_weight": 1.0}
    trainer = stub_trainer(**settings, calculate_KL=True)
    trainer._compute_kl_logps.side_effect = lambda *_: strangers
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    inputs |= {"label": torch.arange(2 * ROWS) < ROWS, "ref_KL_logps": torch.zeros(len(strangers))}
    inputs["ref_logps"] = torch.cat([pairs.ref_chosen, pairs.ref_rejected])
    return float(KTOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False))


def terms_of(name: str) -> Terms:
    """Return what is asked of an objective here: numbers in which every part of it has a say."""
    margin = 1.0 if name == "simpo" else 0.0
    return Terms(name, BETAS.get(name, 0.1), margin, SMOOTHING.get(name, 0.0), desirable=1.5)


def ours(name: str, pairs: Pairs, strangers: torch.Tensor) -> float:
    """Return the mean loss by headstart."""
    if name != "kto":
        return float(PAIRWISE[name](pairs, terms_of(name)).mean())
    gains = torch.cat([pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected])
    return float(kto(gains, torch.arange(2 * ROWS) < ROWS, strangers, terms_of(name)).mean())


def theirs(name: str, pairs: Pairs, strangers: torch.Tensor) -> float:
    """Return the mean loss by TRL."""
    terms = terms_of(name)
    if name in DPO:
        return dpo_of_trl(pairs, DPO[name], terms.beta, terms.label_smoothing)
    if name == "orpo":
        return orpo_of_trl(pairs, terms.beta)
    if name == "kto":
        return kto_of_trl(pairs, strangers, terms)
    return cpo_of_trl(pairs, "simpo" if name == "simpo" else "sigmoid", terms)


if __name__ == "__main__":
    for objective in (*DPO, "simpo", "cpo", "orpo", "kto"):
        a, b = (side(objective, draw_pairs(), STRANGERS) for side in (ours, theirs))
        print(f"{objective:<9} headstart {a:.9f}   TRL {b:.9f}   apart {abs(a - b):.1e}")
