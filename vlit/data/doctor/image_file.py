"""A look at one image file, as training will see it: the same rules for paths, formats and decoding.

A JPEG is decoded at an eighth of its size, which reads all its data and leaves out most of the arithmetic; what is cut
off or damaged is found all the same.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from vlit.data.doctor.checks import Finding
from vlit.data.images import EXTREME_RATIO, FORMATS, MAX_PIXELS, open_rgb, orientation_of, resolve_image
from vlit.data.members import MissingMember
from vlit.errors import DataError

EXTENSIONS = {
    ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".png": "PNG", ".gif": "GIF", ".webp": "WEBP",
    ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF", ".avif": "AVIF",
}  # fmt: skip
_SAME = {"MPO": "JPEG", "DIB": "BMP"}
_PNG_END = b"IEND\xaeB`\x82"  # with its check sum
_BACKGROUND = (127, 127, 127)
_ENCODED_IMAGE = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")


@dataclass
class ImageJob:
    """Looks at (number, image folder, reference). With ``decode`` off, the header alone is read."""

    decode: bool = True
    follow_links: bool = False
    cache_dir: str | None = None

    def start(self) -> None:
        pass

    def begin(self, task: Any) -> Any:
        return task

    def look(self, item: tuple[int, str, str]) -> list[Finding]:
        _, root, image = item
        try:
            path = resolve_image(image, Path(root), follow_links=self.follow_links, cache_dir=self.cache_dir)
        except MissingMember as error:
            return [Finding("image_missing", str(error))]
        except DataError as error:
            return [Finding("image_outside", str(error))]
        return look_at(path, shown=image, decode=self.decode)

    def end(self) -> None:
        return None


@dataclass
class ThumbnailJob:
    """Small copies of (number, path): ``end`` gives encoded bytes by number. What cannot be decoded is left out."""

    max_side: int = 224
    _made: dict[int, bytes] = field(default_factory=dict)

    def start(self) -> None:
        pass

    def begin(self, task: Any) -> Any:
        self._made = {}
        return task

    def look(self, item: tuple[int, str]) -> list[Finding]:
        number, path = item
        with contextlib.suppress(DataError):
            image = open_rgb(Path(path), background=_BACKGROUND, at_least=self.max_side)
            image.thumbnail((self.max_side, self.max_side))
            buffer = io.BytesIO()
            image.save(buffer, "PNG" if max(image.size) <= 128 else "JPEG")
            self._made[number] = buffer.getvalue()
        return []

    def end(self) -> dict[int, bytes]:
        return self._made


def look_at(path: Path, *, shown: str, decode: bool = True) -> list[Finding]:
    """What is wrong with or odd about the file; ``shown`` is its name in reasons."""
    findings: list[Finding] = []
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):
            kind = "a folder" if stat.S_ISDIR(info.st_mode) else "no regular file"
            return [Finding("image_no_file", f"image {shown!r} is {kind}")]
        if info.st_size == 0:
            return [Finding("image_empty", f"image {shown!r} has 0 bytes")]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as image:
                findings = _oddities(image, path, shown, info.st_size)
                width, height = image.size
                if width * height > MAX_PIXELS:
                    return [_too_large(shown, f"{width:,} x {height:,} pixels, more than {MAX_PIXELS:,}")]
        if decode:
            open_rgb(path, background=_BACKGROUND, at_least=1)
        return findings
    except DataError as error:
        return [_what(error.__cause__ or error, path, shown)]
    except Exception as error:  # whatever PIL raises for a damaged header
        return [_what(error, path, shown)]


def _what(error: BaseException, path: Path, shown: str) -> Finding:
    """The finding an exception of opening or decoding stands for."""
    words = " ".join(str(error).removeprefix(f"{path}: ").split()).removesuffix(" Replace the file.")[:200]
    words = words or type(error).__name__
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return Finding("image_missing", f"image {shown!r} does not exist{_sibling(path)}")
    if isinstance(error, PermissionError):
        return Finding("image_unreadable", f"image {shown!r} may not be read ({error.strerror})")
    if isinstance(error, (Image.DecompressionBombError, MemoryError)):
        return _too_large(shown, words)
    if isinstance(error, Image.UnidentifiedImageError):
        with path.open("rb") as file:
            head = file.read(16)
        if any(head[: len(mark)] == mark[: len(head)] for mark in _ENCODED_IMAGE):
            return Finding("image_damaged", f"image {shown!r} cannot be read: its header is cut off or damaged")
        return Finding("image_not_image", f"image {shown!r} is not an image, it starts with {head!r}")
    return Finding("image_damaged", f"image {shown!r} cannot be decoded ({words})")


def _too_large(shown: str, words: str) -> Finding:
    return Finding("image_too_large", f"image {shown!r}: {words}")


def _sibling(path: Path) -> str:
    """A hint when the same name exists with another extension: released image sets and records often disagree there."""
    for extension in EXTENSIONS:
        for other in (path.with_suffix(extension), path.with_suffix(extension.upper())):
            if other != path and other.is_file():
                return f", {other.name} exists"
    return ""


def _oddities(image: Image.Image, path: Path, shown: str, size: int) -> list[Finding]:
    """Notes from the header; nothing is decoded."""
    width, height = image.size
    written, found = EXTENSIONS.get(path.suffix.lower()), _SAME.get(str(image.format), str(image.format))
    mode, notes = image.mode, []
    if written is not None and written != found:
        notes.append(("image_extension", f"is a {found} file"))
    if mode == "CMYK":
        notes.append(("image_cmyk", "is CMYK"))
    if mode in ("P", "PA"):
        notes.append(("image_palette", "has a palette"))
    if mode.startswith(("I", "F")):
        notes.append(("image_deep", f"is deep grey (mode {mode})"))
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        notes.append(("image_transparent", "has transparency"))
    if orientation_of(image) != 1:
        notes.append(("image_rotated", f"has EXIF orientation {orientation_of(image)}"))
    if width * height == 1:
        notes.append(("image_tiny", "is one pixel"))
    elif max(width, height) >= EXTREME_RATIO * min(width, height):
        notes.append(("image_strip", f"is {width} x {height}"))
    if found in ("GIF", "WEBP", "PNG", "AVIF") and _is_animated(image):
        notes.append(("image_animated", "has several frames"))
    if found in ("PNG", "GIF") and not _is_finished(path, size, found):
        notes.append(("image_unfinished", f"ends without the mark of a whole {found} file"))
    return [Finding(check, f"image {shown!r} {words}") for check, words in notes]


def _is_animated(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # damaged behind the first frame, which is the one that is used
        return False


def _is_finished(path: Path, size: int, found: str) -> bool:
    """Whether the mark that ends a PNG or GIF is there; their pixels may be whole without it."""
    with path.open("rb") as file:
        file.seek(max(0, size - 4096))
        tail = file.read()
    return _PNG_END in tail if found == "PNG" else tail.rstrip(b"\0").endswith(b";")
