"""Rows -> records: the field's data set formats, detected and said aloud.

| format            | what a row holds                                                              |
|-------------------|-------------------------------------------------------------------------------|
| messages          | `messages`: role, content, weight, tool_calls; `tools` beside it (OpenAI)       |
| sharegpt          | `conversations`: from, value; `system`, `tools` beside it                      |
| alpaca            | `instruction`, `input` (may be empty or absent), `output`; `system`             |
| prompt_completion | `prompt`, `completion`: text, or lists of messages; other pairs of names in PAIRS |
| columns           | any columns: the user names the two, or gives templates over columns           |
| labels            | a text, or a pair of texts, with a class, a list of classes, or numbers        |
| tags              | `tokens` with as many `tags`: lists, or the lines of a CoNLL file               |
| related           | `anchor`, `positive` and perhaps `negative`: texts that belong together         |
| images            | the path of an image and its class, or a folder of images for each class       |
| preference        | a prompt with answers of which some are preferred (`preferences.py` has the layouts) |
| text              | `text`, a document; or the column that the user names                           |

The first five are conversations to learn answers from; labels, tags, related texts and images are supervised; text is to
be continued. Names of columns that are known without being told stand in `columns.py`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from headstart.config import TASKS, DataSettings
from headstart.data.columns import (
    RowError,
    check_encodable,
    fill,
    find_image,
    find_labelled,
    find_related,
    find_tagged,
    find_text_column,
    label_task,
    need_columns,
    take_group,
    take_labelled,
    take_picture,
    take_related,
    take_tagged,
    take_text,
    template_columns,
)
from headstart.data.preferences import LABEL, Sides, are_votes, as_preference, as_turns, is_preference, take_sides
from headstart.data.private import redact
from headstart.data.read import Row, Where
from headstart.data.records import Conversation, Document, Message, Preference, Record
from headstart.data.strict import parse_json
from headstart.errors import DataError, Problem

ROLES = ("system", "developer", "user", "assistant", "tool")
SYSTEM = ("system", "developer")
ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("instruction", "response"),
    ("query", "response"),
    ("input", "output"),
)
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
TURN_KEYS = {"role", "content", "weight", "tool_calls", "function_call", "tool_call_id", "name", "from", "value"} | {
    *REASONING_KEYS
}
TEXT_ONLY = {"text", "id", "source", "meta", "metadata", "title", "url", "timestamp", "date", "added", "created"}
CHAT_KEYS = ("messages", "conversations", "conversation")
VOTE = "a prompt, an answer and whether it is wanted (a class or score to tell instead: --kind supervised)"
SHOWN = 200  # characters of a row in a message


@dataclass(frozen=True)
class Detection:
    """Which format the rows have, how many fit it, how sure that is (`certain`, `likely` or `given`), and what they are for."""

    format: str
    fitting: int
    rows: int
    certainty: str
    reads: str
    task: str

    @property
    def kind(self) -> str:
        """The kind of fine-tuning that such rows are for."""
        return "unsupervised" if self.format == "text" else TASKS[self.task]

    def __str__(self) -> str:
        return f"{self.format} ({self.certainty}): {self.fitting:,} of {self.rows:,} rows have {self.reads}"


@dataclass
class Formatted:
    """What became of the rows."""

    detection: Detection
    examples: list[Record] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    redacted: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Named:
    """What the user said of the columns: each a column or a template over columns, `label` columns."""

    prompt: str | None = None
    completion: str | None = None
    rejected: str | None = None
    text: str | None = None
    text_pair: str | None = None
    label: Sequence[str] = ()


def named_columns(settings: DataSettings) -> Named:
    """Return what settings say of the columns."""
    return Named(**{name: getattr(settings, name) for name in Named.__dataclass_fields__})


def format_rows(
    rows: Sequence[Row],
    *,
    format: str = "auto",
    named: Named | None = None,
    kind: str = "auto",
    task: str = "auto",
    train_on: str = "all",
    reasoning: str = "keep",
    group_by: str | None = None,
    redact: bool = False,
    merge: bool = False,
    fold: bool = False,
    judged: bool = True,
) -> Formatted:
    """Detect the format of `rows` and turn each into a record; a row that can't be is a problem.

    `task` is what the rows are to be used for, where that is known. With `train_on` `last`, only the last answer of a
    conversation is trained; `reasoning` tells what becomes of thoughts before an answer: keep, drop or untrained. With
    `redact`, personal data and secrets are replaced, and counted in what is returned. `merge` joins neighbouring turns of
    one role, `fold` puts system turns in front of the user's next. Without `judged`, answers need not be told apart: they are
    yet to be scored.

    Raises DataError where no format fits, where several are mixed, or where a column that was named isn't there.
    """
    formatting = Formatting(
        rows, format, named or Named(), task, train_on, reasoning, group_by, redact, merge, fold, judged, kind
    )
    formatted = Formatted(formatting.detection)
    formatting.take(rows, formatted)
    formatted.notes = formatting.notes()
    return formatted


class Formatting:
    """How rows become records, found from the first of them; the others may come in parts.

    Raises DataError where no format fits, where several are mixed, or where a column that was named isn't there.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        format: str,
        named: Named,
        task: str,
        train_on: str = "all",
        reasoning: str = "keep",
        group_by: str | None = None,
        redact: bool = False,
        merge: bool = False,
        fold: bool = False,
        judged: bool = True,
        kind: str = "auto",
    ) -> None:
        if group_by is not None:
            need_columns(rows, [group_by], "data.group_by")
        self._group_by = group_by
        self._redact = redact
        self._named = named
        self._tally = _Tally(reasoning, merge, fold, judged)
        self.detection, self._take = _find_format(rows, format, named, (kind, task), self._tally, train_on)

    def take(self, rows: Sequence[Row], formatted: Formatted) -> None:
        """Add what becomes of rows: records, and problems of those of which nothing does."""
        for row in rows:
            try:
                plain = row._replace(fields=redact(row.fields, formatted.redacted)) if self._redact else row
                record = self._take(plain)
                group = take_group(row, self._group_by)
            except RowError as error:
                formatted.problems += error.problems
                continue
            except KeyError as error:
                what = f"no {error}"
                cure = f"the row has {sorted(row.fields)}"
                formatted.problems.append(Problem("row.field_missing", what, str(row.where), cure))
                continue
            formatted.examples.append(replace(record, group=group) if group is not None else record)
            self._tally.columns.update(row.fields)

    def fitting(self, rows: Sequence[Row]) -> int | None:
        """Return how many further rows fit the format of conversations; None where one is of another format."""
        name = self.detection.format
        if name == "columns":
            needed = [
                column
                for text in (self._named.prompt, self._named.completion)
                for column in template_columns(text or "")
            ]
            return sum(all(column in row.fields for column in needed) for row in rows)
        fits, count = _FITS[name][1], 0
        for row in rows:
            count += fits(row.fields)
            if self.detection.certainty != "given" and _format_of(row) not in (name, ""):
                return None
        return count

    def notes(self) -> list[str]:
        """Return what there is to tell of all rows so far."""
        return self._tally.notes({self._group_by})


# --- which format ---

_Take = Callable[[Row], Record]


def _find_format(
    rows: Sequence[Row], format: str, named: Named, aim: tuple[str, str], tally: _Tally, train_on: str
) -> tuple[Detection, _Take]:
    """Return the format of rows, and what makes a record of one; `aim` are the kind and the task that they are for, or auto."""
    kind, task = aim
    if named.rejected is not None:
        return _compared(rows, named, task, tally)
    if named.prompt is not None or named.completion is not None or format == "columns":
        convert, detection = _columns(rows, named.prompt, named.completion)
        return detection, lambda row: _to_conversation(row, convert, tally, train_on)
    name, sure = _detect(rows, _implied(named, task) if format == "auto" else format, kind)
    if name == "preference":
        reads, fits = _FITS[name]
        reads = VOTE if any(LABEL in row.fields and "chosen" not in row.fields for row in rows) else reads
        task = name if task == "auto" else task
        detection = Detection(name, sum(fits(row.fields) for row in rows), len(rows), sure, reads, task)
        return detection, lambda row: _to_preference(row, take_sides(row, margins=task == "reward"), tally)
    given = named.text is not None or bool(named.label)
    if name in _CONVERT:
        reads, fits = _FITS[name]
        pair = next((pair for row in rows if (pair := _pair(row.fields))), None)
        if name == "prompt_completion" and pair:
            reads = f"`{pair[0]}` and `{pair[1]}`"
        fitting = sum(fits(row.fields) for row in rows)
        detection = Detection(name, fitting, len(rows), sure, reads, "chat")
        return detection, lambda row: _to_conversation(row, _CONVERT[name], tally, train_on)
    task, columns, take = _BY_COLUMNS[name](rows, named, task)
    need_columns(rows, columns, "data.text, data.label")
    tally.used.update(columns)
    return replace(_named(name, rows, columns, task), certainty="given" if given else sure), take


def _named(name: str, rows: Sequence[Row], columns: Sequence[str], task: str = "chat") -> Detection:
    fitting = sum(all(column in row.fields for column in columns) for row in rows)
    reads = " and ".join(f"`{column}`" for column in dict.fromkeys(columns))
    return Detection(name, fitting, len(rows), "given", reads, task)


def _implied(named: Named, task: str) -> str:
    """Return the format that follows from what the user said, or auto."""
    if task in ("tagging", "images", "preference", "reward"):
        return {"tagging": "tags", "reward": "preference"}.get(task, task)
    if task == "embedding" and named.text_pair and not named.label:
        return "related"
    if named.label:
        return "labels"
    return "text" if named.text is not None else "auto"


def _detect(rows: Sequence[Row], format: str, kind: str = "auto") -> tuple[str, str]:
    """Return the one format that rows have, of those for the kind that the user named, and how sure that is.

    A prompt, an answer and a label are a vote on the answer where most labels are a yes or a no; else the label is what is
    to be told of both.
    """
    if format != "auto":
        return format, "given"
    fits = _fits_of(kind)
    if "preference" in fits and kind == "auto" and not are_votes(row.fields for row in rows):
        fits = {
            "labels": lambda f: find_labelled(f) is not None,
            **{k: v for k, v in fits.items() if k != "preference"},
        }
    counts: Counter[str] = Counter()
    first: dict[str, Row] = {}
    for row in rows:
        name = next((name for name, fit in fits.items() if fit(row.fields)), "") or _format_of(row)
        counts[name] += 1
        first.setdefault(name, row)
    found = [name for name in counts if name]
    if not found:
        raise DataError(_unknown(first[""]))
    if len(found) > 1:
        raise DataError(_mixed(counts, first))
    name, fields = found[0], first[found[0]].fields
    sure = {
        "prompt_completion": _pair(fields) == PAIRS[0],
        "labels": {"text", "label"} <= set(fields),
        "preference": "label" not in fields or "chosen" in fields,
        "text": set(fields) <= TEXT_ONLY,
    }.get(name, True)
    return name, "certain" if sure else "likely"


def _fits_of(kind: str) -> dict[str, Callable[[Mapping[str, Any]], bool]]:
    """Return what tells whether a row is of a format, for each of those that are for a kind."""
    chats = ("messages", "sharegpt", "alpaca", "prompt_completion")
    kinds = {"preference": "preference", "text": "unsupervised", **dict.fromkeys(chats, "instruction")}
    return {n: fits for n, (_, fits) in _FITS.items() if kind in ("auto", kinds.get(n, "supervised"))}


def _format_of(row: Row) -> str:
    return next((name for name, (_, fits) in _FITS.items() if fits(row.fields)), "")


def _unknown(row: Row) -> Problem:
    columns = list(row.fields)
    texts = [name for name, value in row.fields.items() if isinstance(value, str)] or columns
    asked, answered = [*texts, "asked", "answered"][:2] if len(texts) < 2 else texts[-2:]
    shown = json.dumps(row.fields, ensure_ascii=False, default=str)
    what = (
        f"no known format; the columns are {', '.join(map(repr, columns))}; "
        f"the first row: {shown[:SHOWN]}{'...' * (len(shown) > SHOWN)}"
    )
    cure = (
        f"""name them. To answer: -s data.prompt="{{{asked}}}" -s data.completion="{{{answered}}}" """
        f"""(a template over columns: any text with {{names}}); to tell a class: -s data.text="{{{asked}}}" """
        f"""-s data.label={answered}; to continue text: -s data.text="{{{answered}}}". Known without naming: messages, """
        "conversations, instruction + output, prompt + completion, question + answer, text + label, tokens + tags, "
        "anchor + positive, image + label, prompt + chosen + rejected, text"
    )
    return Problem("format.unknown", what, str(row.where), cure)


def _mixed(counts: Counter[str], first: Mapping[str, Row]) -> Problem:
    seen = "; ".join(
        f"{counts[name]} rows of {name or 'no known format'}, first at {row.where}" for name, row in first.items()
    )
    return Problem(
        "format.mixed", f"several formats: {seen}", "", "split the file, or settle it with -s data.format=NAME"
    )


def _pair(fields: Mapping[str, Any]) -> tuple[str, str] | None:
    return next((pair for pair in PAIRS if pair[0] in fields and pair[1] in fields), None)


_FITS: dict[str, tuple[str, Callable[[Mapping[str, Any]], bool]]] = {
    "preference": ("a prompt and answers that are preferred or not", is_preference),
    "messages": ("`messages`", lambda f: "messages" in f),
    "sharegpt": ("`conversations`", lambda f: "conversations" in f or "conversation" in f),
    "alpaca": ("`instruction` and `output`", lambda f: "instruction" in f and "output" in f),
    "tags": ("words and tags", lambda f: (pair := find_tagged(f)) is not None and isinstance(f[pair[0]], list)),
    "related": ("texts that belong together", lambda f: find_related(f) is not None),
    "images": ("an image and its class", lambda f: find_image(f) is not None),
    "prompt_completion": ("a prompt and a completion", lambda f: _pair(f) is not None),
    "labels": ("a text and a label", lambda f: find_labelled(f) is not None),
    "text": ("`text`", lambda f: "text" in f),
}


# --- formats that are columns ---

_Columns = tuple[str, Sequence[str], _Take]


def _text(_: Sequence[Row], named: Named, task: str) -> _Columns:
    text = named.text or "text"
    return (
        "causal" if task == "auto" else task,
        template_columns(text),
        lambda row: Document(row.where, take_text(row, text)),
    )


def _labels(rows: Sequence[Row], named: Named, task: str) -> _Columns:
    fields = {name: None for row in rows for name in row.fields}
    found = find_labelled(fields)
    label = tuple(named.label) or ((found[2],) if found else ("label",))
    pair = named.text_pair or (found[1] if found and named.text is None else None)
    text = named.text or (found[0] if found and pair and not named.text_pair else find_text_column(rows, label))
    columns = [*template_columns(text), *(template_columns(pair) if pair else ()), *label]
    if task == "embedding":
        both = [text, pair or find_text_column(rows, (text, *label))]
        return task, columns, lambda row: take_related(row, both, label[0])
    task = label_task(rows, label) if task == "auto" else task
    return task, columns, lambda row: take_labelled(row, text, pair, label, task)


def _tags(rows: Sequence[Row], named: Named, _: str) -> _Columns:
    found = find_tagged({name: None for row in rows for name in row.fields}) or ("tokens", "tags")
    words, tags = named.text or found[0], named.label[0] if named.label else found[1]
    return "tagging", [words, tags], lambda row: take_tagged(row, words, tags)


def _related(rows: Sequence[Row], named: Named, _: str) -> _Columns:
    found = find_related({name: None for row in rows for name in row.fields}) or ("anchor", "positive")
    texts = [named.text or found[0], named.text_pair or found[1], *found[2:]]
    return (
        "embedding",
        [name for text in texts for name in template_columns(text)],
        lambda row: take_related(row, texts),
    )


def _images(rows: Sequence[Row], named: Named, _: str) -> _Columns:
    found = next((pair for row in rows if (pair := find_image(row.fields))), None) or ("image", "label")
    image, label = named.text or found[0], named.label[0] if named.label else found[1]
    return "images", [image, label], lambda row: take_picture(row, image, label)


_BY_COLUMNS = {"text": _text, "labels": _labels, "tags": _tags, "related": _related, "images": _images}


# --- conversations ---


@dataclass
class _Draft:
    """A row on its way: raw turns as mappings with role, content and the like."""

    turns: Sequence[Mapping[str, Any]]
    tools: Any = None
    used: set[str] = field(default_factory=set)


_Convert = Callable[[Row], _Draft]


def _from_messages(row: Row) -> _Draft:
    return _Draft(_turns(row, "messages"), row.fields.get("tools"), {"messages", "tools"})


def _from_sharegpt(row: Row) -> _Draft:
    key = next((name for name in CHAT_KEYS[1:] if name in row.fields), CHAT_KEYS[1])
    turns = []
    for index, turn in enumerate(_turns(row, key)):
        content = turn.get("value", turn.get("content"))
        role = turn.get("from", turn.get("role"))
        converted: dict[str, Any] = {**turn, "role": role, "content": content}
        if role == "function_call":
            converted |= {"content": "", "tool_calls": _calls_from_text(content, row.where.field(f"{key}[{index}]"))}
        turns.append(converted)
    system = row.fields.get("system")
    if system:
        turns.insert(0, {"role": "system", "content": system})
    return _Draft(turns, row.fields.get("tools"), {key, "system", "tools"})


def _from_alpaca(row: Row) -> _Draft:
    fields = row.fields
    extra = fields.get("input")
    asked = fields["instruction"]
    if extra is not None and not isinstance(extra, str):
        what = f"a {type(extra).__name__} where text is expected"
        raise RowError(Problem("row.field_type", what, row.where.field("input"), "give it as text"))
    if isinstance(asked, str) and extra and extra.strip():
        asked = f"{asked}\n\n{extra}"
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": fields["output"]}]
    if fields.get("system"):
        turns.insert(0, {"role": "system", "content": fields["system"]})
    return _Draft(turns, None, {"instruction", "input", "output", "system"})


def _from_pair(row: Row) -> _Draft:
    pair = _pair(row.fields)
    if pair is None:
        raise RowError(
            Problem(
                "row.field_missing", "no prompt and completion", str(row.where), f"the row has {sorted(row.fields)}"
            )
        )
    turns: list[Mapping[str, Any]] = []
    for name, role in zip(pair, ("user", "assistant"), strict=True):
        value = row.fields[name]
        given = _turns(row, name) if isinstance(value, list) else [{"role": role, "content": value}]
        # What a prompt holds is asked, earlier answers in it included: only the completion is learned.
        turns += given if role == "assistant" else [{**turn, "weight": 0} for turn in given]
    return _Draft(turns, row.fields.get("tools"), {*pair, "tools"})


_CONVERT: dict[str, _Convert] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_pair,
}


def _columns(rows: Sequence[Row], prompt: str | None, completion: str | None) -> tuple[_Convert, Detection]:
    if prompt is None or completion is None:
        missing = "data.prompt" if prompt is None else "data.completion"
        raise DataError(Problem("format.column", "both sides must be named", missing, f'-s {missing}="{{column}}"'))
    templates = {"user": prompt, "assistant": completion}
    needed = [name for template in templates.values() for name in template_columns(template)]
    need_columns(rows, needed, "data.prompt, data.completion")

    def convert(row: Row) -> _Draft:
        turns = [{"role": role, "content": fill(template, row)} for role, template in templates.items()]
        return _Draft(list(turns), None, set(needed))

    return convert, _named("columns", rows, needed)


# --- preferences ---


def _compared(rows: Sequence[Row], named: Named, task: str, tally: _Tally) -> tuple[Detection, _Take]:
    """Return the format of rows whose two answers the user names."""
    if named.completion is None:
        cure = "-s data.completion=COLUMN: the better answer"
        raise DataError(Problem("format.column", "both answers must be named", "data.completion", cure))
    columns = [c for text in (named.prompt, named.completion, named.rejected) if text for c in template_columns(text)]
    need_columns(rows, columns, "data.completion, data.rejected")

    task = "preference" if task == "auto" else task

    def take(row: Row) -> Record:
        sides = take_sides(row, named.prompt, named.completion, named.rejected, margins=task == "reward")
        return _to_preference(row, sides, tally)

    return _named("preference", rows, columns, task), take


def _to_preference(row: Row, sides: Sides, tally: _Tally) -> Preference:
    problems: list[Problem] = []

    def messages(value: Any, field: str, role: str) -> list[Message]:
        found = _list_of_turns(as_turns(value, role), row.where.field(field))
        whole = isinstance(value, list)
        places = [row.where.field(f"{field}[{n}]" if whole else field) for n in range(len(found))]
        read = [
            _message({"role": t.get("from"), "content": t.get("value"), **t}, place, problems, tally)
            for t, place in zip(found, places, strict=True)
        ]
        return [message for message in read if message is not None]

    prompt = None if sides.prompt is None else messages(sides.prompt, sides.prompt_field or "prompt", "user")
    if prompt and sides.system:
        prompt = [*messages([{"role": "system", "content": sides.system}], "system", "system"), *prompt]
    answers = [(field, messages(value, field, "assistant")) for field, value in sides.answers]
    tools = _tools(sides.tools, row.where)
    if problems:
        raise RowError(*problems)
    found = as_preference(row.where, prompt, answers, sides.scores, tools, judged=tally.judged)
    for conversation in found.conversations:
        if wrong := _check_turns(conversation.messages, row.where) or _check_calls(
            conversation.messages, tools, row.where
        ):
            raise RowError(*wrong)
    tally.used |= sides.used
    return replace(found, margin=sides.margin)


# --- the turns of a row ---


@dataclass
class _Tally:
    """What was handled in many rows and is told once, with counts."""

    reasoning: str = "keep"
    merge: bool = False
    fold: bool = False
    judged: bool = True
    folded: int = 0
    merged: int = 0
    thoughts: int = 0
    aliases: Counter[str] = field(default_factory=Counter)
    columns: set[str] = field(default_factory=set)
    trailing: int = 0
    opening: int = 0
    keys: Counter[str] = field(default_factory=Counter)
    repeated: int = 0
    used: set[str] = field(default_factory=set)

    def notes(self, known: set[str | None]) -> list[str]:
        """Return what there is to tell; `known` columns are used elsewhere."""
        said = [f"role `{old}` read as `{ALIASES[old]}` in {count:,} turns" for old, count in self.aliases.items()]
        if unused := sorted(self.columns - self.used - known):
            said.append("columns not used: " + ", ".join(unused))
        if self.thoughts:
            what = {"keep": "is learned", "drop": "is left out", "untrained": "is read and not learned"}[self.reasoning]
            said.append(f"{self.thoughts:,} answers come with reasoning, which {what} (data.reasoning)")
        if self.trailing:
            said.append(f"{self.trailing:,} rows end with turns after the last answer; those turns are not used")
        if self.opening:
            said.append(
                f"{self.opening:,} rows begin with an answer; it is read, not trained, since nothing asks for it"
            )
        if self.keys:
            named = ", ".join(f"`{key}` ({count:,} turns)" for key, count in sorted(self.keys.items()))
            said.append(f"keys of turns that are not used: {named}")
        if self.folded:
            said.append(f"{self.folded:,} rows have a system turn, which is put in front of the user's next turn")
        if self.merged:
            said.append(f"{self.merged:,} rows have two turns of one role in a row, which are joined")
        if self.repeated:
            said.append(
                f"{self.repeated:,} rows have two turns of one role in a row (-s data.fix=merge_turns joins them)"
            )
        return said


def _to_conversation(row: Row, convert: _Convert, tally: _Tally, train_on: str) -> Conversation:
    draft = convert(row)
    problems: list[Problem] = []
    places = [row.where.field(f"turn[{index}]") for index in range(len(draft.turns))]
    messages = [_message(turn, place, problems, tally) for turn, place in zip(draft.turns, places, strict=True)]
    tools = _tools(draft.tools, row.where)
    kept = _joined([message for message in messages if message is not None], tally)
    if kept and kept[0].role == "assistant":
        kept[0] = replace(kept[0], trained=False)
    if not problems:
        problems += _check_turns(kept, row.where) or _check_calls(kept, tools, row.where)
    if problems:
        raise RowError(*problems)
    last = max(i for i, m in enumerate(kept) if (m.trained if train_on == "last" else m.role == "assistant"))
    if train_on == "last":
        kept = [replace(message, trained=index == last) for index, message in enumerate(kept)]
    tally.trailing += last + 1 < len(kept)
    tally.opening += kept[0].role == "assistant"
    tally.repeated += any(a.role == b.role != "tool" for a, b in zip(kept, kept[1:], strict=False))
    tally.used |= draft.used
    return Conversation(row.where, tuple(kept[: last + 1]), tools)


def _joined(messages: list[Message], tally: _Tally) -> list[Message]:
    """Return the turns as the settings want them joined."""
    if tally.fold and (folded := fold_system(messages)) != messages:
        tally.folded += 1
        messages = folded
    if tally.merge and (merged := _merge(messages)) != messages:
        tally.merged += 1
        messages = merged
    return messages


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """Put what system turns say in front of the user's next turn; one behind which the user says nothing stays."""
    found: list[Message] = []
    for message in messages:
        if message.role == "user":
            first = len(found)
            while first and found[first - 1].role in SYSTEM:
                first -= 1
            said = [turn.content for turn in found[first:]]
            found[first:] = [replace(message, content="\n\n".join(filter(None, [*said, message.content])))]
        else:
            found.append(message)
    return found


def _merge(messages: Sequence[Message]) -> list[Message]:
    """Join neighbouring turns that differ in nothing but what they say; calls of tools and thoughts keep theirs apart."""
    found: list[Message] = []
    for message in messages:
        alike = found and replace(found[-1], content="") == replace(message, content="")
        if alike and message.role != "tool" and not message.tool_calls and not message.reasoning:
            found[-1] = replace(message, content=f"{found[-1].content}\n\n{message.content}")
        else:
            found.append(message)
    return found


def _turns(row: Row, key: str) -> list[Mapping[str, Any]]:
    return _list_of_turns(row.fields.get(key), row.where.field(key))


def _list_of_turns(value: Any, where: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not value:
        what = "empty" if value == [] else f"a {type(value).__name__} where a list of turns is expected"
        raise RowError(Problem("row.field_type", what, where, '[{"role": "user", "content": "..."}, ...]'))
    bad = next((i for i, turn in enumerate(value) if not isinstance(turn, dict)), None)
    if bad is not None:
        raise RowError(
            Problem("row.field_type", "the turn is no object", f"{where}[{bad}]", '{"role": ..., "content": ...}')
        )
    return value


def _message(turn: Mapping[str, Any], place: str, problems: list[Problem], tally: _Tally) -> Message | None:
    role = turn.get("role")
    if isinstance(role, str) and role.lower() in ALIASES:
        tally.aliases[role.lower()] += 1
        role = ALIASES[role.lower()]
    if role not in ROLES:
        problems.append(Problem("row.role", f"the role is {role!r}", f"{place}.role", f"one of {', '.join(ROLES)}"))
        return None
    if unknown := turn.keys() - TURN_KEYS:
        tally.keys.update(unknown)
    weight = turn.get("weight", 1)
    if weight not in (0, 1, None):
        problems.append(Problem("row.weight", f"the weight is {weight!r}", f"{place}.weight", "0 or 1"))
    try:
        legacy = turn.get("function_call")
        calls = _tool_calls([legacy] if legacy else turn.get("tool_calls"), f"{place}.tool_calls")
        content = _content(turn.get("content"), f"{place}.content", optional=bool(calls))
        for key in ("name", "tool_call_id"):
            check_encodable(turn.get(key), f"{place}.{key}")
    except RowError as error:
        problems += error.problems
        return None
    reasoning = ""
    if role == "assistant":
        reasoning, content = _reasoning(turn, content, place, problems)
        tally.thoughts += bool(reasoning)
    if role == "assistant" and not content.strip() and not calls:
        problems.append(
            Problem("row.empty_answer", "the answer is empty", f"{place}.content", "fill it in, or delete the row")
        )
    return Message(
        role,
        content,
        trained=role == "assistant" and weight != 0,
        tool_calls=calls,
        tool_call_id=str(turn.get("tool_call_id") or ""),
        name=str(turn.get("name") or ""),
        reasoning="" if tally.reasoning == "drop" else reasoning,
        silent=tally.reasoning == "untrained",
    )


def _reasoning(turn: Mapping[str, Any], content: str, place: str, problems: list[Problem]) -> tuple[str, str]:
    """Return what was thought before an answer, from a key of its own or between <think> and </think>, and the answer."""
    key = next((name for name in REASONING_KEYS if turn.get(name)), None)
    if key is None:
        found = THOUGHT.match(content)
        return (found[1].strip(), content[found.end() :]) if found else ("", content)
    thought = turn[key]
    if not isinstance(thought, str):
        what = f"a {type(thought).__name__} where text is expected"
        problems.append(Problem("row.field_type", what, f"{place}.{key}", "give it as text"))
        return "", content
    check_encodable(thought, f"{place}.{key}")
    return thought.strip(), content


def _content(value: Any, place: str, *, optional: bool) -> str:
    if value is None and optional:
        return ""
    if isinstance(value, list):
        parts = []
        for index, part in enumerate(value):
            kind = part.get("type", "text") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise RowError(
                    Problem("row.media", f"a part of type {kind!r}", f"{place}[{index}]", "keep text parts only")
                )
            parts.append(part["text"])
        value = "".join(parts)
    if not isinstance(value, str):
        code = "row.field_missing" if value is None else "row.field_type"
        what = "no value" if value is None else f"a {type(value).__name__} where text is expected"
        raise RowError(Problem(code, what, place, "give it as text"))
    check_encodable(value, place)
    return value


def _tool_calls(value: Any, place: str) -> tuple[Mapping[str, Any], ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise RowError(Problem("row.tool_call", f"a {type(value).__name__} where a list is expected", place, "[{...}]"))
    calls = []
    for index, call in enumerate(value):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(
                Problem(
                    "row.tool_call",
                    "no function with a name",
                    f"{place}[{index}]",
                    '{"function": {"name": ..., "arguments": ...}}',
                )
            )
        arguments = function.get("arguments", {})
        where = f"{place}[{index}].function.arguments"
        if arguments is None or isinstance(arguments, str):
            arguments = _parse(arguments or "", where) or {}
        if not isinstance(arguments, dict):
            what = f"the arguments are a {type(arguments).__name__}, not an object"
            raise RowError(Problem("row.tool_call", what, where, '{"name": value}'))
        check_encodable([call.get("id"), function["name"], arguments], f"{place}[{index}]")
        calls.append(
            {
                "id": str(call.get("id") or ""),
                "type": "function",
                "function": {"name": function["name"], "arguments": arguments},
            }
        )
    return tuple(calls)


def _parse(text: str, place: str) -> Any:
    """Return what stands in a text as JSON; None where nothing does."""
    try:
        return parse_json(text) if text.strip() else None
    except ValueError as error:
        raise RowError(Problem("row.tool_call", f"no JSON: {error}", place, "write it with json.dumps")) from None


def _calls_from_text(text: Any, place: str) -> list[Any]:
    calls = _parse(text, place) if isinstance(text, str) else text
    return calls if isinstance(calls, list) else [calls]


def _tools(value: Any, where: Where) -> tuple[Mapping[str, Any], ...]:
    if isinstance(value, str):
        value = _parse(value, where.field("tools"))
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError(Problem("row.field_type", "no list of tools", where.field("tools"), "a list of JSON schemas"))
    check_encodable(value, where.field("tools"))
    for index, tool in enumerate(value):
        function = _function(tool)
        named = isinstance(function, dict) and isinstance(function.get("name"), str)
        if not named or not isinstance(function.get("parameters"), dict | None):
            cure = '{"type": "function", "function": {"name": "look", "parameters": {...}}}'
            what = "no function with a name, or parameters that are no schema"
            raise RowError(Problem("row.tool_call", what, where.field(f"tools[{index}]"), cure))
    return tuple(value)


def _function(tool: Mapping[str, Any]) -> Any:
    return tool.get("function", tool)


def _check_turns(messages: Sequence[Message], where: Where) -> list[Problem]:
    if not any(message.role == "assistant" for message in messages):
        return [Problem("row.no_answer", "no turn of the assistant", str(where), "add the answer, or delete the row")]
    if not any(message.trained for message in messages):
        return [
            Problem("row.no_answer", "every answer has weight 0", str(where), "give one weight 1, or delete the row")
        ]
    known: set[str] = set()
    for index, message in enumerate(messages):
        if index and message.role in SYSTEM:
            second = messages[0].role in SYSTEM
            what = f"a {message.role} turn {'behind another' if second else 'that is not the first'}"
            cure = "join it to the first turn, or to the user's, as -s data.fix=fold_system does"
            return [Problem("row.role", what, where.field(f"turn[{index}].role"), cure)]
        known.update(call["id"] for call in message.tool_calls)
        if message.role == "tool" and message.tool_call_id and message.tool_call_id not in known:
            what = f"the result of a call {message.tool_call_id!r} that was never made"
            return [Problem("row.tool_call", what, where.field(f"turn[{index}]"), "add the call before it")]
    return []


def _check_calls(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], where: Where) -> list[Problem]:
    """Return the call of a tool that isn't among those of the row, where it names any."""
    names = [_function(tool)["name"] for tool in tools]
    for index, message in enumerate(messages):
        for call in message.tool_calls:
            name = call["function"]["name"]
            if tools and name not in names:
                what = f"a call of {name!r}, which is none of the tools"
                cure = f"one of {', '.join(names)}; or add it to the tools"
                return [Problem("row.tool_call", what, where.field(f"turn[{index}].tool_calls"), cure)]
    return []
