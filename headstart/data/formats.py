"""Rows -> records: the field's data set formats, detected and said aloud.

| format            | what a row holds                                                              |
|-------------------|-------------------------------------------------------------------------------|
| messages          | `messages`: role, content, weight, tool_calls; `tools` beside it (OpenAI)       |
| sharegpt          | `conversations`: from, value; `system`, `tools` beside it                      |
| alpaca            | `instruction`, `input` (may be empty or absent), `output`; `system`             |
| prompt_completion | `prompt`, `completion`: text, or lists of messages; other pairs of names in PAIRS |
| columns           | any columns: the user names the two, or gives templates over columns           |
| labels            | a text and its class: TEXT_COLUMNS and LABEL_COLUMNS, or the columns that the user names |
| text              | `text`, a document; or the column that the user names                           |

The first five are conversations to learn answers from; labels are classes to tell; text is to be continued.
"""

from __future__ import annotations

import json
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from headstart.data.read import Row, Where
from headstart.data.records import Conversation, Document, Labelled, Message, Record
from headstart.errors import DataError, Problem

ROLES = ("system", "developer", "user", "assistant", "tool")
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
TURN_KEYS = {"role", "content", "weight", "tool_calls", "function_call", "tool_call_id", "name", "from", "value"}
TEXT = "text"
LABELS = "labels"
TEXT_COLUMNS = ("text", "sentence", "utterance", "content", "review", "query", "question", "input")
LABEL_COLUMNS = ("label", "labels", "intent", "category", "class")
TEXT_ONLY = {"text", "id", "source", "meta", "metadata", "title", "url", "timestamp", "date", "added", "created"}
CHAT_KEYS = ("messages", "conversations", "conversation")


@dataclass(frozen=True)
class Detection:
    """Which format the rows have, how many fit it, and how sure that is (`certain`, `likely` or `given`)."""

    format: str
    fitting: int
    rows: int
    certainty: str
    reads: str

    @property
    def kind(self) -> str:
        """The kind of fine-tuning that such rows are for."""
        return {TEXT: "unsupervised", LABELS: "supervised"}.get(self.format, "instruction")

    def __str__(self) -> str:
        return f"{self.format} ({self.certainty}): {self.fitting:,} of {self.rows:,} rows have {self.reads}"


@dataclass
class Formatted:
    """What became of the rows."""

    detection: Detection
    examples: list[Record] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def format_rows(
    rows: Sequence[Row],
    *,
    format: str = "auto",
    prompt: str | None = None,
    completion: str | None = None,
    text: str | None = None,
    label: str | None = None,
    train_on: str = "all",
    group_by: str | None = None,
) -> Formatted:
    """Detect the format of `rows` and turn each into a record; a row that can't be is a problem.

    `prompt` and `completion`, or `text`, are columns or templates over columns that the user names; `label` a column.
    With `train_on` `last`, only the last answer of a conversation is trained.

    Raises DataError where no format fits, where several are mixed, or where a column that was named isn't there.
    """
    if group_by is not None:
        _need_columns(rows, [group_by], "data.group_by")
    if prompt is not None or completion is not None:
        format = "columns"
    convert: _Convert | None = None
    if label is not None:
        text, detection = _label_columns(rows, text, label)
    elif text is not None:
        detection = _text_column(rows, text)
    elif format == "columns":
        convert, detection = _columns(rows, prompt, completion)
    else:
        detection = _detect(rows, format)
    tally = _Tally()
    formatted = Formatted(detection)

    def to_record(row: Row) -> Record | list[Problem]:
        if detection.format == TEXT:
            return _to_document(row, as_template(text or TEXT), group_by, tally)
        if detection.format == LABELS:
            pair = (text, label) if text and label else _label_pair(row.fields)
            return _to_labelled(row, pair, group_by, tally)
        return _to_conversation(row, convert or _CONVERT[detection.format], group_by, tally, train_on)

    for row in rows:
        result = to_record(row)
        if isinstance(result, list):
            formatted.problems += result
        else:
            formatted.examples.append(result)
    formatted.notes = tally.notes()
    return formatted


# --- which format ---


def _detect(rows: Sequence[Row], format: str) -> Detection:
    if format != "auto":
        reads, fits = _FITS[format]
        fitting = sum(fits(row.fields) for row in rows)
        return Detection(format, fitting, len(rows), "given", reads)
    counts: Counter[str] = Counter()
    first: dict[str, Row] = {}
    for row in rows:
        name = next((name for name, (_, fits) in _FITS.items() if fits(row.fields)), "")
        counts[name] += 1
        first.setdefault(name, row)
    named = [name for name in counts if name]
    if not named:
        raise DataError(_unknown(first[""]))
    if len(named) > 1:
        raise DataError(_mixed(counts, first))
    name = named[0]
    pair = _pair(first[name].fields)
    sure = pair == PAIRS[0] if name == "prompt_completion" else name != TEXT or set(first[name].fields) <= TEXT_ONLY
    if name == LABELS:
        pair = _label_pair(first[name].fields)
        sure = pair == (TEXT_COLUMNS[0], LABEL_COLUMNS[0])
    reads = f"`{pair[0]}` and `{pair[1]}`" if name in ("prompt_completion", LABELS) and pair else _FITS[name][0]
    return Detection(name, counts[name], len(rows), "certain" if sure else "likely", reads)


def _unknown(row: Row) -> Problem:
    columns = list(row.fields)
    texts = [name for name, value in row.fields.items() if isinstance(value, str)] or columns
    asked, answered = [*texts, "asked", "answered"][:2] if len(texts) < 2 else texts[-2:]
    cure = (
        f"""name them, for example: -s data.prompt="{{{asked}}}" -s data.completion="{{{answered}}}" """
        f"""(a template over columns: any text with {{names}}), or, for text to continue, -s data.text="{{{answered}}}". """
        "Known without naming: messages, conversations, instruction + output, prompt + completion, question + answer, text"
    )
    return Problem(
        "format.unknown", f"no known format; the columns are {', '.join(map(repr, columns))}", str(row.where), cure
    )


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
    "messages": ("`messages`", lambda f: "messages" in f),
    "sharegpt": ("`conversations`", lambda f: "conversations" in f or "conversation" in f),
    "alpaca": ("`instruction` and `output`", lambda f: "instruction" in f and "output" in f),
    "prompt_completion": ("a prompt and a completion", lambda f: _pair(f) is not None),
    LABELS: ("a text and a label", lambda f: _label_pair(f) is not None),
    TEXT: ("`text`", lambda f: TEXT in f),
}


# --- each format ---


@dataclass
class _Draft:
    """A row on its way: raw turns as mappings with role, content and the like."""

    turns: Sequence[Mapping[str, Any]]
    tools: Any = None
    used: set[str] = field(default_factory=set)


_Convert = Callable[[Row], _Draft]


class _RowError(Exception):
    def __init__(self, *problems: Problem) -> None:
        self.problems = list(problems)


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
        raise _RowError(Problem("row.field_type", what, row.where.field("input"), "give it as text"))
    if isinstance(asked, str) and extra and extra.strip():
        asked = f"{asked}\n\n{extra}"
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": fields["output"]}]
    if fields.get("system"):
        turns.insert(0, {"role": "system", "content": fields["system"]})
    return _Draft(turns, None, {"instruction", "input", "output", "system"})


def _from_pair(row: Row) -> _Draft:
    pair = _pair(row.fields)
    if pair is None:
        raise _RowError(
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
    templates = {"user": as_template(prompt), "assistant": as_template(completion)}
    needed = [name for template in templates.values() for name in template_columns(template)]
    _need_columns(rows, needed, "data.prompt, data.completion")

    def convert(row: Row) -> _Draft:
        turns = [{"role": role, "content": _fill(template, row)} for role, template in templates.items()]
        return _Draft(list(turns), None, set(needed))

    fitting = sum(all(name in row.fields for name in needed) for row in rows)
    reads = " and ".join(f"`{name}`" for name in dict.fromkeys(needed))
    return convert, Detection("columns", fitting, len(rows), "given", reads)


def _text_column(rows: Sequence[Row], text: str) -> Detection:
    needed = template_columns(as_template(text))
    _need_columns(rows, needed, "data.text")
    fitting = sum(all(name in row.fields for name in needed) for row in rows)
    return Detection(TEXT, fitting, len(rows), "given", " and ".join(f"`{name}`" for name in dict.fromkeys(needed)))


def _to_document(row: Row, template: str, group_by: str | None, tally: _Tally) -> Document | list[Problem]:
    try:
        content = _text(row, template)
        group = _group(row, group_by)
    except _RowError as error:
        return error.problems
    tally.unused.update(set(row.fields) - {*template_columns(template), group_by})
    return Document(row.where, content, group)


def _label_pair(fields: Mapping[str, Any]) -> tuple[str, str] | None:
    text = next((name for name in TEXT_COLUMNS if name in fields), None)
    label = next((name for name in LABEL_COLUMNS if name in fields), None)
    return (text, label) if text and label else None


def _label_columns(rows: Sequence[Row], text: str | None, label: str) -> tuple[str, Detection]:
    found = text or find_text_column(rows, label)
    needed = [*template_columns(as_template(found)), label]
    _need_columns(rows, needed, "data.text, data.label")
    fitting = sum(all(name in row.fields for name in needed) for row in rows)
    return found, Detection(LABELS, fitting, len(rows), "given", " and ".join(f"`{name}`" for name in needed))


def _to_labelled(
    row: Row, pair: tuple[str, str] | None, group_by: str | None, tally: _Tally
) -> Labelled | list[Problem]:
    if pair is None:
        what = f"no text and label; the row has {sorted(row.fields)}"
        return [Problem("row.field_missing", what, str(row.where), "add them, or delete the row")]
    template, name = as_template(pair[0]), pair[1]
    try:
        text = _text(row, template)
        label = _label(row.fields.get(name), row.where.field(name))
        group = _group(row, group_by)
    except _RowError as error:
        return error.problems
    tally.unused.update(set(row.fields) - {*template_columns(template), name, group_by})
    return Labelled(row.where, text, label, group)


def find_text_column(rows: Sequence[Row], label: str | None = None) -> str:
    """Return the first of TEXT_COLUMNS, but the label's, that a row has. Raises DataError where no row has one."""
    known = {name: None for row in rows for name in row.fields}
    found = next((name for name in TEXT_COLUMNS if name in known and name != label), None)
    if found is None:
        cure = f'-s data.text="{{column}}"; the columns are {", ".join(known)}'
        raise DataError(Problem("format.column", "it isn't known which column is the text", "data.text", cure))
    return found


def take_texts(rows: Sequence[Row], text: str) -> tuple[list[Labelled], list[Problem]]:
    """Return the texts of rows that are to be labelled, and what is wrong with the others.

    `text` is a column or a template over columns.
    """
    texts: list[Labelled] = []
    problems: list[Problem] = []
    for row in rows:
        try:
            texts.append(Labelled(row.where, _text(row, as_template(text)), ""))
        except _RowError as error:
            problems += error.problems
    return texts, problems


def _text(row: Row, template: str) -> str:
    content = _fill(template, row)
    _check_encodable(content, str(row.where))
    if not content.strip():
        raise _RowError(Problem("row.empty_text", "the text is empty", str(row.where), "fill it in, or delete the row"))
    return content


def _label(value: Any, place: str) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise _RowError(Problem("row.field_missing", "no label", place, "fill it in, or delete the row"))
    if isinstance(value, (float, list, dict)):
        what = f"the label is {value!r:.40}" if isinstance(value, float) else f"the label is a {type(value).__name__}"
        raise _RowError(Problem("row.label", what, place, "one class a row, as text or a whole number"))
    _check_encodable(str(value), place)
    return str(value)


def _group(row: Row, group_by: str | None) -> str | None:
    if group_by is None:
        return None
    value = row.fields.get(group_by)
    if value is None:
        raise _RowError(Problem("row.field_missing", "no value to group by", row.where.field(group_by), "fill it in"))
    return json.dumps(value, default=str)


def as_template(text: str) -> str:
    """Return `text` as a template: a bare column name stands for its value."""
    return text if "{" in text else f"{{{text}}}"


def template_columns(template: str) -> list[str]:
    """Return the columns that a template names. Raises DataError where it can't be read."""
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        cure = "write {column}; a brace that is text is doubled: {{ and }}"
        raise DataError(Problem("format.column", f"no template: {error}", template, cure)) from None


def _need_columns(rows: Sequence[Row], names: Iterable[str], setting: str) -> None:
    known = {name: None for row in rows for name in row.fields}
    missing = [name for name in dict.fromkeys(names) if name not in known]
    if missing:
        what = f"no row has a column {', '.join(map(repr, missing))}"
        raise DataError(Problem("format.column", what, setting, f"the columns are {', '.join(known)}"))


def _fill(template: str, row: Row) -> str:
    parts = []
    for literal, name, _, _ in string.Formatter().parse(template):
        parts.append(literal)
        if name is not None:
            value = row.fields.get(name)
            if value is None or isinstance(value, (list, dict)):
                code = "row.field_missing" if value is None else "row.field_type"
                what = "no value" if value is None else f"a {type(value).__name__} where text is expected"
                raise _RowError(Problem(code, what, row.where.field(name), "fill it in, or delete the row"))
            parts.append(value if isinstance(value, str) else str(value))
    return "".join(parts)


# --- the turns of a row ---


@dataclass
class _Tally:
    """What was handled in many rows and is told once, with counts."""

    aliases: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    trailing: int = 0
    opening: int = 0
    keys: Counter[str] = field(default_factory=Counter)
    repeated: int = 0

    def notes(self) -> list[str]:
        said = [f"role `{old}` read as `{ALIASES[old]}` in {count:,} turns" for old, count in self.aliases.items()]
        if self.unused:
            said.append("columns not used: " + ", ".join(sorted(self.unused)))
        if self.trailing:
            said.append(f"{self.trailing:,} rows end with turns after the last answer; those turns are not used")
        if self.opening:
            said.append(
                f"{self.opening:,} rows begin with an answer; it is read, not trained, since nothing asks for it"
            )
        if self.keys:
            named = ", ".join(f"`{key}` ({count:,} turns)" for key, count in sorted(self.keys.items()))
            said.append(f"keys of turns that are not used: {named}")
        if self.repeated:
            said.append(f"{self.repeated:,} rows have two turns of one role in a row")
        return said


def _to_conversation(
    row: Row, convert: _Convert, group_by: str | None, tally: _Tally, train_on: str
) -> Conversation | list[Problem]:
    try:
        draft = convert(row)
        problems: list[Problem] = []
        messages = [_message(turn, row.where, index, problems, tally) for index, turn in enumerate(draft.turns)]
        tools = _tools(draft.tools, row.where)
        group = _group(row, group_by)
    except _RowError as error:
        return error.problems
    except KeyError as error:
        return [Problem("row.field_missing", f"no {error}", str(row.where), f"the row has {sorted(row.fields)}")]
    kept = [message for message in messages if message is not None]
    if kept and kept[0].role == "assistant":
        kept[0] = replace(kept[0], trained=False)
    if not problems:
        problems += _check_turns(kept, row.where)
    if problems:
        return problems
    last = max(i for i, m in enumerate(kept) if (m.trained if train_on == "last" else m.role == "assistant"))
    if train_on == "last":
        kept = [replace(message, trained=index == last) for index, message in enumerate(kept)]
    tally.trailing += last + 1 < len(kept)
    tally.opening += kept[0].role == "assistant"
    tally.repeated += any(a.role == b.role != "tool" for a, b in zip(kept, kept[1:], strict=False))
    tally.unused.update(set(row.fields) - draft.used - {group_by})
    return Conversation(row.where, tuple(kept[: last + 1]), tools, group)


def _turns(row: Row, key: str) -> list[Mapping[str, Any]]:
    value = row.fields.get(key)
    where = row.where.field(key)
    if not isinstance(value, list) or not value:
        what = "empty" if value == [] else f"a {type(value).__name__} where a list of turns is expected"
        raise _RowError(Problem("row.field_type", what, where, '[{"role": "user", "content": "..."}, ...]'))
    bad = next((i for i, turn in enumerate(value) if not isinstance(turn, dict)), None)
    if bad is not None:
        raise _RowError(
            Problem("row.field_type", "the turn is no object", f"{where}[{bad}]", '{"role": ..., "content": ...}')
        )
    return value


def _message(
    turn: Mapping[str, Any], where: Where, index: int, problems: list[Problem], tally: _Tally
) -> Message | None:
    place = where.field(f"turn[{index}]")
    role = turn.get("role")
    if isinstance(role, str) and role.lower() in ALIASES:
        tally.aliases[role.lower()] += 1
        role = ALIASES[role.lower()]
    if role not in ROLES:
        problems.append(Problem("row.role", f"the role is {role!r}", f"{place}.role", f"one of {', '.join(ROLES)}"))
        return None
    tally.keys.update(set(turn) - TURN_KEYS)
    weight = turn.get("weight", 1)
    if weight not in (0, 1, None):
        problems.append(Problem("row.weight", f"the weight is {weight!r}", f"{place}.weight", "0 or 1"))
    try:
        legacy = turn.get("function_call")
        calls = _tool_calls([legacy] if legacy else turn.get("tool_calls"), f"{place}.tool_calls")
        content = _content(turn.get("content"), f"{place}.content", optional=bool(calls))
    except _RowError as error:
        problems += error.problems
        return None
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
    )


def _content(value: Any, place: str, *, optional: bool) -> str:
    if value is None and optional:
        return ""
    if isinstance(value, list):
        parts = []
        for index, part in enumerate(value):
            kind = part.get("type", "text") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise _RowError(
                    Problem("row.media", f"a part of type {kind!r}", f"{place}[{index}]", "keep text parts only")
                )
            parts.append(part["text"])
        value = "".join(parts)
    if not isinstance(value, str):
        code = "row.field_missing" if value is None else "row.field_type"
        what = "no value" if value is None else f"a {type(value).__name__} where text is expected"
        raise _RowError(Problem(code, what, place, "give it as text"))
    _check_encodable(value, place)
    return value


def _check_encodable(value: Any, place: str) -> None:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"half of a surrogate pair (\\u{ord(text[error.start]):04x}) at character {error.start + 1}"
        raise _RowError(Problem("row.unencodable", what, place, "write the whole character, or delete it")) from None


def _tool_calls(value: Any, place: str) -> tuple[Mapping[str, Any], ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise _RowError(
            Problem("row.tool_call", f"a {type(value).__name__} where a list is expected", place, "[{...}]")
        )
    calls = []
    for index, call in enumerate(value):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _RowError(
                Problem(
                    "row.tool_call",
                    "no function with a name",
                    f"{place}[{index}]",
                    '{"function": {"name": ..., "arguments": ...}}',
                )
            )
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parse_arguments(arguments, f"{place}[{index}].function.arguments")
        _check_encodable([function["name"], arguments], f"{place}[{index}].function")
        calls.append(
            {
                "id": str(call.get("id") or ""),
                "type": "function",
                "function": {"name": function["name"], "arguments": arguments},
            }
        )
    return tuple(calls)


def _parse_arguments(text: str, place: str) -> Any:
    try:
        return json.loads(text) if text.strip() else {}
    except ValueError as error:
        raise _RowError(
            Problem("row.tool_call", f"the arguments are no JSON: {error}", place, "an object as JSON")
        ) from None


def _calls_from_text(text: Any, place: str) -> list[Any]:
    calls = _parse_arguments(text, place) if isinstance(text, str) else text
    return calls if isinstance(calls, list) else [calls]


def _tools(value: Any, where: Where) -> tuple[Mapping[str, Any], ...]:
    if isinstance(value, str):
        value = _parse_arguments(value, where.field("tools")) if value.strip() else None
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise _RowError(Problem("row.field_type", "no list of tools", where.field("tools"), "a list of JSON schemas"))
    _check_encodable(value, where.field("tools"))
    return tuple(value)


def _check_turns(messages: Sequence[Message], where: Where) -> list[Problem]:
    if not any(message.role == "assistant" for message in messages):
        return [Problem("row.no_answer", "no turn of the assistant", str(where), "add the answer, or delete the row")]
    if not any(message.trained for message in messages):
        return [
            Problem("row.no_answer", "every answer has weight 0", str(where), "give one weight 1, or delete the row")
        ]
    known: set[str] = set()
    for index, message in enumerate(messages):
        known.update(call["id"] for call in message.tool_calls)
        if message.role == "tool" and message.tool_call_id and message.tool_call_id not in known:
            what = f"the result of a call {message.tool_call_id!r} that was never made"
            return [Problem("row.tool_call", what, where.field(f"turn[{index}]"), "add the call before it")]
    return []
