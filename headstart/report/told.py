"""What the report shows of rows that were told something: classes, entities, which is taken for which, and how sure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from headstart.evaluate.compare import BINS, Calibration
from headstart.evaluate.entities import entities, has_entities
from headstart.evaluate.measure import Measured, RowResult
from headstart.report.charts import Bin, heat_map, reliability_chart, scatter_chart
from headstart.report.tables import cell, table

CLASSES, CONFUSED, DRAWN = 30, 15, 20  # shown at most
POINTS = 1_000
LEADS = {  # of answers that are held against each other: what heads their table, and the column of the better one
    "preference": ("Pairs that gained least", "the better answer gained, nats"),
    "reward": ("Pairs in the least right order", "reward of the better answer"),
}


def told_sections(before: Measured, after: Measured) -> list[tuple[str, str]]:
    """Return the sections of a report, title and body, that suit the task."""
    sides = (
        [row for row in side.own if after.task != "chat" or row.probability is not None] for side in (before, after)
    )
    before, after = (Measured(rows, after.task) for rows in sides)
    if after.task in ("classification", "images") or (after.task == "chat" and after.rows):
        return [
            ("Classes", _classes(_of_rows(before), _of_rows(after))),
            ("What is taken for what", _confusion(after)),
            ("How sure it is", _sure(before, after)),
        ]
    if after.task == "multilabel":
        return [("Classes", _classes(_of_sets(before), _of_sets(after)))]
    if after.task == "tagging":
        return [("Entities" if _has_entities(after) else "Tags", _classes(_of_tags(before), _of_tags(after)))]
    if after.task == "regression":
        return [("Told against right", _numbers(after))]
    if after.task in LEADS:
        title, what = LEADS[after.task]
        return [(title, _leads(after, what))]
    return []


class _Counts(NamedTuple):
    """How often each class is right, told and there."""

    right: Counter[str]
    told: Counter[str]
    there: Counter[str]

    def f1(self, name: str) -> float:
        return 2 * self.right[name] / max(1, self.told[name] + self.there[name])


def _of_rows(measured: Measured) -> _Counts:
    rows = measured.rows
    return _Counts(
        Counter(row.reference for row in rows if row.answer == row.reference),
        Counter(row.answer or "" for row in rows),
        Counter(row.reference for row in rows),
    )


def _of_sets(measured: Measured) -> _Counts:
    rows = measured.rows
    return _Counts(
        Counter(name for row in rows for name in row.truth if name in row.found),
        Counter(name for row in rows for name in row.found),
        Counter(name for row in rows for name in row.truth),
    )


def _has_entities(measured: Measured) -> bool:
    return any(has_entities(row.truth) for row in measured.rows)


def _of_tags(measured: Measured) -> _Counts:
    right, told, there = Counter[str](), Counter[str](), Counter[str]()
    by_entity = _has_entities(measured)
    for row in measured.rows:
        if by_entity:
            true, found = set(entities(row.truth)), set(entities(row.found))
            right.update(e.type for e in true & found)
            told.update(e.type for e in found)
            there.update(e.type for e in true)
        else:
            right.update(t for t, f in zip(row.truth, row.found, strict=True) if t == f)
            told.update(row.found)
            there.update(row.truth)
    return _Counts(right, told, there)


def _classes(before: _Counts, after: _Counts) -> str:
    """Return what each class gained, the weakest first."""
    rows = []
    for name, count in sorted(after.there.items(), key=lambda item: (after.f1(item[0]), item[0])):
        precision, recall = after.right[name] / max(1, after.told[name]), after.right[name] / count
        shown = [f"{value:.3f}" for value in (before.f1(name), after.f1(name), precision, recall)]
        rows.append([cell(text) for text in (name, f"{count:,}", *shown)])
    head = ["class", "there", "F1 before", "F1 after", "precision", "recall"]
    more = f"<p>and {len(rows) - CLASSES:,} more classes with a higher F1.</p>" if len(rows) > CLASSES else ""
    return table(head, rows[:CLASSES]) + more


def _confusion(after: Measured) -> str:
    """Return the confusion matrix as a picture (of many classes, that of those with the most mistakes), and as a list."""
    rows = after.rows
    wrong = Counter((row.reference, row.answer or "") for row in rows if row.answer != row.reference)
    names = sorted({row.reference for row in rows})
    if len(names) > DRAWN:
        mistakes: Counter[str] = Counter()
        for pair, count in wrong.items():
            mistakes.update(dict.fromkeys(pair, count))
        names = sorted(name for name, _ in mistakes.most_common(DRAWN))
    place = {name: number for number, name in enumerate(names)}
    counts = np.zeros((len(names), len(names)), int)
    for row in rows:
        if row.reference in place and row.answer in place:
            counts[place[row.reference], place[row.answer or ""]] += 1
    drawn = heat_map(names, counts.tolist()) if names else ""
    mixed = [[cell(a), cell(b), cell(f"{count:,}")] for (a, b), count in wrong.most_common(CONFUSED)]
    listed = table(["class", "taken for", "rows"], mixed) if mixed else "<p>No row was taken for another class.</p>"
    note = f"<p>The {DRAWN} classes with the most mistakes.</p>" if len(names) == DRAWN else ""
    return f"{drawn}{note}<h3>Taken for another</h3>{listed}"


def _sure(before: Measured, after: Measured) -> str:
    """Return how often it is right where it is so sure, as a picture."""
    note = "<p>On the line, it is right as often as it says. The larger a point, the more rows lie there.</p>"
    return reliability_chart(_bins(before.rows), _bins(after.rows)) + note


def _bins(rows: Sequence[RowResult]) -> list[Bin]:
    sure = np.array([row.probability or 0.0 for row in rows])
    right = np.array([float(row.answer == row.reference) for row in rows])
    places = Calibration(sure, right).bins()
    found = []
    for number in range(BINS):
        mine = places == number
        if mine.any():
            found.append(Bin(float(sure[mine].mean()), float(right[mine].mean()), float(mine.mean())))
    return found


def _leads(after: Measured, what: str) -> str:
    """Return the rows in which the chosen answer gained least over the others; of lone answers, those that went the wrong way.

    A reward stands where a gain does. `what` heads its column.
    """
    rows = []
    for row in after.own:
        gains = [logprob - reference for logprob, _, reference in row.found]
        best = max(range(len(gains)), key=lambda n: row.truth[n])
        others = [gain for n, gain in enumerate(gains) if n != best]
        lead = gains[best] - sum(others) / len(others) if others else gains[best] * (1 if row.truth[best] > 0.5 else -1)
        shown = f"{sum(others) / len(others):+.2f}" if others else "wanted" if row.truth[best] > 0.5 else "not wanted"
        rows.append((lead, [row.where, f"{gains[best]:+.2f}", shown, f"{lead:+.2f}"]))
    ordered = [[cell(text) for text in texts] for _, texts in sorted(rows, key=lambda row: row[0])[:CONFUSED]]
    head = ["row", what, "the others", "its lead"]
    return table(head, ordered)


def _numbers(after: Measured) -> str:
    step = -(-len(after.rows) // POINTS)
    charts = []
    for column in range(len(after.rows[0].truth)):
        points = [(row.truth[column], row.found[column]) for row in after.rows[::step]]
        charts.append(scatter_chart("right", "told", points))
    note = f"<p>Each {step}th row.</p>" if step > 1 else ""
    return "".join(charts) + note
