"""Every number that the user left out, decided from the model, the data and the machine, each with its reason."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from headstart.config import AUTO, Config
from headstart.engine.plan import FORWARD_COST
from headstart.errors import Problem, UsageError

EVALS_PER_RUN = 8
EVAL_TIME_FRAC = 0.1
GENERATE_ROWS = 32
CHOICE_ROWS = 200
EMBEDDING_ROWS = 64
PREFERENCE_SLOWER = 10
PACK_TOKENS = {"cpu": 1024, "mps": 4096, "cuda": 8192}


# As in the papers that objectives/preference.py names; hinge, robust and kto as DPO's.
BETAS = {"dpo_norm": 5.0, "simpo": 2.0}
OWN_LIKELIHOOD = ("orpo", "cpo")  # of which it is a part
SMOOTHED = ("dpo", "dpo_norm", "robust", "simpo", "cpo", "reward")


@dataclass(frozen=True)
class Facts:
    """What the choices rest on. Lengths are in tokens; `train_tokens` and `watch_tokens` are over all rows."""

    device: str
    hidden_size: int
    train_rows: int
    watch_rows: int
    proof_rows: int
    train_tokens: int
    watch_tokens: int
    longest: int
    task: str
    held_out: float | None
    choices: int = 0


def choose(config: Config, facts: Facts) -> Config:
    """Fill in what the user left out."""
    settings = config.settings
    found: dict[str, tuple[Any, str]] = {}

    def decide(key: str, value: Any, why: str) -> Any:
        section, _, name = key.rpartition(".")
        current = getattr(getattr(settings, section) if section else settings, name)
        if current not in (None, AUTO):
            return current
        found[key] = (value, why)
        return value

    rows = facts.train_rows
    labels = facts.task not in ("chat", "causal", "masked", "preference", "reward")
    if facts.task == "embedding":
        size = decide("batch_size", min(EMBEDDING_ROWS, rows), "each text is told apart from all others of its step")
    else:
        size = decide("batch_size", *(_label_batch_size(rows) if labels else _batch_size(rows)))
    if settings.steps is None:
        whole = labels and facts.task != "tagging"  # a row of tags says as much as a row of text
        epochs = decide("epochs", *(_label_epochs(rows) if whole else _epochs(rows, facts.task)))
        steps = math.ceil(round(epochs * rows) / size)
    else:
        steps = settings.steps
    new_head = facts.task not in ("chat", "causal", "preference")
    rate, why = _learning_rate(settings.method or "lora", facts.hidden_size, new_head)
    if facts.task == "preference":
        # Pairs pull on differences alone, which answers of any quality can satisfy: the field goes ten times slower and more.
        rate, why = float(f"{rate / PREFERENCE_SLOWER:.1e}"), f"{why}, a {PREFERENCE_SLOWER}th of it for preferences"
    decide("optim.lr", rate, why)
    decide("optim.warmup", 0.05, "a twentieth of the steps")
    alone = f"; the longest row, of {facts.longest:,}, is a pack of its own"
    packed = PACK_TOKENS[facts.device]
    decide("engine.tokens_per_pack", packed, f"suits a {facts.device}{alone if facts.longest > packed else ''}")
    if facts.held_out is not None:
        decide("data.held_out", facts.held_out, f"for {rows + facts.watch_rows + facts.proof_rows:,} rows")
    every, why = _eval_every(facts, steps, size)
    every = decide("eval.every", every, why)
    if settings.eval.choices == "auto":
        few = f"{facts.choices:,} answers stand again and again" if facts.choices else "answers are free"
        found["eval.choices"] = ("on" if facts.choices else "off", few)
    if facts.task in ("chat", "preference"):
        most = CHOICE_ROWS if found.get("eval.choices", (settings.eval.choices,))[0] == "on" else GENERATE_ROWS
        decide("eval.generate", min(most, facts.proof_rows), f"at most {most}: answering takes long")
    else:
        decide("eval.generate", 0, "such rows ask for no answer")
    decide("eval.rows", facts.proof_rows, "all of them")
    decide("save.every", every or max(1, steps // EVALS_PER_RUN), "as often as the model is scored")
    return config.decide(found)


def choose_preference(config: Config, lone: int) -> Config:
    """Fill in how answers are held against each other: `lone` rows have one answer, which is wanted or not.

    Raises UsageError where the objective can't be had from such rows, or would not read a setting.
    """
    given = config.settings.preference
    objective = given.objective
    found: dict[str, tuple[Any, str]] = {}
    if objective == "auto":
        objective = "kto" if lone else "dpo"
        found["preference.objective"] = (
            objective,
            "answers stand alone" if lone else "answers stand against each other",
        )
    if problems := _no_effect(config, objective, lone):
        raise UsageError(problems)
    if objective == "reward":
        return config.decide(found)
    usual = f"usual for {objective}"
    values: dict[str, tuple[Any, str]] = {
        "beta": (BETAS.get(objective, 0.1), usual),
        "likelihood": (1.0, f"part of {objective}")
        if objective in OWN_LIKELIHOOD
        else (0.2, "so that chosen answers stay likely (Llama 3's share)"),
    }
    found |= {f"preference.{k}": v for k, v in values.items() if getattr(given, k) is None}
    return config.decide(found)


def _no_effect(config: Config, objective: str, lone: int) -> list[Problem]:
    given = config.settings.preference
    problems = []
    if lone and objective != "kto":
        what = f"{objective} holds answers against each other, and in {lone:,} rows there is only one"
        problems.append(Problem("config.bad_value", what, "preference.objective", "-s preference.objective=kto"))
    if objective == "robust" and not given.label_smoothing:
        what = "robust without a part of pairs that are the wrong way round is dpo"
        problems.append(Problem("config.no_effect", what, "preference.objective", "-s preference.label_smoothing=0.1"))
    if objective == "reward":
        lost = [name for name in ("beta", "likelihood") if getattr(given, name) is not None]
        what = "has no effect: a reward model gives no likelihoods"
        problems += [
            Problem("config.no_effect", f"`preference.{name}` {what}", f"preference.{name}", "leave it out")
            for name in lost
        ]
    if given.label_smoothing and objective not in SMOOTHED:
        what = f"`preference.label_smoothing` has no effect: the objective is {objective}"
        cure = f"leave it out, or take {' or '.join(SMOOTHED)}"
        problems.append(Problem("config.no_effect", what, "preference.label_smoothing", cure))
    return problems


def _batch_size(rows: int) -> tuple[int, str]:
    size = 4 if rows < 500 else 8 if rows < 5_000 else 16
    return min(size, rows), f"for {rows:,} rows"


def _label_batch_size(rows: int) -> tuple[int, str]:
    # A label says far less than an answer, so a step needs more of them.
    size = 8 if rows < 500 else 16 if rows < 5_000 else 32
    return min(size, rows), f"for {rows:,} labelled rows"


def _label_epochs(rows: int) -> tuple[float, str]:
    return (20.0 if rows < 1_000 else 10.0 if rows < 5_000 else 4.0), f"for {rows:,} labelled rows"


def _epochs(rows: int, task: str) -> tuple[float, str]:
    if task in ("preference", "reward"):  # more passes learn the pairs by heart
        return (2.0 if rows < 1_000 else 1.0), f"for {rows:,} rows of preferences"
    times = 1 if task in ("chat", "causal") else 2  # a head that begins at random takes longer
    return times * (3.0 if rows < 1_000 else 2.0 if rows < 5_000 else 1.0), f"for {rows:,} rows"


def _learning_rate(method: str, hidden_size: int, new_head: bool) -> tuple[float, str]:
    # An adapter wants about ten times the rate of a full fine-tuning, and wider models a lower one: 5e-4 at a width of
    # 2,000, falling with its root ("LoRA Without Regret", Thinking Machines, 2025; tried at a width of 576: docs/log.md).
    rate = 5e-4 * math.sqrt(2000 / hidden_size)
    # A head that begins at random takes twice the rate where the model trains whole (docs/log.md).
    rate = rate if method == "lora" else rate / (5 if new_head else 10)
    return float(
        f"{rate:.1e}"
    ), f"for {method} at a model width of {hidden_size:,}{', with a new head' if new_head else ''}"


def _eval_every(facts: Facts, steps: int, batch_size: int) -> tuple[int, str]:
    if not facts.watch_rows:
        return 0, "too few held-out rows to watch some and keep others for the proof"
    step_cost = facts.train_tokens / facts.train_rows * batch_size
    eval_cost = facts.watch_tokens * FORWARD_COST
    affordable = math.ceil(eval_cost / (EVAL_TIME_FRAC * step_cost))
    every = min(steps, max(1, math.ceil(steps / EVALS_PER_RUN), affordable))
    return every, f"at most {EVALS_PER_RUN} times, and a tenth of the time"
