"""A part of an RGB picture, with a margin around it, -> uint8 pixels of a given size: by PIL exactly, or by torch fast."""

from __future__ import annotations

from math import ceil

import numpy as np
from PIL import Image

from vlit.data.image_modes import LARGE

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels; may fall between them and outside of the picture."""


def resize_exact(
    image: Image.Image, box: Box, new: tuple[int, int], colour: tuple[int, int, int], resample: Image.Resampling
) -> np.ndarray:
    """uint8 [3, new height, new width] of the part ``box``, by PIL; what lies outside of the picture has the colour."""
    left, top, right, bottom = box
    inside = left >= 0 and right <= image.width
    if (inside and (top < 0 or bottom > image.height)) or ceil(right - left) * image.height > LARGE:
        # PIL resizes a picture's rows, then its columns: so can we, and rows of padding need no resizing to be the same
        image = _resize_rows(image, left, right, new[0], colour, resample)
        left, right = 0, new[0]
    image, (left, top, right, bottom) = _with_margin(image, (left, top, right, bottom), colour)
    return np.asarray(image.resize(new, resample, box=(left, top, right, bottom))).transpose(2, 0, 1)


def _resize_rows(
    image: Image.Image, left: float, right: float, width: int, colour: tuple[int, int, int], resample: Image.Resampling
) -> Image.Image:
    """Every row from ``left`` to ``right`` in ``width`` pixels; by strips, as the margin of a tall picture is large."""
    strip_rows = max(1, LARGE // (4 * ceil(right - left)))
    result = Image.new("RGB", (width, image.height))
    for top in range(0, image.height, strip_rows):
        rows = min(strip_rows, image.height - top)
        strip = image if rows == image.height else image.crop((0, top, image.width, top + rows))
        strip, (begin, _, end, _) = _with_margin(strip, (left, 0, right, rows), colour)
        result.paste(strip.resize((width, rows), resample, box=(begin, 0, end, rows)), (0, top))
    return result


def _with_margin(image: Image.Image, box: Box, colour: tuple[int, int, int]) -> tuple[Image.Image, Box]:
    """A picture that holds the whole ``box``, and where the box lies on it."""
    left, top, right, bottom = box
    x, y = max(0, ceil(-left)), max(0, ceil(-top))
    box = left + x, top + y, right + x, bottom + y
    size = max(image.width, ceil(box[2])), max(image.height, ceil(box[3]))
    if size == image.size:
        return image, box
    canvas = Image.new("RGB", size, colour)
    canvas.paste(image, (x, y))
    return canvas, box


def resize_fast(
    image: Image.Image, box: Box, new: tuple[int, int], colour: tuple[int, int, int], resample: str
) -> np.ndarray:
    """The same by torch; the edges of ``box`` lie between pixels and it holds the whole picture. A box of very many pixels
    is left to PIL, which needs no copy of it.
    """
    if (box[2] - box[0]) * (box[3] - box[1]) > 4 * LARGE:
        return resize_exact(image, box, new, colour, getattr(Image.Resampling, resample.upper()))
    import torch  # here, so that indexing and checking data stay light

    left, top, right, bottom = (int(edge) for edge in box)
    pixels_HWC = np.empty((bottom - top, right - left, 3), np.uint8)  # few large buffers: their page faults cost time
    if pixels_HWC.shape[:2] != (image.height, image.width):
        pixels_HWC[0] = colour
        pixels_HWC[1:] = pixels_HWC[0]
    pixels_HWC[-top : image.height - top, -left : image.width - left] = np.asarray(image)
    pixels_1CHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1).unsqueeze(0)
    return torch.nn.functional.interpolate(pixels_1CHW, (new[1], new[0]), mode=resample, antialias=True)[0].numpy()
