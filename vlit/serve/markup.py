"""HTML that cannot be injected into: every child that is not markup already is escaped. No template engine, no scripts.

``tag("p", "a < b", cls="note")`` -> ``<p class="note">a &lt; b</p>``. Pages are self-contained: styles inline, pictures
as data URIs, no request leaves the reader's machine.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

VOID_TAGS = frozenset({"img", "br", "meta", "line", "circle", "rect", "path"})


class Markup(str):
    """Text that is HTML already and must not be escaped again."""

    __slots__ = ()


def join(children: Iterable[Any]) -> Markup:
    """Children one after another; text is escaped, None and False are left out, lists are opened."""
    parts: list[str] = []
    for child in children:
        if child is None or child is False:
            continue
        if isinstance(child, Markup):
            parts.append(child)
        elif isinstance(child, (list, tuple)):
            parts.append(join(child))
        else:
            parts.append(escape(str(child), quote=False))
    return Markup("".join(parts))


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """One element. ``cls`` is the attribute ``class``, ``_`` in names becomes ``-``; None or False leave one out."""
    text = "".join(
        f' {key}="{escape(str(value))}"' if value is not True else f" {key}"
        for key, value in (("class" if k == "cls" else k.replace("_", "-"), v) for k, v in attributes.items())
        if value is not None and value is not False
    )
    if name in VOID_TAGS and not children:
        return Markup(f"<{name}{text}/>")
    return Markup(f"<{name}{text}>{join(children)}</{name}>")


def page(title: str, *body: Any) -> str:
    """A whole document with the project's style sheet; light or dark as the reader's system is set."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        Markup(f"<style>{style}</style>"),
    )
    return "<!doctype html>\n" + tag("html", head, tag("body", tag("main", *body)), lang="en") + "\n"


def table(
    header: Sequence[Any], rows: Iterable[Sequence[Any]], *, numeric: Sequence[int] = (), cls: str = ""
) -> Markup:
    """A table that scrolls sideways on a narrow screen; columns listed in ``numeric`` are right-aligned."""

    def cells(name: str, row: Sequence[Any]) -> list[Markup]:
        return [tag(name, cell, cls="num" if at in numeric else None) for at, cell in enumerate(row)]

    head = tag("thead", tag("tr", *cells("th", header)))
    body = tag("tbody", *(tag("tr", *cells("td", row)) for row in rows))
    return tag("div", tag("table", head, body, cls=cls or None), cls="scroll")


def picture(path: Path, *, max_side: int = 320, alt: str = "") -> Markup:
    """The picture as a data URI, no larger than ``max_side`` pixels; where it cannot be read, a box that says so."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = "not found" if isinstance(error, FileNotFoundError) else "cannot be read"
        return tag("div", f"picture {reason}: {path.name}", cls="no-picture")
    return picture_of(image, max_side=max_side, alt=alt or path.name)


def picture_of(image: Any, *, max_side: int = 320, alt: str = "") -> Markup:
    """A PIL picture as a data URI: PNG when it is small (kept sharp when enlarged), JPEG otherwise."""
    small = max(image.size) <= 128
    image = image.copy()
    image.thumbnail((max_side, max_side))
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if small else "JPEG", **({"optimize": True} if small else {"quality": 82}))
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    kind = "png" if small else "jpeg"
    return tag("img", src=f"data:image/{kind};base64,{data}", alt=alt, title=alt, cls="pixels" if small else None)


# --- numbers as a reader wants them -----------------------------------------------------------------------------------


def number(value: Any) -> str:
    """Three significant digits for fractions, thousands separators for integers, scientific below 0.0001."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-4:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"


def measure(value: float) -> str:
    """A measured number with three significant digits, zeros kept: 2.004 -> 2.00."""
    if not math.isfinite(value) or abs(value) < 1e-4 or abs(value) >= 100:
        return number(value)
    return f"{value:#.3g}".removesuffix(".")


def short(value: float) -> str:
    """Large counts with a unit: 1,234 -> 1.23k, 7.06e9 -> 7.06B."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return number(value)


def percent(share: float, *, digits: int = 1) -> str:
    """0.9123 -> 91.2 %."""
    return f"{100 * share:.{digits}f} %"


def duration(seconds: float) -> str:
    """4h 12m, 3m 05s or 8.2 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    return f"{minutes // 60}h {minutes % 60:02d}m"
