"""Small charts as inline SVG: plain text, the same bytes every time, coloured by the page's own CSS.

Classes used: `axis`, `grid`, `dot`, `range`, and `s0` to `s3` for the series of a line chart.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import ceil, floor, isfinite, log10

Series = tuple[str, Sequence[float], Sequence[float]]  # name, x values, y values

WIDTH = 420
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 30, 34


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers between low and high, at least about `wanted` of them."""
    raw = (high - low) / wanted
    unit = 10.0 ** floor(log10(raw))
    step = unit * max(m for m in (1, 2, 5) if m * unit <= raw * 1.001)
    return [n * step for n in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return (low - margin, high + margin)


def _open(title: str, height: int) -> str:
    name = escape(title)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{name}">'
        f'<text x="4" y="16" class="title">{name}</text>'
    )


def line_chart(title: str, x_name: str, series: Sequence[Series], markers: bool = False) -> str:
    """One chart with up to four lines over a common x axis; '' when no series has a point to draw."""
    height = 230
    lines = []
    for name, xs, ys in series:
        points = [(x, y) for x, y in zip(xs, ys, strict=True) if isfinite(x) and isfinite(y)]
        stride = max(1, len(points) // 400)  # more points than pixels only make the page larger
        if points:
            lines.append((name, points[::stride]))
    if not lines:
        return ""
    x_low, x_high = _span([x for _, points in lines for x, _ in points])
    y_low, y_high = _span([y for _, points in lines for _, y in points])

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return across, height - BOTTOM - (y - y_low) / (y_high - y_low) * (height - TOP - BOTTOM)

    parts = [_open(title, height)]
    for value in ticks(y_low, y_high):
        _, y = at(x_low, value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in ticks(x_low, x_high):
        x, _ = at(value, y_low)
        parts.append(f'<text x="{x:.1f}" y="{height - BOTTOM + 15}" text-anchor="middle">{value:.4g}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{height - BOTTOM}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{height - 4}" text-anchor="end">{escape(x_name)}</text>')
    legend = LEFT
    for index, (name, points) in enumerate(lines):
        path = "L".join("{:.1f} {:.1f}".format(*at(x, y)) for x, y in points)
        parts.append(f'<path class="line s{index % 4}" d="M{path}"/>')
        if markers or len(points) == 1:
            parts += [
                '<circle class="dot s{}" cx="{:.1f}" cy="{:.1f}" r="3"/>'.format(index % 4, *at(*p))
                for p in points
            ]
        if len(lines) > 1:
            parts.append(f'<path class="line s{index % 4}" d="M{legend} {height - 8}h18"/>')
            parts.append(f'<text x="{legend + 22}" y="{height - 4}">{escape(name)}</text>')
            legend += 36 + 7 * len(name)
    return "".join(parts) + "</svg>"


def interval_chart(title: str, rows: Sequence[tuple[str, float, float, float]], percent: bool = True) -> str:
    """A dot with its interval for each (label, value, low, high); '' without rows."""
    if not rows:
        return ""
    height = TOP + 30 * len(rows) + 24
    left = min(150, 14 + 7 * max(len(row[0]) for row in rows))
    low, high = _span([v for row in rows for v in row[1:]])
    if percent:
        low, high = max(low, 0.0), min(high, 1.0)
    scale, suffix = (100, " %") if percent else (1, "")

    def at(value: float) -> float:
        return left + (value - low) / (high - low) * (WIDTH - left - 24)

    parts = [_open(title, height)]
    for value in ticks(low, high, 3):  # labels in percent are wide
        x = at(value)
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{height - 22}"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{height - 6}" text-anchor="middle">{scale * value:.4g}{suffix}</text>'
        )
    for index, (label, value, below, above) in enumerate(rows):
        y = TOP + 18 + 30 * index
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{escape(label)}</text>')
        parts.append(f'<path class="range" d="M{at(below):.1f} {y}H{at(above):.1f}"/>')
        parts.append(f'<circle class="dot s0" cx="{at(value):.1f}" cy="{y}" r="5"/>')
    return "".join(parts) + "</svg>"
