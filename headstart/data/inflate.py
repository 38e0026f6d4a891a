"""Compressed files, inflated within bounds: a few kilobytes can hold terabytes of nothing."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import IO, Any

INFLATED_BYTES = 1 << 30  # as much may come out of any file
RATIO_MAX = 500  # and so many times its size; rows that repeat a long prompt stay far below
BLOCK_BYTES = 1 << 17


class InflationError(Exception):
    """A file that holds more than it may: most likely made to fill the memory or the disk."""


class Meter:
    """How much came out of a file of `packed` bytes so far."""

    def __init__(self, packed: int) -> None:
        self._packed = packed
        self._limit = max(INFLATED_BYTES, RATIO_MAX * packed)
        self._total = 0

    def add(self, count: int) -> None:
        """Count bytes that came out. Raises InflationError where they are too many."""
        self._total += count
        if self._total > self._limit:
            raise InflationError(f"its {self._packed:,} bytes hold more than {self._limit:,}")


def open_plain(path: Path) -> IO[bytes]:
    """Open a file to be read, inflated if it is gzip. Reading raises InflationError where too much comes out."""
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
    return io.BufferedReader(_Inflated(path), BLOCK_BYTES) if packed else path.open("rb")


class _Inflated(io.RawIOBase):
    def __init__(self, path: Path) -> None:
        self._gzip = gzip.open(path)  # noqa: SIM115 (closed with this)
        self._meter = Meter(path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._gzip.read1(len(buffer))
        self._meter.add(len(block))
        buffer[: len(block)] = block
        return len(block)

    def close(self) -> None:
        self._gzip.close()
        super().close()
