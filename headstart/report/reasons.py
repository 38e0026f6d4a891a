"""The seven reasons why people fine-tune: what a run shows of each, and how to measure what it doesn't."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from headstart.display import in_time
from headstart.evaluate.robust import VARIABLE
from headstart.report.words import flips_words, guard_words, old_words, score_words, sentence

NOT_MEASURED = "not measured"
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
        "different_situations": Reason(
            "Different situations",
            "Does it hold when inputs vary?",
            how="headstart eval RUN DATA --robust, and the same of the model that it came from"
            if result["task"] in VARIABLE
            else "headstart compare MODEL RUN DATA, with rows from elsewhere",
        ),
        "shared_knowledge": _shared_knowledge(result),
        "happy_users": Reason(
            "Happy users",
            "Do people prefer it?",
            how="let people choose between the answers in evaluation/before.json and after.json, without telling whose is whose",
        ),
        "up_to_date": _up_to_date(result),
    }
    return {name: reason.to_json() for name, reason in found.items()}


def _custom_fit(result: Mapping[str, Any]) -> Reason:
    return Reason("Custom fit", "Is it better at the job?", f"{sentence(result)}; {flips_words(result['flips'])}")


def _matching_data(result: Mapping[str, Any]) -> Reason:
    asks = "Does it know this kind of text?"
    metric = next((name for name in TEXT if name in result["differences"]), None)
    if metric is None or result["kind"] == "supervised":
        how = "tune it on texts of this kind first (a file of `text`): the report then has their bits per byte"
        return Reason("Matching data", asks, how=how)
    return Reason("Matching data", asks, f"{score_words(result, metric)}, on text that was held out")


def _time_and_money(result: Mapping[str, Any]) -> Reason:
    plan, tokens = result["plan"], result["tokens"]
    trained = f"{plan['trainable'] / 1e6:,.2f}M of {plan['parameters'] / 1e6:,.0f}M parameters trained, "
    says = f"{trained}{tokens['rows']:,} tokens in {in_time(result['speed']['train_s'])}"
    how = "run it again with -s weights=random, which begins with nothing, and compare the two: that is what the head start saved"
    return Reason("Time and money", "What did it cost, and what did the head start save?", says, how)


def _up_to_date(result: Mapping[str, Any]) -> Reason:
    asks = "Does it know what is new, and still what is old?"
    old = result.get("old")
    if not old or isinstance(old, str):
        how = "headstart update RUN NEW_DATA: it goes on from this run, and is scored on new rows and old ones"
        return Reason("Up to date", asks, how=how)
    new = score_words(result, result["difference"]["metric"], f"on {result['rows']['proof']:,} new rows")
    return Reason("Up to date", asks, f"{new}; {old_words(old)}")


def _shared_knowledge(result: Mapping[str, Any]) -> Reason:
    asks = "Did it keep what it knew?"
    if not isinstance(result["guard"], str):
        return Reason("Shared knowledge", asks, guard_words(result["guard"]))
    writes = result["task"] in ("chat", "causal", "preference")
    how = (
        "leave out -s eval.guard=off"
        if writes
        else "compare it with the model that it came from on data of other kinds"
    )
    return Reason("Shared knowledge", asks, how=how)
