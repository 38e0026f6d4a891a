"""headstart: fine-tune a language model and prove that it got better.

import headstart

run = headstart.tune("data.jsonl")
run.result["verdict"], run.report, run.model
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headstart.errors import HeadstartError
    from headstart.label import predict
    from headstart.run import Run
    from headstart.tuning import tune
    from headstart.verbs import check, compare, evaluate, load, plan

__version__ = "0.1.0"
__all__ = ["HeadstartError", "Run", "check", "compare", "evaluate", "load", "plan", "predict", "tune"]

_HOMES = {
    "HeadstartError": "headstart.errors",
    "Run": "headstart.run",
    "tune": "headstart.tuning",
    "check": "headstart.verbs",
    "compare": "headstart.verbs",
    "evaluate": "headstart.verbs",
    "load": "headstart.verbs",
    "plan": "headstart.verbs",
    "predict": "headstart.label",
}


def __getattr__(name: str) -> Any:
    # Found when first asked for, so that `headstart --help` imports nothing heavy.
    if name not in _HOMES:
        raise AttributeError(f"module 'headstart' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
