"""What every page is made of: its frame, its sections, and texts of data in it."""

from __future__ import annotations

import difflib
import html
import re
from importlib import resources

TEXT_MAX = 4_000
ALIKE = 0.5  # of the words, for the others to be marked
PAIRS_MOST = 40_000  # of words that are held against each other
PIECE = re.compile(r"\S+\s*|\s+")


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
    return html.escape(_cut(text))


def marked(text: str, other: str) -> str:
    """Return a text of data as HTML, with the words marked that `other` doesn't have at their place.

    White space is no difference. Where less than half is alike nothing is marked: it would be most of the text.
    """
    ours, theirs = (PIECE.findall(side[:TEXT_MAX]) for side in (text, other))
    words = [[piece.strip() for piece in side] for side in (ours, theirs)]
    matcher = difflib.SequenceMatcher(a=words[0], b=words[1], autojunk=False)
    # To find what is alike takes long where words stand again and again, as in a text that goes round in circles.
    if len(ours) * len(theirs) > PAIRS_MOST or matcher.quick_ratio() < ALIKE or matcher.ratio() < ALIKE:
        return excerpt(text)
    parts = []
    for kind, begin, end, *_ in matcher.get_opcodes():
        part = "".join(ours[begin:end])
        inner = part.rstrip()
        different = kind != "equal" and inner
        parts.append(f"<mark>{html.escape(inner)}</mark>{part[len(inner) :]}" if different else html.escape(part))
    return "".join(parts) + html.escape(_cut(text)[TEXT_MAX:])


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_MAX else f"{text[:TEXT_MAX]} [{len(text) - TEXT_MAX:,} more characters]"
