"""Image file -> uint8 view [3, H, W], by the three policies of LLaVA's family.

Decoding rules, the same for every file: EXIF orientation is applied (as people see the picture; LLaVA ignores it);
transparency is laid over the encoder's mean colour, so dark and light drawings both stay visible (``convert("RGB")``
would show whatever colour the invisible pixels hold); 16-bit grey is scaled to 8 bits, not clipped; CMYK and palettes
are converted; of an animation the first frame is taken. JPEGs are decoded at full size: PIL's faster ``draft`` decoding
changes pixels, and `crop` equals transformers' CLIP processor bit for bit.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from vlit.errors import DataError
from vlit.types import ModelSpec

Policy = Literal["pad", "crop", "squash"]
MAX_PIXELS = 178_956_970
"""Largest picture that is decoded (PIL's own limit for refusing a decompression bomb): about 13,377 by 13,377."""
_EXTREME_RATIO = 32
_RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def resolve_image(image: str, image_root: Path) -> Path:
    """The file an image reference names. References are data, so ``..`` and absolute paths outside the root are
    refused; links that the owner of the folder made are followed.
    """
    path = Path(image)
    if path.is_absolute():
        if not path.is_relative_to(image_root.absolute()) or ".." in path.parts:
            raise DataError(
                f"image {image!r} lies outside the image folder {image_root}. Set images: of the data source to a "
                "folder that holds it, or make the path relative."
            )
        return path
    if ".." in path.parts or "\0" in image:
        raise DataError(
            f"image {image!r} leaves the image folder {image_root}. Write it relative to that folder, without .."
        )
    return image_root / path


def load_view(path: Path, *, policy: Policy, spec: ModelSpec) -> np.ndarray:
    """uint8 [3, ``spec.image_size``, ``spec.image_size``], RGB, not normalised.

    Raises:
        DataError: the file is missing, not an image, damaged, or larger than ``MAX_PIXELS``.
    """
    view = view_of(open_rgb(path, background=mean_colour(spec)), policy=policy, spec=spec)
    return np.ascontiguousarray(np.asarray(view, dtype=np.uint8).transpose(2, 0, 1))


def mean_colour(spec: ModelSpec) -> tuple[int, int, int]:
    """The encoder's mean as a colour, truncated as LLaVA does: (122, 116, 104) for CLIP."""
    red, green, blue = (int(channel * 255) for channel in spec.image_mean)
    return red, green, blue


def open_rgb(path: Path, *, background: tuple[int, int, int]) -> Image.Image:
    """Decode a file into an upright RGB picture; transparent parts show ``background``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise DataError(
                        f"{path}: {width} x {height} pixels, more than {MAX_PIXELS:,}. Make the picture smaller."
                    )
                image.load()
                return _to_rgb(_upright(image), background)
    except FileNotFoundError as error:
        raise DataError(f"{path}: the image does not exist. Check images: of its data source.") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: more than {MAX_PIXELS:,} pixels. Make the picture smaller.") from error
    except Image.UnidentifiedImageError as error:
        raise DataError(f"{path}: not an image ({_first_bytes(path)}). Replace the file.") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what PIL's decoders raise for damaged files
        raise DataError(f"{path}: the image cannot be decoded ({error}). Replace the file.") from error


def view_of(image: Image.Image, *, policy: Policy, spec: ModelSpec) -> Image.Image:
    """An RGB picture brought to the encoder's square size.

    ``pad``: LLaVA's ``expand2square`` with the mean colour, then resize. ``crop``: CLIP's processor (short side to
    size, centre cut). ``squash``: resize both sides.
    """
    size, resample = spec.image_size, _RESAMPLE[spec.resample]
    if policy == "crop":
        return _crop(image, size, resample)
    if policy == "pad":
        image = _pad(image, size, mean_colour(spec), resample)
    return image if image.size == (size, size) else image.resize((size, size), resample)


def _pad(image: Image.Image, size: int, colour: tuple[int, int, int], resample: Image.Resampling) -> Image.Image:
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    if side > size and side >= _EXTREME_RATIO * min(width, height):  # the square of a 20000 x 10 strip would be 1.2 GB
        scale = size / side
        image = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), resample)
        (width, height), side = image.size, size
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _crop(image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    width, height = image.size
    short, long = sorted((width, height))
    if long >= _EXTREME_RATIO * short:  # keep the middle: the ends of a strip would be enlarged only to be cut off
        keep = _EXTREME_RATIO * short
        left, top = max(0, (width - keep) // 2), max(0, (height - keep) // 2)
        image = image.crop((left, top, left + min(width, keep), top + min(height, keep)))
        width, height = image.size
        short, long = sorted((width, height))
    new_long = int(size * long / short)
    new = (size, new_long) if width <= height else (new_long, size)
    if image.size != new:
        image = image.resize(new, resample)
    left, top = (new[0] - size) // 2, (new[1] - size) // 2
    return image.crop((left, top, left + size, top + size))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except (SyntaxError, ValueError, TypeError, KeyError, OSError, AttributeError):  # damaged EXIF, sound pixels
        return image


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode == "RGB":
        transparent = image.info.get("transparency")
        return image if transparent is None else _over(image.convert("RGBA"), background)
    if image.mode.startswith(("I", "F")):
        return _from_deep_grey(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return _over(image.convert("RGBA"), background)
    return image.convert("RGB")


def _over(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    canvas = Image.new("RGBA", image.size, (*background, 255))
    canvas.alpha_composite(image)
    return canvas.convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """16-bit and 32-bit integers span 0-65535; floats span 0-1 when nothing exceeds 1, else 0-255."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        scale = 255.0 if values.max(initial=0.0) <= 1.0 else 1.0
    else:
        scale = 255.0 / 65535.0
    grey = np.clip(np.rint(np.nan_to_num(values) * scale), 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _first_bytes(path: Path) -> str:
    if path.is_dir():
        return "it is a folder"
    with path.open("rb") as file:
        head = file.read(12)
    return f"it starts with {head!r}" if head else "the file is empty"
