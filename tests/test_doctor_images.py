"""What `vlit doctor` finds in one image file, and what training would refuse."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tests.doctor_templates  # noqa: F401  (registers a template)
from tests.scale.doctor_665k import World
from vlit.data.doctor.checks import Finding, severity_of
from vlit.data.doctor.image_file import look_at
from vlit.data.images import load_view, resolve_image
from vlit.errors import DataError

ROOT = Path(__file__).resolve().parent.parent
EVIL = '<img src=x onerror="alert(1)">'


def pixels(width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or pixels()).save(buffer, kind, **options)
    return buffer.getvalue()


def checks_of(path: Path, **options: Any) -> list[str]:
    return [finding.check for finding in look_at(path, shown=path.name, **options)]


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded("JPEG", exif=exif)


def animated(kind: str) -> bytes:
    frames = [pixels().convert("P"), pixels().rotate(180).convert("P")]
    return encoded(kind, frames[0], save_all=True, append_images=frames[1:])


FILES: list[tuple[str, bytes, list[str]]] = [
    ("sound.jpg", encoded("JPEG"), []),
    ("sound.JPEG", encoded("JPEG", progressive=True), []),
    ("sound.png", encoded("PNG"), []),
    ("sound.webp", encoded("WEBP"), []),
    ("sound.bmp", encoded("BMP"), []),
    ("grey.png", encoded("PNG", pixels().convert("L")), []),
    ("name without extension", encoded("PNG"), []),
    ("empty.jpg", b"", ["image_empty"]),
    ("page.jpg", b"<!DOCTYPE html><html>404</html>", ["image_not_image"]),
    ("note.png", b"version https://git-lfs.github.com/spec/v1", ["image_not_image"]),
    ("cut.jpg", encoded("JPEG")[:-100], ["image_damaged"]),
    ("header.jpg", encoded("JPEG")[:7], ["image_damaged"]),
    ("cut.png", encoded("PNG")[:-100], ["image_damaged"]),
    ("noise.png", encoded("PNG")[:60] + bytes(range(256)) * 8, ["image_damaged"]),
    ("zeros.jpg", encoded("JPEG")[:700] + bytes(3000), ["image_damaged"]),
    ("bomb.png", World(Path(), records=0, images=0, faults=0)._bomb(), ["image_too_large"]),
    ("is_png.jpg", encoded("PNG"), ["image_extension"]),
    ("is_jpeg.png", encoded("JPEG"), ["image_extension"]),
    ("cmyk.jpg", encoded("JPEG", pixels().convert("CMYK")), ["image_cmyk"]),
    ("palette.png", encoded("PNG", pixels().convert("P")), ["image_palette"]),
    ("deep.png", encoded("PNG", Image.fromarray(np.full((9, 9), 40_000, np.uint16))), ["image_deep"]),
    ("alpha.png", encoded("PNG", pixels().convert("RGBA")), ["image_transparent"]),
    ("frames.gif", animated("GIF"), ["image_palette", "image_animated"]),
    ("frames.webp", animated("WEBP"), ["image_animated"]),
    ("turned.jpg", rotated(), ["image_rotated"]),
    ("dot.png", encoded("PNG", pixels(1, 1)), ["image_tiny"]),
    ("strip.png", encoded("PNG", pixels(640, 8)), ["image_strip"]),
    ("no_end.png", encoded("PNG")[:-12], ["image_unfinished"]),
]


@pytest.mark.parametrize(("name", "content", "expected"), FILES, ids=[name for name, _, _ in FILES])
def test_an_image_file_gets_its_findings_and_no_others(
    tmp_path: Path, name: str, content: bytes, expected: list[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert checks_of(path) == expected


@pytest.mark.parametrize(("name", "content"), [(n, c) for n, c, _ in FILES], ids=[name for name, _, _ in FILES])
def test_an_error_is_what_training_would_refuse(tiny_spec: Any, tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    try:
        view = load_view(path, policy="pad", spec=tiny_spec)
        assert view.shape[0] == 3
        refused = False
    except DataError:
        refused = True
    assert any(severity_of(check) == "error" for check in checks_of(path)) == refused


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    assert checks_of(tmp_path / "folder.jpg") == ["image_no_file"]
    assert checks_of(tmp_path / "pipe.jpg") == ["image_no_file"]  # without waiting for a writer
    assert checks_of(tmp_path / "dangling.jpg") == ["image_missing"]
    assert checks_of(tmp_path / "absent" / "a.jpg") == ["image_missing"]


def test_a_missing_image_names_the_file_with_another_extension(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    (tmp_path / "b.JPG").write_bytes(encoded("JPEG"))
    (found,) = look_at(tmp_path / "a.jpg", shown="a.jpg")
    assert found == Finding("image_missing", "image 'a.jpg' does not exist, a.png exists")
    (found,) = look_at(tmp_path / "b.gif", shown="b.gif")
    assert found.reason.endswith(", b.JPG exists")
    (found,) = look_at(tmp_path / "c.jpg", shown="c.jpg")
    assert found.reason.endswith("does not exist")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_file_cut_at_any_byte_never_passes_for_a_whole_one(tmp_path: Path, kind: str) -> None:
    content = encoded(kind, pixels(24, 16) if kind != "GIF" else pixels(24, 16).convert("P"))
    path = tmp_path / f"cut.{kind.lower()}"
    path.write_bytes(content)
    whole = checks_of(path)
    assert not any(severity_of(check) == "error" for check in whole)
    passed = []
    for length in range(1, len(content)):
        path.write_bytes(content[:length])
        if checks_of(path) == whole:
            passed.append(length)
    assert passed == []


def test_headers_alone_find_bombs_and_web_pages_but_not_cut_files(tmp_path: Path) -> None:
    for name, content, expected in (
        ("a.jpg", encoded("JPEG")[:-100], []),
        ("b.jpg", b"<html>", ["image_not_image"]),
        ("c.png", World(Path(), records=0, images=0, faults=0)._bomb(), ["image_too_large"]),
    ):
        (tmp_path / name).write_bytes(content)
        assert checks_of(tmp_path / name, decode=False) == expected


def test_links_that_lead_out_of_the_image_folder_are_refused_unless_allowed(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "real"
    (root / "inside").mkdir(parents=True)
    outside.mkdir()
    for folder in (outside, root / "inside"):
        (folder / "a.png").write_bytes(encoded("PNG"))
    (root / "file_out.png").symlink_to(outside / "a.png")
    (root / "folder_out").symlink_to(outside)
    (root / "file_in.png").symlink_to("inside/a.png")
    (root / "folder_in").symlink_to("inside")
    (tmp_path / "linked").symlink_to(root)
    for folder in (root, tmp_path / "linked"):  # the image folder itself may be a link
        for name in ("inside/a.png", "file_in.png", "folder_in/a.png", "absent.png"):
            assert resolve_image(name, folder) == folder / name
        for name in ("file_out.png", "folder_out/a.png"):
            with pytest.raises(DataError, match=r"leads out of the image folder .* data.follow_links: true"):
                resolve_image(name, folder)
            assert resolve_image(name, folder, follow_links=True).is_file()
