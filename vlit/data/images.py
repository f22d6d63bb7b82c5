"""Image file -> uint8 view [3, H, W], by the three policies of LLaVA's family.

Decoding rules, the same for every file: EXIF orientation is applied (as people see the picture; LLaVA ignores it);
transparency is laid over the encoder's mean colour, so dark and light drawings both stay visible (``convert("RGB")``
would show whatever colour the invisible pixels hold); 16-bit grey is scaled to 8 bits, not clipped; CMYK and palettes
are converted; of an animation the first frame is taken.

Two ways to the same view. *Exact*: the file is decoded at full size and resized by PIL, so `crop` equals transformers'
CLIP processor bit for bit. *Fast* differs in two places; figures are for photographs and 336-pixel views:

- The last resize is torch's antialiased one for bytes, about four times as fast. 0.006 of 255 levels on average, PSNR
  above 70 dB; 0.24 and 54 dB where PIL resizes columns before rows (mostly `squash` of tall pictures, Pillow #9549).
- A JPEG at least twice as large as its view needs is decoded at 1/2, 1/4 or 1/8 of its size (the decoder leaves out
  frequencies), so that the last resize still halves at least: 44.9 to 55 dB, below 0.9 levels on average, single pixels up
  to 24. Decoding down to once the size would give 33 to 45 dB. A size that the factor does not divide is resized from a
  box that ends between pixels; without it odd sizes fall to 23 dB.
"""

from __future__ import annotations

import os
import stat
import struct
import warnings
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from vlit.data.image_modes import LARGE, to_rgb
from vlit.data.image_paths import refusal as refusal
from vlit.data.image_paths import resolve_image as resolve_image
from vlit.data.image_resize import Box, resize_exact, resize_fast
from vlit.data.image_tail import missing_end
from vlit.errors import DataError
from vlit.types import ModelSpec

Policy = Literal["pad", "crop", "squash"]
Side = Literal["short", "long"]
MAX_PIXELS = 178_956_970
"""Largest picture that is decoded (PIL's own limit for refusing a decompression bomb): about 13,377 by 13,377."""
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What is decoded, by content. Left out on purpose: EPS (PIL starts Ghostscript, which runs what the file says) and JPEG 2000
(the part of a file that is cut off comes out black, without an error)."""
EXTREME_RATIO = 32
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_DAMAGED = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, ArithmeticError, AttributeError, RuntimeError,
    struct.error,
)  # fmt: skip
"""What PIL's readers raise for damaged files."""
_KINDS = {
    b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG", b"GIF8": "GIF", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"RIFF": "WEBP",
    b"\0\0\0\x0cjP": "JPEG 2000", b"%!PS": "PostScript", b"8BPS": "Photoshop", b"%PDF": "PDF",
}  # fmt: skip
"""First bytes of files that people take for pictures."""
_RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class _Decoded(NamedTuple):
    """An upright RGB picture of ``width`` by ``height``, held in ``ceil(width / scale)`` by ``ceil(height / scale)``
    pixels. With a scale that does not divide a side, its last pixel lies partly outside the picture.
    """

    image: Image.Image
    width: int
    height: int
    scale: int

    @property
    def box(self) -> Box:
        """Where the picture lies on the pixels."""
        return 0.0, 0.0, self.width / self.scale, self.height / self.scale


def load_view(path: Path, *, policy: Policy, spec: ModelSpec, exact: bool = False) -> np.ndarray:
    """uint8 [3, ``spec.image_size``, ``spec.image_size``], RGB, not normalised.

    ``pad``: LLaVA's ``expand2square`` with the mean colour, then resize. ``crop``: CLIP's processor (short side to
    size, centre cut). ``squash``: resize both sides. ``exact``: the reference's pixels, at half the speed and less (see
    the module).

    Raises:
        DataError: the file is missing, not an image, damaged, or larger than ``MAX_PIXELS``.
    """
    size, colour, resample = spec.image_size, mean_colour(spec), spec.resample
    decoded = _decode(path, colour, None if exact else 2 * size, "long" if policy == "pad" else "short")
    image, box, new = decoded.image, decoded.box, (size, size)
    if policy == "pad":
        image, box = _square(decoded, size, _RESAMPLE[resample])
    elif policy == "crop":
        image, box, new = _crop(decoded, size)
    if exact or any(edge % 1 for edge in box):
        view = resize_exact(image, box, new, colour, _RESAMPLE[resample])
    else:
        view = resize_fast(image, box, new, colour, resample)
    left, top = (new[0] - size) // 2, (new[1] - size) // 2
    return np.ascontiguousarray(view[:, top : top + size, left : left + size])


def mean_colour(spec: ModelSpec) -> tuple[int, int, int]:
    """The encoder's mean as a colour, truncated as LLaVA does: (122, 116, 104) for CLIP."""
    red, green, blue = (int(channel * 255) for channel in spec.image_mean)
    return red, green, blue


def open_rgb(
    path: Path, *, background: tuple[int, int, int], at_least: int | None = None, side: Side = "short"
) -> Image.Image:
    """Decode a file into an upright RGB picture; transparent parts show ``background``.

    With ``at_least``, a JPEG may come at 1/2, 1/4 or 1/8 of its size, which is faster, as long as its short (or long)
    ``side`` keeps that many pixels.

    Raises:
        DataError: the file is missing, not an image, damaged, or larger than ``MAX_PIXELS``.
    """
    return _decode(path, background, at_least, side).image


def _decode(path: Path, background: tuple[int, int, int], at_least: int | None, side: Side) -> _Decoded:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for, a device never ends
            kind = "a folder" if path.is_dir() else "no regular file"
            raise DataError(f"{path}: not an image (it is {kind}). Name an image file.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of damaged EXIF and odd palettes without naming the file
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise DataError(
                        f"{path}: {width} x {height} pixels, more than {MAX_PIXELS:,}. Make the picture smaller."
                    )
                scale = 1 if at_least is None else _draft(image, at_least, side)
                image.load()
                if reason := missing_end(path, image.format):
                    raise DataError(f"{path}: the image is not complete ({reason}). Replace the file.")
                method = _UPRIGHT.get(orientation_of(image))
                upright = image if method is None else image.transpose(method)
                if method is not None:
                    width, height = upright.width * scale, upright.height * scale
                rgb = to_rgb(upright, background)
                if at_least is not None and (factor := _spare(rgb, at_least, side)) > 1:
                    rgb, scale = rgb.reduce(factor), scale * factor
                return _Decoded(rgb, width, height, scale)
    except FileNotFoundError as error:
        raise DataError(f"{path}: the image does not exist. Check images: of its data source.") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: more than {MAX_PIXELS:,} pixels. Make the picture smaller.") from error
    except Image.UnidentifiedImageError as error:
        raise DataError(f"{path}: {_unidentified(path)}. Replace the file.") from error
    except PermissionError as error:
        raise DataError(f"{path}: the image may not be read ({error.strerror}). Change its permissions.") from error
    except MemoryError as error:
        raise DataError(f"{path}: not enough memory to decode the image. Make the picture smaller.") from error
    except _DAMAGED as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{path}: the image cannot be decoded ({reason}). Replace the file.") from error


def _draft(image: Image.Image, at_least: int, side: Side) -> int:
    """Ask for a reduced decoding of a JPEG and return its factor: the largest that leaves ``at_least`` pixels.

    Pictures that are stored rotated need a factor that divides both sides, or their partial last pixels would become
    the first ones. Strips are decoded whole: their short side has no pixel to give.
    """
    short, long = sorted(image.size)
    if image.format not in ("JPEG", "MPO") or long >= EXTREME_RATIO * short:
        return 1
    length, upright = (long if side == "long" else short), orientation_of(image) not in _UPRIGHT
    for factor in (8, 4, 2):
        if length >= factor * at_least and (upright or short % factor == long % factor == 0):
            drafted = image.draft(None, (max(1, image.width // factor), max(1, image.height // factor)))
            return 1 if drafted is None else round(long / max(drafted[1]))
    return 1


def _spare(image: Image.Image, at_least: int, side: Side) -> int:
    """How many times a picture of very many pixels may be made smaller; 1 for all others. Resizing 179 million pixels with
    their padding would take several GB.
    """
    short, long = sorted(image.size)
    if short * long <= LARGE or long >= EXTREME_RATIO * short:
        return 1
    return max(1, (long if side == "long" else short) // at_least)


def orientation_of(image: Image.Image) -> int:
    """How the picture is stored, as EXIF numbers it: 1 is upright."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except _DAMAGED:  # damaged EXIF, sound pixels
        return 1
    return orientation if isinstance(orientation, int) else 1


def _square(decoded: _Decoded, size: int, resample: Image.Resampling) -> tuple[Image.Image, Box]:
    """The picture and the square around it, which reaches beyond its pixels; LLaVA rounds the left and top margin down."""
    image, width, height, scale = decoded
    side = max(width, height)
    if side > size and side >= EXTREME_RATIO * min(width, height):  # the square of a 20000 x 10 strip would be 1.2 GB
        shrink = size / side
        image = image.resize((max(1, round(width * shrink)), max(1, round(height * shrink))), resample)
        (width, height), side = image.size, size
    elif scale > 1 and width != height:  # a last pixel that is mostly outside would stand on the padding
        trimmed = (round(width / scale), image.height) if width < height else (image.width, round(height / scale))
        image = image.crop((0, 0, *trimmed))
    left, top = -((side - width) // 2) / scale, -((side - height) // 2) / scale
    return image, (left, top, left + side / scale, top + side / scale)


def _crop(decoded: _Decoded, size: int) -> tuple[Image.Image, Box, tuple[int, int]]:
    """The picture, where it lies on the pixels, and the size to resize it to before the centre is cut out."""
    image, width, height, _ = decoded
    box = decoded.box
    short, long = sorted((width, height))
    if long >= EXTREME_RATIO * short:  # keep the middle: the ends of a strip would be enlarged only to be cut off
        keep = EXTREME_RATIO * short
        left, top = max(0, (width - keep) // 2), max(0, (height - keep) // 2)
        image = image.crop((left, top, left + min(width, keep), top + min(height, keep)))
        width, height = image.size
        box = (0.0, 0.0, width, height)
        short, long = sorted((width, height))
    new_long = int(size * long / short)
    return image, box, (size, new_long) if width <= height else (new_long, size)


def _unidentified(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(12)
    kind = next((kind for mark, kind in _KINDS.items() if head.startswith(mark)), None)
    if kind in FORMATS:
        return f"the image cannot be decoded (the header of this {kind} file is damaged or cut off)"
    begins = f"it starts with {head!r}" if head else "the file is empty"
    return f"not an image ({begins}{f', a {kind} file, which is not read' if kind else ''})"
