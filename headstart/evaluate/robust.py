"""Does a model hold when inputs vary? The same rows with typing errors, in another case, without punctuation, and so on."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from headstart.config import DataSettings
from headstart.data.feed import content_hash
from headstart.data.read import Where
from headstart.data.records import Conversation, Document, Label, Labelled, Message, Preference, Record, Tagged
from headstart.data.segments import Segmented
from headstart.evaluate.compare import MIN_ROWS, Compared, Interval, Rank, compare, interval
from headstart.evaluate.guard import general_forms
from headstart.evaluate.measure import PRIMARY, Measured, RowResult, as_references

# Tasks whose rows can be written otherwise, such that what is right stays known; of text that is the text itself.
VARIABLE = (
    *("chat", "causal", "masked", "classification", "multilabel", "regression", "tagging"),
    *("preference", "reward"),
)
OUTSIDE = "text from outside the job"
ROWS_MOST = 64  # of a run's proof that are written otherwise
SHARE = 0.1  # of what training computes that this may cost a run
TYPED_WRONG = 0.15  # of words of four letters or more
WORD = re.compile(r"[^\W\d_]{4,}")
FIELD = re.compile(r"\s*[\w ]{1,40}: *\S")
GREETING = "Hello, I hope that you are well. I have something for you to look at.\n"
OTHER = (
    "The weather has been mild for most of the week, with some rain on Tuesday. The trains ran as usual, though the one at noon was "
    "late. In the garden the first roses are out, and the neighbours have painted their fence green. The library is closed on "
    "Monday, and the market opens an hour later than in spring.\n\n"
)


def _pairs(text: str) -> dict[str, str]:
    return dict(pair.split(": ") for pair in text.split(", "))


# Words that tasks are told with in English, and what says the same.
VERBS = _pairs(
    "write: compose, summarize: sum up, summarise: sum up, describe: give a description of, list: enumerate, explain: clarify, "
    "classify: categorize, extract: pull out, answer: reply to, generate: produce, create: make, identify: point out, "
    "give: provide, provide: give, rewrite: rephrase, rephrase: reword, determine: work out, correct: fix, complete: finish, "
    "choose: pick, select: pick, read: look at, translate: convey, compare: contrast, draft: write up, suggest: propose"
)
NOUNS = _pairs(
    "text: passage, passage: text, dialogue: conversation, conversation: dialogue, question: query, following: given"
)
# Only before what it is to be done to: "answer yes or no", "a complete waste" and "list of names" tell no task so.
DONE_TO = (
    "a|an|the|this|these|that|those|each|all|any|my|me|our|your|its|his|her|their|if|whether|what|which|where|how|why"
)
VERB = re.compile(rf"(?i)((?:^|[.!?:;,] |\b(?:please|to|and|then) ))({'|'.join(VERBS)})(?= (?:{DONE_TO})\b)")
NOUN = re.compile(rf"(?i)\b({'|'.join(NOUNS)})\b")

Vary = Callable[[str, random.Random], str]


def mistype(text: str, chance: random.Random) -> str:
    """Swap two letters of a word in seven, leave one out or write one twice."""

    def wrong(found: re.Match[str]) -> str:
        word = found.group()
        if chance.random() >= TYPED_WRONG:
            return word
        at = chance.randrange(len(word) - 1)
        ways = (word[at + 1] + word[at], word[at + 1], word[at] * 2 + word[at + 1])
        return word[:at] + chance.choice(ways) + word[at + 2 :]

    return WORD.sub(wrong, text)


def drop_punctuation(text: str, _: random.Random) -> str:
    """Leave out what ends sentences and clauses, but not what stands within numbers and words."""
    return re.sub(r"[.,;:!?]+(?=\s|$)", "", text)


def space_out(text: str, chance: random.Random) -> str:
    """Write two or three spaces in place of some, and begin and end with white space."""
    return f"\n{re.sub(' ', lambda _: ' ' * chance.choice((1, 1, 2, 3)), text)}  \n"


def first_line_last(text: str, _: random.Random) -> str:
    """Put the first line behind the rest: mostly it says what is to be done. A text of one line stays as it is."""
    first, rest = [*text.split("\n", 1), ""][:2]
    return f"{rest.strip()}\n\n{first.strip()}" if first.strip() and rest.strip() else text


def reword(text: str, _: random.Random) -> str:
    """Say what is to be done in other words: in the first line, and in English alone. Any other text stays as it is."""

    def like(word: str, new: str) -> str:
        return new[:1].upper() + new[1:] if word[:1].isupper() else new

    first, line, rest = text.partition("\n")
    told = VERB.sub(lambda found: found[1] + like(found[2], VERBS[found[2].lower()]), first)
    if told == first:
        return text
    return NOUN.sub(lambda found: like(found[0], NOUNS[found[0].lower()]), told) + line + rest


def reorder_fields(text: str, chance: random.Random) -> str:
    """Put the lines of `name: value` into another order; a text that isn't made of such lines stays as it is."""
    lines = text.split("\n")
    places = [number for number, line in enumerate(lines) if FIELD.match(line)]
    if len(places) < 2 or len(places) < len(lines) // 2:
        return text
    for place, line in zip(places, chance.sample([lines[p] for p in places], len(places)), strict=True):
        lines[place] = line
    return "\n".join(lines)


# What happens most comes first, since a short run can pay for some of these alone.
VARIED: dict[str, Vary] = {
    "typing errors": mistype,
    "lower case": lambda text, _: text.lower(),
    "no punctuation": drop_punctuation,
    "a greeting before it": lambda text, _: GREETING + text,
    "the task in other words": reword,
    "the first line last": first_line_last,
    "other text before it": lambda text, _: OTHER + text,
    "white space": space_out,
    "upper case": lambda text, _: text.upper(),
    "fields in another order": reorder_fields,
}
OF_WORDS = ("typing errors", "lower case", "upper case")  # what keeps words apart as they are
# What a text can be that is predicted itself. Another text before it would be predicted too, and tell of that text; and no
# line of it says what is to be done, so that one may come last.
OF_TEXT = ("typing errors", "lower case", "no punctuation", "white space", "upper case", "fields in another order")
OF_TASKS = ("the task in other words",)  # what a row that only has a label doesn't tell


def ways_of(record: Record) -> Sequence[str]:
    """Return the names of the ways in which a row of this sort may be written."""
    if isinstance(record, Labelled):
        return [name for name in VARIED if name not in OF_TASKS]
    return OF_WORDS if isinstance(record, Tagged) else OF_TEXT if isinstance(record, Document) else tuple(VARIED)


def vary(record: Record, name: str) -> Record:
    """Return a row whose input is written otherwise; what follows from it stays. The same row always varies alike.

    Of a text it is the text itself, of preferences what the user says in their prompt. A row that can't be written so comes back as it is.
    """
    if name not in ways_of(record):
        return record
    change, chance = VARIED[name], random.Random(f"{name} {content_hash(record)}")  # noqa: S311
    new: dict[str, Any] = {}
    tells = ("user", "system") if name in OF_TASKS else ("user",)
    if isinstance(record, Labelled):
        new = {"text": change(record.text, chance)}
        new["pair"] = None if record.pair is None else change(record.pair, chance)
    elif isinstance(record, Tagged):
        new = {"words": tuple(change(word, chance) for word in record.words)}
    elif isinstance(record, Document):
        new = {"content": change(record.content, chance)}
    elif isinstance(record, Conversation):
        new = {"messages": _vary_turns(record.messages, change, chance, tells)}
    elif isinstance(record, Preference):
        new = {"prompt": _vary_turns(record.prompt, change, chance, tells)}
    return replace(record, **new)


def _vary_turns(
    turns: Sequence[Message], change: Vary, chance: random.Random, roles: Sequence[str]
) -> tuple[Message, ...]:
    """Return turns of which those of some roles are written otherwise."""
    return tuple(replace(m, content=change(m.content, chance)) if m.role in roles else m for m in turns)


@dataclass(frozen=True)
class Varied:
    """How a model fares on rows that are written otherwise, against the same rows as they are."""

    name: str
    compared: Compared

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        found = self.compared
        sides = {"clean": found.before, "varied": found.after, "difference": found.difference}
        told = {name: side.to_json() for name, side in sides.items()}
        over = {"rows": found.rows, "grouped": found.grouped}
        return {"metric": found.name, **told, **over, "direction": found.direction, "p": found.p}


@dataclass(frozen=True)
class Robust:
    """How a model fares where inputs vary, and how well its confidence tells text from outside the job (None: not measured)."""

    varied: Sequence[Varied]
    outside: Interval | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        outside = self.outside.to_json() if self.outside else "not measured"
        return {"varied": {item.name: item.to_json() for item in self.varied}, "outside_auroc": outside}


@dataclass(frozen=True)
class Variant:
    """Rows as they would be written otherwise, by `name`, and the number of each among the rows as they are; or `OUTSIDE`, without."""

    name: str
    rows: Segmented
    numbers: Sequence[int]

    def mark(self, rows: Sequence[RowResult]) -> list[RowResult]:
        """Return what a model made of these rows, such that it is known what they are."""
        return [replace(row, part=self.name, varied=n) for row, n in zip(rows, self.numbers, strict=True)]

    def references(self, before: Measured | None) -> list[list[float]]:
        """Return what the untouched model gave each answer of these very rows, written so, `before`; empty where it didn't score them."""
        scored = before.variants().get(self.name) if before else None
        own = [(str(record.where), n) for record, n in zip(self.rows.kept, self.numbers, strict=True)]
        return as_references(scored) if scored and _places(scored) == own else []


def write_variants(
    records: Mapping[int, Record],
    encode: Callable[[Sequence[Record]], Segmented],
    *,
    ways: int = len(VARIED),
    rows: int | None = None,
    least: int = 1,
    outside: Segmented | None = None,
) -> list[Variant]:
    """Write records, by their numbers, otherwise, and put text from `outside` the job beside them.

    In the first `ways` that change `least` of them or more, in each the first `rows` that it changes. What can't be read
    then, since it is too long, isn't there.
    """
    variants: list[Variant] = []
    for name in VARIED:
        if len(variants) == ways:
            break
        varied = ((n, vary(record, name)) for n, record in records.items())
        changed = dict(islice(((n, new) for n, new in varied if new != records[n]), rows))
        if len(changed) < least:
            continue
        # For a while each stands at its number: a row that is cut comes back as another, and several may stand at one place.
        some = encode([replace(new, where=new.where._replace(line=n)) for n, new in changed.items()])
        if some.kept:
            numbers = [record.where.line for record in some.kept]
            variants.append(Variant(name, _put_back(some, [changed[n].where for n in numbers]), numbers))
    if variants and outside is not None:
        variants.append(Variant(OUTSIDE, outside, [-1] * len(outside.kept)))
    return variants


def _put_back(rows: Segmented, places: Sequence[Where]) -> Segmented:
    """Return rows at their own places."""
    sides = (
        [replace(row, where=w) for row, w in zip(side, places, strict=True)] for side in (rows.examples, rows.kept)
    )
    return Segmented(*sides)


def variant_reading(settings: DataSettings) -> DataSettings:
    """Return how rows that were written otherwise are read: what gets too long by that is left out, since it is no fault of the row's."""
    return settings.model_copy(update={"over_length": "drop"}) if settings.over_length == "error" else settings


def spare_tokens(trained_tokens: float) -> float:
    """Return how many tokens of rows written otherwise a run can pay for, to be scored before and after training.

    To score costs a forward pass, to train one and a backward pass of about twice that (Kaplan et al., 2020).
    """
    return SHARE * 3 * trained_tokens / 2


def affordable(tokens: float, row_tokens: float, most: int = len(VARIED)) -> tuple[int, int]:
    """Return in how many ways, of `most`, how many rows that cost `row_tokens` may be written for so many tokens.

    First as many ways as there are with the fewest rows that can decide, then more rows; no ways where none can be paid for.
    """
    rows = int(tokens / max(1.0, row_tokens))
    ways = max(0, min(rows // MIN_ROWS, most))
    return ways, min(rows // max(1, ways), ROWS_MOST)


def find_robust(measured: Measured) -> Robust:
    """Hold the rows of `measured` that were written otherwise against the same rows as they are.

    The metric is the first of the task's that both have.
    """
    variants, own = measured.variants(), measured.own
    outside = variants.pop(OUTSIDE, None)
    found = []
    for name, varied in variants.items():
        before = Measured([own[row.varied or 0] for row in varied.rows], measured.task).metrics()
        after = varied.metrics()
        metric = next((m for m in PRIMARY[measured.task] if m in before and m in after), None)
        if metric is not None:
            found.append(Varied(name, compare(metric, before[metric], after[metric])))
    return Robust(found, know_outside(measured, outside) if outside else None)


def robust_result(before: Measured, after: Measured) -> dict[str, Any] | None:
    """Return how the tuned model fares where inputs vary, beside the untouched one, as a run's result holds it; None: not measured.

    Of each way: the tuned model's rows as they are (`clean`) and written otherwise (`varied`), with their `difference`; what the
    untouched one made of the latter (`untouched`), and what was gained on them (`gain`). Ways in which both didn't see the
    same rows (a run that goes on with other settings, or was begun by an older version) are left out.
    """
    first, second = before.variants(), after.variants()
    same = [name for name in second if name in first and _places(first[name]) == _places(second[name])]
    parts = {}
    for item in find_robust(after).varied:
        if item.name not in same:
            continue
        metric = item.compared.name
        gain = compare(metric, first[item.name].metrics()[metric], second[item.name].metrics()[metric])
        gained = {
            "untouched": gain.before.to_json(),
            "gain": gain.difference.to_json(),
            "gain_direction": gain.direction,
        }
        parts[item.name] = {**item.to_json(), **gained}
    outside: dict[str, Any] | str = "not measured"
    if OUTSIDE in same:
        sides = {"before": know_outside(before, first[OUTSIDE]), "after": know_outside(after, second[OUTSIDE])}
        outside = {name: side.to_json() for name, side in sides.items()}
    return {"varied": parts, "outside_auroc": outside} if parts or OUTSIDE in same else None


def _places(measured: Measured) -> list[tuple[str, int | None]]:
    return [(row.where, row.varied) for row in measured.rows]


def general_rows(label: Label) -> list[Record]:
    """Return the guard's texts and questions as rows to label: text from outside of any job."""
    rows = [record for formed in general_forms() for record in formed.formatted.examples]
    return [Labelled(row.where, row.texts[0], label) for row in rows]


def know_outside(inside: Measured, outside: Measured) -> Interval:
    """Return how well confidence tells the job's rows from others, as AUROC: 0.5 is chance, 1 is always."""
    sides = [[row.probability or 0.0 for row in side.own] for side in (inside, outside)]
    truth = np.repeat([1.0, 0.0], [len(side) for side in sides])
    metric = Rank(truth, np.array([*sides[0], *sides[1]]), "auroc")
    return interval(metric)
