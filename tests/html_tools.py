"""Reads generated pages back: a strict little parser, and headless Chromium where it is installed."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest

CHROMIUM = Path("/usr/bin/chromium")
VOID = {"img", "br", "meta", "line", "circle", "rect", "path"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All text inside, as a reader sees it."""
        return "".join(c if isinstance(c, str) else c.text for c in self.children)

    def all(self, tag: str, cls: str | None = None) -> list[Element]:
        """All elements inside with this tag (and class)."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                if child.tag == tag and (cls is None or cls in (child.attributes.get("class") or "").split()):
                    found.append(child)
                found += child.all(tag, cls)
        return found

    def by_id(self, name: str) -> Element:
        (found,) = [e for e in self.everything() if e.attributes.get("id") == name]
        return found

    def everything(self) -> list[Element]:
        inside = [c for c in self.children if isinstance(c, Element)]
        return inside + [e for c in inside for e in c.everything()]

    def rows(self) -> list[list[str]]:
        """Cell texts of the body rows of all tables inside."""
        return [[cell.text.strip() for cell in row.all("td")] for row in self.all("tr") if row.all("td")]


class _Builder(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("document", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID or tag in ("circle", "rect", "path", "line"):
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parse(html: str) -> Element:
    """Parse a page; every element must be closed in order."""
    builder = _Builder()
    builder.feed(html)
    builder.close()
    assert builder.open == [builder.root], f"never closed: {[e.tag for e in builder.open[1:]]}"
    return builder.root


def assert_self_contained(root: Element) -> None:
    """No script, no event handler, and nothing that a browser would fetch."""
    elements = root.everything()
    assert len(elements) > 50
    assert not {e.tag for e in elements} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for element in elements:
        for key, value in element.attributes.items():
            assert not key.startswith("on"), (element.tag, key)
            if key in ("src", "href", "srcset", "action", "data"):
                assert (value or "").startswith(("data:image/", "#")), (element.tag, key, (value or "")[:80])
    for style in root.all("style"):
        assert "url(" not in style.text
        assert "@import" not in style.text


def in_chromium(html: str, folder: Path, *, width: int, height: int = 2000) -> tuple[Path, dict[str, int]]:
    """Render in real Chromium: a screenshot, and what the browser measured (page width, pictures that failed, ...)."""
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed")
    probe = (
        "<script>onload=()=>{const d=document,broken=[...d.images].filter(i=>!i.naturalWidth).length;"
        "d.title=JSON.stringify({page:d.documentElement.scrollWidth,window:innerWidth,images:d.images.length,broken,"
        "height:d.documentElement.scrollHeight})}</script>"
    )
    page, shot = folder / "page.html", folder / f"page-{width}.png"
    page.write_text(html.replace("</body>", f"{probe}</body>"), encoding="utf-8")
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}"]
    subprocess.run([*command, f"--screenshot={shot}", page.as_uri()], check=True, capture_output=True, timeout=120)
    dump = subprocess.run([*command, "--dump-dom", page.as_uri()], check=True, capture_output=True, timeout=120)
    import json

    title = parse(dump.stdout.decode()).all("title")[0].text
    return shot, json.loads(title)
