"""Many conversations: read, rendered and encoded in a stream, once, and from then on read from a store on disk.

The store holds every row of its files, whatever it is for: which rows are trained on, watched or kept for the proof follows
from hashes that are kept with them, so another split needs no other tokens. What a row says is read back where it is asked:
of rows that are scored, or shown.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from headstart.config import DataSettings
from headstart.data.feed import Keys, content_hash, digest_of
from headstart.data.formats import Detection, Formatted, Formatting, Named, named_columns
from headstart.data.labels import CHOICES_MAX, choose_answers
from headstart.data.near import once_each
from headstart.data.prepare import (
    FITTING,
    Coding,
    Formed,
    Parts,
    Prepared,
    Split,
    first_rows,
    need_rows,
    split,
    without_near_leaks,
)
from headstart.data.private import redacted_notes
from headstart.data.read import Note, Row, SourceFile, Where, find_files, kind_of, read, read_parts
from headstart.data.records import Conversation, Message, Record
from headstart.data.render import Renderer
from headstart.data.replay import UNKNOWN, Known
from headstart.data.segments import Outcome, Segmented, encode_rows
from headstart.data.store import Store, StoredRows, StoreWriter, find_store, hashed, store_key
from headstart.errors import DataError, Problem

STORED_BYTES = 4 << 20  # smaller data is encoded anew at each start, which takes a second or two
ROWS_AT_ONCE = 2048
PEEK = 1_000
PLAIN_TURN = 3  # a turn with a role, a content and whether it is trained needs no more than these


class _UnlikeError(Exception):
    """Rows that a stream can't take: read at once, they are understood, or refused with all there is to say."""


@dataclass(frozen=True)
class Chats:
    """Files with conversations, and what their first rows are."""

    files: Sequence[SourceFile]
    evaluation: Sequence[SourceFile]
    detection: Detection


def find_chats(settings: DataSettings, kind: str, task: str) -> Chats | None:
    """Return the files of a run, if they hold many conversations; None where they are something else, or few."""
    if kind not in ("auto", "instruction") or task not in ("auto", "chat"):
        return None
    files = find_files(settings.train, settings.encoding)
    if sum(file.path.stat().st_size for file in files) < STORED_BYTES:
        return None
    rows = [item for item in itertools.islice(read(files), PEEK) if isinstance(item, Row)]
    try:
        found = _formatting(rows, settings).detection if rows else None
    except DataError:
        return None
    if found is None or found.task != "chat":
        return None
    return Chats(files, find_files(settings.eval, settings.encoding) if settings.eval else [], found)


def prepare_chats(
    chats: Chats,
    settings: DataSettings,
    renderer: Renderer,
    max_length: int,
    known: Known = UNKNOWN,
    *,
    seed: int = 0,
    watch: bool = True,
) -> Prepared | None:
    """Do for many conversations what `prepare` does for rows in memory; None where they have to be read at once.

    Raises DataError where there is nothing to train or to score on; problems of single rows are in the result.
    """
    try:
        train = _Stored.find(chats.files, settings, renderer, max_length)
        evaluation = _Stored.find(chats.evaluation, settings, renderer, max_length) if chats.evaluation else None
    except (_UnlikeError, DataError, OSError):  # or there is no room for a store
        return None
    sides = [train] if evaluation is None else [train, evaluation]
    problems = [problem for side in sides for problem in side.formed.formatted.problems]
    if not all(len(side.store) for side in sides):
        raise DataError(problems)
    others = train if evaluation is None else evaluation
    try:
        found = split(train.keys, None if evaluation is None else others.keys, settings, known, watch=watch)
        if settings.leaks == "near":
            found = without_near_leaks(found, train.records, None if evaluation is None else others.records)
    except DataError as error:
        raise DataError([*problems, *error.problems]) from None
    choices = train.choices(found.train, known.trained)
    found = replace(found, train=first_rows(found.train, train.keys.digests, settings.rows))
    parts = (train.segmented(found.train), others.segmented(found.watch), others.segmented(found.proof))
    if settings.over_length == "error":
        for part in parts:
            part.reject_dropped(max_length, "drop or cut")
    problems += [problem for part in parts for problem in part.problems]
    need_rows(parts, problems, max_length)
    named = _parts(train, others, found)
    return Prepared(
        [side.formed for side in sides],
        named,
        *parts,
        problems,
        choices=choices,
        coding=Coding("chat"),
        replayed=known.replayed(len(named.train), (named.watch, named.proof), seed),
    )


def _parts(train: _Stored, others: _Stored, found: Split) -> Parts:
    return Parts(
        StoredChats(train, found.train),
        StoredChats(others, found.watch),
        StoredChats(others, found.proof),
        found.held_out,
        found.duplicates,
        found.leaked,
        found.near,
        0,
        found.held_before,
        found.trained_before,
    )


class StoredChats(Sequence[Record]):
    """Some conversations of a store, each read when it is asked for; `more` are records behind them in memory."""

    def __init__(self, chats: _Stored, rows: NDArray[np.int64]) -> None:
        self._chats = chats
        self._rows = rows
        self._more: list[Record] = []

    def __len__(self) -> int:
        return len(self._rows) + len(self._more)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        if place >= len(self._rows):
            return self._more[place - len(self._rows)]
        return self._chats.record(int(self._rows[place]))

    def __iadd__(self, more: Sequence[Record]) -> StoredChats:
        self._more += more
        return self

    @property
    def hashes(self) -> list[str]:
        """The hash of what each says, as `content_hash` gives it."""
        digests = self._chats.store.column("digest")[self._rows]
        found = [f"{digest:016x}" for digest in digests.tolist()]
        for place in np.flatnonzero(self._chats.store.column("cut")[self._rows]).tolist():
            found[place] = content_hash(self[place])
        return [*found, *map(content_hash, self._more)]

    def where_spelled(self, spells: Any) -> list[str]:
        """Return the places of the rows with a text that spells a control token."""
        flagged = self._rows[self._chats.store.column("spells")[self._rows] != 0]
        own = [str(self._chats.store.where(row)) for row in flagged.tolist()]
        return own + [str(record.where) for record in self._more if any(map(spells, record.texts))]


@dataclass(frozen=True)
class _Stored:
    """The conversations of some files as they lie on disk."""

    store: Store
    formed: Formed
    names: Mapping[str, str]

    @staticmethod
    def find(files: Sequence[SourceFile], settings: DataSettings, renderer: Renderer, max_length: int) -> _Stored:
        """Return the conversations of files, encoded first if need be. Raises _UnlikeError where a stream can't take them."""
        over_length = "cut" if settings.over_length == "cut" else "drop"
        files = hashed(files)
        key = store_key(
            "chat",
            [[kind_of(file.path), file.sha256] for file in files],
            renderer.identity,
            asdict(named_columns(settings)),
            [settings.format, settings.train_on, settings.reasoning, settings.group_by, settings.redact],
            sorted(settings.fix),
            [max_length, over_length, settings.encoding],
        )
        writing = _Writing(files, settings, renderer, max_length, over_length)
        store = find_store(key, writing.write)
        known = store.known
        names = dict(zip(known["files"], [file.name for file in files], strict=True))
        store.rename(names)
        problems = [_to_problem(values, names) for values in known["problems"]]
        formatted = Formatted(Detection(**known["detection"]), problems=problems)
        notes = [_renamed(note, names) for note in known["notes"]]
        stored = _Stored(store, Formed(files, known["rows"], formatted, notes), names)
        stored.formed.reread = lambda: stored.records
        return stored

    @property
    def keys(self) -> Keys:
        return Keys(self.store.column("digest"), self.store.column("side"))

    @property
    def records(self) -> StoredChats:
        return StoredChats(self, np.arange(len(self.store)))

    def record(self, row: int) -> Record:
        return _to_conversation(self.store.where(row), self.store.record(row))

    def segmented(self, rows: NDArray[np.int64]) -> Segmented:
        """Return what became of some rows."""
        lengths = self.store.column("dropped")[rows]
        unfit = [values for values in self.store.known["unfit"] if (rows == values[0]).any()]
        problems = [_to_problem(values, self.names) for _, *values in unfit]
        dropped = [
            (self.store.where(row), int(length))
            for row, length in zip(rows[lengths > 0].tolist(), lengths[lengths > 0], strict=True)
        ]
        kept = rows[self.store.column("kept")[rows] != 0]
        examples = StoredRows(self.store, kept, self.store.column("cut"), lambda row: str(self.store.record(row)[-1]))
        return Segmented(examples, StoredChats(self, kept), dropped, problems)

    def choices(self, rows: NDArray[np.int64], more: Sequence[Record] = ()) -> tuple[str, ...]:
        """Return the answers that stand again and again, as `find_choices` does, in these rows and in `more`."""
        if self.store.column("thought")[rows].any():
            return ()
        answers = self.store.column("answer")[rows]
        if len(once_each(answers)) > CHOICES_MAX:
            return ()
        _, first, counts = np.unique(answers, return_index=True, return_counts=True)
        texts = [self._answer(int(row)) for row in rows[first]]
        told = Counter(dict(zip(texts, counts.tolist(), strict=True)))
        told.update(record.messages[-1].content for record in more if isinstance(record, Conversation))
        return choose_answers(told)

    def _answer(self, row: int) -> str:
        record = self.record(row)
        return record.messages[-1].content if isinstance(record, Conversation) else ""


# What stands of each row in columns: the hash of what it says, its side, the length for which it was dropped (or 0), whether
# it was kept, cut, spells a control token or holds a thought, and the hash of its last answer.
COLUMNS = np.dtype(
    [
        ("digest", "<u8"),
        ("side", "<f8"),
        ("dropped", "<i4"),
        ("kept", "?"),
        ("cut", "?"),
        ("spells", "?"),
        ("thought", "?"),
        ("answer", "<u8"),
    ]
)


@dataclass
class _Writing:
    """Conversations on their way from files into a store."""

    files: Sequence[SourceFile]
    settings: DataSettings
    renderer: Renderer
    max_length: int
    over_length: str
    rows: int = 0
    fitting: int = 0
    notes: list[str] = field(default_factory=list)
    unread: list[Problem] = field(default_factory=list)
    formatted: Formatted | None = None
    formatting: Formatting | None = None

    def write(self, writer: StoreWriter) -> dict[str, Any]:
        """Write all rows and return what else there is to know."""
        writer.set_tokens(len(self.renderer.tokenizer), None)
        columns: list[NDArray[Any]] = []
        unfit: list[list[Any]] = []
        row = 0
        parts = self._keyed(columns)
        encoded = encode_rows(parts, self.renderer, max_length=self.max_length, over_length=self.over_length)
        for number, outcomes in enumerate(encoded):
            numbers = columns[number]
            numbers["dropped"] = [outcome.length for outcome in outcomes]
            numbers["kept"] = [outcome.example is not None for outcome in outcomes]
            numbers["cut"] = [outcome.example is not None and bool(outcome.example.cut) for outcome in outcomes]
            spells = self.renderer.spells_control
            numbers["spells"] = [any(map(spells, outcome.conversation.texts)) for outcome in outcomes]
            for outcome in outcomes:
                self._add(writer, outcome)
                if outcome.problem is not None:
                    unfit.append([row, *_values(outcome.problem)])
                row += 1
        if self.formatting is None or self.formatted is None:
            raise _UnlikeError
        whole = np.concatenate([*columns, np.zeros(0, COLUMNS)])
        for name in COLUMNS.names or ():
            writer.add_column(name, np.ascontiguousarray(whole[name]))
        problems = [*self.unread, *self.formatted.problems]
        return {
            "detection": {**asdict(self.formatting.detection), "rows": self.rows, "fitting": self.fitting},
            "files": [file.name for file in self.files],
            "rows": self.rows + len(self.unread),
            "notes": [*self.notes, *self.formatting.notes(), *redacted_notes(self.formatted.redacted)],
            "problems": [_values(problem) for problem in problems],
            "unfit": unfit,
        }

    @staticmethod
    def _add(writer: StoreWriter, outcome: Outcome) -> None:
        conversation, example = outcome.conversation, outcome.example
        writer.add(conversation.where, () if example is None else example.segments)
        try:
            writer.add_record(_from_conversation(conversation, "" if example is None else example.cut))
        except (TypeError, ValueError):  # a value in the arguments of a call that is no JSON
            raise _UnlikeError from None

    def _keyed(self, columns: list[NDArray[Any]]) -> Iterator[Sequence[Conversation]]:
        """Yield the conversations in parts; what decides where each goes is put into `columns`."""
        for conversations in self._conversations():
            numbers = np.zeros(len(conversations), COLUMNS)
            keys = Keys.of(conversations)
            numbers["digest"], numbers["side"] = keys.digests, keys.sides
            numbers["thought"] = [any(m.reasoning for m in c.messages) for c in conversations]
            numbers["answer"] = [digest_of(c.messages[-1].content) for c in conversations]
            columns.append(numbers)
            yield conversations

    def _conversations(self) -> Iterator[Sequence[Conversation]]:
        for rows in read_parts(self.files, ROWS_AT_ONCE, self._put_aside):
            if self.formatting is None:
                self.formatting = _formatting(rows, self.settings)
                found = self.formatting.detection
                if found.task != "chat" or found.format not in FITTING:
                    raise _UnlikeError
                self.formatted = Formatted(found)
            fitting = self.formatting.fitting(rows)
            if fitting is None or self.formatted is None:
                raise _UnlikeError
            self.rows += len(rows)
            self.fitting += fitting
            self.formatting.take(rows, self.formatted)
            conversations = [record for record in self.formatted.examples if isinstance(record, Conversation)]
            self.formatted.examples.clear()
            yield conversations

    def _put_aside(self, item: Problem | Note) -> None:
        if isinstance(item, Note):
            self.notes.append(f"{item.where}: {item.text}")
        else:
            self.unread.append(item)


def _formatting(rows: Sequence[Row], settings: DataSettings) -> Formatting:
    named: Named = named_columns(settings)
    how = (settings.train_on, settings.reasoning, settings.group_by, settings.redact)
    joined = ("merge_turns" in settings.fix, "fold_system" in settings.fix)
    return Formatting(rows, settings.format, named, "auto", *how, *joined)


def _values(problem: Problem) -> list[str]:
    return [problem.code, problem.what, problem.where, problem.cure]


def _to_problem(values: Sequence[str], names: Mapping[str, str]) -> Problem:
    code, what, where, cure = values
    return Problem(code, what, _renamed(where, names), cure)


def _renamed(place: str, names: Mapping[str, str]) -> str:
    """Return a place with the file as users see it now."""
    old = max((name for name in names if place == name or place.startswith(f"{name}:")), key=len, default="")
    return names[old] + place.removeprefix(old) if old else place


def _from_conversation(conversation: Conversation, cut: str) -> list[Any]:
    """Return a conversation, and what was cut away from it, as plain values."""
    turns = []
    for turn in conversation.messages:
        more = (turn.tool_calls, turn.tool_call_id, turn.name, turn.reasoning, turn.silent, turn.thought)
        turns.append([turn.role, turn.content, turn.trained, *(more if any(more) else ())])
    return [turns, list(conversation.tools), conversation.group, cut]


def _to_conversation(where: Where, values: list[Any]) -> Conversation:
    turns, tools, group, _ = values
    messages = []
    for role, content, trained, *more in turns:
        calls, *others = more or [()]
        messages.append(Message(role, content, trained, tuple(calls), *others))
    return Conversation(where, tuple(messages), tuple(tools), group)
