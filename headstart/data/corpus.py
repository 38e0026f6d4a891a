"""Large corpora: documents that go through in a stream, and whose tokens lie on disk, made once.

Rows are read, checked, given to a side and encoded in parts; those to train on go into a store, from which a row is read
when its turn comes. Held-out rows stay in memory: there are few. A store is found again by the data's content, the tokenizer
and all settings that the tokens depend on, so the same corpus is encoded once.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from headstart.config import DataSettings
from headstart.data.documents import Fit, measure_fit
from headstart.data.encode import Encoder
from headstart.data.feed import content_hash, side_of
from headstart.data.formats import Detection, Formatted, format_rows, named_columns
from headstart.data.masking import find_masking
from headstart.data.near import once_each
from headstart.data.prepare import Coding, Formed, Parts, Prepared, form_rows, segment, spelled_problem, split_held
from headstart.data.private import redacted_notes
from headstart.data.read import Note, Row, SourceFile, Where, read, read_parts
from headstart.data.records import Document
from headstart.data.segments import ROWS_AT_ONCE, Segmented
from headstart.data.store import Store, StoredRows, StoreWriter, find_store, hashed, store_key
from headstart.errors import DataError, Problem

STREAM_BYTES = 64 << 20  # data larger than this goes through in a stream, if it is text to continue
HELD_OUT_ROWS = 1_000  # about as many documents are held out where the user didn't say
PEEK = 1_000


@dataclass
class Corpus:
    """What became of a corpus: its rows to train on, its held-out documents, and what there is to tell."""

    train: StoredRows
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
        reading = [
            settings.format,
            settings.text,
            settings.group_by,
            settings.over_length,
            settings.positions,
            settings.encoding,
        ]
        reading += [settings.control_tokens]
        reading += ["redact"] * settings.redact
        held = hashlib.sha256("".join(map(content_hash, self.others)).encode()).hexdigest()
        return store_key(
            "corpus",
            [file.sha256 for file in self.files],
            self.encoder.identity,
            reading,
            self.coding.task,
            self.max_length,
            self.share,
            held,
        )


@dataclass
class _Tally:
    """What is counted on the way."""

    rows: int = 0
    fitting: int = 0
    leaked: int = 0
    spelled: int = 0
    cut: int = 0
    digests: array[int] = field(default_factory=lambda: array("Q"))
    notes: dict[str, None] = field(default_factory=dict)
    redacted: Counter[str] = field(default_factory=Counter)
    dropped: list[tuple[Where, int]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    detection: Detection | None = None

    def put_aside(self, item: Problem | Note) -> None:
        """Take what is no row; a note counts once."""
        if isinstance(item, Note):
            self.notes[f"{item.where}: {item.text}"] = None
        else:
            self.problems.append(item)


def is_large(files: Sequence[SourceFile]) -> bool:
    """Tell whether files hold so much that they go through in a stream."""
    return sum(file.path.stat().st_size for file in files) > STREAM_BYTES


def peek(files: Sequence[SourceFile], settings: DataSettings, task: str) -> Detection | None:
    """Return what the first rows are; None where that can't be told without the others."""
    rows = [item for item in itertools.islice(read(files), PEEK) if isinstance(item, Row)]
    try:
        return (
            format_rows(rows, format=settings.format, named=named_columns(settings), task=task).detection
            if rows
            else None
        )
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
    files = hashed(files)
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
    spec = _Spec(files, settings, encoder, coding, max_length, None, ())
    formed = Formed(files, corpus.rows, Formatted(corpus.detection), corpus.notes)
    formed.reread = lambda: itertools.chain.from_iterable(_documents(spec, _Tally()))
    parts = Parts([], watched, proof, corpus.held_out, corpus.duplicates, corpus.leaked)
    train = Segmented(corpus.train, [], corpus.dropped)
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
    return _open(find_store(spec.key, lambda writer: _encode(writer, spec)), share)


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


def _encode(writer: StoreWriter, spec: _Spec) -> dict[str, Any]:
    """Write a corpus into a store: the tokens of rows to train on, and the held-out documents as records."""
    seen = {content_hash(document) for document in spec.others}
    tally = _Tally()
    fit_on: list[Document] = []
    writer.set_tokens(len(spec.encoder.tokenizer), float(spec.coding.task == "causal"))
    for documents in _documents(spec, tally):
        train = []
        for document in documents:
            digest = content_hash(document)
            tally.digests.append(int(digest, 16))
            if digest in seen:
                tally.leaked += 1
            elif spec.share is not None and side_of(document) < spec.share:
                writer.add_record([*document.where, document.content, document.group])
            else:
                train.append(document)
        fit_on += train if not fit_on else []
        made = segment(train, spec.settings, spec.encoder, spec.max_length, spec.coding, whole=False)
        tally.cut += made.cut
        tally.dropped += made.dropped
        tally.problems += made.problems
        for example in made.examples:
            writer.add(example.where, example.segments)
    if tally.detection is None:
        raise DataError(tally.problems or [Problem("data.empty", "no rows", "", "give a file with rows")])
    return _describe(tally, spec.max_length, measure_fit(fit_on, spec.encoder) if fit_on else None)


def _documents(spec: _Spec, tally: _Tally) -> Iterator[list[Document]]:
    """Yield the documents of files in parts."""
    settings = spec.settings
    for rows in read_parts(spec.files, ROWS_AT_ONCE, tally.put_aside):
        formatted = format_rows(
            rows,
            format="text",
            named=named_columns(settings),
            task=spec.coding.task,
            group_by=settings.group_by,
            redact=settings.redact,
        )
        if tally.detection is None:  # how sure it is is seen without being told
            found = format_rows(rows, format=settings.format, named=named_columns(settings), task=spec.coding.task)
            tally.detection = found.detection
        tally.rows += len(rows)
        tally.fitting += formatted.detection.fitting
        tally.problems += formatted.problems
        tally.notes |= dict.fromkeys(formatted.notes)
        tally.redacted += formatted.redacted
        documents = [record for record in formatted.examples if isinstance(record, Document)]
        spelled = [document for document in documents if spec.encoder.spells_control(document.content)]
        if settings.control_tokens == "refuse":
            tally.problems += [spelled_problem(str(document.where)) for document in spelled]
            refused = {document.where for document in spelled}
            documents = [document for document in documents if document.where not in refused]
        else:
            tally.spelled += len(spelled)
        yield documents


def _describe(tally: _Tally, max_length: int, fit: Fit | None) -> dict[str, Any]:
    notes = [*tally.notes, *redacted_notes(tally.redacted)]
    if tally.cut:
        notes.append(f"{tally.cut:,} rows were cut to {max_length:,} tokens")
    if tally.spelled:
        notes.append(f"{tally.spelled:,} rows spell a control token; it is read as text")
    detection = asdict(tally.detection) if tally.detection else {}
    return {
        "rows": tally.rows,
        "detection": {**detection, "rows": tally.rows, "fitting": tally.fitting},
        "duplicates": len(tally.digests) - len(once_each(np.frombuffer(tally.digests, np.uint64))),
        "leaked": tally.leaked,
        "dropped": [[*where, length] for where, length in tally.dropped],
        "problems": [[p.code, p.what, p.where, p.cure] for p in tally.problems],
        "notes": notes,
        "fit": asdict(fit) if fit else None,
    }


def _open(store: Store, share: float | None) -> Corpus:
    known = store.known
    held = []
    for number in range(len(store.column("record_ends"))):
        path, line, content, group = store.record(number)
        held.append(Document(Where(path, line), content, group))
    return Corpus(
        StoredRows(store),
        held,
        Detection(**known["detection"]),
        known["rows"],
        share,
        known["duplicates"],
        known["leaked"],
        [(Where(path, line), length) for path, line, length in known["dropped"]],
        [Problem(*values) for values in known["problems"]],
        known["notes"],
        Fit(**known["fit"]) if known["fit"] else None,
    )
