"""A run at several strengths as one page: what each gives at the job, and what it leaves of what was known."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from headstart.report.charts import Series, line_chart
from headstart.report.frame import document, section
from headstart.report.tables import cell, table
from headstart.report.words import clearness, named, over, shift

STYLES = {"kept": "good", "lost": "bad", "better": "good", "worse": "bad"}
LINES = ("watch", "train")


def strength_lines(found: Mapping[str, Any]) -> list[tuple[str, str, str, str, str, str]]:
    """Return a line a strength: itself, the metric, its difference to strength 0, how sure that is, the guard, its verdict."""
    lines = []
    for item in found["strengths"]:
        gap, guard = item["difference"], item["guard"]
        parts = {} if isinstance(guard, str) else guard["parts"]
        grown = ", ".join(f"{name} {part['loss']['value']:+.1%}" for name, part in parts.items())
        clear = clearness(gap) if item["strength"] else ""
        verdict = guard if isinstance(guard, str) else guard["verdict"]
        lines.append((f"{item['strength']:g}", f"{item['value']['value']:.3f}", shift(gap), clear, grown, verdict))
    return lines


def strength_words(found: Mapping[str, Any]) -> str:
    """Say up to which strength what was known holds."""
    holds, kept = found["holds"], found["kept"]
    if holds is None:
        return "what was known before was not measured"
    said = f"the greatest strength whose guard holds is {holds:g}: beyond it, something of what was known is lost for certain"
    if holds == max(item["strength"] for item in found["strengths"]):
        said = "the guard holds at full strength: nothing of what was known is lost for certain"
    return f"{said}; it is kept for certain {f'up to {kept:g}' if kept else 'only without what was learned'}"


def strength_page(found: Mapping[str, Any]) -> str:
    """Return the page. Nothing in it is loaded from anywhere."""
    title = f"{found['run']} at several strengths"
    rows = [
        [
            cell(strength),
            cell(value),
            cell(gap),
            cell(clear, STYLES.get(clear, "flat")),
            cell(grown),
            cell(kept, STYLES.get(kept, "flat")),
        ]
        for strength, value, gap, clear, grown, kept in strength_lines(found)
    ]
    head = ["strength", named(found["metric"]), "against strength 0", "", "loss of the guard grew by", ""]
    note = (
        f"<p>At strength 0 it is {html.escape(found['zero'])}, at 1 the run; between them each weight lies on the line from one to the other. "
        f"Scored on {over(found)} {'that were never trained on' if found['own'] else 'of the data that was named'}, and on the guard. In brackets the 95% interval of "
        "the paired difference. Write a model at a strength: <code>headstart strength RUN --at 0.5 -o FOLDER</code>.</p>"
    )
    lead = strength_words(found)
    body = (
        f'<h1>{html.escape(title)}</h1><p class="lead">{html.escape(lead[0].upper() + lead[1:])}.</p>'
        + section("The job", _job_chart(found))
        + section("What was known", _guard_chart(found) or "<p>Not measured.</p>")
        + section("Scores", table(head, rows) + note)
    )
    return document(title, body)


def _job_chart(found: Mapping[str, Any]) -> str:
    points = [(item["strength"], item["value"]["value"]) for item in found["strengths"]]
    return line_chart("The job by strength", [Series(named(found["metric"]), points, "watch", dots=True)], "strength")


def _guard_chart(found: Mapping[str, Any]) -> str:
    """Draw by how much the loss of each part of the guard grew, in percent, with the bound."""
    measured = [item for item in found["strengths"] if not isinstance(item["guard"], str)]
    if not measured:
        return ""
    series = [
        Series(
            f"{name}: loss grew by, %",
            [(item["strength"], 100 * item["guard"]["parts"][name]["loss"]["value"]) for item in measured],
            LINES[number % len(LINES)],
            dots=True,
        )
        for number, name in enumerate(measured[0]["guard"]["parts"])
    ]
    bound = 100 * measured[0]["guard"]["bound"]
    ends = [(item["strength"], bound) for item in (measured[0], measured[-1])]
    return line_chart("The guard by strength", [*series, Series("the bound", ends, "bound")], "strength")
