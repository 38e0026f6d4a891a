"""Files that are whole or not there: atomic writes, atomic folders, hashes and locks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from headstart.errors import DamagedError, Problem
from headstart.faults import reach

BLOCK_BYTES = 1 << 20
TEMPORARY_PREFIX = ".tmp-"
SYSTEM_FAULT = re.compile(r"\(os error (\d+)\)")
UNPRINTABLE = re.compile("[\x7f-\x9f\ud800-\udfff]")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that it holds the old content or the new, whatever happens: temp, fsync, rename, fsync.

    The temporary file lies beside its target, since a rename is atomic only within one file system. The file gets
    the permissions that any new file would get.
    """
    with new_file(path) as file:
        # Names of files may hold halves of surrogate pairs, which no encoding writes: these are spelled out.
        file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Give a temporary file that becomes `path` when the block ends well, and vanishes when it doesn't."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{TEMPORARY_PREFIX}{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            reach("file.made", path.name)
            yield file
            file.flush()
            reach("file.written", path.name)
            os.fsync(file.fileno())
        Path(name).chmod(0o666 & ~_umask())
        reach("file.synced", path.name)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    reach("file.renamed", path.name)
    sync_folder(path.parent)


class Lines:
    """A text file that grows line by line. What the disk refused is kept, in order, and written with the next line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[str] = []

    def add(self, line: str) -> None:
        """Add a line. Raises OSError where it can't be written now; nothing of it is in the file then."""
        self._waiting.append(line + "\n")
        self.flush()

    @property
    def waits(self) -> bool:
        """Tell whether the disk refused what was added last."""
        return bool(self._waiting)

    def flush(self) -> None:
        """Write what waits, whole or not at all. Raises OSError."""
        if not self._waiting:
            return
        with self.path.open("ab", buffering=0) as file:
            begin = file.tell()
            try:
                reach("line.made", self.path.name)
                content = memoryview("".join(self._waiting).encode())
                while content:
                    content = content[file.write(content) :]
            except OSError:
                file.truncate(begin)
                raise
        self._waiting.clear()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Refuses NaN and infinity, which are no JSON."""
    write_atomic(path, json_text(value, allow_nan=False) + "\n")


def json_text(value: Any, *, ensure_ascii: bool = False, **how: Any) -> str:
    """Return `value` as indented JSON in which nothing steers a terminal: such characters are escaped."""
    text = json.dumps(value, indent=2, ensure_ascii=ensure_ascii, **how)
    return UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def read_json(path: Path) -> Any:
    """Read a JSON file that `write_json` wrote. Raises DamagedError, a ValueError, where it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        what, cure = f"it can't be read: {error}", "put it back as it was"
        raise DamagedError(Problem("run.damaged", what, str(path), cure)) from None


def take_room(folder: Path, size: int) -> None:
    """Take `size` bytes of the disk for a moment, to show that they are there and may be written. Raises OSError."""
    handle, name = tempfile.mkstemp(dir=folder, prefix=f"{TEMPORARY_PREFIX}room-")
    try:
        with contextlib.suppress(AttributeError):  # a system without it
            os.posix_fallocate(handle, 0, max(1, size))
    finally:
        os.close(handle)
        Path(name).unlink()


def seconds_per_byte(path: Path, size: int = 16 * BLOCK_BYTES) -> float:
    """Return how long a byte takes to be written where `path` lies or would lie, synced, and read again for its hash.

    At most a quarter of what is free is taken for a moment; 0 where that is too little to tell, or refused.
    """
    folder = path.absolute()
    while not folder.is_dir():
        folder = folder.parent
    handle, name = tempfile.mkstemp(dir=folder, prefix=f"{TEMPORARY_PREFIX}pace-")
    os.close(handle)
    size = min(size, shutil.disk_usage(folder).free // 4)
    begun = time.perf_counter()
    try:
        if size < BLOCK_BYTES:
            return 0.0
        Path(name).write_bytes(bytes(size))
        sync_file(Path(name))
        sha256(Path(name))
        return (time.perf_counter() - begun) / size
    except OSError:  # a quota: whether there is room for what is needed shows when that is taken
        return 0.0
    finally:
        Path(name).unlink()


@contextlib.contextmanager
def new_folder(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Give a temporary folder that becomes `path` when the block ends well, and vanishes when it doesn't.

    Every file in it is synced before the rename. An existing `path` is replaced; without `replace` it stays as it is, so
    that of several processes that make the same folder the first one wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{TEMPORARY_PREFIX}{path.name}-"))
    try:
        reach("folder.made", path.name)
        with _system_faults(path):
            yield temporary
        reach("folder.written", path.name)
        temporary.chmod(0o777 & ~_umask())
        for file in temporary.rglob("*"):
            if file.is_file():
                sync_file(file)
                file.chmod(0o666 & ~_umask())
        sync_folder(temporary)
        reach("folder.synced", path.name)
        if replace:
            replace_folder(temporary, path)
        else:
            _rename_where_free(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def _system_faults(path: Path) -> Iterator[None]:
    """Raise as OSError what the system refused, where a library that is written in Rust tells it in words alone.

    Tensors and tokenizers are written by such ones.
    """
    try:
        yield
    except Exception as error:
        told = SYSTEM_FAULT.search(str(error))
        if told is None or isinstance(error, OSError):
            raise
        number = int(told[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def _rename_where_free(source: Path, target: Path) -> None:
    """Rename a folder, or delete it where another stands in its place by then."""
    try:
        source.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(source, ignore_errors=True)
    else:
        sync_folder(target.parent)


def remove_folder(path: Path) -> None:
    """Delete a folder such that nobody finds it half deleted."""
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{TEMPORARY_PREFIX}{path.name}-"))
    with contextlib.suppress(FileNotFoundError):  # another was quicker
        path.rename(aside / path.name)
    shutil.rmtree(aside, ignore_errors=True)


def replace_folder(source: Path, target: Path) -> None:
    """Rename `source` to `target`; what was there is moved aside first, deleted last, and put back where that fails."""
    old = None
    if target.exists():
        old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{TEMPORARY_PREFIX}{target.name}-")) / target.name
        target.rename(old)
    try:
        reach("folder.aside", target.name)
        source.rename(target)
    except BaseException:
        if old is not None:
            old.rename(target)
            old.parent.rmdir()
        raise
    reach("folder.renamed", target.name)
    sync_folder(target.parent)
    if old is not None:
        shutil.rmtree(old.parent, ignore_errors=True)


def shown(path: Path) -> str:
    """Return a path as users read it: from where they are, if it lies there."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def remove_temporaries(folder: Path, name: str = "") -> None:
    """Delete what a killed process left half written in `folder`; only what was to become `name` if one is given."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}{name}{'-' if name else ''}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(path: Path) -> None:
    """Make renames in `path` survive a power cut, where the system can (Windows can't open folders)."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Make what a file holds survive a power cut."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
