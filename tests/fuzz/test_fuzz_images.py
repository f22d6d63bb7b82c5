"""Image files of any bytes: a DataError that names the file, or a view of the right size; never pixels that are not there."""

from __future__ import annotations

import io
import tempfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from tests.data_fixtures import make_spec
from tests.fuzz.common import Property, mutated, peak_memory
from vlit.data.images import load_view, open_rgb
from vlit.errors import DataError

SPEC = make_spec("none", image_size=16)
SAVED: dict[str, tuple[str, dict[str, Any]]] = {
    # name: mode, options of PIL's writer
    "png": ("RGB", {"format": "PNG"}),
    "png palette": ("P", {"format": "PNG", "transparency": 3}),
    "png grey alpha": ("LA", {"format": "PNG"}),
    "png deep": ("I;16", {"format": "PNG"}),
    "jpeg": ("RGB", {"format": "JPEG"}),
    "jpeg progressive": ("RGB", {"format": "JPEG", "progressive": True}),
    "jpeg cmyk": ("CMYK", {"format": "JPEG"}),
    "gif": ("P", {"format": "GIF"}),
    "webp": ("RGB", {"format": "WEBP"}),
    "webp lossless": ("RGBA", {"format": "WEBP", "lossless": True}),
    "tiff": ("RGB", {"format": "TIFF"}),
    "tiff packed": ("CMYK", {"format": "TIFF", "compression": "tiff_lzw"}),
    "tiff float": ("F", {"format": "TIFF"}),
    "bmp": ("RGB", {"format": "BMP"}),
    "avif": ("RGB", {"format": "AVIF"}),
    "ppm": ("RGB", {"format": "PPM"}),
}
TOKENS = (
    b"\xff\xd9", b"\xff\xd8", b"\xff\xda", b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\x4e\x20\0\0\x4e\x20",
    b"IEND", b"IDAT", b"acTL", b"eXIf", b"iCCP", b"Exif\0\0II*\0", b"%!PS-Adobe-3.0 EPSF-3.0\n",
)  # fmt: skip


@cache
def file_of(name: str) -> bytes:
    """A picture of 20 x 12 pixels with EXIF, in one of the formats."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (12, 20, 3), dtype=np.uint8))
    mode, options = SAVED[name]
    picture = (
        Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
        if mode == "I;16"
        else picture.convert(mode)
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    options = options | ({"exif": exif} if options["format"] in ("PNG", "JPEG", "WEBP", "TIFF") else {})
    buffer = io.BytesIO()
    picture.save(buffer, **options)
    return buffer.getvalue()


def check_file(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.img"
        path.write_bytes(content)
        for policy, exact in (("pad", False), ("crop", True), ("squash", False)):
            view, message = None, ""
            try:
                view = load_view(path, policy=policy, spec=SPEC, exact=exact)
            except DataError as error:
                message = str(error)
            if view is None:
                assert "x.img: " in message
                assert "\n" not in message
                assert len(message) < 600
            else:
                assert view.shape == (3, 16, 16)
                assert view.dtype == np.uint8


def header(case: tuple[str, int, int]) -> bytes:
    """A small file whose header claims other dimensions."""
    name, width, height = case
    content = bytearray(file_of(name))
    if name == "png":
        content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    elif name == "jpeg":
        place = content.index(b"\xff\xc0")
        content[place + 5 : place + 9] = (height % 65536).to_bytes(2, "big") + (width % 65536).to_bytes(2, "big")
    elif name == "gif":
        content[6:10] = (width % 65536).to_bytes(2, "little") + (height % 65536).to_bytes(2, "little")
    elif name == "bmp":
        content[18:26] = width.to_bytes(4, "little") + height.to_bytes(4, "little")
    return bytes(content)


sizes = st.integers(0, 2**31 - 1) | st.integers(1, 40_000) | st.sampled_from((0, 1, 13_378, 65_535, 2**31 - 1))
DAMAGED = mutated(st.sampled_from(sorted(SAVED)).map(file_of), tokens=TOKENS)
PROPERTIES = [
    Property("images: damaged files", DAMAGED, check_file, 400),
    Property(
        "images: any size in the header",
        st.tuples(st.sampled_from(("png", "jpeg", "gif", "bmp")), sizes, sizes).map(header),
        check_file,
        30,
    ),
    Property("images: any bytes", st.binary(max_size=60), check_file, 60),
]


@pytest.mark.parametrize("fuzz", PROPERTIES, ids=lambda fuzz: fuzz.name)
def test_images(fuzz: Property):
    before = peak_memory()
    assert fuzz.run() > fuzz.examples // 2
    assert peak_memory() - before < 2 << 30  # the largest picture allowed has 179 million pixels of 3 bytes


def refused_or_equal(name: str, tmp_path: Path, damage: Callable[[bytes, int], bytes]) -> float:
    """Damage the file at every single byte; the share that is refused. What is not refused must give the same pixels."""
    content = file_of(name)
    path = tmp_path / "x.img"
    path.write_bytes(content)
    whole = np.asarray(open_rgb(path, background=(1, 2, 3)))
    refused = 0
    for length in range(len(content)):
        path.write_bytes(damage(content, length))
        try:
            cut = np.asarray(open_rgb(path, background=(1, 2, 3)))
        except DataError:
            refused += 1
        else:
            np.testing.assert_array_equal(cut, whole, err_msg=f"{name} damaged at byte {length} of {len(content)}")
    return refused / len(content)


@pytest.mark.parametrize("name", SAVED)
def test_the_beginning_of_a_file_is_refused_or_gives_the_pixels_of_the_whole(name: str, tmp_path: Path):
    assert refused_or_equal(name, tmp_path, lambda content, length: content[:length]) > 0.8


@pytest.mark.parametrize("name", [name for name in SAVED if name.startswith(("png", "jpeg", "gif"))])
def test_a_file_whose_end_is_zeros_is_refused_or_gives_the_pixels_of_the_whole(name: str, tmp_path: Path):
    assert refused_or_equal(name, tmp_path, lambda content, length: content[:length].ljust(len(content), b"\0")) > 0.8
