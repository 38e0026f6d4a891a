"""Models beside each other as one page: scores, differences, what flipped with both answers, and whose settings differ."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from headstart.evaluate.flips import Flip, Flips
from headstart.evaluate.versus import Pair, Versus
from headstart.report.charts import Change, change_chart
from headstart.report.frame import document, excerpt, marked, section
from headstart.report.tables import cell, table
from headstart.report.words import bounds, chance_words, clearness, named, over, shift, wins_words

EXAMPLES = 5  # flips of a kind that are shown
STYLES = {1: "good", -1: "bad", 0: "flat"}


def versus_page(found: Versus) -> str:
    """Return the page. Everything that comes from data is escaped; nothing is loaded from anywhere."""
    names = [model.model for model in found.models]
    title = f"{', '.join(names)} on {found.rows:,} rows"
    notes = dict.fromkeys(note for model in found.models for note in model.notes)
    body = [
        f"<h1>{html.escape(title)}</h1>",
        *(pair_section(pair) for pair in found.pairs),
        section("Scores", _scores(found)),
        section("Settings of the runs that differ", _settings(names, found.settings)),
        section("Notes", "".join(f"<p>{html.escape(note)}</p>" for note in notes)) if notes else "",
    ]
    return document(title, "".join(body))


def flip_line(flips: Flips) -> str:
    """Return what flipped, as text."""
    return (
        f"{len(flips.fixed):,} fixed, {len(flips.broken):,} broken, {flips.both_right:,} right in both, "
        f"of {flips.rows:,} ({flips.by}; {chance_words(grouped=flips.grouped)} {flips.p:.3g})"
    )


def pair_section(pair: Pair) -> str:
    """Return what two models scored on the same rows, their differences, and what flipped."""
    changes = [
        Change(named(item.name), item.before.to_json(), item.after.to_json(), {1: True, -1: False}.get(item.direction))
        for item in pair.compared
    ]
    rows = [
        [
            cell(named(item.name)),
            cell(f"{item.before.value:.3f}"),
            cell(f"{item.after.value:.3f}"),
            cell(shift(told)),
            cell(clearness(told), STYLES[item.direction]),
            cell(over(told)),
        ]
        for item in pair.compared
        for told in [item.to_json()]
    ]
    note = (
        "<p>In brackets the 95% interval of the paired difference (bootstrap over rows, or over groups of rows that stand or fall "
        "together; of what is right or wrong, from the counts).</p>"
    )
    wins = (wins_words(item.to_json(), f"Answers of {pair.b}", f"those of {pair.a}") for item in pair.wins)
    note += "".join(f"<p>{html.escape(said)}.</p>" for said in wins)
    scores = change_chart(changes) + table(["", pair.a, pair.b, "difference", "", "over"], rows) + note
    return section(f"{pair.a} → {pair.b}", scores + (_flips(pair) if pair.flips else ""))


def _flips(pair: Pair) -> str:
    flips = pair.flips
    if flips is None:
        return ""
    parts = [f"<p>{html.escape(flip_line(flips))}. Marked is what stands elsewhere or not at all in the reference.</p>"]
    for title, some in (("Fixed", flips.fixed), ("Broken", flips.broken)):
        shown = "".join(_flip(flip, pair) for flip in some[:EXAMPLES])
        more = f"<p>and {len(some) - EXAMPLES:,} more, in --json.</p>" if len(some) > EXAMPLES else ""
        parts.append(f"<h3>{title}</h3>{shown}{more}" if some else "")
    return "".join(parts)


def _flip(flip: Flip, pair: Pair) -> str:
    texts = (
        (pair.a, "before", flip.first.answer),
        (pair.b, "after", flip.second.answer),
        ("reference", "", flip.second.reference),
    )
    columns = "".join(
        f'<div class="{style}"><h4>{html.escape(name)}</h4><pre>{marked(text or "", flip.second.reference)}</pre></div>'
        for name, style, text in texts
    )
    head = f"<details><summary>{html.escape(flip.second.where)}</summary>"
    return f'{head}<pre class="asked">{excerpt(flip.second.asked)}</pre><div class="samples">{columns}</div></details>'


def _scores(found: Versus) -> str:
    metrics = dict.fromkeys(name for model in found.models for name in model.metrics)
    rows = [
        [cell(named(name)), *(cell(_with_bounds(model.metrics.get(name))) for model in found.models)]
        for name in metrics
    ]
    note = "<p>Each model by itself, with its 95% interval; whether two differ stands in the pairs above.</p>"
    return table(["", *(model.model for model in found.models)], rows) + note


def _with_bounds(value: Mapping[str, Any] | None) -> str:
    return f"{value['value']:.3f} [{bounds(value)}]" if value else "not measured"


def _settings(names: Sequence[str], settings: Mapping[str, Sequence[Any]]) -> str:
    if not settings:
        return "<p>None, or fewer than two of the models are results of runs.</p>"
    rows = [[cell(key), *(cell("" if v is None else str(v)) for v in values)] for key, values in settings.items()]
    return table(["setting", *names], rows)
