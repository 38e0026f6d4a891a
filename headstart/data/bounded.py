"""Chat templates within bounds: they come with models, from anyone, and may neither run nor write without end.

A template is compiled in the sandbox of transformers, with a step added wherever it could go on and on: each turn of a
loop and each call of a macro is counted, and so is all that it writes; texts that it puts together have a length too. So
what is refused doesn't depend on the machine, but for the time that nothing well meant takes.
"""

from __future__ import annotations

import time
from typing import Any

import jinja2
from jinja2 import nodes

TURNS_MAX = 1_000_000
LENGTH_MAX = 1 << 26  # characters; a row has at most 16 MiB
TIME_MAX_S = 60.0
# Names that no template can spell, since a blank stands in them.
TURN, WRITE, HOLD = "headstart turn", "headstart write", "headstart hold"


class BoundsError(Exception):
    """A template that takes or gives more than any row needs."""


class BoundedTemplate:
    """A template of `environment`, which is left as it is. Not for several threads at once."""

    def __init__(self, environment: jinja2.Environment, text: str) -> None:
        own = environment.overlay()
        own.filters = {**environment.filters, TURN: self._turn, WRITE: self._write, HOLD: self._hold}
        own.globals = {name: value for name, value in environment.globals.items() if name != "lipsum"}
        _bind_products(own)
        tree: Any = own.parse(text)
        for call in list(tree.find_all((nodes.Call, nodes.Filter))):
            call.args = [_through(HOLD, argument) for argument in call.args]
            for pair in call.kwargs:
                pair.value = _through(HOLD, pair.value)
        for block in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            block.body.insert(0, nodes.ExprStmt(_through(TURN, nodes.Const(None))))
            if isinstance(block, nodes.For) and block.test is not None:
                block.test = _through(TURN, block.test)
        for output in tree.find_all(nodes.Output):
            output.nodes = [_through(WRITE, child) for child in output.nodes]
        for assigned in tree.find_all(nodes.Assign):
            assigned.node = _through(HOLD, assigned.node)
        self._template = own.from_string(tree)
        self._begin()

    def render(self, **values: Any) -> str:
        """Return what the template writes. Raises BoundsError, and whatever the template raises."""
        self._begin()
        return self._template.render(**values)

    def _begin(self) -> None:
        self._turns, self._written, self._until = 0, 0, time.monotonic() + TIME_MAX_S

    @jinja2.pass_context
    def _turn(self, _: Any, value: Any) -> Any:
        self._turns += 1
        if self._turns > TURNS_MAX:
            raise BoundsError(f"its loops turn more than {TURNS_MAX:,} times")
        if time.monotonic() > self._until:
            raise BoundsError(f"it takes longer than {TIME_MAX_S:.0f} s")
        return value

    @jinja2.pass_context
    def _write(self, _: Any, value: Any) -> Any:
        text = value if isinstance(value, str) else str(value)
        self._written += len(text)
        if self._written > LENGTH_MAX:
            raise BoundsError(f"it writes more than {LENGTH_MAX:,} characters")
        return text

    @jinja2.pass_context
    def _hold(self, _: Any, value: Any) -> Any:
        size = value if isinstance(value, int) else len(value) if isinstance(value, str | list | tuple) else 0
        if size > LENGTH_MAX:
            raise BoundsError(f"it puts together more than {LENGTH_MAX:,} characters")
        return value


def _through(step: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, step, [], [], None, None)


def _bind_products(environment: Any) -> None:
    """Let products and powers be refused before they are made."""
    times, power = environment.binop_table["*"], environment.binop_table["**"]

    def bounded_times(a: Any, b: Any) -> Any:
        sizes = [len(x) if isinstance(x, str | list | tuple) else x for x in (a, b)]
        if sizes != [a, b] and sizes[0] * sizes[1] > LENGTH_MAX:
            raise BoundsError(f"it puts together more than {LENGTH_MAX:,} characters")
        return times(a, b)

    def bounded_power(a: Any, b: Any) -> Any:
        if abs(b) > 64:
            raise BoundsError("it takes a power over 64")
        return power(a, b)

    environment.intercepted_binops = frozenset({"*", "**"})
    environment.binop_table = {**environment.binop_table, "*": bounded_times, "**": bounded_power}
