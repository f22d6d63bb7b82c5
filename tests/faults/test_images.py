"""Damaged, hostile and unusual pictures: refused by name, or exactly the pixels the documented rules give."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tests.data_fixtures import make_spec
from vlit.data.images import Policy, load_view, open_rgb
from vlit.errors import DataError

ROOT = Path(__file__).resolve().parent.parent.parent
SPEC = make_spec("none", image_size=56)
GREY = (122, 116, 104)  # CLIP's mean colour
POLICIES: list[Policy] = ["pad", "crop", "squash"]


def smooth(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return noise.filter(ImageFilter.GaussianBlur(2))


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def refusal_of(path: Path, *, exact: bool = False) -> str:
    with pytest.raises(DataError) as caught:
        load_view(path, policy="pad", spec=SPEC, exact=exact)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_a_pipe_and_a_device_are_no_images_and_nothing_is_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.jpg")
    assert "it is a folder" in refusal_of(tmp_path)
    assert "it is no regular file" in refusal_of(tmp_path / "pipe.jpg")
    assert "it is no regular file" in refusal_of(Path("/dev/zero"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html>gone", "it starts with b'<!DOCTYPE ht'"),
        (b"just some text\n", "it starts with b'just some te'"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it starts with b'%!PS-Adobe-3', a PostScript file"),
        (
            encoded(smooth(9, 9), "JPEG2000"),
            r"it starts with b'\x00\x00\x00\x0cjP  \r\n\x87\n', a JPEG 2000 file, which is not",
        ),
    ],
    ids=["empty", "page", "text", "postscript", "jpeg 2000"],
)
def test_what_is_no_picture_is_named_with_what_it_begins_with(tmp_path: Path, content: bytes, words: str):
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    assert f"{path}: not an image ({words}" in refusal_of(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
@pytest.mark.parametrize("end", ["missing", "zeros"])
@pytest.mark.parametrize("exact", [False, True])
def test_a_cut_jpeg_is_refused_by_name_and_never_half_grey(
    tmp_path: Path, share: float, options: dict[str, bool], end: str, exact: bool
):
    """1000 x 700 pixels, so that the fast way decodes it reduced."""
    whole = encoded(smooth(1000, 700), "JPEG", quality=90, **options)
    path = tmp_path / "cut.jpg"
    path.write_bytes(whole)
    load_view(path, policy="pad", spec=SPEC, exact=exact)
    kept = whole[: int(len(whole) * share)]
    path.write_bytes(kept if end == "missing" else kept.ljust(len(whole), b"\0"))
    message = refusal_of(path, exact=exact)
    assert message.startswith(f"{path}: the image ")
    assert "cannot be decoded" in message or "is not complete" in message


def test_zeros_behind_the_end_mark_do_no_harm(tmp_path: Path):
    for format in ("JPEG", "PNG", "GIF"):
        content = encoded(smooth(40, 30), format)
        (tmp_path / "a").write_bytes(content)
        (tmp_path / "b").write_bytes(content + bytes(5000))
        pixels = [np.asarray(open_rgb(tmp_path / name, background=GREY)) for name in "ab"]
        np.testing.assert_array_equal(*pixels)


def over(colour: tuple[int, ...], alpha: float) -> np.ndarray:
    """A colour of some opacity over the mean colour."""
    return np.array(colour) * alpha + np.array(GREY) * (1 - alpha)


def ycck(folder: Path) -> Path:
    """PIL writes CMYK; the Adobe segment's last byte says that the same four channels are YCCK."""
    content = bytearray(encoded(Image.new("CMYK", (16, 16), (90, 127, 127, 200)), "JPEG", quality=100))
    adobe = content.index(b"Adobe")
    assert content[adobe + 11] == 0
    content[adobe + 11] = 2
    (folder / "ycck.jpg").write_bytes(content)
    return folder / "ycck.jpg"


def saved(name: str, make: Callable[[], Image.Image], **options: object) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        make().save(folder / name, **options)
        return folder / name

    return write


def palette(entries: list[int], pixel: int) -> Image.Image:
    image = Image.new("P", (16, 16), pixel)
    image.putpalette(entries + [0] * (768 - len(entries)))
    return image


GOLDEN: dict[str, tuple[Callable[[Path], Path], np.ndarray, float]] = {
    # what: (file, the colour it must have, tolerance in levels)
    "rgb": (saved("a.png", lambda: Image.new("RGB", (16, 16), (10, 20, 30))), np.array((10, 20, 30)), 0),
    "grey": (saved("a.png", lambda: Image.new("L", (16, 16), 77)), np.array((77, 77, 77)), 0),
    "grey jpeg": (saved("a.jpg", lambda: Image.new("L", (16, 16), 77)), np.array((77, 77, 77)), 1),
    "1 bit": (saved("a.png", lambda: Image.new("1", (16, 16), 1)), np.array((255, 255, 255)), 0),
    "rgb + alpha": (saved("a.png", lambda: Image.new("RGBA", (16, 16), (200, 100, 0, 51))), over((200, 100, 0), 0.2), 1),
    "invisible": (saved("a.png", lambda: Image.new("RGBA", (16, 16), (255, 0, 255, 0))), np.array(GREY), 0),
    "grey + alpha": (saved("a.png", lambda: Image.new("LA", (16, 16), (200, 102))), over((200, 200, 200), 0.4), 1),
    "palette": (saved("a.png", lambda: palette([1, 2, 3, 40, 50, 60], 1)), np.array((40, 50, 60)), 0),
    "transparent palette": (saved("a.png", lambda: palette([1, 2, 3, 40, 50, 60], 1), transparency=1), np.array(GREY), 0),
    "half transparent palette": (
        saved("a.png", lambda: palette([1, 2, 3, 40, 50, 60], 1), transparency=bytes((255, 128))),
        over((40, 50, 60), 128 / 255), 1,
    ),
    "one transparent colour": (
        saved("a.png", lambda: Image.new("RGB", (16, 16), (9, 8, 7)), transparency=(9, 8, 7)), np.array(GREY), 0,
    ),
    "16 bit": (saved("a.png", lambda: Image.fromarray(np.full((16, 16), 100 * 257, np.uint16))), np.array((100,) * 3), 0),
    "32 bit": (saved("a.tiff", lambda: Image.fromarray(np.full((16, 16), 50 * 257, np.int32))), np.array((50,) * 3), 0),
    "float to 1": (saved("a.tiff", lambda: Image.fromarray(np.full((16, 16), 0.2, np.float32))), np.array((51,) * 3), 0),
    "float to 255": (saved("a.tiff", lambda: Image.fromarray(np.full((16, 16), 51.0, np.float32))), np.array((51,) * 3), 0),
    "cmyk": (  # red = (1 - cyan) (1 - black)
        saved("a.jpg", lambda: Image.new("CMYK", (16, 16), (51, 102, 0, 51)), quality=100),
        255 * (1 - np.array((51, 102, 0)) / 255) * (1 - 51 / 255), 3,
    ),
    # stored: Y = 255 - 90, Cb = Cr = 128 (neutral), K = 255 - 200; so ink = Y, and black = 200 of 255
    "ycck": (ycck, np.full(3, 255 * (1 - 165 / 255) * (1 - 200 / 255)), 3),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_every_kind_of_pixel_has_the_colour_worked_out_by_hand(tmp_path: Path, name: str):
    write, expected, tolerance = GOLDEN[name]
    pixels = np.asarray(open_rgb(write(tmp_path), background=GREY)).astype(float)
    assert pixels.shape == (16, 16, 3)
    assert np.abs(pixels - expected).max() <= tolerance, pixels[8, 8]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("exact", [False, True])
def test_all_eight_orientations_give_the_same_upright_view(tmp_path: Path, policy: Policy, exact: bool):
    upright = smooth(120, 90)
    turns = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    views = []
    for orientation, turn in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = upright if turn is None else upright.transpose(turn)
        path = tmp_path / f"{orientation}.png"
        stored.save(path, exif=exif)
        views.append(load_view(path, policy=policy, spec=SPEC, exact=exact))
    plain = tmp_path / "plain.png"
    upright.save(plain)
    for view in views:
        np.testing.assert_array_equal(view, load_view(plain, policy=policy, spec=SPEC, exact=exact))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *chunks: bytes, rows: bytes = b"\0") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_damaged_colour_profiles_and_camera_data_do_not_matter(tmp_path: Path, format: str):
    image = smooth(40, 30)
    options = {"lossless": True} if format == "WEBP" else {}
    clean, damaged = tmp_path / "clean", tmp_path / "damaged"
    clean.write_bytes(encoded(image, format, **options))
    expected = np.asarray(open_rgb(clean, background=GREY))
    for exif in (
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0garbage",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12",
        b"Exif\0\0",
    ):
        damaged.write_bytes(encoded(image, format, exif=exif, icc_profile=b"no profile" * 9, **options))
        np.testing.assert_array_equal(np.asarray(open_rgb(damaged, background=GREY)), expected)


def test_a_png_with_a_wrong_checksum_is_refused_by_name(tmp_path: Path):
    rows = b"".join(b"\0" + bytes(27) for _ in range(9))
    sound = png(9, 9, chunk(b"tEXt", b"k\0v"), rows=rows)
    path = tmp_path / "x.png"
    path.write_bytes(sound)
    open_rgb(path, background=GREY)
    path.write_bytes(sound.replace(b"k\0v", b"k\0w"))
    assert "x.png: the image cannot be decoded" in refusal_of(path)


def test_the_first_frame_is_taken_of_every_kind_of_animation_and_of_two_camera_pictures(tmp_path: Path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime")]
    for name, options in {
        "a.gif": {}, "a.png": {}, "a.webp": {"lossless": True}, "a.tiff": {}, "a.mpo": {"format": "MPO", "quality": 100}
    }.items():  # fmt: skip
        path = tmp_path / name
        frames[0].save(path, save_all=True, append_images=frames[1:], **options)
        with Image.open(path) as image:
            assert getattr(image, "n_frames", 1) == 2
        pixel = np.asarray(open_rgb(path, background=GREY))[8, 8].astype(int)
        assert np.abs(pixel - (255, 0, 0)).max() <= 2, name
