"""Large corpora: documents that go through in a stream, and whose tokens lie on disk, made once.

Rows are read, checked, given to a side and encoded in parts; those to train on go into a file of token ids, from which
a row is read when its turn comes. Held-out rows stay in memory: there are few. The files lie in the cache under a key of
the data's content, the tokenizer and all settings that the tokens depend on, so the same corpus is encoded once.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from headstart.config import DataSettings
from headstart.data.documents import Fit, measure_fit
from headstart.data.encode import Encoder
from headstart.data.feed import content_hash, side_of
from headstart.data.formats import Detection, Formatted, Named, format_rows
from headstart.data.masking import find_masking
from headstart.data.prepare import Coding, Formed, Parts, Prepared, form_rows, segment, split_held
from headstart.data.read import Item, Note, Row, SourceFile, Where, read
from headstart.data.records import Document
from headstart.data.segments import ROWS_AT_ONCE, Example, Segment, Segmented
from headstart.errors import DataError, Problem
from headstart.files import new_folder, read_json, sha256, write_json
from headstart.machine import home

STREAM_BYTES = 64 << 20  # data larger than this goes through in a stream, if it is text to continue
HELD_OUT_ROWS = 1_000  # about as many documents are held out where the user didn't say
FORMAT = 1
META, IDS, TABLE, HELD = "meta.json", "ids.bin", "rows.npy", "held.jsonl"
PEEK = 1_000

ROW = np.dtype([("end", "<i8"), ("file", "<i4"), ("line", "<i8"), ("first", "<i4")])


class TokenStore(Sequence[Example]):
    """Rows to train on, whose tokens lie in a file; `more` are rows that stand behind them in memory."""

    def __init__(self, folder: Path) -> None:
        meta = read_json(folder / META)
        self._table = np.load(folder / TABLE)
        self._names: list[str] = meta["names"]
        self._dtype = np.dtype(meta["dtype"])
        self._file = os.open(folder / IDS, os.O_RDONLY)
        self._causal = bool(meta["causal"])
        self._more: list[Example] = []
        self.highest_id = int(meta["highest_id"])

    def __len__(self) -> int:
        return len(self._table) + len(self._more)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if index >= len(self._table):
            return self._more[index - len(self._table)]
        row = self._table[index]
        begin = int(self._table[index - 1]["end"]) if index else 0
        size = self._dtype.itemsize
        # Read, and not mapped: what was read once needn't stay in memory.
        raw = os.pread(self._file, (int(row["end"]) - begin) * size, begin * size)
        ids = np.frombuffer(raw, self._dtype).astype(np.int32)
        weights = np.full(len(ids), float(self._causal), np.float32)
        weights[:1] = 0.0
        where = Where(self._names[row["file"]], int(row["line"]))
        return Example(where, (Segment(ids, weights, int(row["first"])),))

    def __iadd__(self, more: Sequence[Example]) -> TokenStore:
        self._more += more
        return self

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The tokens of each row."""
        own = np.diff(self._table["end"], prepend=0)
        return np.concatenate([own, [example.token_count for example in self._more]]).astype(np.int64)

    @property
    def target_count(self) -> int:
        """How many tokens are predicted; of masked tokens that is known only when they are hidden."""
        own = int((np.diff(self._table["end"], prepend=0) - 1).sum()) if self._causal else 0
        return own + sum(example.target_count for example in self._more)


@dataclass
class Corpus:
    """What became of a corpus: its rows to train on, its held-out documents, and what there is to tell."""

    train: TokenStore
    held: list[Document]
    detection: Detection
    rows: int
    held_out: float | None
    duplicates: int
    leaked: int
    dropped: list[tuple[Where, int]]
    problems: list[Problem]
    notes: list[str]
    fit: Fit | None


@dataclass(frozen=True)
class _Spec:
    """All that the tokens of a corpus depend on. `share` of the rows is held out; where `others` were named, none is."""

    files: Sequence[SourceFile]
    settings: DataSettings
    encoder: Encoder
    coding: Coding
    max_length: int
    share: float | None
    others: Sequence[Document]

    @property
    def key(self) -> str:
        """A name for the tokens: equal for equal content, tokenizer and settings."""
        settings = self.settings
        hashes = [sha256(file.path) for file in self.files]
        tokens = hashlib.sha256(self.encoder.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        reading = [settings.format, settings.text, settings.group_by, settings.over_length, settings.positions]
        held = hashlib.sha256("".join(map(content_hash, self.others)).encode()).hexdigest()
        parts = [FORMAT, hashes, tokens, list(self.encoder.stop_ids), reading, self.coding.task]
        return hashlib.sha256(json.dumps([*parts, self.max_length, self.share, held]).encode()).hexdigest()[:32]


@dataclass
class _Tally:
    """What is counted on the way."""

    rows: int = 0
    fitting: int = 0
    leaked: int = 0
    spelled: int = 0
    highest: int = 0
    cut: int = 0
    tokens: int = 0
    digests: array[int] = field(default_factory=lambda: array("Q"))
    names: dict[str, int] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)
    dropped: list[tuple[Where, int]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    detection: Detection | None = None


def is_large(files: Sequence[SourceFile]) -> bool:
    """Tell whether files hold so much that they go through in a stream."""
    return sum(file.path.stat().st_size for file in files) > STREAM_BYTES


def peek(files: Sequence[SourceFile], settings: DataSettings, task: str) -> Detection | None:
    """Return what the first rows are; None where that can't be told without the others."""
    rows = [item for item in itertools.islice(read(files), PEEK) if isinstance(item, Row)]
    try:
        return format_rows(rows, format=settings.format, named=_named(settings), task=task).detection if rows else None
    except DataError:
        return None


def prepare_corpus(
    files: Sequence[SourceFile],
    settings: DataSettings,
    encoder: Encoder,
    max_length: int,
    *,
    task: str,
    seed: int = 0,
    watch: bool = True,
) -> Prepared:
    """Do for a corpus what `prepare` does for rows in memory.

    Raises DataError where there is nothing to train or to score on; problems of single rows are in the result.
    """
    evaluation = form_rows(settings.eval, settings, "unsupervised", task) if settings.eval else None
    named = [r for r in evaluation.formatted.examples if isinstance(r, Document)] if evaluation else []
    masking = find_masking(encoder, seed, whole_words=settings.whole_words) if task == "masked" else None
    coding = Coding(task, None, masking)
    corpus = load_corpus(files, settings, encoder, coding, max_length, named)
    held = named or corpus.held
    if not len(corpus.train) or not held:
        what = f"{len(corpus.train)} rows to train on and {len(held)} to score on"
        raise DataError([*corpus.problems, Problem("split.too_small", what, "", "give rows for both")])
    watched, proof = split_held(held, watch=watch)
    to_watch, to_prove = (segment(side, settings, encoder, max_length, coding, whole=True) for side in (watched, proof))
    problems = [*corpus.problems, *to_watch.problems, *to_prove.problems]
    formed = Formed(list(files), corpus.rows, Formatted(corpus.detection), corpus.notes)
    parts = Parts([], watched, proof, corpus.held_out, corpus.duplicates, corpus.leaked)
    train = Segmented(corpus.train, [], corpus.dropped)  # type: ignore[arg-type]  # reads as a list does
    both = [formed] if evaluation is None else [formed, evaluation]
    return Prepared(both, parts, train, to_watch, to_prove, problems, corpus.fit, None, masking)


def load_corpus(
    files: Sequence[SourceFile],
    settings: DataSettings,
    encoder: Encoder,
    coding: Coding,
    max_length: int,
    others: Sequence[Document] = (),
) -> Corpus:
    """Return a corpus as it lies in the cache, encoded first if need be.

    `others` are documents to score on that were named: none of them is trained on, and then none is held out.
    """
    share = None if others else _choose_share(files, settings)
    spec = _Spec(files, settings, encoder, coding, max_length, share, others)
    folder = home() / "tokens" / spec.key
    if not (folder / META).exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        _encode(folder, spec)
    return _open(folder, share)


def _named(settings: DataSettings) -> Named:
    return Named(settings.prompt, settings.completion, settings.text, settings.text_pair, settings.label)


def _choose_share(files: Sequence[SourceFile], settings: DataSettings) -> float:
    """Return the part of the rows that is held out; a number of them becomes about that part, by the first rows' size."""
    if settings.held_out is not None and settings.held_out < 1:
        return settings.held_out
    rows = [item for item in itertools.islice(read(files), PEEK) if isinstance(item, Row)]
    size = sum(len(json.dumps(row.fields, default=str)) for row in rows) / max(1, len(rows))
    total = sum(file.path.stat().st_size for file in files)
    if settings.held_out is not None:
        return min(0.5, settings.held_out * size / total)
    return float(f"{min(0.02, HELD_OUT_ROWS * size / total):.1e}")


def _encode(folder: Path, spec: _Spec) -> None:
    """Write a corpus into a folder of the cache, which appears whole or not at all."""
    seen = {content_hash(document) for document in spec.others}
    tally = _Tally()
    fit_on: list[Document] = []
    dtype = np.dtype("<u2") if len(spec.encoder.tokenizer) <= 1 << 16 else np.dtype("<i4")
    with new_folder(folder) as target:
        with (
            (target / IDS).open("wb") as ids,
            (target / HELD).open("w", encoding="utf-8") as held,
            (target / "rows.raw").open("wb") as table,
        ):
            for documents in _documents(spec, tally):
                train = []
                for document in documents:
                    digest = content_hash(document)
                    tally.digests.append(int(digest, 16))
                    if digest in seen:
                        tally.leaked += 1
                    elif spec.share is not None and side_of(document) < spec.share:
                        held.write(json.dumps([*document.where, document.content, document.group]) + "\n")
                    else:
                        train.append(document)
                fit_on += train if not fit_on else []
                made = segment(train, spec.settings, spec.encoder, spec.max_length, spec.coding, whole=False)
                tally.cut += made.cut
                tally.dropped += made.dropped
                tally.problems += made.problems
                _write(made.examples, ids, table, dtype, tally)
        if tally.detection is None:
            raise DataError(tally.problems or [Problem("data.empty", "no rows", "", "give a file with rows")])
        np.save(target / TABLE, np.fromfile(target / "rows.raw", ROW))
        (target / "rows.raw").unlink()
        fit = measure_fit(fit_on, spec.encoder) if fit_on else None
        write_json(target / META, _describe(tally, dtype, spec.coding.task == "causal", spec.max_length, fit))


def _documents(spec: _Spec, tally: _Tally) -> Iterator[list[Document]]:
    """Yield the documents of files in parts."""
    settings = spec.settings
    for rows in _in_parts(read(spec.files), tally):
        formatted = format_rows(
            rows, format="text", named=_named(settings), task=spec.coding.task, group_by=settings.group_by
        )
        if tally.detection is None:  # how sure it is is seen without being told
            found = format_rows(rows, format=settings.format, named=_named(settings), task=spec.coding.task)
            tally.detection = found.detection
        tally.rows += len(rows)
        tally.fitting += formatted.detection.fitting
        tally.problems += formatted.problems
        tally.notes |= dict.fromkeys(formatted.notes)
        documents = [record for record in formatted.examples if isinstance(record, Document)]
        tally.spelled += sum(spec.encoder.spells_control(document.content) for document in documents)
        yield documents


def _describe(tally: _Tally, dtype: np.dtype[Any], causal: bool, max_length: int, fit: Fit | None) -> dict[str, Any]:
    notes = [*tally.notes]
    if tally.cut:
        notes.append(f"{tally.cut:,} rows were cut to {max_length:,} tokens")
    if tally.spelled:
        notes.append(f"{tally.spelled:,} rows spell a control token; it is read as text")
    detection = asdict(tally.detection) if tally.detection else {}
    return {
        "names": list(tally.names),
        "dtype": dtype.str,
        "causal": causal,
        "highest_id": tally.highest,
        "rows": tally.rows,
        "detection": {**detection, "rows": tally.rows, "fitting": tally.fitting},
        "duplicates": len(tally.digests) - len(np.unique(np.frombuffer(tally.digests, np.uint64))),
        "leaked": tally.leaked,
        "dropped": [[*where, length] for where, length in tally.dropped],
        "problems": [[p.code, p.what, p.where, p.cure] for p in tally.problems],
        "notes": notes,
        "fit": asdict(fit) if fit else None,
    }


def _write(examples: Sequence[Example], ids: Any, table: Any, dtype: np.dtype[Any], tally: _Tally) -> None:
    rows = np.zeros(len(examples), ROW)
    for number, example in enumerate(examples):
        (piece,) = example.segments
        tally.tokens += len(piece)
        tally.highest = max(tally.highest, int(piece.ids.max()))
        file = tally.names.setdefault(example.where.path, len(tally.names))
        rows[number] = (tally.tokens, file, example.where.line, piece.first)
        ids.write(piece.ids.astype(dtype).tobytes())
    table.write(rows.tobytes())


def _in_parts(items: Iterator[Item], tally: _Tally) -> Iterator[list[Row]]:
    part: list[Row] = []
    for item in items:
        if isinstance(item, Row):
            part.append(item)
            if len(part) == ROWS_AT_ONCE:
                yield part
                part = []
        elif isinstance(item, Note):
            tally.notes[f"{item.where}: {item.text}"] = None
        else:
            tally.problems.append(item)
    if part:
        yield part


def _open(folder: Path, share: float | None) -> Corpus:
    meta = read_json(folder / META)
    held = []
    with (folder / HELD).open(encoding="utf-8") as file:
        for line in file:
            path, number, content, group = json.loads(line)
            held.append(Document(Where(path, number), content, group))
    return Corpus(
        TokenStore(folder),
        held,
        Detection(**meta["detection"]),
        meta["rows"],
        share,
        meta["duplicates"],
        meta["leaked"],
        [(Where(path, line), length) for path, line, length in meta["dropped"]],
        [Problem(*values) for values in meta["problems"]],
        meta["notes"],
        Fit(**meta["fit"]) if meta["fit"] else None,
    )
