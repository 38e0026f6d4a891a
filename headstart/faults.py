"""Named places at which a run can be made to fail, so that what it survives can be shown: `HEADSTART_FAIL`.

HEADSTART_FAIL=step.updated:3                       killed when it is there for the third time
HEADSTART_FAIL=folder.synced@step-000004            killed there when that folder is written
HEADSTART_FAIL=file.written@result.json=ENOSPC      there the disk is full, once
HEADSTART_FAIL=folder.written:2+=EIO                there writing fails from the second time on
HEADSTART_FAIL=step.forward:2=memory                there the memory runs out
HEADSTART_FAIL=checkpoint.pruning=SIGTERM           there a signal comes
"""

from __future__ import annotations

import errno
import os
import re
import signal

VARIABLE = "HEADSTART_FAIL"
# Every place, in the order in which a run comes to them.
POINTS = (
    "file.made",  # a temporary file is there, with nothing in it
    "file.written",  # with all of it in it, and nothing synced
    "file.synced",
    "file.renamed",
    "folder.made",  # a temporary folder is there, with nothing in it
    "folder.written",  # with all files in it, and nothing synced
    "folder.synced",
    "folder.aside",  # what it replaces was renamed, and it is not yet in its place
    "folder.renamed",
    "line.made",  # a line is about to be added to a log
    "evaluation.pack",  # a pack is about to be scored
    "evaluation.scored",  # held-out rows were scored, and nothing of it is written
    "step.forward",  # a pack went forward
    "step.backward",  # and backward
    "step.gradient",  # all packs of a step did
    "step.updated",  # the weights have changed
    "step.told",  # and it stands in the metrics
    "checkpoint.tensors",  # tensors are in the new folder, and nothing else
    "checkpoint.values",  # and the plain values, without a manifest
    "checkpoint.committed",  # a checkpoint is in its place, and older ones are still there
    "checkpoint.pruning",  # one of these is about to be deleted
)
_RULE = re.compile(r"(?P<point>[a-z.]+)(?:@(?P<name>[^:=]+))?(?::(?P<time>\d+))?(?P<on>\+)?(?:=(?P<how>\w+))?")
_arrivals: dict[tuple[str, str], int] = {}  # how often a rule was met, by the whole of the variable and the rule


def reach(point: str, name: str = "") -> None:
    """Fail here, if that is asked for. `name` is that of the file or folder at hand.

    Raises OSError or MemoryError as asked; a kill or a signal is sent to this process.
    """
    asked = os.environ.get(VARIABLE)
    if not asked:
        return
    for text in asked.split(","):
        rule = _RULE.fullmatch(text)
        if rule is None or rule["point"] not in POINTS:
            raise ValueError(f"{VARIABLE}={text}: there are {', '.join(POINTS)}")
        if rule["point"] != point or rule["name"] not in (None, name):
            continue
        times = _arrivals[asked, text] = _arrivals.get((asked, text), 0) + 1
        wanted = int(rule["time"] or 1)
        if times == wanted or (rule["on"] and times > wanted):
            _fail(rule["how"] or "SIGKILL", name)


def _fail(how: str, name: str) -> None:
    if how == "memory":
        raise MemoryError(f"{VARIABLE} asks for it")
    if how.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, how))
        return
    number = getattr(errno, how)
    raise OSError(number, os.strerror(number), name)
