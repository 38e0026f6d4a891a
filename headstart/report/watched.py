"""What was watched of a preference run, in words and as curves: likelihoods of its pairs, sampled answers, and signs that it goes wrong."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from headstart.display import in_time
from headstart.report.charts import Series, line_chart

CURES = {
    "likelihood": "raise preference.likelihood or preference.beta, or lower optim.lr",
    "length": "see in `headstart check` whether the longer answer wins, or take preference.objective=dpo_norm",
    "silence": "lower optim.lr, or raise preference.likelihood",
    "repetition": "lower optim.lr, or raise preference.likelihood",
    "stops": "lower optim.lr, or raise preference.likelihood",
    "divergence": "raise preference.beta, or lower optim.lr",
}
SIDES = (("chosen", "watch"), ("rejected", "train"))
HEIGHT = 150


def told_words(told: Mapping[str, float]) -> str:
    """Say what the objective tells of a step: accuracy, and how much likelier either side became (without a reference: the lead)."""
    gains = [f"{side} {told[key]:+.1f}" for side, _ in SIDES if (key := f"{side}_gain") in told]
    lead = [f"lead {told['lead']:+.2f}"] if not gains and "lead" in told else []
    return "  ".join([f"accuracy {told['accuracy']:.2f}", *gains, *lead])


def look_words(values: Mapping[str, float]) -> str:
    """Say what was seen at an evaluation."""
    said = [told_words({name.removeprefix("watch_"): value for name, value in values.items()})]
    if "sample_tokens" in values:
        said.append(
            f"answers of {values['sample_tokens']:.0f} tokens, {values['sample_stop_rate']:.0%} end by themselves, "
            f"{values['sample_repetition']:.0%} repeated, {values['sample_kl']:.2f} nats a token from the untouched model"
        )
    return "; ".join(said)


def sign_words(name: str, said: str, *, sure: bool) -> str:
    """Say a sign with what to do about it."""
    return f"{'it goes wrong' if sure else 'a sign that it goes wrong'}: {said}; {CURES[name]}"


def stop_words(signs: Sequence[Mapping[str, Any]]) -> str:
    """Say why a run was ended early."""
    sure = "; ".join(sign["said"] for sign in signs if sign["sure"])
    return f"it surely went wrong at two evaluations in a row: {sure}"


def sign_facts(watch: Mapping[str, Any] | str) -> list[tuple[str, str]]:
    """Return the signs that were told on the way, as names and values."""
    if isinstance(watch, str):
        return []
    facts = [
        (f"step {sign['step']}", sign_words(sign["name"], sign["said"], sure=sign["sure"])) for sign in watch["signs"]
    ]
    return [*facts, *([("stopped early", watch["stopped"])] if watch["stopped"] else [])]


def watched_section(watch: Mapping[str, Any] | str, metrics: Sequence[Mapping[str, Any]]) -> str:
    """Return the curves of a preference run as HTML, with what they show in words; empty for other runs."""
    if not any("accuracy" in record for record in metrics):
        return ""
    if any("chosen_reward" in record for record in metrics):
        said = "A reward model says nothing, so there are no answers of its own to look at."
    elif isinstance(watch, str):
        said = "Nothing was watched but the steps themselves: too few rows are held out, or eval.every is 0."
    else:
        said = (
            f"Watched rows were scored at each evaluation. {watch['prompts']:,} of their prompts were answered {watch['times']:,} times by "
            f"draws that are the same each time, from the untouched model's on: {in_time(watch['seconds'])} of the run. "
            "Repeated is the part of an answer's four-token pieces that it had said before (Welleck et al., 2019); how far "
            "it is from the untouched model is the divergence KL(tuned || untouched) on its own answers (Schulman's k3)."
        )
    signs = sign_facts(watch)
    told = "".join(f"<p>{html.escape(f'{name}: {what}')}.</p>" for name, what in signs) or (
        "" if isinstance(watch, str) else "<p>No sign that it went wrong was seen.</p>"
    )
    return f"{told}<p>{html.escape(said)}</p>{''.join(_charts(metrics))}"


def _charts(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    def pair(title: str, key: str, name: str, first: str = "") -> str:
        lines = [_series(f"{side} {name}", metrics, f"{first}{side}_{key}", style) for side, style in SIDES]
        return line_chart(title, lines, "step", HEIGHT)

    def one(title: str, *keys: tuple[str, str, str]) -> str:
        return line_chart(title, [_series(name, metrics, key, style) for key, name, style in keys], "step", HEIGHT)

    free = not any("chosen_gain" in record for record in metrics)
    rewards = any("chosen_reward" in record for record in metrics)
    unit = "of rewards" if rewards else "nats a token" if free else "nats an answer"
    return [
        pair("Chosen and rejected answers by step", "gain", "answers gained, nats"),
        pair("Rewards by step", "reward", "answers' reward"),
        pair("Log-probability per token by step", "per_token", "answers' log-probability, nats a token"),
        one(
            "How far chosen answers lead by step",
            ("lead", f"lead of chosen over rejected, {unit}", "train"),
            ("watch_lead", "on the watched rows", "watch"),
        ),
        one(
            "Accuracy by step",
            ("accuracy", "chosen ahead, part of the pairs", "train"),
            ("watch_accuracy", "on the watched rows", "watch"),
        ),
        one("Length of sampled answers by step", ("sample_tokens", "tokens of a sampled answer", "watch")),
        one(
            "Repetition and stops of sampled answers by step",
            ("sample_stop_rate", "part that ends by itself", "watch"),
            ("sample_repetition", "part repeated", "train"),
        ),
        one(
            "Divergence from the untouched model by step",
            ("sample_kl", "nats a token from the untouched model", "watch"),
        ),
    ]


def _series(name: str, metrics: Sequence[Mapping[str, Any]], key: str, style: str) -> Series:
    points = [(record["step"], record[key]) for record in metrics if key in record]
    return Series(name, points, style, dots=key.startswith(("watch_", "sample_")))
