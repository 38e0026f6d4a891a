"""Rows whose tokens lie on disk: written once, whole or not at all, found again by what they were made from.

A store is a folder of the cache: the tokens of all rows one behind the other, a weight for each where weights differ, the
records of which something will be asked as lines of JSON, and numbers of each row (where it stands, where its tokens end, the
hash of what it says) as one array each. Its manifest is written last and has the size and hash of every file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
from numpy.typing import NDArray

from headstart.data.read import SourceFile, Where
from headstart.data.segments import Example, Segment
from headstart.files import TEMPORARY_PREFIX, new_folder, read_json, remove_folder, sha256, write_json
from headstart.machine import home

FORMAT = 3  # of the files and of what rows become; another number makes all stores anew
MANIFEST, IDS, WEIGHTS, RECORDS = "manifest.json", "ids.bin", "weights.bin", "records.jsonl"
# A larger file is known by its size alone: hashing it would cost more than reading what is needed.
HASHED_BYTES = 1 << 30
STORES_BYTES = 32 << 30  # of all stores together; those that were of no use for the longest time make room
REMEMBERED_BYTES, SETTLED_NS = 1 << 28, 2_000_000_000
PENDING = 1024  # pieces that are written at once
# The numbers of a row, each an array of its own: tokens and pieces up to its end, the place of its file among the names, its
# line, its targets.
ROW = {"token_end": "q", "piece_end": "q", "file": "i", "line": "q", "targets": "i"}

Ints = NDArray[np.int64]


def store_key(*parts: Any) -> str:
    """Return a name for a store that follows from all that it is made from."""
    return hashlib.sha256(json.dumps([FORMAT, *parts]).encode()).hexdigest()[:32]


def store_folder() -> Path:
    """Return the folder in which all stores lie; it may be deleted whenever no run is going on."""
    return home() / "tokens"


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes; that of a large file is remembered for as long as the file isn't touched.

    A file that was changed a moment ago is not remembered: it might change again without a new time.
    """
    stat = path.stat()
    if stat.st_size <= REMEMBERED_BYTES:
        return sha256(path)
    seen = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    memory = store_folder() / "hashes.json"
    try:
        known = dict(read_json(memory))
    except (OSError, ValueError, TypeError):
        known = {}
    name = str(path.resolve())
    if known.get(name, [None])[:-1] == seen:
        return str(known[name][-1])
    found = sha256(path)
    if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > SETTLED_NS:
        write_json(memory, {**known, name: [*seen, found]})
    return found


def hashed(files: Sequence[SourceFile]) -> list[SourceFile]:
    """Return files, each with the hash of its bytes."""
    return [replace(file, sha256=file_hash(file.path)) for file in files]


def find_store(key: str, write: Callable[[StoreWriter], dict[str, Any]]) -> Store:
    """Return the store of this name, written first where it isn't there or is damaged.

    `write` fills it and returns what else is to be known of it, as plain values. Where two processes write the same store,
    the first to end wins and both read that one.
    """
    folder = store_folder() / key
    if folder.exists() and not is_whole(folder):
        remove_folder(folder)
    if not folder.exists():
        with new_folder(folder, replace=False) as target, StoreWriter.opened(target) as writer:
            known = write(writer)
            writer.finish(known)
        _forget_others(folder)
    os.utime(folder / MANIFEST)  # the time at which it was last of use
    return Store(folder)


def _forget_others(kept: Path) -> None:
    """Delete the stores that were of no use for the longest time, while all together are too large.

    A run that reads one of them goes on: its files are open.
    """
    stores, sizes = {}, {}
    for path in kept.parent.glob(f"*/{MANIFEST}"):
        folder = path.parent
        if folder.name.startswith(TEMPORARY_PREFIX):  # still written by another process, or on its way out
            continue
        with suppress(FileNotFoundError):  # another process deletes it
            size, used = sum(file.stat().st_size for file in folder.iterdir()), path.stat().st_mtime
            sizes[folder], stores[folder] = size, used
    for folder in sorted(stores, key=lambda folder: stores[folder]):
        if folder != kept and sum(sizes.values()) > STORES_BYTES:
            remove_folder(folder)
            sizes.pop(folder)


def is_whole(folder: Path) -> bool:
    """Tell whether a store holds what was written."""
    try:
        files: Mapping[str, Any] = read_json(folder / MANIFEST)["files"]
        largest_first = sorted(files, key=lambda name: -files[name]["bytes"])
        with ThreadPoolExecutor(2) as pool:  # to hash holds no lock of Python's
            return all(pool.map(lambda name: _is_as_written(folder / name, files[name]), largest_first))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_as_written(path: Path, file: Mapping[str, Any]) -> bool:
    if path.stat().st_size != file["bytes"]:
        return False
    return bool(file["bytes"] > HASHED_BYTES or sha256(path) == file["sha256"])


class StoreWriter:
    """A store while it is written. `columns` are further numbers of rows, by name the kind of their array."""

    def __init__(self, folder: Path, ids: BinaryIO, weights: BinaryIO, records: BinaryIO) -> None:
        self._folder = folder
        self._ids, self._weights, self._records = ids, weights, records
        self._dtype: np.dtype[Any] = np.dtype("<i4")
        self._columns = {name: array(kind) for name, kind in ROW.items()}
        self._piece_ends, self._firsts, self._record_ends = array("q"), array("i"), array("q")
        self._names: dict[str, int] = {}
        self._pending: list[Segment] = []
        self._tokens = self._bytes = 0
        self._weight: float | None = None
        self._more: dict[str, NDArray[Any]] = {}
        self.highest_id = 0

    @staticmethod
    @contextmanager
    def opened(folder: Path) -> Iterator[StoreWriter]:
        """Give a writer into a folder."""
        with (
            (folder / IDS).open("wb") as ids,
            (folder / WEIGHTS).open("wb") as weights,
            (folder / RECORDS).open("wb") as records,
        ):
            yield StoreWriter(folder, ids, weights, records)

    def set_tokens(self, vocabulary: int, weight: float | None) -> None:
        """Say how many tokens there are, and the weight that all but the first of a row have (None: it differs)."""
        self._dtype = np.dtype("<u2" if vocabulary <= 1 << 16 else "<i4")
        self._weight = weight

    def add(self, where: Where, segments: Sequence[Segment]) -> None:
        """Add a row; one without segments is there, and has no tokens."""
        columns = self._columns
        targets = 0
        for piece in segments:
            self._tokens += len(piece.ids)
            self._piece_ends.append(self._tokens)
            self._firsts.append(piece.first)
            self._pending.append(piece)
            if self._weight is None:
                targets += piece.target_count
            else:
                targets += len(piece.ids) - 1 if self._weight else 0
        if len(self._pending) >= PENDING:
            self._write_tokens()
        columns["token_end"].append(self._tokens)
        columns["piece_end"].append(len(self._piece_ends))
        columns["file"].append(self._names.setdefault(where.path, len(self._names)))
        columns["line"].append(where.line)
        columns["targets"].append(targets)

    def _write_tokens(self) -> None:
        if self._pending:
            ids = np.concatenate([piece.ids for piece in self._pending])
            self.highest_id = max(self.highest_id, int(ids.max()))
            self._ids.write(ids.astype(self._dtype).tobytes())
            if self._weight is None:
                self._weights.write((np.concatenate([piece.weights for piece in self._pending]) != 0).tobytes())
        self._pending.clear()

    def add_record(self, value: Any) -> None:
        """Add a record as plain values."""
        self._bytes += self._records.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
        self._record_ends.append(self._bytes)

    def add_column(self, name: str, values: NDArray[Any]) -> None:
        """Add a number of each row, or of each record."""
        self._more[name] = values

    def finish(self, known: dict[str, Any]) -> None:
        """Write what is left, the manifest last."""
        self._write_tokens()
        for file in (self._ids, self._weights, self._records):
            file.flush()
        arrays = {name: np.frombuffer(values, values.typecode) for name, values in self._columns.items()}
        arrays["piece_ends"] = np.frombuffer(self._piece_ends, "q")
        arrays["firsts"] = np.frombuffer(self._firsts, "i")
        arrays["record_ends"] = np.frombuffer(self._record_ends, "q")
        for name, values in (arrays | self._more).items():
            np.save(self._folder / f"{name}.npy", values)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(self._folder.iterdir())
        }
        meta = {"names": list(self._names), "dtype": self._dtype.str, "weight": self._weight}
        write_json(self._folder / MANIFEST, {**meta, "highest_id": self.highest_id, "known": known, "files": files})


class Store:
    """Rows on disk. `known` is what was to be known of them beside their tokens."""

    def __init__(self, folder: Path) -> None:
        meta = read_json(folder / MANIFEST)
        self.known: dict[str, Any] = meta["known"]
        self.highest_id = int(meta["highest_id"])
        self._names: list[str] = meta["names"]
        self._dtype = np.dtype(meta["dtype"])
        self._weight: float | None = meta["weight"]
        self._ids = os.open(folder / IDS, os.O_RDONLY)
        self._weights = os.open(folder / WEIGHTS, os.O_RDONLY)
        self._records = os.open(folder / RECORDS, os.O_RDONLY)
        self._columns = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}

    def __len__(self) -> int:
        return len(self._columns["line"])

    def __del__(self) -> None:
        for name in ("_ids", "_weights", "_records"):
            if hasattr(self, name):
                os.close(getattr(self, name))

    def rename(self, names: Mapping[str, str]) -> None:
        """Call files as users see them now."""
        self._names = [names.get(name, name) for name in self._names]

    def column(self, name: str) -> NDArray[Any]:
        """Return a number of each row (or of each record), mapped from disk."""
        found: NDArray[Any] = self._columns[name]
        return found

    def where(self, row: int) -> Where:
        """Return where a row stands."""
        return Where(self._names[int(self._columns["file"][row])], int(self._columns["line"][row]))

    def segments(self, row: int) -> tuple[Segment, ...]:
        """Return the segments of a row, read from disk: what was read once needn't stay in memory."""
        begin = int(self._columns["piece_end"][row - 1]) if row else 0
        end = int(self._columns["piece_end"][row])
        ends = self._columns["piece_ends"]
        start = int(ends[begin - 1]) if begin else 0
        count = (int(ends[end - 1]) if end else 0) - start
        size = self._dtype.itemsize
        ids = np.frombuffer(os.pread(self._ids, count * size, start * size), self._dtype).astype(np.int32)
        weights = self._read_weights(start, count)
        pieces = []
        for piece in range(begin, end):
            low, high = (int(ends[piece - 1]) if piece else 0) - start, int(ends[piece]) - start
            part = weights[low:high]
            part[:1] = 0.0
            pieces.append(Segment(ids[low:high], part, int(self._columns["firsts"][piece])))
        return tuple(pieces)

    def _read_weights(self, start: int, count: int) -> NDArray[np.float32]:
        if self._weight is not None:
            return np.full(count, self._weight, np.float32)
        return np.frombuffer(os.pread(self._weights, count, start), np.uint8).astype(np.float32)

    def record(self, number: int) -> Any:
        """Return a record as it was given."""
        ends = self._columns["record_ends"]
        begin = int(ends[number - 1]) if number else 0
        return json.loads(os.pread(self._records, int(ends[number]) - begin, begin))

    @property
    def lengths(self) -> Ints:
        """The tokens of each row."""
        return np.diff(self.column("token_end"), prepend=0)

    @property
    def longest(self) -> Ints:
        """The tokens of the longest segment of each row."""
        pieces = np.diff(self._columns["piece_ends"], prepend=0)
        ends = self._columns["piece_end"]
        begins = np.concatenate([[0], ends[:-1]])
        filled = ends > begins
        longest = np.zeros(len(ends), np.int64)
        if filled.any():
            longest[filled] = np.maximum.reduceat(pieces, begins[filled])
        return longest


class StoredRows(Sequence[Example]):
    """Some rows of a store, by their numbers (None: all); `more` are rows that stand behind them in memory."""

    def __init__(
        self,
        store: Store,
        rows: Ints | None = None,
        cuts: NDArray[np.bool_] | None = None,
        cut_of: Callable[[int], str] = lambda _: "",
    ) -> None:
        self._store = store
        self._rows = rows
        self._cuts, self._cut_of = cuts, cut_of  # which rows lost context, and what they lost
        self._more: list[Example] = []
        self._count = len(store) if rows is None else len(rows)

    def __len__(self) -> int:
        return self._count + len(self._more)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        if place >= self._count:
            return self._more[place - self._count]
        row = place if self._rows is None else int(self._rows[place])
        cut = self._cut_of(row) if self._cuts is not None and self._cuts[row] else ""
        return Example(self._store.where(row), self._store.segments(row), cut)

    def __iadd__(self, more: Sequence[Example]) -> StoredRows:
        self._more += more
        return self

    def _chosen(self, values: NDArray[Any]) -> NDArray[Any]:
        return values if self._rows is None else values[self._rows]

    @functools.cached_property
    def _lengths(self) -> Ints:
        """The tokens of each row that is stored: asked for again and again while a run is laid out."""
        return self._chosen(self._store.lengths)

    @property
    def lengths(self) -> Ints:
        """The tokens of each row."""
        more = [example.token_count for example in self._more]
        return np.concatenate([self._lengths, np.array(more, np.int64)]) if more else self._lengths

    @property
    def longest(self) -> int:
        """The tokens of the longest segment."""
        more = (len(segment) for example in self._more for segment in example.segments)
        return max(self._longest, max(more, default=0))

    @functools.cached_property
    def _longest(self) -> int:
        return int(self._chosen(self._store.longest).max(initial=0))

    @property
    def target_count(self) -> int:
        """How many tokens are predicted; of masked tokens that is known only when they are hidden."""
        own = int(self._chosen(self._store.column("targets")).sum(dtype=np.int64))
        return own + sum(example.target_count for example in self._more)

    @property
    def highest_id(self) -> int:
        """The highest token of the whole store and of the rows in memory."""
        more = (int(segment.ids.max()) for example in self._more for segment in example.segments)
        return max(self._store.highest_id, max(more, default=0))

    @property
    def cut(self) -> int:
        """How many rows lost context."""
        return 0 if self._cuts is None else int(np.count_nonzero(self._chosen(self._cuts)))
