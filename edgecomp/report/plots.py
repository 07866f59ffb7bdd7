"""Plots as inline SVG: coordinates here, colours in report.css, so that they follow light, dark and print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

WIDTH = 680
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 16, 44


@dataclass(frozen=True)
class Point:
    """A dot of `scatter`. `x_ends`, `y_ends`: 95 % intervals, or None; `series`: index of its colour."""

    label: str
    x: float
    y: float
    series: int = 0
    x_ends: tuple[float, float] | None = None
    y_ends: tuple[float, float] | None = None
    note: str = ""


@dataclass(frozen=True)
class Bar:
    """A row of `bars`. `text`: what is written behind the bar; `marked`: one of the rows to look at."""

    label: str
    value: float
    text: str
    series: int = 0
    marked: bool = False


@dataclass(frozen=True)
class Axis:
    """A linear scale from data to pixels with round ticks."""

    low: float
    high: float
    start: float
    end: float

    def to(self, value: float) -> float:
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return self.start + share * (self.end - self.start)

    def ticks(self, about: int = 5) -> list[float]:
        """Multiples of 1, 2 or 5 times a power of ten inside the axis."""
        rough = (self.high - self.low) / about or 1.0
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def tag(name: str, text: str = "", **attributes: str | float) -> Markup:
    """One SVG element; `class_` becomes `class`, `_` in names becomes `-`; everything is escaped."""
    words = []
    for key, value in attributes.items():
        shown = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
        words.append(f' {key.rstrip("_").replace("_", "-")}="{escape(shown)}"')
    return Markup(f"<{name}{''.join(words)}>{escape(text)}</{name}>")


def picture(parts: Sequence[Markup], height: float, title: str) -> Markup:
    body = Markup("").join(parts)
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, round(height), title)
    return head + body + Markup("</svg>")


def spread(values: Sequence[float], *, zero: bool = False, room: float = 0.08) -> tuple[float, float]:
    """The range of an axis: the values with a little room; `zero`: starts at zero."""
    low, high = min(values), max(values)
    margin = (high - low) * room or abs(high) * room or 1.0
    return (0.0 if zero else low - margin), high + margin


def tick_text(value: float, step: float) -> str:
    places = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
    return f"{value:,.{places}f}".replace("-", "\u2212")


def _grid(x: Axis, y: Axis, x_title: str, y_title: str, height: float) -> list[Markup]:
    parts = []
    x_ticks, y_ticks = x.ticks(), y.ticks()
    bottom = y.start
    for value in y_ticks:
        text = tick_text(value, _step(y_ticks))
        parts.append(tag("line", x1=x.start, x2=x.end, y1=y.to(value), y2=y.to(value), class_="grid"))
        parts.append(tag("text", text, x=x.start - 8, y=y.to(value) + 4, class_="tick end"))
    for value in x_ticks:
        text = tick_text(value, _step(x_ticks))
        parts.append(tag("line", x1=x.to(value), x2=x.to(value), y1=bottom, y2=bottom + 4, class_="axis"))
        parts.append(tag("text", text, x=x.to(value), y=bottom + 18, class_="tick middle"))
    parts.append(tag("line", x1=x.start, x2=x.end, y1=bottom, y2=bottom, class_="axis"))
    parts.append(tag("text", x_title, x=(x.start + x.end) / 2, y=height - 6, class_="name middle"))
    turned = f"translate(14 {(y.start + y.end) / 2:.1f}) rotate(-90)"
    parts.append(tag("text", y_title, transform=turned, class_="name middle"))
    return parts


def _step(ticks: Sequence[float]) -> float:
    return ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) if ticks and ticks[0] else 1.0


def scatter(
    points: Sequence[Point],
    *,
    x_title: str,
    y_title: str,
    title: str,
    reference: tuple[str, float] | None = None,
    height: float = 340,
) -> Markup:
    """Dots with their names and intervals. `reference`: name and height of a dashed line."""
    xs = [v for p in points for v in (p.x, *(p.x_ends or ()))]
    ys = [v for p in points for v in (p.y, *(p.y_ends or ()))] + ([reference[1]] if reference else [])
    x = Axis(*spread(xs, zero=True), _LEFT, WIDTH - _RIGHT)
    y = Axis(*spread(ys), height - _BOTTOM, _TOP)
    parts = _grid(x, y, x_title, y_title, height)
    taken: list[tuple[float, float, float]] = []
    if reference:
        parts += _reference(reference, x, y, points, taken)
    for point in sorted(points, key=lambda p: p.y, reverse=True):
        parts += _dot(point, x, y)
        parts.append(_name(point, x, y, taken))
    return picture(parts, height, title)


def _reference(
    reference: tuple[str, float],
    x: Axis,
    y: Axis,
    points: Sequence[Point],
    taken: list[tuple[float, float, float]],
) -> list[Markup]:
    """A dashed line with its name above it, at the end where no dot is in the way."""
    name, level, length = reference[0], y.to(reference[1]), 7.0 * len(reference[0])
    crowded = any(abs(y.to(p.y) - level) < 24 and x.to(p.x) > x.end - length - 12 for p in points)
    begin = x.start + 4 if crowded else x.end - length
    taken.append((level - 10, begin, begin + length))
    where: dict[str, Any] = (
        {"x": x.start + 4, "class_": "label start"} if crowded else {"x": x.end, "class_": "label end"}
    )
    return [
        tag("line", x1=x.start, x2=x.end, y1=level, y2=level, class_="reference"),
        tag("text", name, y=level - 6, **where),
    ]


def _dot(point: Point, x: Axis, y: Axis) -> list[Markup]:
    across, up, colour = x.to(point.x), y.to(point.y), f"s{point.series % 6}"
    parts = []
    if point.x_ends:
        ends = [x.to(v) for v in point.x_ends]
        parts.append(tag("line", x1=ends[0], x2=ends[1], y1=up, y2=up, class_=f"whisker {colour}"))
    if point.y_ends:
        ends = [y.to(v) for v in point.y_ends]
        parts.append(tag("line", x1=across, x2=across, y1=ends[0], y2=ends[1], class_=f"whisker {colour}"))
    hover = tag("title", point.note or point.label)
    dot = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="5.5" class="dot {}">').format(across, up, colour)
    return [*parts, dot + hover + Markup("</circle>")]


def _name(point: Point, x: Axis, y: Axis, taken: list[tuple[float, float, float]]) -> Markup:
    """The dot's name beside it, moved down until it covers no other name."""
    length = 7.0 * len(point.label)
    right = x.to(point.x) + 10 + length <= x.end
    start = x.to(point.x) + 10 if right else x.to(point.x) - 10 - length
    height = y.to(point.y) - 8
    while any(abs(height - h) < 15 and start < stop and begin < start + length for h, begin, stop in taken):
        height += 15
    taken.append((height, start, start + length))
    anchor = "start" if right else "end"
    return tag(
        "text", point.label, x=start if right else start + length, y=height + 4, class_=f"label {anchor}"
    )


def bars(rows: Sequence[Bar], *, title: str, unit: str, row_height: float = 20) -> Markup:
    """Horizontal bars from zero, their names on the left and their values behind them."""
    left = min(300.0, 16 + 6.6 * max(len(shortened(r.label)) for r in rows))
    height = len(rows) * row_height + 34
    high = max(max(r.value for r in rows), 0.0) or 1.0
    axis = Axis(min(0.0, *(r.value for r in rows)), high, left, WIDTH - 90.0)
    bottom = height - 26
    parts = []
    for value in axis.ticks():
        parts.append(tag("line", x1=axis.to(value), x2=axis.to(value), y1=0, y2=bottom, class_="grid"))
        text = f"{tick_text(value, _step(axis.ticks()))} {unit}".strip()
        parts.append(tag("text", text, x=axis.to(value), y=bottom + 16, class_="tick middle"))
    for i, row in enumerate(rows):
        parts += _bar(row, axis, i * row_height, row_height)
    parts.append(tag("line", x1=axis.to(0.0), x2=axis.to(0.0), y1=0, y2=bottom, class_="axis"))
    return picture(parts, height, title)


def _bar(row: Bar, axis: Axis, top: float, height: float) -> list[Markup]:
    zero, end = axis.to(0.0), axis.to(row.value)
    colour = "bad" if row.marked else f"s{row.series % 6}"
    middle = top + height / 2 + 4
    return [
        tag("text", shortened(row.label), x=axis.start - 8, y=middle, class_="label end"),
        tag(
            "rect",
            x=min(zero, end),
            y=top + 3,
            width=max(abs(end - zero), 1.0),
            height=height - 6,
            rx=2,
            class_=f"bar {colour}",
        ),
        tag("text", row.text, x=max(zero, end) + 6, y=middle, class_="tick start"),
    ]


def shortened(label: str, longest: int = 42) -> str:
    """The end of a long dotted name, which is what tells layers apart."""
    return label if len(label) <= longest else "\u2026" + label[-(longest - 1) :]


def strip(samples: Sequence[float], marks: Sequence[tuple[str, float]], *, title: str) -> Markup:
    """How often each latency was seen: a histogram of the samples, and named marks (p50, p99) on it."""
    height, bottom, bins = 96.0, 56.0, 48
    ordered = sorted(samples)
    # A long tail would squeeze everything else into a few pixels: what is beyond the axis gets an arrow.
    median, late = (ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.95))
    last = min(ordered[-1], max(1.05 * median, median + 3 * (late - median)))
    axis = Axis(ordered[0], last if last > ordered[0] else ordered[0] + 1.0, 12, WIDTH - 12)
    heights = [0] * bins
    for value in ordered:
        if value <= axis.high:
            share = (value - axis.low) / (axis.high - axis.low)
            heights[min(bins - 1, int(share * bins))] += 1
    wide = (axis.end - axis.start) / bins
    parts = []
    for i, seen in enumerate(heights):
        tall = seen / max(heights) * (bottom - 14)
        if seen:
            parts.append(
                tag(
                    "rect",
                    x=axis.start + i * wide,
                    y=bottom - tall,
                    width=wide - 1,
                    height=tall,
                    class_="bar s0",
                )
            )
    parts.append(tag("line", x1=axis.start, x2=axis.end, y1=bottom, y2=bottom, class_="axis"))
    return picture([*parts, *_marks(marks, axis, bottom)], height, title)


def _marks(marks: Sequence[tuple[str, float]], axis: Axis, bottom: float) -> list[Markup]:
    parts, free = [], [-100.0, -100.0]
    for given, value in marks:
        beyond = value > axis.high
        name = f"{given} \u2192" if beyond else given
        across = axis.end if beyond else axis.to(value)
        half = 3.4 * len(name)
        line = 0 if across - half > free[0] else 1
        free[line] = across + half + 6
        middle = min(max(across, axis.start + half), axis.end - half)
        parts.append(tag("line", x1=across, x2=across, y1=4, y2=bottom + 5, class_="mark"))
        parts.append(tag("text", name, x=middle, y=bottom + 18 + 16 * line, class_="tick middle"))
    return parts
