"""Pictures that look the same: copies of pages, forms and charts are found, other pages of that kind are not."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from vlit.synth.quality.pictures import Looks, look_at, same_across, same_within

WORDS = (
    "invoice",
    "total",
    "amount",
    "date",
    "customer",
    "report",
    "table",
    "value",
    "name",
    "street",
    "city",
    "order",
)
WIDE, HIGH, COUNT = 600, 780, 16


def text(draw: ImageDraw.ImageDraw, rng: Random) -> None:
    for y in range(40, HIGH - 40, 18):
        x = 40.0
        while x < WIDE - 60:
            word = rng.choice(WORDS)
            draw.text((x, y), word, fill="black", font_size=13)
            x += draw.textlength(word, font_size=13) + 5


def form(draw: ImageDraw.ImageDraw, rng: Random) -> None:
    for _ in range(rng.randint(6, 14)):
        place = (rng.randint(30, WIDE - 200), rng.randint(30, HIGH - 60))
        draw.text(place, f"{rng.choice(WORDS)}: {rng.randint(1, 99999)}", fill="black", font_size=15)


def line_chart(draw: ImageDraw.ImageDraw, rng: Random) -> None:
    draw.line((50, 50, 50, 700, 560, 700), fill="black")
    draw.line([(x, rng.randint(80, 680)) for x in range(50, 570, 50)], fill=(30, 60, 200), width=3)


def bar_chart(draw: ImageDraw.ImageDraw, rng: Random) -> None:
    draw.line((50, 700, 560, 700), fill="black")
    for x in range(70, 550, 80):
        draw.rectangle((x, 700 - rng.randint(30, 600), x + 45, 700), fill=(70, 110, 200))


def copies(image: Image.Image) -> Iterator[tuple[str, Image.Image]]:
    """What a picture becomes elsewhere, by kind."""
    yield "resized", image.resize((240, 312), Image.Resampling.BICUBIC)
    yield "brightened", ImageEnhance.Brightness(image).enhance(1.08)
    yield "darkened", ImageEnhance.Brightness(image).enhance(0.97)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=60)
    yield "jpeg", Image.open(data).convert("RGB")
    yield "cropped", image.crop((5, 6, WIDE - 5, HIGH - 6))


def seen(pictures: list[Image.Image], folder: Path) -> Looks:
    folder.mkdir()
    names = [f"{number}.png" for number in range(len(pictures))]
    for name, picture in zip(names, pictures, strict=True):
        picture.save(folder / name)
    return look_at((names, folder))


@pytest.mark.parametrize("kind", [text, form, line_chart, bar_chart])
def test_different_pages_are_told_apart_and_copies_are_found(
    kind: Callable[[ImageDraw.ImageDraw, Random], None], tmp_path: Path
) -> None:
    pages = []
    for seed in range(COUNT):
        pages.append(Image.new("RGB", (WIDE, HIGH), "white"))
        kind(ImageDraw.Draw(pages[-1]), Random(seed))
    looks = seen(pages, tmp_path / "pages")
    assert len(same_within(looks)) <= 0.01 * COUNT * (COUNT - 1) / 2
    half = COUNT // 2
    others = Looks(*(column[half:] for column in looks))
    assert (same_across(Looks(*(column[:half] for column in looks)), others) >= 0).sum() == 0
    found: dict[str, list[bool]] = {}
    for number, page in enumerate(pages[:half]):
        for name, copy in copies(page):
            of = same_across(seen([copy], tmp_path / f"{name}{number}"), looks)
            found.setdefault(name, []).append(of.tolist() == [number])
    shares = {name: float(np.mean(held)) for name, held in found.items()}
    assert shares.pop("cropped") >= 0.9
    assert shares == dict.fromkeys(("resized", "brightened", "darkened", "jpeg"), 1.0)


def test_a_blank_page_is_the_same_as_a_blank_page_and_as_no_other(tmp_path: Path) -> None:
    blank, written = Image.new("RGB", (WIDE, HIGH), "white"), Image.new("RGB", (WIDE, HIGH), "white")
    form(ImageDraw.Draw(written), Random(0))
    looks = seen([blank, written, Image.new("RGB", (300, 400), (252, 252, 252))], tmp_path / "p")
    assert same_within(looks).tolist() == [[0, 2]]
