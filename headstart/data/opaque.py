"""Chat templates that write contents and never look into them: what they write around contents follows from the roles.

Such a template is known by reading its syntax tree: a content may be written, joined with other text, stripped, given a
name, or asked whether it is there; anything else looks into it. Where this can't be seen, the template is not opaque,
which costs time and nothing else: each row is then rendered by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

# What an expression can be: text that no content is in, a content, text around contents, a message, several messages.
PLAIN, CONTENT, TEXT, MESSAGE, MESSAGES = "plain", "content", "text", "message", "messages"
WRITTEN = (PLAIN, CONTENT, TEXT)
STRIPS = ("strip", "lstrip", "rstrip", "trim")
# Tests of what kind of thing a value is, which are the same for every content.
OF_KIND = ("string", "defined", "undefined", "none", "mapping", "iterable", "sequence")
OF_LOOP = ("index", "index0", "revindex", "revindex0", "first", "last", "length", "depth", "depth0")


class _LookedIntoError(Exception):
    pass


def is_opaque(template: str) -> bool:
    """Tell whether what a chat template (Jinja) makes of turns with a role and a text depends on the texts' places alone.

    The texts stand in what it writes as they are, or stripped, in the same way at the same place. Only turns of a role
    and a content that isn't white space are spoken of.
    """
    import jinja2

    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)  # noqa: S701 (is never run)
    except jinja2.TemplateSyntaxError:
        return False
    reading = _Reading()
    try:
        known: dict[str, str] | None = None
        while known != reading.names:  # a loop may use a name that is given further down
            known = dict(reading.names)
            reading.statement(tree)
    except _LookedIntoError:
        return False
    return True


class _Reading:
    """A template that is read: what each name stands for so far. Raises _LookedIntoError where a content is looked into."""

    def __init__(self) -> None:
        self.names = {"messages": MESSAGES}

    def statement(self, node: Any) -> None:
        read = _STATEMENTS.get(type(node).__name__)
        if read is None:
            raise _LookedIntoError
        read(self, node)

    def _all(self, nodes: Any) -> None:
        for node in nodes:
            self.statement(node)

    def _body(self, node: Any) -> None:
        self._all(node.body)

    def _output(self, node: Any) -> None:
        for child in node.nodes:
            self._need(child, *WRITTEN)

    def _if(self, node: Any) -> None:
        self._need(node.test, *WRITTEN, MESSAGES)
        self._all([*node.body, *node.elif_, *node.else_])

    def _for(self, node: Any) -> None:
        kind = {MESSAGES: MESSAGE, PLAIN: PLAIN}.get(self.kind(node.iter))
        if kind is None or (kind == MESSAGE and type(node.target).__name__ != "Name"):
            raise _LookedIntoError
        self._name(node.target, kind)
        if node.test is not None:
            self._need(node.test, PLAIN)
        self._all([*node.body, *node.else_])

    def _assign(self, node: Any) -> None:
        self._name(node.target, self.kind(node.node))

    def _name(self, target: Any, kind: str) -> None:
        names = target.items if type(target).__name__ == "Tuple" else [target]
        for name in names:
            if type(name).__name__ != "Name" or name.name == "loop":
                if kind != PLAIN:  # an attribute of a namespace, say
                    raise _LookedIntoError
            else:
                self.names[name.name] = _either(self.names.get(name.name, kind), kind)

    def _need(self, node: Any, *kinds: str) -> str:
        kind = self.kind(node)
        if kind not in kinds:
            raise _LookedIntoError
        return kind

    def kind(self, node: Any) -> str:
        """Return what an expression is."""
        read = _EXPRESSIONS.get(type(node).__name__)
        if read is not None:
            return read(self, node)
        for child in node.iter_child_nodes():
            self._need(child, PLAIN)
        return PLAIN

    def _of_name(self, node: Any) -> str:
        if node.name == "loop":  # it knows the messages before and behind
            raise _LookedIntoError
        return self.names.get(node.name, PLAIN)

    def _join(self, node: Any) -> str:
        parts = node.nodes if type(node).__name__ == "Concat" else (node.left, node.right)
        kinds = {self._need(part, *WRITTEN) for part in parts}
        return PLAIN if kinds == {PLAIN} else TEXT

    def _getitem(self, node: Any) -> str:
        kind = self.kind(node.node)
        if kind == MESSAGES:
            self._need(node.arg, PLAIN)
            return MESSAGES if type(node.arg).__name__ == "Slice" else MESSAGE
        if kind == MESSAGE:
            return self._entry(node.arg.value if type(node.arg).__name__ == "Const" else None)
        if kind != PLAIN:
            raise _LookedIntoError
        return self._need(node.arg, PLAIN)

    def _getattr(self, node: Any) -> str:
        if type(node.node).__name__ == "Name" and node.node.name == "loop" and node.attr in OF_LOOP:
            return PLAIN
        kind = self.kind(node.node)
        if kind == MESSAGE:
            return self._entry(node.attr)
        if kind != PLAIN:
            raise _LookedIntoError
        return PLAIN

    @staticmethod
    def _entry(key: Any) -> str:
        # What a dict can do by itself (items, values) would give contents too.
        if not isinstance(key, str) or hasattr(dict, key):
            raise _LookedIntoError
        return CONTENT if key == "content" else PLAIN

    def _call(self, node: Any) -> str:
        callee, arguments = node.node, [*node.args, *node.kwargs]
        if type(callee).__name__ == "Getattr":
            kind = self.kind(callee.node)
            if kind == CONTENT and callee.attr in STRIPS and not arguments:
                return CONTENT
            if kind == MESSAGE and callee.attr == "get" and node.args and type(node.args[0]).__name__ == "Const":
                self._plain(node.args[1:])
                return self._entry(node.args[0].value)
        self._need(callee, PLAIN)
        self._plain([*arguments, *filter(None, (node.dyn_args, node.dyn_kwargs))])
        return PLAIN

    def _filter(self, node: Any) -> str:
        kind = PLAIN if node.node is None else self.kind(node.node)
        if kind == CONTENT and node.name == "trim" and not node.args and not node.kwargs:
            return CONTENT
        if kind == MESSAGES and node.name in ("length", "count"):
            return PLAIN
        if kind == MESSAGES and node.name in ("first", "last"):
            return MESSAGE
        if kind != PLAIN:
            raise _LookedIntoError
        self._plain([*node.args, *node.kwargs])
        return PLAIN

    def _test(self, node: Any) -> str:
        if node.name not in OF_KIND:
            self._need(node.node, PLAIN)
        else:
            self.kind(node.node)
        self._plain([*node.args, *node.kwargs])
        return PLAIN

    def _compare(self, node: Any) -> str:
        kind = self.kind(node.expr)
        for operand in node.ops:
            other = self.kind(operand.expr)
            asks_for_key = operand.op in ("in", "notin") and kind == PLAIN and other == MESSAGE
            if not asks_for_key and {kind, other} != {PLAIN}:
                raise _LookedIntoError
            kind = other
        return PLAIN

    def _not(self, node: Any) -> str:
        self._need(node.node, *WRITTEN, MESSAGES)
        return PLAIN

    def _either_of(self, node: Any) -> str:
        return _either(self.kind(node.left), self.kind(node.right))

    def _choice(self, node: Any) -> str:
        self._need(node.test, *WRITTEN, MESSAGES)
        return _either(self.kind(node.expr1), self.kind(node.expr2) if node.expr2 is not None else PLAIN)

    def _plain(self, nodes: Any) -> None:
        for node in nodes:
            self._need(node, PLAIN)


def _either(a: str, b: str) -> str:
    """Return what something is that may be one or the other."""
    kinds = {a, b}
    if len(kinds) == 1:
        return a
    if not kinds <= set(WRITTEN):
        raise _LookedIntoError
    return TEXT if TEXT in kinds else CONTENT


_STATEMENTS: Mapping[str, Callable[[_Reading, Any], None]] = {
    "Template": _Reading._body,
    "Output": _Reading._output,
    "If": _Reading._if,
    "For": _Reading._for,
    "Assign": _Reading._assign,
    "Break": lambda _, __: None,
    "Continue": lambda _, __: None,
}
_EXPRESSIONS: Mapping[str, Callable[[_Reading, Any], str]] = {
    "Name": _Reading._of_name,
    "TemplateData": lambda _, __: PLAIN,
    "Add": _Reading._join,
    "Concat": _Reading._join,
    "Getitem": _Reading._getitem,
    "Getattr": _Reading._getattr,
    "Call": _Reading._call,
    "Filter": _Reading._filter,
    "Test": _Reading._test,
    "Compare": _Reading._compare,
    "Not": _Reading._not,
    "And": _Reading._either_of,
    "Or": _Reading._either_of,
    "CondExpr": _Reading._choice,
}
