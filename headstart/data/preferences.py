"""Rows of preferences: where their prompt and answers stand, what makes them a pair, and the segments they become.

| layout   | what a row holds                                                                           |
|----------|--------------------------------------------------------------------------------------------|
| pair     | `chosen`, `rejected`: texts, turns, or transcripts (`Human:`, `Assistant:`); the prompt beside |
|          | them (`prompt`, `question`, ...), or in both of them                                         |
| openai   | `input`, `preferred_output`, `non_preferred_output` (older: `..._completion`)                |
| ranked   | a prompt, `responses` and their `scores` or `ranks`; or answers with a score each            |
| unpaired | a prompt, a completion and a `label`: wanted or not                                          |
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.data.columns import RowError, fill, take_number, template_columns
from headstart.data.feed import content_hash
from headstart.data.read import Row, Where
from headstart.data.records import Conversation, Message, Preference
from headstart.data.render import Renderer
from headstart.data.segments import ROWS_AT_ONCE, Example, Outcome, Segment, Segmented, encode_rows
from headstart.errors import Problem

PROMPTS = ("prompt", "question", "instruction", "query", "input", "messages", "conversations")
OPENAI = (("preferred_output", "non_preferred_output"), ("preferred_completion", "non_preferred_completion"))
RESPONSES = ("responses", "completions", "answers")
SCORES, RANKS = ("scores", "ratings", "score", "overall_score", "rating"), ("ranks", "ranking", "rank")
TEXTS = ("response", "content", "text", "completion", "answer")
COMPLETIONS = ("completion", "response", "answer", "output")
LABEL = "label"
# What a label says that is a vote: wanted, or not. Numbers count as what they are worth, 1.0 as 1.
VOTES = {"true": True, "yes": True, "good": True, "1": True, "false": False, "no": False, "bad": False, "0": False}
MARGIN = "margin"  # by how much the chosen answer is better, as reward models may be told (TRL's name for it)
TRANSCRIPT = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \t]?")
# From so many pairs on, it is told in which part of them the longer (or shorter) answer wins, and from which part on it hurts.
BIAS_PAIRS, BIAS_FRAC = 20, 0.7
EVEN = (1.0, 4 / 3)  # how many wanted answers may stand against an unwanted one (Ethayarajh et al., 2024, section 4.3)


@dataclass(frozen=True)
class Sides:
    """A row taken apart, as it was given: `prompt` (None where it stands in the answers), answers by the field they stand in.

    `scores` tell which answer is the better one; a prompt that is text may have a `system` text before it.
    """

    prompt: Any
    answers: Sequence[tuple[str, Any]]
    scores: Sequence[float]
    used: frozenset[str]
    prompt_field: str = ""
    system: Any = None
    tools: Any = None
    margin: float = 0.0


# --- where prompt and answers stand ---


def is_preference(fields: Mapping[str, Any]) -> bool:
    """Tell whether a row holds answers of which some are preferred."""
    return bool(_layout(fields))


def _layout(fields: Mapping[str, Any]) -> str:
    if "chosen" in fields and "rejected" in fields:
        return "pair"
    if any(first in fields and second in fields for first, second in OPENAI):
        return "openai"
    if _prompt_of(fields) and (name := _first(RESPONSES, fields)) and isinstance(fields[name], list):
        of_answers = fields[name][0] if fields[name] and isinstance(fields[name][0], Mapping) else {}
        if any(_first((*SCORES, *RANKS), each) for each in (fields, of_answers)):
            return "ranked"
    return "unpaired" if _prompt_of(fields) and _first(COMPLETIONS, fields) and _could_be_wanted(fields) else ""


def _could_be_wanted(fields: Mapping[str, Any]) -> bool:
    """Tell whether a label beside an answer could be about it: no name of a class."""
    label = fields.get(LABEL, "class")
    known = ("", "nan", "inf", "none", "null")
    return not isinstance(label, str) or read_vote(label) is not None or label.strip().lower() in known


def read_vote(value: Any) -> bool | None:
    """Return what a label says of an answer: wanted, or not; None where that isn't clear."""
    said = str(value).strip().lower()
    return VOTES.get(said.removesuffix(".0") if said in ("1.0", "0.0") else said)


def are_votes(rows: Iterable[Mapping[str, Any]]) -> bool:
    """Tell whether the labels of rows with an answer are votes on it: most are; else they are classes or numbers to tell."""
    labels = [fields.get(LABEL) for fields in rows if _layout(fields) == "unpaired"]
    told = [label for label in labels if label is not None and str(label).strip()]
    return 2 * sum(read_vote(label) is not None for label in told) > len(told) or not told


def _first(names: Iterable[str], fields: Mapping[str, Any]) -> str:
    return next((name for name in names if name in fields), "")


def _prompt_of(fields: Mapping[str, Any]) -> str:
    return _first(PROMPTS, fields)


def take_sides(
    row: Row,
    prompt: str | None = None,
    chosen: str | None = None,
    rejected: str | None = None,
    *,
    margins: bool = False,
) -> Sides:
    """Return what a row asks and its answers; columns, or templates over columns, where they are named.

    With `margins` the column `margin` is read where there is one. Raises RowError where a side is missing, or a score, label
    or margin is none.
    """
    sides = _needed(row, _take(row, prompt, chosen, rejected))
    if not margins or MARGIN not in row.fields or len(sides.answers) != 2:
        return sides
    number = take_number(row.fields[MARGIN], row.where.field(MARGIN))
    if number < 0:
        what = f"the margin is {number:g}: then the rejected answer would be the better one"
        raise RowError(Problem("row.pair", what, row.where.field(MARGIN), "0 or more; or swap the sides"))
    return replace(sides, margin=number, used=sides.used | {MARGIN})


def _take(row: Row, prompt: str | None, chosen: str | None, rejected: str | None) -> Sides:
    if chosen is not None and rejected is not None:
        asked = prompt or _first((name for name in PROMPTS if name not in (chosen, rejected)), row.fields)
        columns = [name for text in (asked, chosen, rejected) if text for name in template_columns(text)]
        fields = [text if "{" not in text else name for text, name in ((chosen, "completion"), (rejected, "rejected"))]
        sides = [(field, _named(row, text)) for field, text in zip(fields, (chosen, rejected), strict=True)]
        value = _named(row, asked) if asked else None
        return Sides(value, sides, (1.0, 0.0), frozenset(columns), asked if "{" not in asked else "prompt")
    return {"openai": _openai, "ranked": _ranked, "unpaired": _unpaired}.get(_layout(row.fields), _pair)(row)


def _named(row: Row, template: str) -> Any:
    """Return a column as it stands, or the text that a template gives."""
    return fill(template, row) if "{" in template else row.fields.get(template)


def _needed(row: Row, sides: Sides) -> Sides:
    missing = [field for field, value in sides.answers if value is None]
    if missing:
        raise RowError(
            *(
                Problem("row.pair", "this side is missing", row.where.field(field), "fill it in, or delete the row")
                for field in missing
            )
        )
    return sides


def _sides(row: Row, prompt: str, answers: Sequence[tuple[str, Any]], scores: Sequence[float], *used: str) -> Sides:
    fields = row.fields
    known = {prompt, "system", "tools", *used, *(field.partition("[")[0] for field, _ in answers)} - {""}
    asked = fields.get(prompt)
    extra = fields.get("input") if prompt == "instruction" else None  # as Alpaca has it
    if isinstance(asked, str) and isinstance(extra, str):
        asked, known = f"{asked}\n\n{extra}" if extra.strip() else asked, known | {"input"}
    return Sides(asked, answers, scores, frozenset(known), prompt, fields.get("system"), fields.get("tools"))


def _pair(row: Row) -> Sides:
    answers = [(name, row.fields.get(name)) for name in ("chosen", "rejected")]
    # A whole conversation beside a prompt that is text, as UltraFeedback has it, says the same once more.
    names = [n for n in PROMPTS if n not in ("messages", "conversations")] if "prompt" in row.fields else PROMPTS
    return _sides(row, _first(names, row.fields), answers, (1.0, 0.0), "messages" if "prompt" in row.fields else "")


def _openai(row: Row) -> Sides:
    pair = next(pair for pair in OPENAI if pair[0] in row.fields and pair[1] in row.fields)
    asked = row.fields.get("input")
    found = _sides(row, "input", [(name, row.fields.get(name)) for name in pair], (1.0, 0.0))
    if isinstance(asked, Mapping):
        return replace(found, prompt=asked.get("messages"), prompt_field="input.messages", tools=asked.get("tools"))
    return found


def _unpaired(row: Row) -> Sides:
    label, place = row.fields.get(LABEL), row.where.field(LABEL)
    vote = read_vote(label)
    if vote is None:
        shown = "no label" if label is None or label == "" else f"{label!r:.40} where true or false is expected"
        cure = "true (wanted) or false; if it isn't about the answer: --kind instruction leaves it, --kind supervised tells it"
        raise RowError(Problem("row.label", shown, place, cure))
    name = _first(COMPLETIONS, row.fields)
    prompt = next(n for n in PROMPTS if n in row.fields and n != name)
    return _sides(row, prompt, [(name, row.fields.get(name))], (float(vote),), LABEL)


def _ranked(row: Row) -> Sides:
    name = _first(RESPONSES, row.fields)
    answers = row.fields[name]
    beside = _first((*SCORES, *RANKS), row.fields)
    values, key, used = row.fields.get(beside), beside, [beside]
    if answers and isinstance(answers[0], Mapping) and not beside:
        key = _first((*SCORES, *RANKS), answers[0])
        values, used = [a.get(key) if isinstance(a, Mapping) else None for a in answers], []
    if not isinstance(values, list) or len(values) != len(answers):
        count = len(values) if isinstance(values, list) else "no list of"
        what = f"{len(answers)} answers and {count} {key}"
        raise RowError(Problem("row.pair", what, row.where.field(beside or name), "one for each answer"))
    if len(answers) < 2:
        what = f"{len(answers)} answers, of which none can be better than another"
        raise RowError(Problem("row.pair", what, row.where.field(name), "two answers or more; or delete the row"))
    places = [f"{beside}[{n}]" if beside else f"{name}[{n}].{key}" for n in range(len(answers))]
    numbers = [take_number(value, row.where.field(place)) for value, place in zip(values, places, strict=True)]
    scores = [-number for number in numbers] if key in RANKS else numbers
    texts = [
        a[field] if isinstance(a, Mapping) and "role" not in a and (field := _first(TEXTS, a)) else a for a in answers
    ]
    return _sides(row, _prompt_of(row.fields), [(f"{name}[{n}]", text) for n, text in enumerate(texts)], scores, *used)


def as_turns(value: Any, role: str) -> Any:
    """Return a text, a turn or turns as turns (still to be checked); a transcript of `Human:` and `Assistant:` as its own."""
    if isinstance(value, Mapping):
        return [value]
    if not isinstance(value, str):
        return value
    if not re.match(r"\s*(Human|Assistant):", value):
        return [{"role": role, "content": value}]
    _, *parts = TRANSCRIPT.split("\n\n" + value.strip())
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


# --- what makes them a pair ---


def as_preference(
    where: Where,
    prompt: Sequence[Message] | None,
    sides: Sequence[tuple[str, Sequence[Message]]],
    scores: Sequence[float],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    judged: bool = True,
) -> Preference:
    """Return a prompt with its answers. Each side ends with its answer, and may begin with the prompt.

    Raises RowError where a side ends with no answer, or with several, where prompts differ, or where no answer is better;
    not `judged` they are yet to be told apart.
    """
    asked = None if prompt is None else list(prompt)
    answers = []
    for field, turns in sides:
        *own, answer = turns
        place = where.field(field)
        if answer.role != "assistant":
            what = f"it ends with a turn of {answer.role}, not with an answer"
            raise RowError(Problem("row.role", what, place, "end it with one turn of the assistant"))
        if own and own[-1].role == "assistant":
            what = "more than one turn of the assistant at its end: only one answer can be compared"
            raise RowError(
                Problem("row.pair", what, place, "join the turns, or put the first of them into both prompts")
            )
        asked = _same_prompt(asked, own, place)
        answers.append(replace(answer, trained=True))
    found = [replace(message, trained=False) for message in asked or ()]
    if not found or found[-1].role == "assistant":
        what = "nothing is asked" if not found else "the prompt ends with an answer"
        cure = "give the prompt in a column (`prompt`), or as turns in both sides"
        raise RowError(Problem("row.pair", what, str(where), cure))
    preference = Preference(where, tuple(found), tuple(answers), tuple(scores), tuple(tools))
    if judged:
        _check_better(preference, sides)
    # Rows of one prompt are on one side of the split, else its answers would be known.
    return replace(preference, group=preference.asked.content)


def _same_prompt(asked: list[Message] | None, own: Sequence[Message], place: str) -> list[Message]:
    """Return the prompt of all sides so far, given what stands before the answer of one. Raises RowError where they differ."""
    if not own and asked is not None:
        return asked
    if asked is None or _plain(asked) == _plain(own):
        return list(own)
    # A prompt that is text is the last thing asked in a side that brings its system turn along.
    if len(asked) == 1 and own[0].role != "assistant" and _plain(asked) == _plain(own[-1:]):
        return list(own)
    what = "its prompt is another than that of the row's other side"
    raise RowError(Problem("row.pair", what, place, "compare answers to one prompt; or delete the row"))


def _plain(messages: Sequence[Message]) -> list[Message]:
    return [replace(message, content=message.content.strip(), trained=False) for message in messages]


def _check_better(row: Preference, sides: Sequence[tuple[str, Any]]) -> None:
    if len(row.answers) == 1:
        return
    better: dict[tuple[Any, ...], float] = {}
    for (field, _), message, score in zip(sides, row.answers, row.scores, strict=True):
        said = (message.content.strip(), message.reasoning, repr(message.tool_calls))
        if better.setdefault(said, score) != score:
            what = "both sides are equal" if len(sides) == 2 else "it equals an answer that is better or worse"
            raise RowError(Problem("row.pair", what, row.where.field(field), "delete the row: it says nothing"))
    if len(set(row.scores)) == 1:
        raise RowError(Problem("row.pair", "no answer is better than another", str(row.where), "delete the row"))


def parted(rows: Sequence[Preference]) -> list[Preference]:
    """Return rows without their groups where all ask the same: else they could not be split at all."""
    one = len({row.group for row in rows}) == 1
    return [replace(row, group=None) for row in rows] if one else list(rows)


def desirable_weight(rows: Sequence[Preference]) -> float:
    """Return what a wanted answer weighs against an unwanted one: 1 where there are about as many of both, else so that
    all of either sort weigh alike.
    """
    wanted, unwanted = _count_wanted(rows)
    even = not wanted or not unwanted or EVEN[0] <= wanted / unwanted <= EVEN[1]
    return 1.0 if even else unwanted / wanted


def _count_wanted(rows: Sequence[Preference]) -> tuple[int, int]:
    flags = [flag for row in rows for flag in row.wanted]
    return sum(flags), len(flags) - sum(flags)


def preference_notes(rows: Sequence[Preference], *, unpaired: bool = False) -> list[str]:
    """Return what people should know of preferences: how often the longer answer wins, and how many answers are wanted."""
    notes = []
    if told := [row.margin for row in rows if row.margin]:
        what = f"{len(told):,} rows say by how much the chosen answer is better (`{MARGIN}`, up to {max(told):g})"
        notes.append(f"{what}: its reward is to lead by that")
    if unpaired or any(len(row.answers) == 1 for row in rows):
        wanted, unwanted = _count_wanted(rows)
        note = f"{wanted:,} answers to train on are wanted, {unwanted:,} are not"
        weight = f"; a wanted one weighs {desirable_weight(rows):.3g}" if desirable_weight(rows) != 1 else ""
        notes.append(note + (weight if wanted and unwanted else ": what the other sort looks like is never seen"))
    if opposed := find_opposed(rows):
        (row, first), *_ = opposed
        what = f"{len(opposed):,} rows prefer an answer to one that an earlier row to the same prompt prefers to it"
        notes.append(f"{what}: first {row.where}, against {first.where}")
    return notes + _length_notes(rows)


def _length_notes(rows: Sequence[Preference]) -> list[str]:
    """Say how often the longer answer wins, with its interval (Wilson, 1927)."""
    from scipy.stats import binomtest

    found = [pair for row in rows for pair in _lengths(row)]
    differ = [(better, worse) for better, worse in found if better != worse]
    if len(differ) < BIAS_PAIRS:
        return []
    longer = sum(better > worse for better, worse in differ)
    which, count = ("longer", longer) if 2 * longer >= len(differ) else ("shorter", len(differ) - longer)
    bounds = binomtest(count, len(differ)).proportion_ci(0.95, "wilson")
    share = f"{count / len(differ):.0%}, 95% interval {bounds.low:.0%} to {bounds.high:.0%}"
    note = f"the {which} answer wins in {count:,} of {len(differ):,} pairs ({share})"
    if count >= BIAS_FRAC * len(differ):
        note += ": length may be what is learned"
    return [note + "; are the sides swapped?" * (which == "shorter" and count == len(differ))]


def find_opposed(rows: Sequence[Preference]) -> list[tuple[Preference, Preference]]:
    """Return rows that prefer A to B, each with the first one of the same prompt that prefers B to A."""
    known: dict[tuple[str, str, str], Preference] = {}
    found = []
    for row in rows:
        asked = row.asked.content
        said = [json.dumps([a.content.strip(), a.reasoning, list(a.tool_calls)], default=str) for a in row.answers]
        ranked = sorted(zip(row.scores, said, strict=True), reverse=True)
        pairs = [(a, b) for n, (s, a) in enumerate(ranked) for t, b in ranked[n + 1 :] if s > t]
        other = next((known[asked, b, a] for a, b in pairs if (asked, b, a) in known), None)
        if other is not None:
            found.append((row, other))
        for a, b in pairs:
            known.setdefault((asked, a, b), row)
    return found


def _lengths(row: Preference) -> list[tuple[int, int]]:
    """Return the characters of the better and of the worse answer of each pair."""
    ranked = sorted(zip(row.scores, [len(a.content) for a in row.answers], strict=True), reverse=True)
    return [(a[1], b[1]) for n, a in enumerate(ranked) for b in ranked[n + 1 :] if a[0] > b[0]]


# --- segments ---


def segment_preferences(
    rows: Sequence[Preference],
    renderer: Renderer,
    *,
    max_length: int,
    over_length: str = "drop",
    unpaired: bool = False,
) -> Segmented:
    """Render and encode prompts with their answers: a segment an answer, of which the answer is trained.

    `label` is [segments, 2]: the score and what the reference gives the answer, NaN until that is known; where a row has
    a margin, that of the better answer. Where an
    answer is over `max_length` tokens with its prompt, the row is dropped whole, or the prompt is cut for all of them.
    With `unpaired` scores are 1 (wanted) or -1, and behind the answers stands, with no score, the answer to another prompt.

    Raises DataError with every row over the length where `over_length` is `error`.
    """
    result = Segmented()
    chunks = [rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE)]
    parts = ([c for row in chunk for c in row.conversations] for chunk in chunks)
    for chunk, outcomes in zip(chunks, encode_rows(parts, renderer, max_length=max_length), strict=True):
        each = iter(outcomes)
        for row in chunk:
            _add(result, row, [next(each) for _ in row.answers], renderer, max_length, cut=over_length == "cut")
    if over_length == "error":
        result.reject_dropped(max_length, "drop or cut")
    if unpaired:
        _unpair(result, renderer, max_length)
    return result


def _add(
    result: Segmented, row: Preference, outcomes: list[Outcome], renderer: Renderer, max_length: int, *, cut: bool
) -> None:
    """Add a row of which every answer can be used; else what is wrong with it."""
    lost = ""
    if cut and any(o.example is None and o.problem is None for o in outcomes):
        longest = max(outcomes, key=lambda outcome: outcome.length).conversation
        ((shorter,),) = encode_rows([[longest]], renderer, max_length=max_length, over_length="cut")
        if shorter.example is not None:
            row, lost = replace(row, prompt=shorter.conversation.messages[:-1]), shorter.example.cut
            (outcomes,) = encode_rows([row.conversations], renderer, max_length=max_length)
    if problem := next((o.problem for o in outcomes if o.problem), None):
        result.problems.append(problem)
    elif any(o.example is None for o in outcomes):
        result.dropped.append((row.where, max(o.length for o in outcomes)))
    else:
        segments = tuple(o.example.segments[-1] for o in outcomes if o.example)
        result.examples.append(Example(row.where, segments, lost, label_of(row.scores, row.margin)))
        result.kept.append(row)


def label_of(scores: Sequence[float], margin: float = 0.0) -> NDArray[np.float64]:
    """Return answers by their scores, with references that aren't known yet, or the margin of the best, [answers, 2]."""
    label = np.array([(score, np.nan) for score in scores], np.float64)
    if margin:
        label[label[:, 0].argmax(), 1] = margin
    return label


def _unpair(result: Segmented, renderer: Renderer, max_length: int) -> None:
    """Score answers as wanted or not, and put behind those of each row an answer to the prompt of another row.

    Rows are taken in the order of their hashes, and each has an answer, wanted or not, of the nearest before it that asks
    something else, if that fits: so the partner is the same however rows are shuffled.
    """
    rows: list[Preference] = result.kept
    hashes = [content_hash(row) for row in rows]
    order = sorted(range(len(rows)), key=lambda n: (hashes[n], n))
    strangers: dict[int, Conversation] = {}
    if len({row.asked.content for row in rows}) < 2:
        order = []  # nobody asks anything else
    for place, number in enumerate(order):
        own = rows[number]
        others = (rows[order[place - back]] for back in range(1, len(order)))
        other = next((row for row in others if row.prompt != own.prompt), None)
        if other is not None:
            answer = other.answers[int(hashes[number][:8], 16) % len(other.answers)]
            strangers[number] = Conversation(own.where, (*own.prompt, answer), own.tools)
    outcomes = [o for part in encode_rows([list(strangers.values())], renderer, max_length=max_length) for o in part]
    segments: dict[int, Segment] = {
        n: o.example.segments[-1] for n, o in zip(strangers, outcomes, strict=True) if o.example
    }
    for number, (example, row) in enumerate(zip(result.examples, rows, strict=True)):
        scores = [1.0 if wanted else -1.0 for wanted in row.wanted]
        more = (segments[number],) if number in segments else ()
        label = label_of([*scores, *[np.nan] * len(more)])
        result.examples[number] = replace(example, segments=(*example.segments, *more), label=label)
