"""Pictures that look the same: 256-bit difference hashes, a colour thumbnail and a grey one (ours, after dHash).

Bit (x, y) says that the grey level rises by more than 4 from x to x + 1 in a 17 x 16 picture; the dead zone keeps flat
areas from voting by noise. Two pictures look the same when at most 24 bits differ, these are at most 0.4 of the bits set in
both (a page has few), the 8 x 8 colour thumbnails differ by at most 12 levels on average, and the grey thumbnails confirm it
(``thumbnails.py``). Evaluation pictures are compared with every picture. Within a dataset only pictures that share one of 16
bands of the hash are: up to 15 bits apart that is certain (pigeonhole), beyond it likely.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from vlit.data.images import open_rgb, resolve_image
from vlit.errors import DataError
from vlit.synth.quality.sketches import candidate_pairs
from vlit.synth.quality.spool import batches, in_order
from vlit.synth.quality.thumbnails import MAX_DETAIL, SIDE, WORDS, same_view, thumbnail

MAX_BITS, MAX_SHARE, MAX_LEVELS, DEAD_ZONE = 24, 0.4, 12.0, 4
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
PICTURES_AT_ONCE = 256
_ALL_PAIRS = 200_000_000


class Looks(NamedTuple):
    """Hashes and thumbnails of N pictures; ``known`` is False where one could not be decoded."""

    bits: np.ndarray  # uint64 [N, 4]
    colours: np.ndarray  # uint8 [N, 192]
    greys: np.ndarray  # uint8 [N, 48, 48]
    detail: np.ndarray  # uint64 [N, 36]
    known: np.ndarray  # bool [N]


def look(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Hash, colours, greys and detail of one picture file.

    Raises:
        DataError: it cannot be decoded.
    """
    image = open_rgb(path, background=(122, 116, 104), at_least=64)
    plain = image.convert("L")
    grey = np.asarray(plain.resize((17, 16), Image.Resampling.BOX), np.int16)
    rises = (grey[:, 1:] - grey[:, :-1] > DEAD_ZONE).reshape(-1)
    colours = np.asarray(image.resize((8, 8), Image.Resampling.BOX), np.uint8).reshape(-1)
    return np.packbits(rises).view(np.uint64), colours, *thumbnail(plain)


def look_at(task: tuple[list[str], Path]) -> Looks:
    """Look at a list of references below an image folder."""
    names, root = task
    looks = _unknown(len(names))
    for place, name in enumerate(names):
        try:
            found = look(resolve_image(name, root))
        except DataError:
            continue
        for column, value in zip(looks, (*found, True), strict=True):
            column[place] = value
    return looks


def _unknown(number: int) -> Looks:
    """Looks of pictures that nothing is known of."""
    shapes = (((4,), np.uint64), ((192,), np.uint8), ((SIDE, SIDE), np.uint8), ((WORDS,), np.uint64), ((), bool))
    return Looks(*(np.zeros((number, *shape), kind) for shape, kind in shapes))


def join(parts: Iterable[Looks]) -> Looks:
    """Looks one after another."""
    held = list(parts)
    return Looks(*(np.concatenate(columns) for columns in zip(*held, strict=True))) if held else _unknown(0)


def pictures_below(folder: Path) -> list[str]:
    """Relative paths of the picture files of an evaluation folder.

    Raises:
        DataError: there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise DataError(f"--eval-images {folder}: no such folder. Give the folder of the evaluation pictures.")
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise DataError(
            f"--eval-images {folder}: no picture ({', '.join(sorted(SUFFIXES))}) in this folder or below it."
        )
    return found


def look_at_evaluation(folder: Path, *, workers: int) -> tuple[list[str], Looks]:
    """Names and looks of the pictures of an evaluation folder.

    Raises:
        DataError: there is none that can be decoded.
    """
    names = pictures_below(folder)
    looks = join(in_order(look_at, ((part, folder) for part in batches(names, PICTURES_AT_ONCE)), workers=workers))
    if not looks.known.any():
        raise DataError(
            f"--eval-images {folder}: none of its {len(names):,} pictures can be decoded. {why(names[0], folder)}"
        )
    return names, looks


def why(name: str, root: Path) -> str:
    """Why a picture below a folder cannot be decoded."""
    try:
        look(resolve_image(name, root))
    except DataError as error:
        return str(error)
    return f"{name}: readable now"


def same_within(looks: Looks) -> np.ndarray:
    """int64 [pairs, 2] of pictures of one set that look the same, the earlier first."""
    rows = np.flatnonzero(looks.known)
    if len(rows) < 2:
        return np.zeros((0, 2), np.int64)
    bands = looks.bits[rows].view(np.uint16).astype(np.uint64)
    found: list[np.ndarray] = []
    for band in range(bands.shape[1]):
        for part in candidate_pairs(bands[:, band]):
            pairs = rows[part]
            found.append(pairs[_alike(looks, pairs[:, 0], looks, pairs[:, 1])])
    return np.unique(np.concatenate(found), axis=0)


def same_across(looks: Looks, others: Looks) -> np.ndarray:
    """int64 [N]: for each picture one of the ``others`` that looks the same; -1 without. Every pair is compared."""
    found = np.full(len(looks.bits), -1, np.int64)
    theirs = np.flatnonzero(others.known)
    if not len(theirs):
        return found
    step = max(1, min(_ALL_PAIRS // (64 * len(theirs)), 4096))
    for low in range(0, len(looks.bits), step):
        part = looks.bits[low : low + step]
        apart = np.zeros((len(part), len(theirs)), np.uint16)
        for word in range(4):
            apart += np.bitwise_count(part[:, word, None] ^ others.bits[theirs, word])
        a, b = np.nonzero(apart <= MAX_BITS)
        a, b = a + low, theirs[b]
        keep = _alike(looks, a, others, b)
        found[a[keep][::-1]] = b[keep][::-1]
    return found


def _alike(left: Looks, a: np.ndarray, right: Looks, b: np.ndarray) -> np.ndarray:
    """Which pairs look the same; pictures that could not be decoded look like nothing. The dearest test comes last."""
    alike = left.known[a] & right.known[b]
    for test, at_once in (
        (_same_bits, 1_000_000),
        (_same_colours, 100_000),
        (_same_detail, 100_000),
        (_same_greys, 256),
    ):
        rows = np.flatnonzero(alike)
        for low in range(0, len(rows), at_once):
            part = rows[low : low + at_once]
            alike[part] = test(left, a[part], right, b[part])
    return alike


def _same_bits(left: Looks, a: np.ndarray, right: Looks, b: np.ndarray) -> np.ndarray:
    apart, held = _apart(left.bits[a], right.bits[b])
    return (apart <= MAX_BITS) & (apart <= MAX_SHARE * held)


def _same_colours(left: Looks, a: np.ndarray, right: Looks, b: np.ndarray) -> np.ndarray:
    return np.abs(left.colours[a].astype(np.int16) - right.colours[b].astype(np.int16)).mean(axis=1) <= MAX_LEVELS


def _same_detail(left: Looks, a: np.ndarray, right: Looks, b: np.ndarray) -> np.ndarray:
    apart, held = _apart(left.detail[a], right.detail[b])
    return apart <= MAX_DETAIL * held


def _same_greys(left: Looks, a: np.ndarray, right: Looks, b: np.ndarray) -> np.ndarray:
    return same_view(left.greys[a], right.greys[b])


def _apart(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bits that differ, and bits set in both together, of each pair of rows."""
    held = np.bitwise_count(ours).sum(axis=1, dtype=np.int64) + np.bitwise_count(theirs).sum(axis=1, dtype=np.int64)
    return np.bitwise_count(ours ^ theirs).sum(axis=1, dtype=np.int64), held
