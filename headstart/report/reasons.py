"""The seven reasons why people fine-tune: what a run shows of each, and how to measure what it doesn't."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from headstart.display import in_time
from headstart.evaluate.robust import VARIABLE
from headstart.evaluate.surprise import few_words
from headstart.evaluate.wins import BY_LIKENESS
from headstart.report.words import (
    flips_words,
    guard_words,
    named,
    old_words,
    over,
    robust_words,
    score_words,
    sentence,
    wins_words,
)

NOT_MEASURED = "not measured"
WORDS = 4  # that are named
TEXT = ("bits_per_byte", "nll")  # metrics that say how well it knows a kind of text


@dataclass(frozen=True)
class Reason:
    """A reason: its title, what it asks, what was found (empty: not measured), and how to measure it, or more of it."""

    title: str
    asks: str
    says: str = ""
    how: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "says": self.says or NOT_MEASURED, "measured": bool(self.says)}


def find_reasons(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the seven reasons by name, as the result holds them."""
    found = {
        "custom_fit": _custom_fit(result),
        "matching_data": _matching_data(result),
        "time_and_money": _time_and_money(result),
        "different_situations": _different_situations(result),
        "shared_knowledge": _shared_knowledge(result),
        "happy_users": _happy_users(result),
        "up_to_date": _up_to_date(result),
    }
    return {name: reason.to_json() for name, reason in found.items()}


def _custom_fit(result: Mapping[str, Any]) -> Reason:
    study = result.get("studies", {}).get("seeds")
    says = [sentence(result), flips_words(result["flips"]), seeds_words(study) if study else ""]
    return Reason("Custom fit", "Is it better at the job?", "; ".join(filter(None, says)))


def seeds_words(study: Mapping[str, Any]) -> str:
    """Say what the same run comes to with other seeds, by the difference on the same rows of the proof."""
    verdicts, spread = study["verdicts"], study["spread"]
    better = sum(verdict == "better" for verdict in verdicts)
    runs = len(verdicts) + study["failed"]
    said = f"better with {better} of {runs} seeds" + f" ({study['failed']} failed)" * bool(study["failed"])
    if spread is None:
        return said
    mean = f"{spread['mean']:+.3f} on average, standard deviation {spread['deviation']:.3f}"
    bounds = f"95% interval over seeds {spread['low']:+.3f} to {spread['high']:+.3f}"
    return f"{said}: {named(study['metric'])} {mean} ({bounds})"


def _matching_data(result: Mapping[str, Any]) -> Reason:
    asks = "Does it know this kind of text?"
    metric = next((name for name in TEXT if name in result["differences"]), None)
    if metric is None or result["kind"] == "supervised":
        how = "tune it on texts of this kind first (a file of `text`): the report then has their bits per byte"
        return Reason("Matching data", asks, how=how)
    says = f"{score_words(result, metric)}, on text that was held out"
    words = result.get("words", NOT_MEASURED)
    if not isinstance(words, str):
        says = f"{says}; learned most, in bits a word: {few_words(words['gained'], WORDS)}"
    return Reason("Matching data", asks, says)


def _time_and_money(result: Mapping[str, Any]) -> Reason:
    plan, tokens = result["plan"], result["tokens"]
    trained = f"{plan['trainable'] / 1e6:,.2f}M of {plan['parameters'] / 1e6:,.0f}M parameters trained, "
    says = f"{trained}{tokens['rows']:,} tokens in {in_time(result['speed']['train_s'])}"
    study = result.get("studies", {}).get("from_scratch")
    how = "" if study else "headstart compare --from-scratch RUN trains the same network from random weights beside it"
    says = f"{says}; {scratch_words(study)}" if study else says
    return Reason("Time and money", "What did it cost, and what did the head start save?", says, how)


def scratch_words(study: Mapping[str, Any]) -> str:
    """Say how many tokens of training the head start saved, by the watched rows."""
    best = study["reached"][0]
    whole = f"from random weights the same network came to loss {best['loss']:.3f} on the watched rows"
    if study.get("at_once"):
        return f"{whole} after {best['random']['tokens']:,} tokens; the untouched model was there before any training"
    if study["saved"] is None:
        return f"{whole}, which the run never did: the head start saved nothing"
    tokens = best["tuned"]["tokens"], best["random"]["tokens"]
    return (
        f"{whole} after {tokens[1]:,} tokens, with the head start after {tokens[0]:,}: {study['saved']:.1f} times fewer"
    )


def _happy_users(result: Mapping[str, Any]) -> Reason:
    """Tell how often its answers win. By likeness that stands for people only where its reference is what people chose."""
    wins = [] if isinstance(result["wins"], str) else result["wins"]
    telling = [item for item in wins if item["by"] != BY_LIKENESS["chat"]]
    how = f"let people choose without knowing whose answer is whose: headstart chat {result['model']['name']} RUN --compare"
    writes = result["task"] in ("chat", "preference")
    return Reason(
        "Happy users",
        "Do people prefer it?",
        "; ".join(map(wins_words, telling)),
        how if writes else "ask the people who work with what it tells",
    )


def _up_to_date(result: Mapping[str, Any]) -> Reason:
    asks = "Does it know what is new, and still what is old?"
    old = result.get("old")
    if not old or isinstance(old, str):
        how = "headstart update RUN NEW_DATA: it goes on from this run, and is scored on new rows and old ones"
        return Reason("Up to date", asks, how=how)
    metric = result["difference"]["metric"]
    new = score_words(result, metric, f"on {over(result['differences'][metric])} of the new data")
    return Reason("Up to date", asks, f"{new}; {old_words(old)}")


def _different_situations(result: Mapping[str, Any]) -> Reason:
    how = (
        "headstart eval RUN DATA --robust, with more rows"
        if result["task"] in VARIABLE
        else "headstart compare MODEL RUN DATA, with rows from elsewhere"
    )
    return Reason(
        "Different situations", "Does it hold when inputs vary?", robust_words(result.get("robust", NOT_MEASURED)), how
    )


def _shared_knowledge(result: Mapping[str, Any]) -> Reason:
    asks = "Did it keep what it knew, and does it need fewer examples for it?"
    curve = result.get("studies", {}).get("curve")
    told = curve_words(curve) if curve else ""
    if not isinstance(result["guard"], str):
        more = "headstart curve DATA --from-scratch tells how many examples it saves"
        return Reason(
            "Shared knowledge", asks, "; ".join(filter(None, (guard_words(result["guard"]), told))), more * (not told)
        )
    writes = result["task"] in ("chat", "causal", "preference")
    how = (
        "leave out -s eval.guard=off"
        if writes
        else "compare it with the model that it came from on data of other kinds"
    )
    return Reason("Shared knowledge", asks, told, how)


def curve_words(curve: Mapping[str, Any]) -> str:
    """Say with how many rows random weights come to what the head start gives with few; nothing where that wasn't tried."""
    best = curve.get("reached")
    if best is None:
        return ""
    with_rows, random_rows = best["tuned_rows"], best["random_rows"]
    score = f"{named(curve['metric'])} {best['value']:.3f}"
    if with_rows is None:
        return f"with {random_rows:,} rows random weights came to {score}, which it never did: the head start saved no examples"
    return f"{score} took {with_rows:,} rows with the head start, and {random_rows:,} from random weights"
