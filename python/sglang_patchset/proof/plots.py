"""Plots as SVG, drawn for a column as wide as a phone; colours and dark mode are the page's own CSS."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 360
_ROW = 17
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 12, 10, 34


@dataclass(frozen=True)
class Line:
    """A series of points; a dashed one is a limit and no measurement."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    dashed: bool = False


@dataclass(frozen=True)
class Range:
    """A measured value with its spread."""

    name: str
    value: float
    low: float
    high: float
    colour: int = 0


def number(value: float) -> str:
    """Three digits of it, as people write them."""
    if not value:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def bars(title: str, groups: Sequence[tuple[str, Sequence[tuple[float, int]]]], unit: str) -> str:
    """Horizontal bars from zero: each group's name, and below it a bar for each value and colour."""
    most = max(value for _, values in groups for value, _ in values) or 1
    room = WIDTH - 70
    parts, y = [], 4.0
    for name, values in groups:
        parts.append(_text(0, y + 11, name))
        y += _ROW
        for value, colour in values:
            width = max(room * value / most, 1)
            parts.append(
                f'<rect class="f{colour}" x="0" y="{y:.1f}" width="{width:.1f}" height="11" rx="2"/>'
            )
            parts.append(_text(width + 5, y + 9.5, f"{number(value)} {unit}", "small"))
            y += 14
        y += 6
    return _svg(title, y, parts)


def stacks(title: str, rows: Sequence[tuple[str, Sequence[tuple[float, int]]]], unit: str) -> str:
    """Horizontal bars of parts that add up; the sum stands behind them."""
    most = max(sum(value for value, _ in values) for _, values in rows) or 1
    room = WIDTH - 70
    parts, y = [], 4.0
    for name, values in rows:
        parts.append(_text(0, y + 11, name))
        y, x = y + _ROW, 0.0
        for value, colour in values:
            width = room * value / most
            parts.append(f'<rect class="f{colour}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="11"/>')
            x += width
        parts.append(_text(x + 5, y + 9.5, f"{number(sum(value for value, _ in values))} {unit}", "small"))
        y += 20
    return _svg(title, y, parts)


def lines(
    title: str,
    series: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    x_ticks: Sequence[float],
    x_name: Callable[[float], str] = number,
    log: bool = False,
) -> str:
    """Lines over a linear or a logarithmic axis; the other one begins at zero."""
    height = 210
    top = _nice(max(y for line in series for _, y in line.points))
    scale = math.log if log else float
    first, last = (scale(edge(x_ticks)) for edge in (min, max))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (scale(x) - first) / (last - first or 1)
        return (
            _LEFT + across * (WIDTH - _LEFT - _RIGHT),
            _TOP + (1 - y / top) * (height - _TOP - _BOTTOM),
        )

    parts = []
    for step in range(5):
        value = top * step / 4
        y = place(x_ticks[0], value)[1]
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 5, y + 3.5, f"{value:g}", "small end"))
    for tick in x_ticks:
        x = place(tick, 0)[0]
        parts.append(_text(x, height - _BOTTOM + 14, x_name(tick), "small mid"))
    parts.append(_text(WIDTH - _RIGHT, height - 4, x_label, "small end"))
    parts.append(_text(0, height - 4, y_label, "small"))
    for line in series:
        places = [place(x, y) for x, y in line.points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path class="s{line.colour} {"dash" if line.dashed else "full"}" d="M{path}"/>')
        if not line.dashed:
            parts += [
                f'<circle class="f{line.colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{escape(line.name)}: '
                f"{x_name(value[0])}, {number(value[1])}</title></circle>"
                for (x, y), value in zip(places, line.points, strict=True)
            ]
    return _svg(title, height, parts)


def ranges(title: str, rows: Sequence[Range], band: tuple[float, float], label: str) -> str:
    """Values with their spreads, a row each, and the band in which they should lie."""
    least = min(band[0], *(row.low for row in rows))
    most = max(band[1], *(row.high for row in rows))
    margin = (most - least) * 0.06
    least, most = least - margin, most + margin

    def place(value: float) -> float:
        return (value - least) / (most - least) * WIDTH

    height = len(rows) * 2 * _ROW + 30
    left, right = map(place, band)
    middle = place(sum(band) / 2)
    parts = [f'<rect class="band" x="{left:.1f}" y="0" width="{right - left:.1f}" height="{height - 28}"/>']
    parts.append(f'<path class="grid" d="M{middle:.1f} 0V{height - 28}"/>')
    for place_in, row in enumerate(rows):
        y = place_in * 2 * _ROW + 12
        parts.append(_text(0, y, f"{row.name}: {row.value:.4f}"))
        parts.append(f'<path class="s{row.colour}" d="M{place(row.low):.1f} {y + 9}H{place(row.high):.1f}"/>')
        parts.append(f'<circle class="f{row.colour}" cx="{place(row.value):.1f}" cy="{y + 9}" r="3.5"/>')
    for value, anchor in ((band[0], "end"), (band[1], "")):
        x = place(value) + (-3 if anchor else 3)
        parts.append(_text(x, height - 16, f"{value:.3f}", f"small {anchor}"))
    parts.append(_text(0, height - 3, label, "small"))
    return _svg(title, height, parts)


def _nice(value: float) -> float:
    """The next number that four steps lead to evenly."""
    if value <= 0:
        return 1.0
    unit = float(10 ** math.floor(math.log10(value)))
    return next(unit * step for step in (1, 1.2, 1.6, 2, 3, 4, 6, 8, 10) if unit * step >= value)


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{attribute}>{escape(words)}</text>'


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    head = f'viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}"'
    return f"<svg {head}>{''.join(parts)}</svg>"
