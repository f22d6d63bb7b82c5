"""Pixels of any mode -> RGB: transparency over a background, 16-bit and float grey scaled, the rest converted by PIL."""

from __future__ import annotations

import numpy as np
from PIL import Image

LARGE = 32 << 20
"""Pictures of more pixels are worked on in strips, or made smaller first; their copies would take gigabytes."""


def to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """An RGB picture; transparent parts show ``background``."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    scale = _grey_scale(image)
    if image.width * image.height <= LARGE:
        return _convert(image, background, scale)
    result = Image.new("RGB", image.size)
    rows = max(1, LARGE // (4 * image.width))
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(image.height, top + rows)))
        result.paste(_convert(strip, background, scale), (0, top))
    return result


def _convert(image: Image.Image, background: tuple[int, int, int], scale: float) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image).astype(np.float64) * scale
        grey = np.clip(np.rint(np.nan_to_num(values)), 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        canvas.alpha_composite(image.convert("RGBA"))
        return canvas.convert("RGB")
    return image.convert("RGB")


def _grey_scale(image: Image.Image) -> float:
    """16-bit and 32-bit integers span 0-65535; floats span 0-1 when nothing exceeds 1, else 0-255."""
    if image.mode != "F":
        return 255.0 / 65535.0
    return 255.0 if np.asarray(image).max(initial=0.0) <= 1.0 else 1.0
