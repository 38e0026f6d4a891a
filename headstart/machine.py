"""What this machine is: cache folder, device, memory, disk, versions."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from headstart.errors import Problem, ResourceError

PACKAGES = ("headstart", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")
GIB = 1 << 30
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
MEMORY_MARKS = ("allocate memory", "out of memory", "not enough memory")


def home() -> Path:
    """Return the folder for models and caches: `HEADSTART_HOME`, else the platform's cache folder."""
    if chosen := os.environ.get("HEADSTART_HOME"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "headstart"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "headstart"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "headstart"


def offline() -> bool:
    """Tell whether the user forbade the network."""
    return os.environ.get("HEADSTART_OFFLINE", "") not in ("", "0")


def pick_device() -> str:
    """Return the fastest device that torch can use here: `cuda`, `mps` or `cpu`."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def cpu_count() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_total_bytes() -> int:
    """Return the memory that this process may fill: the machine's, or its container's limit if that is less."""
    total = _memory()[0]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(file).read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            return min(total, int(limit))
    return total


def memory_free_bytes() -> int:
    """Return the memory that can still be had without swapping."""
    return min(_memory()[1], memory_total_bytes() - memory_used_bytes())


def _memory() -> tuple[int, int]:
    """Return the bytes of memory that there are, and those that can be had."""
    try:
        found = psutil.virtual_memory()
    except OSError:  # no /proc/meminfo, as in some containers; then free is what nothing fills, caches too
        page = os.sysconf("SC_PAGE_SIZE")
        return page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    return int(found.total), int(found.available)


def memory_used_bytes() -> int:
    """Return the resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


_highest_bytes = 0  # of the peaks that `begin_peak` forgot


def memory_peak_bytes() -> int:
    """Return the most resident memory that this process ever had."""
    return max(_highest_bytes, _peak_bytes())


def _peak_bytes() -> int:
    """Return the most resident memory since the process began, or since the last `begin_peak`."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def begin_peak(device: str) -> None:
    """Count the peak of what follows by itself, for `peak_since`. `device_peak_bytes` still tells of everything."""
    global _highest_bytes  # noqa: PLW0603 (the system keeps one peak a process, and so do we)
    if device == "cuda":
        return
    _highest_bytes = max(_highest_bytes, _peak_bytes())
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_since(device: str) -> int:
    """Return the most memory since `begin_peak`; where the system forgets no peak, what is filled now."""
    if device == "cuda":
        return device_peak_bytes(device)
    peak = _peak_bytes()
    return peak if peak > _highest_bytes or Path("/proc/self/clear_refs").exists() else memory_used_bytes()


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """While modules are loaded, which make objects by the hundred thousand that all stay, look for none to collect."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Collect what can be, and for a while look only at what came since: each `trim_memory` is then quick."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def trim_memory() -> None:
    """Give memory that is free back to the system, where the allocator keeps it and can be told to."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library than GNU's
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def device_peak_bytes(device: str) -> int:
    """Return the most memory that tensors ever filled on `device`; on the CPU the process's own peak."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return memory_peak_bytes()


def device_used_bytes(device: str) -> int:
    """Return the memory that is filled on `device` now."""
    if device == "cuda":
        import torch

        return torch.cuda.memory_allocated()
    return memory_used_bytes()


def device_free_bytes(device: str) -> int:
    """Return the memory that is free on `device`."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    return memory_free_bytes()


def out_of_memory(error: BaseException) -> str | None:
    """Return what an error says of memory that ran out; None where it says something else.

    Only on some devices has torch a class of its own for this.
    """
    said = str(error).partition("\n")[0]
    if isinstance(error, MemoryError):
        return said or "out of memory"
    return said if any(mark in said for mark in MEMORY_MARKS) else None


@contextlib.contextmanager
def resources() -> Iterator[None]:
    """Turn what the system says when memory or disk runs out into errors that say what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = out_of_memory(error)
        if said is None:
            raise
        cure = "-s engine.tokens_per_pack=512, -s engine.checkpointing=on, or a smaller model"
        raise ResourceError(Problem("memory.exhausted", said, "", cure)) from None
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise disk_error(error, "; a run goes on with headstart resume") from None


def disk_error(error: OSError, then: str = "", where: str = "") -> ResourceError:
    """Return what a fault of the disk is to a user: `disk.full` or `disk.failed`, and what to do, `then` included.

    `where` is the place of which the system says nothing more exact.
    """
    full = error.errno in DISK_FULL
    cure = ("free some space" if full else "see that it can be read and written") + then
    what, place = error.strerror or str(error), str(error.filename or where)
    return ResourceError(Problem("disk.full" if full else "disk.failed", what, place, cure))


# What glibc's mallopt calls them, and the largest size that it takes for the first.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_THRESHOLD_MOST = -1, -3, 32 << 20


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed for the next step, instead of handing it back and asking anew each time.

    Return whether it does: glibc alone can be told so. Blocks over 32 MiB are handed back all the same.
    """
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(MMAP_THRESHOLD, MMAP_THRESHOLD_MOST) and mallopt(TRIM_THRESHOLD, 1 << 30))


def has_large_pages() -> bool:
    """Tell whether torch was asked for memory in large pages (`headstart/__init__.py`) and the system has them."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    asked = os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"
    return asked and setting.exists() and "[never]" not in setting.read_text()


def disk_free_bytes(path: Path) -> int:
    """Return the free bytes of the disk on which `path` lies or would lie."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def versions() -> dict[str, str]:
    """Return the installed version of each package that decides what a run computes."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def describe() -> dict[str, Any]:
    """Return what a result says of the machine that it came from."""
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": cpu_count(),
        "memory_bytes": memory_total_bytes(),
        "device": pick_device(),
        "versions": versions(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
