"""Charts as SVG files that stand alone: bars against their limits, and curves over a doubling x."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from headstart.report.charts import nice_ticks

WIDTH = 720
STYLE = (
    "<style>text{font:13px sans-serif;fill:#333}.grid{stroke:#ddd}.line{fill:none;stroke:#2563a8;stroke-width:2}"
    ".dot{fill:#2563a8}.met{fill:#3a8f5c}.missed{fill:#c4742f}.none{fill:#8a94a0}.limit{stroke:#222;stroke-width:2}</style>"
)


def _svg(height: int, title: str, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(title)}">'
    return "\n".join([head, STYLE, '<rect width="100%" height="100%" fill="#fff"/>', *parts, "</svg>\n"])


def bars(title: str, rows: Sequence[tuple[str, float, float | None, str]]) -> str:
    """Draw a bar for each row (name, value, limit, class of its colour), with its limit as a mark across."""
    left, step, top = 390, 30, 34
    longest = max([value for _, value, _, _ in rows] + [limit for *_, limit, _ in rows if limit] + [1e-9])
    wide = (WIDTH - left - 60) / longest
    parts = [f'<text x="10" y="20">{html.escape(title)}</text>']
    for number, (name, value, limit, style) in enumerate(rows):
        down = top + number * step
        parts.append(f'<text x="{left - 8}" y="{down + 16}" text-anchor="end">{html.escape(name)}</text>')
        parts.append(f'<rect class="{style}" x="{left}" y="{down + 4}" width="{value * wide:.1f}" height="16"/>')
        parts.append(f'<text x="{left + value * wide + 6:.1f}" y="{down + 17}">{value:.2f}</text>')
        if limit is not None:
            x = round(left + limit * wide, 1)
            parts.append(f'<line class="limit" x1="{x}" x2="{x}" y1="{down}" y2="{down + 24}"/>')
    return _svg(top + step * len(rows) + 10, title, parts)


def curve(title: str, x_name: str, y_name: str, points: Sequence[tuple[float, float]]) -> str:
    """Draw a curve over x > 0 on a logarithmic scale, y from zero on."""
    height, left, right, top, bottom = 300, 70, 24, 34, 46
    xs, ys = [math.log2(x) for x, _ in points], [y for _, y in points]
    ticks = nice_ticks(0.0, max(ys))
    span = (max(xs) - min(xs)) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (math.log2(x) - min(xs)) / span * (WIDTH - left - right)
        return round(across, 1), round(top + (1 - y / ticks[-1]) * (height - top - bottom), 1)

    parts = [f'<text x="10" y="20">{html.escape(f"{title}: {y_name}")}</text>']
    for tick in ticks:
        _, down = place(points[0][0], tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{WIDTH - right}" y1="{down}" y2="{down}"/>')
        parts.append(f'<text x="{left - 6}" y="{down + 4}" text-anchor="end">{tick:,.4g}</text>')
    placed = [place(x, y) for x, y in points]
    parts.append(f'<polyline class="line" points="{" ".join(f"{x},{y}" for x, y in placed)}"/>')
    for (x, y), (value, _) in zip(placed, points, strict=True):
        parts.append(f'<circle class="dot" cx="{x}" cy="{y}" r="4"/>')
        parts.append(f'<text x="{x}" y="{height - bottom + 18}" text-anchor="middle">{value:,.0f}</text>')
    parts.append(f'<text x="{WIDTH - right}" y="{height - 8}" text-anchor="end">{html.escape(x_name)}</text>')
    return _svg(height, title, parts)
