"""What every page is made of: its frame, its sections, and texts of data in it."""

from __future__ import annotations

import html
from importlib import resources

TEXT_MAX = 4_000


def document(title: str, body: str) -> str:
    """Return a page. Nothing in it is loaded from anywhere; `body` is HTML, `title` text."""
    style = resources.files("headstart.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{style}</style></head><body>{body}</body></html>\n"
    )


def section(title: str, body: str) -> str:
    """Return a section; `body` is HTML."""
    return f"<h2>{html.escape(title)}</h2>{body}"


def excerpt(text: str) -> str:
    """Return a text of data as HTML, cut where it is long, which is said."""
    cut = text if len(text) <= TEXT_MAX else f"{text[:TEXT_MAX]} [{len(text) - TEXT_MAX:,} more characters]"
    return html.escape(cut)
