"""Charts as inline SVG: no script, no font, nothing from the network; colours come from the page's style."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

POINTS_MAX = 300
EDGE = 24
LARGE = 10_000  # numbers from here on are told without decimals
WIDTH = 640
NAME_MAX = 22
CELLS_WITH_NUMBERS = 12


@dataclass(frozen=True)
class Series:
    """A line of a chart: its name, its points (x, y), and the class that colours it. `dots` marks each point.

    `bounds` are a low and a high y for each point, of its interval.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: str
    dots: bool = False
    bounds: Sequence[tuple[float, float]] = ()


def line_chart(
    title: str, series: Sequence[Series], x_label: str, height: int = 220, marks: Sequence[float] = ()
) -> str:
    """Draw lines over a common x; empty where no series has a point. With `marks`, x goes by its logarithm and is told there."""
    points = [point for line in series for point in line.points if math.isfinite(point[1])]
    if not points:
        return ""
    left, right, top, bottom = 64, 12, 12, 34
    scale = math.log if marks else float
    xs = [scale(x) for x, _ in points]
    ys = [y for _, y in points] + [bound for line in series for both in line.bounds for bound in both]
    y_ticks = nice_ticks(min(ys), max(ys))
    x_low, x_high = min(xs), max(*xs, min(xs) + 1)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (scale(x) - x_low) / (x_high - x_low) * (WIDTH - left - right)
        down = top + (y_high - y) / (y_high - y_low) * (height - top - bottom)
        return round(across, 1), round(down, 1)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(_said(title, series, x_label))}">'
    ]
    for tick in y_ticks:
        _, down = place(points[0][0], tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{WIDTH - right}" y1="{down}" y2="{down}"/>')
        parts.append(f'<text x="{left - 6}" y="{down + 4}" text-anchor="end">{_number(tick)}</text>')
    for tick in marks or nice_ticks(x_low, x_high):
        if x_low <= scale(tick) <= x_high:
            across, _ = place(tick, y_low)
            anchor = "middle" if across < WIDTH - right - EDGE else "end"  # what stands at the edge would be cut
            parts.append(f'<text x="{across}" y="{height - 16}" text-anchor="{anchor}">{_number(tick)}</text>')
    parts.append(f'<text x="{WIDTH - right}" y="{height - 2}" text-anchor="end">{html.escape(x_label)}</text>')
    for line in series:
        parts += _draw(line, place)
    parts.append("</svg>")
    named = [line for line in series if line.points and line.name]
    names = "".join(f'<span class="{line.style}">{html.escape(line.name)}</span>' for line in named)
    return f'<figure>{"".join(parts)}<figcaption class="legend">{names}</figcaption></figure>'


def _number(value: float) -> str:
    """Return a number as people write it: 100,000 and not 1e+05."""
    return f"{value:,.0f}" if abs(value) >= LARGE else f"{value:.4g}"


def _said(title: str, series: Sequence[Series], x_label: str) -> str:
    """Return what a chart shows, for those who can't see it: where each line begins and ends."""
    lines = [(line.name, [point for point in line.points if math.isfinite(point[1])]) for line in series]
    said = [
        f"{name}: {', '.join(f'{y:.3g} at {x_label} {_number(x)}' for x, y in (points[0], points[-1]))}"
        for name, points in lines
        if points
    ]
    return f"{title}. {'; '.join(said)}"


def _draw(line: Series, place: object) -> list[str]:
    shown = [point for point in thin_out(line.points) if math.isfinite(point[1])]
    placed = [place(x, y) for x, y in shown]  # type: ignore[operator]
    path = " ".join(f"{x},{y}" for x, y in placed)
    parts = [f'<polyline class="{line.style}" points="{path}"/>']
    for (x, _), (low, high) in zip(line.points, line.bounds, strict=False):
        (across, below), (_, above) = place(x, low), place(x, high)  # type: ignore[operator]
        parts.append(f'<line class="bound {line.style}" x1="{across}" x2="{across}" y1="{below}" y2="{above}"/>')
    if line.dots:
        parts += [f'<circle class="{line.style}" cx="{x}" cy="{y}" r="3"/>' for x, y in placed]
    return parts


def ends(side: Mapping[str, Any]) -> tuple[float, float]:
    """Return the bounds of an interval as they are drawn: at its value where none are known."""
    low, high = (side["value"] if side[end] is None else side[end] for end in ("low", "high"))
    return low, high


@dataclass(frozen=True)
class Change:
    """A row of the before-and-after chart: values with their bounds."""

    name: str
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    better: bool | None


def change_chart(changes: Sequence[Change]) -> str:
    """Draw each metric before (hollow) and after (full) with their intervals, each row on its own scale.

    Of boxes and not as a picture, so that its words stay readable on a phone.
    """
    rows = []
    for change in changes:
        bounds = [bound for side in (change.before, change.after) for bound in (*ends(side), side["value"])]
        low, span = min(bounds), (max(bounds) - min(bounds)) or 1.0

        def across(value: float, low: float = low, span: float = span) -> float:
            return round((value - low) / span * 100, 1)

        style = "good" if change.better else "bad" if change.better is False else "flat"
        marks, values = "", ""
        for side, name in ((change.before, "before"), (change.after, style)):
            begin, end = map(across, ends(side))
            bar = f'<i class="bar {name}" style="left:{begin}%;width:{end - begin:.1f}%"></i>'
            marks += f'<span>{bar}<i class="dot {name}" style="left:{across(side["value"])}%"></i></span>'
            values += f'<span class="{name}">{side["value"]:.3f}</span>'
        rows.append(f'<div><b>{html.escape(change.name)}</b><div class="track">{marks}</div><div>{values}</div></div>')
    return f'<figure class="changes" role="group" aria-label="Scores before and after, with intervals">{"".join(rows)}</figure>'


def thin_out(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most `POINTS_MAX` points: means of neighbours, so that no spike is invented or doubled."""
    size = math.ceil(len(points) / POINTS_MAX)
    groups = [points[start : start + size] for start in range(0, len(points), size or 1)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def nice_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Return round numbers from at or below `low` to at or above `high`."""
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / wanted))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= wanted)
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return [number * step for number in range(first, last + 1)]


@dataclass(frozen=True)
class Bin:
    """Rows of like confidence: the mean of it, how often they are right, and which part of all rows they are."""

    sure: float
    right: float
    part: float


def heat_map(names: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """Draw a confusion matrix: a line for each class that is right, a column for each that was told."""
    size = max(18, min(34, 480 // len(names)))
    left, top = 150, 8
    wide, high = left + size * len(names) + 8, top + size * len(names) + 110
    parts = [f'<svg viewBox="0 0 {wide} {high}" style="max-width:{wide}px" role="img" aria-label="Confusion matrix">']
    for line, (name, row) in enumerate(zip(names, counts, strict=True)):
        total = max(1, sum(row))
        down = top + line * size
        parts.append(f'<text x="{left - 6}" y="{down + size / 2 + 4}" text-anchor="end">{_short(name)}</text>')
        for column, count in enumerate(row):
            x = left + column * size
            kind = "right" if line == column else "wrong"
            parts.append(
                f'<rect class="cell {kind}" x="{x}" y="{down}" width="{size - 1}" height="{size - 1}" '
                f'style="--share:{count / total:.3f}"><title>{html.escape(name)} told as '
                f"{html.escape(names[column])}: {count:,}</title></rect>"
            )
            if count and len(names) <= CELLS_WITH_NUMBERS:
                parts.append(f'<text x="{x + size / 2}" y="{down + size / 2 + 4}" text-anchor="middle">{count}</text>')
    for column, name in enumerate(names):
        middle, below = left + column * size + size / 2, top + size * len(names) + 10
        parts.append(f'<text transform="translate({middle},{below}) rotate(55)">{_short(name)}</text>')
    return f"<figure>{''.join(parts)}</svg></figure>"


def _short(name: str) -> str:
    return html.escape(name if len(name) <= NAME_MAX else f"{name[: NAME_MAX - 1]}…")


def reliability_chart(before: Sequence[Bin], after: Sequence[Bin], size: int = 300) -> str:
    """Draw how often rows are right against how sure the model was of them."""
    edge = 40

    def place(sure: float, right: float) -> tuple[float, float]:
        return round(edge + sure * (size - edge - 10), 1), round(10 + (1 - right) * (size - edge - 10), 1)

    (x0, y0), (x1, y1) = place(0, 0), place(1, 1)
    parts = [f'<svg viewBox="0 0 {size} {size}" style="max-width:{size}px" role="img" aria-label="Reliability">']
    parts.append(f'<line class="grid" x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}"/>')
    for tick in (0.0, 0.5, 1.0):
        (x, _), (_, y) = place(tick, 0), place(0, tick)
        parts.append(f'<text x="{x}" y="{y0 + 16}" text-anchor="middle">{tick:g}</text>')
        parts.append(f'<text x="{edge - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for bins, style in ((before, "before"), (after, "watch")):
        for item in bins:
            x, y = place(item.sure, item.right)
            parts.append(f'<circle class="{style}" cx="{x}" cy="{y}" r="{3 + 9 * math.sqrt(item.part):.1f}"/>')
    parts.append(f'<text x="{size}" y="{size - 4}" text-anchor="end">how sure, against how often right</text></svg>')
    legend = '<figcaption class="legend"><span>before</span><span class="watch">after</span></figcaption>'
    return f"<figure>{''.join(parts)}{legend}</figure>"


def scatter_chart(x_name: str, y_name: str, points: Sequence[tuple[float, float]], size: int = 340) -> str:
    """Draw points in a square of equal axes, with the line on which both are alike."""
    values = [value for point in points for value in point]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    edge = 52

    def place(x: float, y: float) -> tuple[float, float]:
        inner = size - edge - 10
        return round(edge + (x - low) / span * inner, 1), round(10 + (high - y) / span * inner, 1)

    (x0, y0), (x1, y1) = place(low, low), place(high, high)
    parts = [
        f'<svg viewBox="0 0 {size} {size}" style="max-width:{size}px" role="img" aria-label="{y_name} against {x_name}">'
    ]
    parts.append(f'<line class="grid" x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}"/>')
    for tick in nice_ticks(low, high):
        if low <= tick <= high:
            (x, _), (_, y) = place(tick, low), place(low, tick)
            parts.append(f'<text x="{x}" y="{y0 + 16}" text-anchor="middle">{_number(tick)}</text>')
            parts.append(f'<text x="{edge - 6}" y="{y + 4}" text-anchor="end">{_number(tick)}</text>')
    parts += [f'<circle class="watch faint" cx="{x}" cy="{y}" r="3"/>' for x, y in (place(*point) for point in points)]
    parts.append(f'<text x="{size}" y="{size - 4}" text-anchor="end">{y_name} against {x_name}</text></svg>')
    return f"<figure>{''.join(parts)}</figure>"
