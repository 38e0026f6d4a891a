"""The process in which a python grader runs: reads cases line by line, answers each with a score or what went wrong.

Run by its path in Python's isolated mode, with an empty environment. It imports nothing of headstart. Before the grader's
source is run, the process takes from itself, for good: memory and open files beyond a bound, writing to files of any
size, and, on Linux, the system calls by which one reaches the network, other processes or changes what lies on disk
(seccomp), and what /proc tells of other processes (Landlock). What is left to a grader: time up to its limit, reading files that the user may read, and its answer.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import platform
import struct
import sys
from typing import Any

ANSWER_MAX = 2_000  # characters of what went wrong
FILES_MAX = 256

# Numbers of system calls that are refused, by machine (Linux, arch/*/entry/syscalls; the newer ones are the same on all).
SAME = [
    *range(424, 435),
    437,
    438,
    440,
    442,
    448,
    452,
    463,
    466,
]  # io_uring, openat2, pidfd, mounts, memory, attributes
REFUSED = {
    # socket, connect, accept, sendto, sendmsg, bind, listen, socketpair; fork, vfork, execve, kill; rename, mkdir, rmdir,
    # creat, link, unlink, symlink, truncate, ftruncate, chmod, chown, mount, ptrace, and the same beside a folder. On the
    # last two lines setpgid, setpriority, sched_set*, ioprio_set, keys, perf_event_open, kcmp, pages of others; shared
    # memory, semaphores and messages of System V, POSIX messages.
    "x86_64": [
        *(41, 42, 43, 44, 46, 307, 49, 50, 53, 288, 57, 58, 59, 62, 200, 234, 101, 322, 129, 297, 310, 311),
        *(
            76,
            77,
            82,
            83,
            84,
            85,
            86,
            87,
            88,
            90,
            91,
            92,
            93,
            94,
            132,
            133,
            161,
            165,
            166,
            188,
            189,
            190,
            235,
            280,
            285,
        ),
        *(258, 259, 260, 261, 263, 264, 265, 266, 268, 316, 197, 198, 199, 155, 169, 175, 246, 272, 308, 321),
        *(109, 141, 142, 144, 203, 314, 251, 248, 249, 250, 298, 312, 256, 279),
        *(29, 30, 31, 67, 64, 65, 66, 220, 68, 69, 70, 71, 240, 241),
    ],
    "aarch64": [
        *(198, 199, 200, 201, 202, 203, 206, 211, 269, 242, 221, 281, 129, 130, 131, 117, 138, 240, 270, 271),
        *(33, 34, 35, 36, 37, 38, 39, 40, 45, 46, 47, 51, 52, 53, 54, 55, 88, 276, 5, 6, 7, 14, 15, 16),
        *(41, 142, 104, 105, 97, 268, 280),
        *(154, 140, 118, 119, 122, 274, 30, 217, 218, 219, 241, 272, 238, 239),
        *(194, 195, 196, 197, 190, 191, 192, 193, 186, 187, 188, 189, 180, 181),
    ],
}
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
OPEN = {"x86_64": [(2, 1), (257, 2)], "aarch64": [(56, 2)]}  # open and openat, and which argument says how
PRLIMIT = {"x86_64": 302, "aarch64": 261}  # of this process alone: 0
# Calls whose second argument may not be: fcntl with F_SETOWN, F_SETOWN_EX (signals to others), ioctl with TIOCSTI (typing).
MODES = {"x86_64": [(72, (8, 15)), (16, (0x5412,))], "aarch64": [(25, (8, 15)), (29, (0x5412,))]}
CLONE = {"x86_64": 56, "aarch64": 220}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
THREAD = 0x10000  # CLONE_THREAD
NEW_SPACES = 0x7E020000  # CLONE_NEW*
LOAD, EQUAL, BITS, RETURN = 0x20, 0x15, 0x45, 0x06
ALLOW, REFUSE, NO_SUCH = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38  # EPERM, ENOSYS
CLONE3 = 435
SECCOMP_MODE_FILTER = 2
CAPABILITY_VERSION, CAP_DAC = 0x20080522, 1 << 1 | 1 << 2
LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF, LANDLOCK_WRITE_FILE = 444, 446, 1 << 1
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SIGKILL = 1, 22, 38, 9


def limit(memory_bytes: int) -> None:
    """Bound memory, open files and what may be written; no core is dumped."""
    import resource

    for name, value in (("AS", memory_bytes), ("NOFILE", FILES_MAX), ("FSIZE", 0), ("CORE", 0)):
        kind = getattr(resource, f"RLIMIT_{name}")
        most = resource.getrlimit(kind)[1]
        bound = value if most == resource.RLIM_INFINITY else min(value, most)
        with contextlib.suppress(ValueError, OSError):  # macOS knows no bound of address space
            resource.setrlimit(kind, (bound, bound))


def lock() -> bool:
    """Refuse system calls from here on, for this process and its threads. Return whether the system can do that."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in REFUSED:
        return False
    code = _program(machine)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    buffer = ctypes.create_string_buffer(code, len(code))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    program = Program(len(code) // 8, ctypes.addressof(buffer))
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return False
    _hide_others(libc)
    return not libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0)


def _hide_others(libc: Any) -> None:
    """Enter a Landlock domain, where the kernel has it (5.13): what /proc tells of processes outside it is closed.

    Their environment and memory are meant. A domain has to forbid something, so that it opens no file for writing. Of a
    superuser's rights those to read files stay: CAP_PERFMON would open the environment again.
    """
    header, rights = struct.pack("=Ii", CAPABILITY_VERSION, 0), ctypes.create_string_buffer(24)
    if not libc.capget(header, rights):
        effective, permitted, *_ = struct.unpack("=6I", rights.raw)
        libc.capset(header, struct.pack("=6I", effective & CAP_DAC, permitted & CAP_DAC, 0, 0, 0, 0))
    rules = ctypes.create_string_buffer(struct.pack("=Q", LANDLOCK_WRITE_FILE), 8)
    domain = libc.syscall(LANDLOCK_CREATE_RULESET, rules, ctypes.c_size_t(8), 0)
    if domain >= 0:
        libc.syscall(LANDLOCK_RESTRICT_SELF, domain, 0)
        os.close(domain)


def _program(machine: str) -> bytes:
    """Return the filter (classic BPF): what is read, 0 the call's number, 4 the machine, 16 + 8 n the arguments."""

    def at(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("=HBBI", code, yes, no, value)

    refuse, allow = at(RETURN, REFUSE), at(RETURN, ALLOW)
    parts = [at(LOAD, 4), at(EQUAL, AUDIT[machine], 1), refuse, at(LOAD, 0)]
    if machine == "x86_64":
        parts += [at(0x35, 0x40000000, 0, 1), refuse]  # x32 has numbers of its own
    parts += [at(EQUAL, CLONE3, 0, 1), at(RETURN, NO_SUCH)]  # its flags can't be seen: libc then takes clone
    for number in (*REFUSED[machine], *SAME):
        parts += [at(EQUAL, number, 0, 1), refuse]
    parts += [
        at(EQUAL, CLONE[machine], 0, 5),
        at(LOAD, 16),
        at(BITS, NEW_SPACES, 2),
        at(BITS, THREAD, 0, 1),
        allow,
        refuse,
    ]
    for number, argument in OPEN[machine]:
        parts += [at(EQUAL, number, 0, 4), at(LOAD, 16 + 8 * argument), at(BITS, WRITES, 0, 1), refuse, allow]
    parts += [at(EQUAL, PRLIMIT[machine], 0, 4), at(LOAD, 16), at(EQUAL, 0, 0, 1), allow, refuse]
    for number, modes in MODES[machine]:
        tests = [at(EQUAL, mode, len(modes) - place) for place, mode in enumerate(modes)]
        parts += [at(EQUAL, number, 0, len(tests) + 3), at(LOAD, 24), *tests, allow, refuse]
    return b"".join([*parts, allow])


def answer(grade: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Return the score of a case, or what went wrong."""
    try:
        score = grade(case["sample"], case["item"])
        if not isinstance(score, int | float):
            score = float(score)
        if not math.isfinite(score):
            raise ValueError(f"the score is {score}")
    except MemoryError:
        return {"why": "it needs more memory than it may have"}
    except BaseException as error:
        return {"why": f"{type(error).__name__}: {error}"[:ANSWER_MAX]}
    return {"score": score if isinstance(score, bool) else float(score)}


def main() -> None:
    """Take limits and source from the first line, then answer line by line."""
    cases = os.fdopen(os.dup(0), encoding="utf-8")
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    null = os.open(os.devnull, os.O_RDWR)
    for handle in (0, 1, 2):  # what a grader prints goes nowhere
        os.dup2(null, handle)
    given = json.loads(cases.readline())
    limit(given["memory_bytes"])
    locked = lock()
    space: dict[str, Any] = {"__name__": "grader"}
    why = ""
    try:
        exec(compile(given["source"], "grader", "exec"), space)  # noqa: S102 (what this process is for)
    except BaseException as error:
        why = f"{type(error).__name__}: {error}"[:ANSWER_MAX]
    out.write(json.dumps({"why": why, "locked": locked}) + "\n")
    for line in cases:
        out.write(json.dumps(answer(space.get("grade"), json.loads(line))) + "\n")


if __name__ == "__main__":
    main()
