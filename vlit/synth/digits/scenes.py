"""Scenes of one to four real handwritten digits, one per quadrant of a 64 x 64 picture, deterministic by seed.

The handwriting is scikit-learn's ``load_digits`` (1,797 scans of 8 x 8 pixels, UCI Optical Recognition of Handwritten
Digits). Every scan belongs to exactly one split, so that no held-out picture shows handwriting seen in training. The
data set does not say who wrote a scan: the split is by scan, balanced per digit, not by writer.

Shape letters: N scenes, Q = 4 quadrants in reading order, S picture side (64), G glyph side (24).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from vlit.errors import DataError

SIDE_PIXELS = 64
QUADRANT_PIXELS = 32
GLYPH_PIXELS = 24
INK_THRESHOLD = 0.25
POSITIONS = ("top-left", "top-right", "bottom-left", "bottom-right")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (240, 50, 45),
    "green": (50, 205, 60),
    "blue": (70, 110, 255),
    "yellow": (245, 225, 50),
    "pink": (255, 95, 215),
    "white": (245, 245, 245),
}
COLOUR_NAMES = tuple(COLOURS)
SPLITS = ("train", "validation", "test")
SPLIT_SHARES = (0.75, 0.10, 0.15)
HANDWRITING_SEED = 20
"""Seed of the assignment of scans to splits. A constant: no choice of a world's seed may move a scan between splits."""


@dataclass(frozen=True)
class Layouts:
    """What stands where in N scenes; ``digits`` and ``colours`` are -1 where a quadrant is empty."""

    digits_NQ: NDArray[np.int64]
    colours_NQ: NDArray[np.int64]
    sources_NQ: NDArray[np.int64]
    """Index into ``load_digits().images``."""
    offsets_NQ2: NDArray[np.int64]
    """(y, x) of the glyph's corner inside its quadrant, even pixels."""

    def __len__(self) -> int:
        return len(self.digits_NQ)

    def rows(self, start: int, stop: int) -> Layouts:
        """The scenes ``start .. stop - 1``."""
        part = slice(start, stop)
        return Layouts(self.digits_NQ[part], self.colours_NQ[part], self.sources_NQ[part], self.offsets_NQ2[part])


@lru_cache(maxsize=1)
def _scans() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images / 16.0).astype(np.float32), data.target.astype(np.int64)


@lru_cache(maxsize=1)
def handwriting() -> dict[str, NDArray[np.int64]]:
    """Indices of the scans of each split: disjoint, together all scans, the same share of every digit."""
    targets = _scans()[1]
    rng = np.random.default_rng(HANDWRITING_SEED)
    parts: dict[str, list[NDArray[np.int64]]] = {split: [] for split in SPLITS}
    for digit in range(10):
        order = rng.permutation(np.flatnonzero(targets == digit))
        first, second = (round(float(share * len(order))) for share in (SPLIT_SHARES[0], sum(SPLIT_SHARES[:2])))
        for split, part in zip(SPLITS, np.split(order, [first, second]), strict=True):
            parts[split].append(part)
    return {split: np.sort(np.concatenate(part)) for split, part in parts.items()}


@lru_cache(maxsize=1)
def glyphs() -> NDArray[np.float32]:
    """All scans enlarged to (1797, G, G), ink in 0..1."""
    from PIL import Image

    size = (GLYPH_PIXELS, GLYPH_PIXELS)
    enlarged = [np.asarray(Image.fromarray(scan).resize(size, Image.Resampling.BICUBIC)) for scan in _scans()[0]]
    return np.clip(np.stack(enlarged), 0.0, 1.0).astype(np.float32)


def draw_layouts(split: str, count: int, *, rng: np.random.Generator, max_digits: int = 4) -> Layouts:
    """Draw ``count`` scenes from the handwriting of ``split``.

    The number of digits is uniform in 1..``max_digits``, quadrants are a random subset, colours are distinct within a
    scene, digits are uniform and independent (they may repeat), scans are uniform within their digit and split.
    """
    if split not in SPLITS:
        raise DataError(f'split "{split}": unknown. Known: {", ".join(SPLITS)}. Use one of them.')
    shape = (count, len(POSITIONS))
    numbers_N1 = rng.integers(1, max_digits + 1, size=(count, 1))
    filled_NQ = rng.permuted(np.tile(np.arange(shape[1]), (count, 1)), axis=1) < numbers_N1
    digits_NQ = rng.integers(0, 10, size=shape)
    colours_NQ = rng.permuted(np.tile(np.arange(len(COLOURS)), (count, 1)), axis=1)[:, : shape[1]]
    available = handwriting()[split]
    targets = _scans()[1][available]
    sources_NQ = np.full(shape, -1, dtype=np.int64)
    for digit in range(10):
        here = filled_NQ & (digits_NQ == digit)
        sources_NQ[here] = rng.choice(available[targets == digit], size=int(here.sum()))
    jitter = (QUADRANT_PIXELS - GLYPH_PIXELS) // 2
    offsets_NQ2 = 2 * rng.integers(0, jitter + 1, size=(*shape, 2))
    return Layouts(np.where(filled_NQ, digits_NQ, -1), np.where(filled_NQ, colours_NQ, -1), sources_NQ, offsets_NQ2)


def ink_masks(layouts: Layouts, *, glyph_bank: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Ink in 0..1 per quadrant, (N, Q, 32, 32). ``glyph_bank`` replaces the plain glyphs (same indices) to augment."""
    bank = glyphs() if glyph_bank is None else glyph_bank
    count, quadrants = layouts.digits_NQ.shape
    masks = np.zeros((count, quadrants, QUADRANT_PIXELS, QUADRANT_PIXELS), dtype=np.float32)
    n, q = np.nonzero(layouts.digits_NQ >= 0)
    y, x = layouts.offsets_NQ2[n, q].T
    span = np.arange(GLYPH_PIXELS)
    rows, columns = (y[:, None] + span)[:, :, None], (x[:, None] + span)[:, None, :]
    masks[n[:, None, None], q[:, None, None], rows, columns] = bank[layouts.sources_NQ[n, q]]
    return masks


def render(
    layouts: Layouts, *, rng: np.random.Generator, masks: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Paint scenes, (N, S, S, 3): a dark background of a random tint, noise, and digits in slightly varied colours."""
    masks_NQhw = ink_masks(layouts) if masks is None else masks
    count = len(layouts)
    palette = np.array(list(COLOURS.values()), dtype=np.float32)
    paint_NQ3 = palette[layouts.colours_NQ] * rng.uniform(0.85, 1.0, size=(count, 4, 1)).astype(np.float32)
    tint_N3 = rng.uniform(0, 60, size=(count, 1, 1, 3)).astype(np.float32)
    half = QUADRANT_PIXELS
    noise = rng.integers(0, 32, size=(count, half, half, 3), dtype=np.uint8).repeat(2, axis=1).repeat(2, axis=2)
    canvas = tint_N3 + noise
    for quadrant in range(len(POSITIONS)):
        top, left = half * (quadrant // 2), half * (quadrant % 2)
        window = canvas[:, top : top + half, left : left + half]
        ink = masks_NQhw[:, quadrant, :, :, None]
        window += ink * (paint_NQ3[:, quadrant, None, None, :] - window)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def ink_boxes(masks: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tight boxes (N, Q, 4) as (x, y, width, height) in picture pixels, ink areas (N, Q) in pixels; empty -> 0."""
    ink = masks > INK_THRESHOLD
    area = ink.sum(axis=(2, 3))
    quadrants = np.arange(len(POSITIONS))
    edges = []
    for axis, shift in ((2, quadrants % 2), (3, quadrants // 2)):  # project onto x, then onto y
        line = np.asarray(ink.any(axis=axis))
        low = line.argmax(axis=-1)
        length = line.shape[-1] - line[..., ::-1].argmax(axis=-1) - low
        edges.append((low + QUADRANT_PIXELS * shift, length))
    (x, width), (y, height) = edges
    boxes = np.stack([x, y, width, height], axis=-1)
    return np.where(area[..., None] > 0, boxes, 0), area
