"""Curves as inline SVG.

Colours of curves are the page's classes c0 to c7, so that they follow light and dark. Values that are
missing or not finite leave gaps. Long curves are drawn as means over bins, so that a page stays small
however long the run was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

WIDTH, HEIGHT = 420.0, 220.0
LARGE_WIDTH, LARGE_HEIGHT = 900.0, 320.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 8.0, 8.0, 24.0
MAX_POINTS = 300
NUM_COLOURS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Curve of a chart. `colour` is a number.

    `style`: 0 a line, 1 dashed, 2 dotted, 3 points, 4 a pale line.
    """

    label: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    style: int = 0


def chart(
    title: str, curves: Sequence[Curve], x_label: str = "step", note: str = "", large: bool = False
) -> str:
    """Return a figure with heading and legend, and a note where there is nothing to draw."""
    drawn = [replace(curve, points=_average_bins(_finite(curve.points))) for curve in curves]
    drawn = [curve for curve in drawn if curve.points]
    head = f"<figcaption>{escape(title)}</figcaption>"
    if not drawn:
        return f'<figure>{head}<p class="none">nothing recorded</p></figure>'
    points = [point for curve in drawn for point in curve.points]
    x0, x1 = _pad(min(x for x, _ in points), max(x for x, _ in points), 0.0)
    y0, y1 = _pad(min(y for _, y in points), max(y for _, y in points), 0.06)
    width, height = (LARGE_WIDTH, LARGE_HEIGHT) if large else (WIDTH, HEIGHT)
    scale = _Scale(x0, x1, y0, y1, width, height)
    body = "".join([_grid(scale, x_label), *(_draw(curve, scale) for curve in drawn)])
    legend = "".join(
        f'<li class="c{curve.colour % NUM_COLOURS} s{curve.style}">{escape(curve.label)}</li>'
        for curve in drawn
    )
    small = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f'<figure>{head}<svg viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(title, quote=True)}">{body}</svg>'
        f'<ul class="legend">{legend}</ul>{small}</figure>'
    )


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers from `low` to `high`, which must differ."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first
    return [(first + i) * step for i in range(count + 1)]


@dataclass(frozen=True, slots=True)
class _Scale:
    x0: float
    x1: float
    y0: float
    y1: float
    width: float
    height: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y0) / (self.y1 - self.y0)
        return self.height - BOTTOM - share * (self.height - TOP - BOTTOM)


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _average_bins(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) <= MAX_POINTS:
        return points
    size = len(points) / MAX_POINTS
    bins = (points[round(i * size) : round((i + 1) * size)] for i in range(MAX_POINTS))
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in bins if b]


def _pad(low: float, high: float, share: float) -> tuple[float, float]:
    """Return a range with a margin at both ends, also where all values are equal."""
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-12):
        margin = 0.5 * abs(low) or 0.5
        return low - margin, high + margin
    margin = share * (high - low)
    return low - margin, high + margin


def _grid(scale: _Scale, x_label: str) -> str:
    parts = []
    for value in ticks(scale.y0, scale.y1):
        y = scale.y(value)
        parts.append(
            f'<path class="grid" d="M{LEFT:g} {y:.1f}H{scale.width - RIGHT:g}"/>'
            f'<text x="{LEFT - 5:g}" y="{y + 4:.1f}" text-anchor="end">{_short(value)}</text>'
        )
    for value in ticks(scale.x0, scale.x1, about=4):
        x = scale.x(value)
        parts.append(
            f'<text x="{x:.1f}" y="{scale.height - 8:g}" text-anchor="middle">{_short(value)}</text>'
        )
    parts.append(
        f'<text x="{LEFT - 14:g}" y="{scale.height - 8:g}" text-anchor="end">{escape(x_label)}</text>'
    )
    return "".join(parts)


def _draw(curve: Curve, scale: _Scale) -> str:
    colour = f"c{curve.colour % NUM_COLOURS}"
    places = [(f"{scale.x(x):.1f}", f"{scale.y(y):.1f}") for x, y in curve.points]
    if curve.style == 3 or len(places) == 1:
        dots = "".join(f'<circle cx="{x}" cy="{y}" r="3.5"/>' for x, y in places)
        return f'<g class="dots {colour}">{dots}</g>'
    line = "L".join(f"{x} {y}" for x, y in places)
    return f'<path class="line {colour} s{curve.style}" d="M{line}"/>'


def _short(value: float) -> str:
    if value == 0 or abs(value) < 1e-12:
        return "0"
    for limit, base, mark in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / base:g}{mark}"
    return f"{value:.6g}" if abs(value) >= 1e-3 else f"{value:.0e}"
