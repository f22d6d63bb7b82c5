"""Bars and histograms of the quality card, as inline SVG with exact values on hover."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlit.serve.markup import Markup, number, short, tag


def histogram(title: str, counts: Sequence[float], edges: Sequence[float], *, colour: int = 1) -> Markup:
    """Counts of records by value; the last bar holds what is larger too."""
    width, height, left, bottom = 260, 130, 40, 104
    top = max(max(counts, default=0), 1)
    step = (width - left) / max(len(counts), 1)
    parts = [tag("line", x1=left, x2=width, y1=bottom, y2=bottom, cls="axis")]
    for at, count in enumerate(counts):
        high = (bottom - 10) * count / top
        words = f"{number(edges[at])} to {number(edges[at + 1])}: {number(count)} records"
        bar = tag(
            "rect", tag("title", words), x=f"{left + at * step + 1:.1f}", y=f"{bottom - high:.1f}",
            width=f"{step - 2:.1f}", height=f"{max(high, 1 if count else 0):.1f}", rx=2, cls=f"f{colour}", opacity=0.75,
        )  # fmt: skip
        parts.append(bar)
    for place in (0, len(counts) // 2, len(counts)):
        parts.append(
            tag("text", number(edges[place]), x=f"{left + place * step:.1f}", y=bottom + 18,
                text_anchor="start" if not place else "end" if place == len(counts) else "middle")
        )  # fmt: skip
    parts.append(tag("text", short(top), x=left - 6, y=18, text_anchor="end"))
    picture = tag("svg", *parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=f"{title}, histogram")
    return tag("figure", tag("figcaption", title), picture)


def bars(title: str, values: Mapping[str, float], *, colour: int = 3, most: int = 12) -> Markup:
    """A row for each of the largest values."""
    shown = sorted(values.items(), key=lambda item: -item[1])[:most]
    if not shown:
        return Markup("")
    width, left, high = 420, 150, 22
    top = max(value for _, value in shown) or 1
    parts: list[Markup] = []
    for at, (name, value) in enumerate(shown):
        y = at * high
        long = (width - left - 60) * value / top
        label = name if len(name) <= 22 else name[:21] + "…"
        parts += [
            tag("text", tag("title", name), label or "(none)", x=left - 8, y=y + 15, text_anchor="end"),
            tag("rect", x=left, y=y + 3, width=f"{max(long, 1):.1f}", height=14, rx=2, cls=f"f{colour}", opacity=0.75),
            tag("text", number(value), x=f"{left + max(long, 1) + 6:.1f}", y=y + 15, cls="strong"),
        ]
    box = f"0 0 {width} {len(shown) * high + 4}"
    picture = tag("svg", *parts, viewBox=box, role="img", aria_label=f"{title}, bars")
    return tag("figure", tag("figcaption", title), picture)
