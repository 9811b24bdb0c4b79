"""Charts as inline SVG: axes with units, a tooltip per bar, colours of the page's light or dark theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from markupsafe import Markup, escape

WIDTH: Final = 420
HEIGHT: Final = 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 30, 40
_BAR_ROW: Final = 22


def histogram(
    edges: Sequence[float],
    counts: Sequence[float],
    *,
    title: str,
    x_label: str,
    y_label: str = "studies",
    marks: Sequence[tuple[float, str]] = (),
    band: tuple[float, float, str] | None = None,
    whole: bool = False,
    cap: bool = False,
) -> Markup:
    """Draw a histogram.

    Args:
        edges: n + 1 rising limits.
        counts: n heights.
        title: what a screen reader says.
        x_label: quantity and unit along x.
        y_label: what is counted.
        marks: places and words of vertical lines.
        band: from, to and name of a shaded range.
        whole: the limits lie half-way between whole numbers.
        cap: cut bars that dwarf the others, and write their height on them.
    """
    top = _limit(counts, cap)
    ticks_y = nice_ticks(0, top, 4, whole=all(float(count).is_integer() for count in counts))
    top = max(top, ticks_y[-1])
    plot = _Plot(edges[0], edges[-1], top)
    parts = [_band(plot, *band)] if band else []
    parts.append(_axes(plot, nice_ticks(edges[0], edges[-1], 6, whole=whole), ticks_y, x_label, y_label))
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        first, last = (low + 0.5, high - 0.5) if whole else (low, high)
        span = number(first) if first == last else f"{number(first)} to {number(last)}"
        parts.append(_bar(plot, low, high, count, f"{span}: {number(count)} {y_label}"))
    parts += [_mark(plot, place, words) for place, words in marks if edges[0] <= place <= edges[-1]]
    return _svg(WIDTH, HEIGHT, title, parts)


class _Plot:
    """Places data in the picture."""

    def __init__(self, low: float, high: float, top: float) -> None:
        self.low, self.high, self.top = low, max(high, low + 1e-9), top or 1.0

    def x(self, value: float) -> float:
        return _LEFT + (value - self.low) / (self.high - self.low) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - min(value / self.top, 1.0) * (HEIGHT - _TOP - _BOTTOM)


def _limit(counts: Sequence[float], cap: bool) -> float:
    ordered = sorted(counts, reverse=True)
    largest = ordered[0] if ordered else 0
    third = ordered[2] if len(ordered) > 2 else 0
    return third * 1.25 if cap and third and largest > 2.5 * third else largest or 1


def _axes(plot: _Plot, ticks_x: Sequence[float], ticks_y: Sequence[float], x_label: str, y_label: str) -> str:
    base = HEIGHT - _BOTTOM
    parts = []
    for tick in ticks_y:
        row = plot.y(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{row:.1f}" y2="{row:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{row + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in ticks_x:
        column = plot.x(tick)
        parts.append(f'<line class="axis" x1="{column:.1f}" x2="{column:.1f}" y1="{base}" y2="{base + 4}"/>')
        parts.append(f'<text class="tick" x="{column:.1f}" y="{base + 16}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text class="label" x="4" y="11">{escape(y_label)}</text>')
    return "".join(parts)


def _bar(plot: _Plot, low: float, high: float, count: float, words: str) -> str:
    if not count:
        return ""
    left, right, row = plot.x(low), plot.x(high), plot.y(count)
    gap = 1.0 if right - left > 4 else 0.0
    shape = (
        f'<rect class="bar" x="{left:.2f}" y="{row:.2f}" width="{max(right - left - gap, 0.6):.2f}" '
        f'height="{max(HEIGHT - _BOTTOM - row, 0.8):.2f}"><title>{escape(words)}</title></rect>'
    )
    if count <= plot.top * 1.001:
        return shape
    anchor, place = ("start", left) if left < WIDTH / 2 else ("end", right)
    return shape + f'<text class="cut" x="{place:.1f}" y="{_TOP - 3}" text-anchor="{anchor}">{number(count)} ↑</text>'


def _band(plot: _Plot, low: float, high: float, words: str) -> str:
    left, right = plot.x(max(low, plot.low)), plot.x(min(high, plot.high))
    return (
        f'<rect class="band" x="{left:.1f}" y="{_TOP}" width="{right - left:.1f}" height="{HEIGHT - _TOP - _BOTTOM}"/>'
        f'<text class="markword" x="{right:.1f}" y="11" text-anchor="end">{escape(words)}</text>'
    )


def _mark(plot: _Plot, place: float, words: str) -> str:
    column = plot.x(place)
    anchor, shift = ("end", -4) if column > WIDTH * 0.6 else ("start", 4)
    return (
        f'<line class="mark" x1="{column:.1f}" x2="{column:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>'
        f'<text class="markword" x="{column + shift:.1f}" y="{_TOP + 9}" text-anchor="{anchor}">{escape(words)}</text>'
    )


def prevalence(rows: Sequence[tuple[str, int, int, int]], title: str) -> Markup:
    """Draw one bar per label: its present share, the unknown share hatched.

    Args:
        rows: name, present, absent, unknown.
        title: what a screen reader says.
    """
    wide, names, bars = 640, 250, 300
    parts = []
    for place, (name, present, absent, unknown) in enumerate(rows):
        total = max(present + absent + unknown, 1)
        row = place * _BAR_ROW + 4
        shares = (present / total, unknown / total)
        words = f"{name}: {present} present, {absent} absent, {unknown} unknown"
        parts.append(f'<text class="name" x="{names - 8}" y="{row + 12}" text-anchor="end">{escape(name)}</text>')
        parts.append(f"<g><title>{escape(words)}</title>")
        parts.append(f'<rect class="track" x="{names}" y="{row}" width="{bars}" height="15" rx="2"/>')
        parts.append(f'<rect class="bar" x="{names}" y="{row}" width="{bars * shares[0]:.1f}" height="15" rx="2"/>')
        if unknown:
            left = names + bars * (1 - shares[1])
            parts.append(f'<rect class="unknown" x="{left:.1f}" y="{row}" width="{bars * shares[1]:.1f}" height="15"/>')
        figure = f"{shares[0]:.1%} ({present})" + (f", {unknown} ?" if unknown else "")
        parts.append(f'<text class="tick" x="{names + bars + 6}" y="{row + 12}">{figure}</text></g>')
    return _svg(wide, len(rows) * _BAR_ROW + 8, title, parts)


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> Markup:
    head = f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
    return Markup(head + "".join(parts) + "</svg>")


def nice_ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """Round numbers within ``low`` to ``high``, and the first at or above ``high`` when low is 0.

    Args:
        low: smallest value.
        high: largest value.
        most: about how many.
        whole: whole numbers only.
    """
    span = max(high - low, 1e-9)
    power = 10.0 ** math.floor(math.log10(span / most))
    steps = [size * power for size in (1, 2, 2.5, 5, 10, 20) if size * power >= span / most]
    step = next(size for size in steps if not whole or size.is_integer()) if not whole or power >= 1 else 1.0
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if low == 0 and last * step < high * (1 - 1e-9):
        last += 1
    return [round(index * step, 10) for index in range(first, last + 1)]


def number(value: float) -> str:
    """A number as a person writes it: no trailing zeros, thousands apart, a true minus sign."""
    text = f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:.3g}"
    return text.replace(",", "\u202f").replace("-", "\u2212")
