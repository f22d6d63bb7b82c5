"""Charts as inline SVG: axes, legend, exact values on hover; colours follow the page's light or dark style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vlit.serve.markup import Markup, join, measure, number, percent, tag

Point = tuple[float, float]
MAX_POINTS = 600
HOVER_POINTS = 60
LOG_FROM_RATIO = 12.0
"""A loss that falls by more than this factor is drawn on a logarithmic axis."""


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart. ``raw`` is thin and pale without hover, ``curve`` is a line, ``dots`` a line with marks."""

    name: str
    points: Sequence[Point]
    colour: int = 1  # 1 to 6
    style: Literal["curve", "raw", "dots"] = "curve"


@dataclass(frozen=True, slots=True)
class AccuracyBar:
    """One row of an accuracy chart; all values are shares, None is left out."""

    name: str
    n: int
    accuracy: float
    low: float
    high: float
    chance: float | None = None
    blind: float | None = None
    shuffled: float | None = None


def smooth(points: Sequence[Point], *, sigma: float) -> list[Point]:
    """Gaussian average around every point (``sigma`` in points), narrower at the ends; it does not lag."""
    if len(points) < 3:
        return list(points)
    reach = min(math.ceil(3 * sigma), len(points) - 1)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    values = np.array([y for _, y in points])
    middle = slice(reach, reach + len(points))
    averaged = np.convolve(values, kernel)[middle] / np.convolve(np.ones(len(points)), kernel)[middle]
    return [(x, float(y)) for (x, _), y in zip(points, averaged, strict=True)]


def nice_ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """About ``count`` round numbers (1, 2, 2.5 or 5 times a power of ten apart) within ``low .. high``."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(s - rough))
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within the range, with round numbers between them when these are fewer than four."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7)):
        ticks = [m * 10.0**d for d in decades for m in multiples if low * 0.999 <= m * 10.0**d <= high * 1.001]
        if len(ticks) >= 4:
            break
    return ticks


def thin(points: Sequence[Point], *, most: int = MAX_POINTS) -> list[Point]:
    """At most about ``most`` points that keep every peak: the lowest and the highest of each bucket, in order."""
    if len(points) <= most:
        return list(points)
    bucket = math.ceil(2 * len(points) / most)
    kept: list[Point] = []
    for start in range(0, len(points), bucket):
        part = points[start : start + bucket]
        low, high = min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])
        kept += sorted({low, high})
    return kept


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    subtitle: str = "",
    x_label: str = "step",
    width: int = 1040,
    height: int = 300,
    show: Callable[[float], str] = measure,
    ticks: Callable[[float], str] = number,
    may_log: bool = False,
) -> Markup:
    """A figure with one or more lines over a common x axis. Empty series are left out; without any, an empty text.

    A narrow chart (under 700) has no labels at the ends of its lines. ``show`` formats values,
    ``ticks`` the axis; ``may_log`` allows a logarithmic axis where the values span more than :data:`LOG_FROM_RATIO`.
    """
    series = [Series(s.name, [p for p in s.points if math.isfinite(p[1])], s.colour, s.style) for s in series]
    series = [s for s in series if s.points]
    if not series:
        return Markup("")
    wide = width > 700
    left, right, top, bottom = 52, width - (56 if wide else 10), 10, height - 30
    x_low, x_high = min(s.points[0][0] for s in series), max(s.points[-1][0] for s in series)
    y_low, y_high, log_y = _y_range(series, may_log=may_log)

    def x_of(x: float) -> float:
        return left + (right - left) * ((x - x_low) / (x_high - x_low) if x_high > x_low else 0.5)

    def y_of(y: float) -> float:
        y = min(max(y, y_low), y_high)
        share = math.log(y / y_low) / math.log(y_high / y_low) if log_y else (y - y_low) / (y_high - y_low)
        return bottom - (bottom - top) * share

    parts: list[Markup] = []
    for tick in log_ticks(y_low, y_high) if log_y else nice_ticks(y_low, y_high, count=max(2, height // 60)):
        y = y_of(tick)
        parts.append(tag("line", x1=left, x2=right, y1=f"{y:.1f}", y2=f"{y:.1f}", cls="grid"))
        parts.append(tag("text", ticks(tick), x=left - 8, y=f"{y + 4:.1f}", text_anchor="end"))
    for tick in (t for t in nice_ticks(x_low, x_high, count=max(3, width // 130)) if t == round(t)):
        parts.append(tag("text", number(tick), x=f"{x_of(tick):.1f}", y=bottom + 18, text_anchor="middle"))
    parts.append(tag("line", x1=left, x2=right, y1=bottom, y2=bottom, cls="axis"))
    parts.append(tag("text", x_label, x=left - 16, y=bottom + 18, text_anchor="end"))
    for s in series:
        parts += _line(s, x_of, y_of, x_label=x_label, most=MAX_POINTS if wide else MAX_POINTS // 3, show=show)
    if wide:
        ends = [s for s in series if s.style != "raw"]
        parts += _end_labels(ends, y_of, x=right + 8, lowest=bottom - 2, show=show)
    words = ", ".join(
        f"{s.name}: {show(s.points[0][1])} to {show(s.points[-1][1])}" for s in series if s.style != "raw"
    )
    picture = tag("svg", *parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=f"{title}. {words}")
    scale = (", logarithmic" if wide else ", log") if log_y else ""
    caption = tag("figcaption", title, tag("span", f" {subtitle}{scale}", cls="soft") if subtitle or scale else None)
    key = _line_legend(series) if wide or sum(s.style != "raw" for s in series) > 1 else None
    return tag("figure", caption, key, tag("div", picture, cls="scroll wide" if wide else None))


def _y_range(series: Sequence[Series], *, may_log: bool) -> tuple[float, float, bool]:
    """Lowest and highest y shown, and whether the axis is logarithmic. Outliers of raw lines are clipped."""
    values: list[float] = []
    for s in series:
        ordered = sorted(y for _, y in s.points)
        cut = len(ordered) // 50 if s.style == "raw" else 0
        values += ordered[cut : len(ordered) - cut] if cut else ordered
    low, high = min(values), max(values)
    if may_log and low > 0 and high / low > LOG_FROM_RATIO:
        return low / 1.1, high * 1.1, True
    if low >= 0 and low < 0.4 * high:
        low = 0.0
    pad = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return (low - pad if low else 0.0), high + pad, False


def _line(
    s: Series,
    x_of: Callable[[float], float],
    y_of: Callable[[float], float],
    *,
    x_label: str,
    most: int,
    show: Callable[[float], str],
) -> list[Markup]:
    points = thin(s.points, most=most)
    path = "M" + "L".join(f"{x_of(x):.1f} {y_of(y):.1f}" for x, y in points)
    parts = [tag("path", d=path, cls=f"{'raw' if s.style == 'raw' else 'curve'} k{s.colour}")]
    if s.style == "raw":
        return parts
    every = 1 if s.style == "dots" else math.ceil(len(s.points) / HOVER_POINTS)
    for x, y in list(s.points[::-1][::every])[::-1]:
        place = {"cx": f"{x_of(x):.1f}", "cy": f"{y_of(y):.1f}"}
        if s.style == "dots":
            parts.append(tag("circle", r=4, cls=f"dot f{s.colour}", **place))
        title = tag("title", f"{s.name}: {show(y)} at {x_label} {number(x)}")
        parts.append(tag("circle", title, r=6, cls="hit", **place))
    return parts


def _end_labels(
    series: Sequence[Series], y_of: Callable[[float], float], *, x: float, lowest: float, show: Callable[[float], str]
) -> list[Markup]:
    """The last value of each line at its end, moved apart where they would overlap, none below ``lowest``."""
    ends = sorted(((y_of(s.points[-1][1]), show(s.points[-1][1]), s.colour) for s in series), key=lambda end: end[0])
    places: list[float] = []
    for y, _, _ in ends:
        places.append(max(y, places[-1] + 14) if places else y)
    for at in range(len(places) - 1, -1, -1):
        places[at] = min(places[at], lowest if at == len(places) - 1 else places[at + 1] - 14)
    return [
        tag("text", text, x=x, y=f"{place + 4:.1f}", cls=f"strong f{colour}")
        for place, (_, text, colour) in zip(places, ends, strict=True)
    ]


def _line_legend(series: Sequence[Series]) -> Markup | None:
    if len(series) < 2:
        return None
    entries = []
    for s in series:
        line = tag("line", x1=1, x2=21, y1=6, y2=6, cls=f"{'raw' if s.style == 'raw' else 'curve'} k{s.colour}")
        dot = tag("circle", cx=11, cy=6, r=4, cls=f"dot f{s.colour}") if s.style == "dots" else None
        entries.append(tag("span", tag("svg", line, dot, viewBox="0 0 22 12", aria_hidden="true"), s.name))
    return tag("div", *entries, cls="legend")


def legend(entries: Sequence[tuple[str, str]]) -> Markup:
    """Coloured boxes with their meanings: (style classes, text)."""
    boxes = [
        tag("span", tag("svg", tag("rect", x=4, y=0, width=14, height=12, rx=2, cls=cls), viewBox="0 0 22 12"), text)
        for cls, text in entries
    ]
    return tag("div", *boxes, cls="legend")


def accuracy_chart(bars: Sequence[AccuracyBar]) -> Markup:
    """Horizontal bars in percent with interval whiskers, a chance line, and marks for the blind and shuffled rows."""
    width, left, right, row_height, top = 1040, 190, 980, 34, 8
    height = top + row_height * len(bars) + 30

    def x_of(share: float) -> float:
        return left + (right - left) * share

    parts: list[Markup] = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = f"{x_of(tick):.1f}"
        parts.append(tag("line", x1=x, x2=x, y1=top, y2=height - 28, cls="grid" if tick else "axis"))
        parts.append(tag("text", f"{100 * tick:.0f} %", x=x, y=height - 10, text_anchor="middle"))
    for at, bar in enumerate(bars):
        parts.append(_accuracy_row(bar, x_of, y=top + row_height * at + row_height / 2, text_x=right + 12, left=left))
    marks: list[tuple[str, Markup]] = [("with the picture, 95 % interval", _bar_swatch())]
    if any(bar.blind is not None for bar in bars):
        marks.append(("blind (no picture)", tag("circle", cx=11, cy=6, r=4.5, cls="hollow k2")))
    if any(bar.shuffled is not None for bar in bars):
        marks.append(("another scene's picture", _diamond(11, 6)))
    if any(bar.chance is not None for bar in bars):
        marks.append(("chance", tag("line", x1=11, x2=11, y1=0, y2=12, cls="chance")))
    key = [tag("span", tag("svg", m, viewBox="0 0 22 12", aria_hidden="true"), name) for name, m in marks]
    words = ", ".join(f"{bar.name} {percent(bar.accuracy)}" for bar in bars)
    picture = tag("svg", *parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=f"Accuracy by kind: {words}")
    return tag("figure", tag("div", *key, cls="legend"), tag("div", picture, cls="scroll wide"))


def _accuracy_row(bar: AccuracyBar, x_of: Callable[[float], float], *, y: float, text_x: float, left: float) -> Markup:
    interval = f"95 % interval {percent(bar.low)} to {percent(bar.high)}"
    hover = f"{bar.name}: {percent(bar.accuracy)} of {bar.n:,} questions, {interval}"
    for word, value in (("blind", bar.blind), ("shuffled", bar.shuffled), ("chance", bar.chance)):
        if value is not None:
            hover += f"; {word} {percent(value)}"
    low, high, end = x_of(bar.low), x_of(bar.high), x_of(bar.accuracy)
    strong = "strong" if bar.name == "all" else None
    parts = [
        tag("title", hover),
        tag("rect", x=0, y=f"{y - 16:.1f}", width=text_x + 60, height=32, fill="transparent"),
        tag("text", bar.name, x=left - 12, y=f"{y + 4:.1f}", text_anchor="end", cls=strong),
        tag("rect", x=left, y=f"{y - 8:.1f}", width=f"{end - left:.1f}", height=16, rx=3, cls="f1", opacity=0.6),
    ]
    for x1, x2, y1, y2 in ((low, high, y, y), (low, low, y - 4, y + 4), (high, high, y - 4, y + 4)):
        parts.append(tag("line", x1=f"{x1:.1f}", x2=f"{x2:.1f}", y1=f"{y1:.1f}", y2=f"{y2:.1f}", cls="whisker"))
    if bar.chance is not None:
        x = f"{x_of(bar.chance):.1f}"
        parts.append(tag("line", x1=x, x2=x, y1=f"{y - 13:.1f}", y2=f"{y + 13:.1f}", cls="chance"))
    if bar.blind is not None:
        parts.append(tag("circle", cx=f"{x_of(bar.blind):.1f}", cy=f"{y:.1f}", r=5, cls="hollow k2"))
    if bar.shuffled is not None:
        parts.append(_diamond(x_of(bar.shuffled), y))
    parts.append(tag("text", f"{100 * bar.accuracy:.1f}", x=text_x, y=f"{y + 4:.1f}", cls="strong"))
    return tag("g", *parts)


def _diamond(x: float, y: float) -> Markup:
    return tag("path", d=f"M{x:.1f} {y - 5.5:.1f}l5.5 5.5l-5.5 5.5l-5.5 -5.5z", cls="hollow k4")


def _bar_swatch() -> Markup:
    return join(
        [
            tag("rect", x=0, y=1, width=16, height=10, rx=2, cls="f1", opacity=0.6),
            tag("line", x1=11, x2=21, y1=6, y2=6, cls="whisker"),
        ]
    )
