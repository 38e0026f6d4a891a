"""JSON as its standard has it, and no more: a name once, numbers that can be held, and no deeper than a row may be."""

from __future__ import annotations

import json
import math
from typing import Any

DEPTH_MAX = 64


class DuplicateKeyError(ValueError):
    """A name that stands twice in one object, of which Python would keep the last value."""


class DepthError(ValueError):
    """Lists and objects inside of each other, so many that what reads them would run out of stack."""

    def __init__(self) -> None:
        super().__init__(f"nested too deep, over {DEPTH_MAX} levels")


def parse_json(text: str) -> Any:
    """Return the one value that a text holds. Raises ValueError, as JSONDecodeError where it has a place."""
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise DepthError from None
    _check_depth(value, text.count("[") + text.count("{"))
    return value


def parse_json_at(text: str, position: int) -> tuple[Any, int]:
    """Return the value that begins at `position`, and where it ends. Raises ValueError."""
    try:
        value, end = _DECODER.raw_decode(text, position)
    except RecursionError:
        raise DepthError from None
    _check_depth(value, text.count("[", position, end) + text.count("{", position, end))
    return value, end


def _check_depth(value: Any, brackets: int) -> None:
    if brackets <= DEPTH_MAX:
        return
    level = [value]
    for _ in range(DEPTH_MAX):
        level = [inner for item in level for inner in _inside(item)]
    if any(isinstance(item, dict | list) for item in level):
        raise DepthError


def _inside(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DuplicateKeyError(twice)
    return fields


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text:.40} is larger than any number that can be held")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)
