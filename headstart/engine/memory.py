"""What a piece of work fills for a while, known from the same work on less: live bytes over time, scaled up.

Work on a pack runs the same operations whatever the pack's size, so the storage that the k-th allocation makes has a size
that is a polynomial of the scale: constant (a gradient), linear (a token's states) or quadratic (a mask). Two small runs
tell which and give each of them, and the sum over those that live at once gives the peak of the whole, which was never run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from headstart import machine
from headstart.data.forest import Pack
from headstart.models.attend import in_blocks
from headstart.models.whole import afresh

SCALES = (1 / 16, 1 / 4)
SMALL_TOKENS = 128  # a pack of so few is measured as it is
MEASURABLE_BYTES = 16 << 20  # below which a process's memory says nothing of it
PASSES = 2  # after which the allocator keeps about what it will keep
LINEAR, QUADRATIC = 0.1, 1.4  # from which power on a storage grows so

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Trace:
    """The storages that a piece of work made: bytes of each, and the operations at which it came and went."""

    sizes: Ints
    born: Ints
    died: Ints
    operations: int

    @property
    def stays(self) -> NDArray[np.bool_]:
        """Tell which storages outlive the work: gradients, where there were none before."""
        return self.died > self.operations

    def peak(self, sizes: Any = None) -> int:
        """Return the most bytes of these storages that were live at once, if they had had other `sizes`."""
        return peak_of(self.sizes if sizes is None else sizes, self.born, self.died, self.operations)

    def added(self) -> Trace:
        """Return what the same work does where gradients are there already: new ones are added to them at once."""
        return replace(self, died=np.where(self.stays, self.born + 1, self.died))

    def like(self, other: Trace) -> bool:
        """Tell whether the same operations made storages at the same moments."""
        return (
            self.operations == other.operations
            and np.array_equal(self.born, other.born)
            and np.array_equal(self.died, other.died)
        )


def peak_of(sizes: Any, born: Ints, died: Ints, operations: int) -> int:
    """Return the most bytes that are live at once; a storage lives from `born` until before `died`."""
    change = np.zeros(operations + 2)
    np.add.at(change, born, sizes)
    np.add.at(change, died, -np.asarray(sizes, float))
    return int(change.cumsum().max(initial=0.0))


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors among what an operation takes or gives: these lie there alone or in lists."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


class _Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every storage that operations make, and when it is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.clock = 0
        self.sizes: list[int] = []
        self.born: list[int] = []
        self.died: dict[int, int] = {}
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if in_blocks():
            return found
        self.clock += 1
        before = {tensor.untyped_storage()._cdata for tensor in _tensors((*args, *(kwargs or {}).values()))}
        for tensor in _tensors((found,)):
            self._note(tensor.untyped_storage(), before)
        return found

    def _note(self, storage: Any, before: set[int]) -> None:
        key = storage._cdata
        if key in before or key in self._known:
            return
        number = len(self.sizes)
        self.sizes.append(storage.nbytes())
        self.born.append(self.clock)
        self._known[key] = weakref.finalize(storage, self._free, number, key)
        self._known[key].atexit = False

    def _free(self, number: int, key: int) -> None:
        self.died[number] = self.clock + 1
        self._known.pop(key, None)

    def result(self) -> Trace:
        """Return what was seen; what still lives dies after the last operation."""
        for watched in list(self._known.values()):
            watched.detach()
        last = self.clock + 1
        died = [self.died.get(number, last) for number in range(len(self.sizes))]
        return Trace(
            np.array(self.sizes, np.int64), np.array(self.born, np.int64), np.array(died, np.int64), self.clock
        )


def trace(work: Callable[[], Any]) -> Trace:
    """Run `work` and note what it fills. Memory inside of a single operation isn't seen, nor that of attention's blocks."""
    tracker = _Tracker()
    with tracker, afresh():
        work()
    return tracker.result()


@dataclass(frozen=True)
class Chunks:
    """Logits that are made for at most `rows_at_once` sources at a time, `vocabulary` wide.

    `sources` are those of each trace, `sources_frac` is how many there are for each token.
    """

    vocabulary: int
    rows_at_once: int
    sources: Sequence[int]
    sources_frac: float


@dataclass(frozen=True)
class Growth:
    """The traces of the same work on more and more `tokens`, and how much of a system's memory a live byte takes.

    What outlives the work takes no more than its size, since it stays where it is.
    """

    traces: Sequence[Trace]
    tokens: Sequence[int]
    overhead: float = 1.0
    chunks: Chunks | None = None

    def bytes_at(self, tokens: int) -> int:
        """Return what the work on a pack of `tokens` will fill.

        A storage is constant, linear in the tokens, or quadratic in them, by the power with which it grew.
        """
        last = self.traces[-1]
        if not all(one.like(last) for one in self.traces):  # other operations: only the peaks can be held together
            peaks = [np.array([float(one.peak())]) for one in self.traces]
            return int(self.overhead * _extend(peaks, self.tokens, tokens)[0])
        sizes = [one.sizes.astype(float) for one in self.traces]
        found = _extend(sizes, self.tokens, tokens)
        if self.chunks:
            found = np.where(self._logits(sizes), self._chunk(found, tokens), found)
        return last.peak(np.where(last.stays, found, found * self.overhead))

    def _logits(self, sizes: Sequence[Any]) -> Any:
        """Tell which storages hold a value for each source and each word."""
        assert self.chunks is not None  # noqa: S101
        width = [
            size / (count * self.chunks.vocabulary) for size, count in zip(sizes, self.chunks.sources, strict=True)
        ]
        return (width[0] == width[-1]) & (width[-1] >= 1) & (width[-1] <= 8)

    def _chunk(self, found: Any, tokens: int) -> Any:
        assert self.chunks is not None  # noqa: S101
        return found * min(1.0, self.chunks.rows_at_once / max(1.0, self.chunks.sources_frac * tokens))


def _extend(sizes: Sequence[Any], tokens: Sequence[int], wanted: int) -> Any:
    """Carry sizes that were seen at some `tokens` on to `wanted`."""
    first, last = sizes[0], sizes[-1]
    ratio = tokens[-1] / tokens[0]
    if ratio <= 1:
        return last
    power = np.log(np.maximum(last, 1) / np.maximum(first, 1)) / np.log(ratio)
    slope = (last - first) / (tokens[-1] - tokens[0])
    linear = last + slope * (wanted - tokens[-1])
    quadratic = last * (wanted / tokens[-1]) ** 2
    return np.where(power < LINEAR, last, np.where(power < QUADRATIC, np.maximum(linear, 0), quadratic))


@afresh()
def measure_growth(
    work: Callable[[Pack], Any],
    pack: Pack,
    device: str,
    *,
    head: Any = None,
    begin: Callable[[], None] | None = None,
    added: bool = False,
) -> Growth:
    """Run `work` on smaller and smaller likes of `pack`, so that what it fills on the whole is known and never filled.

    `head` is what makes logits in chunks (`models.head.Head`); of these the smaller packs have one each. `begin` is called
    before each. With `added` the work is one of several of which each adds to the same gradients.
    """
    largest = max(SCALES)
    if head is not None and len(pack.sources):
        largest = min(largest, head.rows_at_once / len(pack.sources))
    scales = [1.0] if len(pack) <= SMALL_TOKENS else [largest * scale / max(SCALES) for scale in SCALES]
    packs = [scaled(pack, scale) for scale in scales]
    work(packs[0])
    traces = []
    for one in packs:
        if begin:
            begin()
        traces.append(trace(lambda: work(one)))  # noqa: B023 (called at once)
    chunks = None
    if head is not None:
        chunks = Chunks(
            head.vocabulary, head.rows_at_once, [len(one.sources) for one in packs], len(pack.sources) / len(pack)
        )
    overhead = _overhead(lambda: work(packs[-1]), traces[-1].added().peak(), device)
    traces = [one.added() for one in traces] if added else traces
    return Growth(traces, [len(one) for one in packs], overhead, chunks)


def _overhead(work: Callable[[], Any], live: int, device: str) -> float:
    """Return how many bytes of the process a live byte takes: an allocator keeps what is freed, in pieces."""
    if device == "cuda" or live < MEASURABLE_BYTES:
        return 1.0
    machine.trim_memory()
    machine.begin_peak(device)
    before = machine.device_used_bytes(device)
    for _ in range(PASSES):
        work()
    return max(1.0, (machine.peak_since(device) - before) / live)


def scaled(pack: Pack, scale: float, least: int = 1) -> Pack:
    """Return a pack with the same nodes, each shorter: a token of the pack, and what is predicted there, now and then.

    Every node keeps at least one token, so that the same operations run, and the pack at least so many sources, where it has
    them. It is for measuring, and means nothing.
    """
    if any(pack.images):
        return _fewer_images(pack, max(1, round(len(pack.images) * scale)))
    length = np.maximum(1, np.ceil(pack.length * scale)).astype(np.int64)
    places = np.concatenate([begin + np.arange(n) for begin, n in zip(pack.start, length, strict=True)])
    where = np.full(len(pack), -1, np.int64)
    where[places] = np.arange(len(places))
    count = min(len(pack.sources), max(least, round(len(pack.sources) * scale)))
    # Sources from all over, since those that rows share have a target for each row.
    chosen = np.arange(count) * len(pack.sources) // max(1, count)
    kept = np.isin(pack.target_sources, chosen)
    ends = np.searchsorted(places, pack.ends, side="right") - 1
    begins = np.minimum(np.searchsorted(places, pack.begins), ends)
    return replace(
        pack,
        ids=pack.ids[places],
        positions=_positions(pack, length),
        types=pack.types[places],
        start=np.cumsum(length) - length,
        length=length,
        sources=np.arange(count) * max(1, len(places)) // max(1, count),
        target_sources=np.searchsorted(chosen, pack.target_sources[kept]),
        target_ids=pack.target_ids[kept],
        weights=pack.weights[kept],
        target_segments=pack.target_segments[kept],
        begins=begins,
        ends=ends,
        row_tokens=len(places),
    )


def _positions(pack: Pack, length: Ints) -> Ints:
    """Return the place of each token in its row, where the nodes of a pack have these lengths."""
    begins = np.zeros(len(length), np.int64)
    for node, above in enumerate(pack.parent):
        begins[node] = pack.positions[pack.start[node]] if above < 0 else begins[above] + length[above]
    return np.concatenate([begin + np.arange(n) for begin, n in zip(begins, length, strict=True)])


def _fewer_images(pack: Pack, count: int) -> Pack:
    tokens = int(pack.length[:count].sum())
    fewer = {name: getattr(pack, name)[:tokens] for name in ("ids", "positions", "types")}
    each = ("start", "length", "parent", "begins", "ends", "segment_rows", "segment_numbers", "labels", "images")
    fewer |= {name: getattr(pack, name)[:count] for name in each}
    return replace(pack, row_tokens=tokens, **fewer)
