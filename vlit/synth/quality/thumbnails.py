"""Whether two grey thumbnails show one picture: what coarse hashes propose is confirmed here (ours).

A hash of 16 x 16 knows little about a page: paper is white everywhere, and texts agree in most bits. Two thumbnails of 48 x 48
are one picture when

1. their detail agrees: of the bits "lighter than the mean of 5 x 5 around by more than 2" that are set in both, at most 0.36
   differ; and
2. no place differs much once they are aligned: shift and scale of each axis, contrast and brightness are fitted by two steps of
   least squares (Lucas and Kanade 1981), and the largest difference left is at most a third of the range of greys.

The fit is what lets a copy pass from which an edge was cut. Shape letters: N pictures or pairs, S = 48.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

SIDE = 48
WORDS = SIDE * SIDE // 64
"""uint64 words of the bits of detail."""
LIGHTER, MAX_DETAIL, MAX_LEFT, MAX_SHIFT = 2, 0.36, 0.33, 2.0
"""Dead zone of the detail; bits that may differ; largest difference in ranges of greys; largest shift in places."""
MIN_GAIN, MAX_GAIN, FLAT = 0.5, 2.0, 8.0
"""Contrast of one against the other; range of greys up to which a thumbnail is blank."""
_STEPS = 2
_AXIS = (np.arange(SIDE, dtype=np.float32) - (SIDE - 1) / 2) / (SIDE / 2)


def thumbnail(grey: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Mean greys, uint8 [S, S], of a grey picture, and uint64 [S * S / 64]: bits of its detail."""
    small = grey.resize((SIDE, SIDE), Image.Resampling.BOX)
    around = np.asarray(small.filter(ImageFilter.BoxBlur(2)), np.int16)
    values = np.asarray(small, np.uint8)
    return values, np.packbits(values - around > LIGHTER).view(np.uint64)


def same_view(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """bool [N]: which pairs of thumbnails (uint8 [N, S, S] each) are one picture, moved, stretched, brightened a little."""
    a, b = _smooth(left.astype(np.float32)), _smooth(right.astype(np.float32))
    blank = (np.ptp(a, axis=(1, 2)) <= FLAT) & (np.ptp(b, axis=(1, 2)) <= FLAT)
    return blank | _aligned(a, b)


def _smooth(grey_NSS: np.ndarray) -> np.ndarray:
    around = np.pad(grey_NSS, ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = (around[:, :-2] + 2 * around[:, 1:-1] + around[:, 2:]) / 4
    return (rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 4


def _aligned(a_NSS: np.ndarray, b_NSS: np.ndarray) -> np.ndarray:
    """bool [N]: whether little is left once ``a`` was fitted to ``b``."""
    number, inner, edge = len(a_NSS), (SIDE - 2) ** 2, slice(1, -1)
    place = np.zeros((number, 4), np.float32)  # shift and scale along x, shift and scale along y
    wanted = b_NSS[:, edge, edge].reshape(number, inner)
    for step in range(_STEPS + 1):
        moved = _moved(a_NSS, place)
        columns = [moved, np.ones_like(moved)]
        if step < _STEPS:
            along_y, along_x = np.gradient(moved, axis=(1, 2))
            columns += [along_x, along_x * _AXIS, along_y, along_y * _AXIS[:, None]]
        known = np.stack([column[:, edge, edge].reshape(number, inner) for column in columns], axis=-1)
        square = np.einsum("npi,npj->nij", known, known, optimize=True) + 1e-3 * np.eye(len(columns), dtype=np.float32)
        fit = np.linalg.solve(square, np.einsum("npi,np->ni", known, wanted)[..., None])[..., 0]
        if step < _STEPS:
            place = (place + fit[:, 2:] / np.abs(fit[:, :1]).clip(MIN_GAIN)).clip(-MAX_SHIFT, MAX_SHIFT)
    left = np.abs(wanted - np.einsum("npi,ni->np", known, fit)).max(axis=1, initial=0)
    gain = fit[:, 0]
    return (left <= MAX_LEFT * np.ptp(b_NSS, axis=(1, 2)).clip(FLAT)) & (gain >= MIN_GAIN) & (gain <= MAX_GAIN)


def _moved(grey_NSS: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Greys at x + shift + scale * x, y likewise, by linear interpolation; the edge goes on outside."""
    for axis, (shift, scale) in ((2, place[:, :2].T), (1, place[:, 2:].T)):
        at = (np.arange(SIDE) + shift[:, None] + scale[:, None] * _AXIS).clip(0, SIDE - 1)
        low = np.minimum(at.astype(np.int64), SIDE - 2)
        shape = (len(at), 1, SIDE) if axis == 2 else (len(at), SIDE, 1)
        share = (at - low).astype(np.float32).reshape(shape)
        first = np.take_along_axis(grey_NSS, low.reshape(shape), axis=axis)
        grey_NSS = first + share * (np.take_along_axis(grey_NSS, low.reshape(shape) + 1, axis=axis) - first)
    return grey_NSS
