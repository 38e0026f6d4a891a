"""headstart: fine-tune a model and prove that it got better.

import headstart

run = headstart.tune("data.jsonl")
run.result["verdict"], run.report, run.model
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headstart.errors import HeadstartError
    from headstart.label import predict
    from headstart.run import Run
    from headstart.trials.curve import curve
    from headstart.trials.sweep import sweep
    from headstart.tune import tune
    from headstart.update import update
    from headstart.verbs import check, compare, evaluate, load, plan

# Torch reads this once, when it first asks for memory: large blocks then lie in large pages, which saves a tenth of a step's
# time on a CPU (docs/log.md). Where torch was at work before, or the system has no such pages, nothing changes.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"
__all__ = [
    "HeadstartError",
    "Run",
    "check",
    "compare",
    "curve",
    "evaluate",
    "load",
    "plan",
    "predict",
    "sweep",
    "tune",
    "update",
]

_HOMES = {
    "HeadstartError": "headstart.errors",
    "Run": "headstart.run",
    "tune": "headstart.tune",
    "update": "headstart.update",
    "predict": "headstart.label",
    "curve": "headstart.trials.curve",
    "sweep": "headstart.trials.sweep",
    **dict.fromkeys(("check", "compare", "evaluate", "load", "plan"), "headstart.verbs"),
}


class _Face(ModuleType):
    """The package as users see it: its functions, also where a room of it bears the same name."""


def _offer(name: str) -> property:
    # Found when asked for, so that `headstart --help` imports nothing heavy. Python sets a room on its package once it
    # is imported, which would hide the function of that name; here it sets nothing.
    def find(_: ModuleType) -> Any:
        return getattr(import_module(_HOMES[name]), name)

    return property(find, lambda _face, _room: None)


for _name in _HOMES:
    setattr(_Face, _name, _offer(_name))
sys.modules[__name__].__class__ = _Face
