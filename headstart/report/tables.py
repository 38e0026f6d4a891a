"""Tables as HTML, in which everything that comes from data is escaped."""

from __future__ import annotations

import html
from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; cells come from `cell`."""
    top = f"<tr>{''.join(f'<th scope=col>{html.escape(name)}</th>' for name in head)}</tr>" if head else ""
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="scroll"><table>{top}{body}</table></div>'


def cell(text: str, style: str = "") -> str:
    """Return a cell that holds a text."""
    return f"<td{f' class={style}' if style else ''}>{html.escape(text)}</td>"
