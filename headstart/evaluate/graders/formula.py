"""A formula over scores, as `0.7 * style + 0.3 * min(1, facts)`: parsed by Python, computed by us, nothing else is run."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

LENGTH_MAX = 1_000
BINARY: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: math.pow,
}
UNARY: Mapping[type[ast.unaryop], Callable[[float], float]] = {ast.USub: operator.neg, ast.UAdd: operator.pos}
FUNCTIONS: Mapping[str, tuple[Callable[..., float], int | None]] = {  # and how many numbers it takes
    "min": (min, None),
    "max": (max, None),
    "abs": (abs, 1),
    "floor": (math.floor, 1),
    "ceil": (math.ceil, 1),
    "exp": (math.exp, 1),
    "sqrt": (math.sqrt, 1),
    "log": (math.log, 1),
}


@dataclass(frozen=True)
class Formula:
    """A formula with +, -, *, /, ^ (power), brackets, numbers, names, and the functions of OpenAI's multi graders."""

    text: str

    @cached_property
    def _tree(self) -> ast.expr:
        if len(self.text) > LENGTH_MAX:
            raise ValueError(f"a formula has at most {LENGTH_MAX:,} characters")
        try:
            return ast.parse(self.text.strip().replace("^", "**"), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"the formula {self.text!r} can't be read: {getattr(error, 'msg', error)}") from None

    def check(self, names: Collection[str]) -> None:
        """Raise ValueError where the formula is none, names what isn't among `names`, or leaves one of them out."""
        used = _names(self._tree, self.text)
        if unknown := sorted(used - set(names)):
            raise ValueError(f"the formula names {unknown}, and there are {sorted(names)}")
        if unused := sorted(set(names) - used):
            raise ValueError(f"the formula doesn't use {unused}: leave it out, or name it")

    def value(self, scores: Mapping[str, float]) -> float:
        """Return what the formula gives. Raises ArithmeticError or ValueError where that is no number."""
        found = float(_value(self._tree, scores))
        if not math.isfinite(found):
            raise ArithmeticError("the formula gives no finite number")
        return found


def _names(node: ast.expr, text: str) -> set[str]:
    """Return the names of a formula. Raises ValueError where it holds anything else than a formula does."""
    match node:
        case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
            return set()
        case ast.Name(id=name):
            return {name}
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            return _names(left, text) | _names(right, text)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in UNARY:
            return _names(operand, text)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS and args:
            if (len(args) == 1) != (FUNCTIONS[name][1] == 1):
                raise ValueError(f"{name} takes {'one number' if FUNCTIONS[name][1] else 'two or more'}, in {text!r}")
            return set().union(*(_names(arg, text) for arg in args))
    what = ast.unparse(node)
    raise ValueError(f"{what!r:.60} is no part of a formula: it has + - * / ^, numbers, names, {', '.join(FUNCTIONS)}")


def _value(node: Any, scores: Mapping[str, float]) -> float:
    match node:
        case ast.Constant(value=int() | float() as value):
            return float(value)
        case ast.Name(id=name):
            return scores[name]
        case ast.BinOp(left=left, op=op, right=right):
            return BINARY[type(op)](_value(left, scores), _value(right, scores))
        case ast.UnaryOp(op=op, operand=operand):
            return UNARY[type(op)](_value(operand, scores))
    function, _ = FUNCTIONS[node.func.id]
    return function(*(_value(arg, scores) for arg in node.args))
