"""Captions for contrastive pretraining: phrases that name some attributes, their truth for a scene, near misses.

Shape letters: C captions, P = up to 4 phrases a caption, N scenes, Q = 4 quadrants. A phrase is three numbers (digit,
colour, position), -1 where it names none; a missing phrase is -2 throughout.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from vlit.synth.digits.scenes import COLOUR_NAMES, POSITIONS, Layouts

UNNAMED, MISSING = -1, -2
SIZES = (10, len(COLOUR_NAMES), len(POSITIONS))


def phrase_text(digit: int, colour: int, position: int) -> str:
    """``a red 7 at the top-left``; without a digit ``a red digit``, without a colour ``a 7``."""
    noun = str(digit) if digit >= 0 else "digit"
    words = ["a", *([COLOUR_NAMES[colour]] if colour >= 0 else []), noun]
    return " ".join(words + ([f"at the {POSITIONS[position]}"] if position >= 0 else []))


def all_phrases() -> list[str]:
    """Every phrase with and without a leading space."""
    ranges = [range(UNNAMED, size) for size in SIZES]
    texts = [phrase_text(*named) for named in itertools.product(*ranges)]
    return texts + [f" {text}" for text in texts] + [f"{text} and{text}" for text in texts]


def caption_text(phrases_P3: NDArray[np.int64]) -> str:
    """The phrases that are there, joined by "and"."""
    return " and ".join(phrase_text(*(int(v) for v in phrase)) for phrase in phrases_P3 if phrase[0] != MISSING)


def draw_captions(layouts: Layouts, *, rng: np.random.Generator, max_phrases: int = 4) -> NDArray[np.int64]:
    """One caption a scene, (N, P, 3): up to ``max_phrases`` of its things, each with some of its attributes."""
    count, quadrants = layouts.digits_NQ.shape
    places_NQ = np.broadcast_to(np.arange(quadrants), (count, quadrants))
    facts_NQ3 = np.stack([layouts.digits_NQ, layouts.colours_NQ, places_NQ], axis=-1)
    named = rng.integers(1, 8, size=(count, quadrants, 1)) >> np.arange(3) & 1
    phrases = np.where(named.astype(bool), facts_NQ3, UNNAMED)
    empty_NQ = layouts.digits_NQ < 0
    order = np.argsort(rng.random((count, quadrants)) + empty_NQ, axis=1)  # things first, in any order
    rank = np.argsort(order, axis=1)
    wanted_N1 = rng.integers(1, max_phrases + 1, size=(count, 1))
    phrases[(rank >= wanted_N1) | empty_NQ] = MISSING
    return np.take_along_axis(phrases, order[..., None], axis=1)


def near_misses(captions_CP3: NDArray[np.int64], *, rng: np.random.Generator) -> NDArray[np.int64]:
    """A copy of each caption with one named attribute of one phrase replaced by another value."""
    changed = captions_CP3.copy()
    count = len(changed)
    score = rng.random(changed.shape) * (changed >= 0)
    flat = score.reshape(count, -1).argmax(axis=1)
    phrase, attribute = flat // 3, flat % 3
    rows = np.arange(count)
    sizes = np.array(SIZES)[attribute]
    changed[rows, phrase, attribute] = (changed[rows, phrase, attribute] + rng.integers(1, sizes)) % sizes
    return changed


def truth(captions_CP3: NDArray[np.int64], layouts: Layouts) -> NDArray[np.bool_]:
    """(C, N): every phrase of the caption describes some thing of the scene."""
    digits, colours = layouts.digits_NQ[None, None], layouts.colours_NQ[None, None]
    places = np.arange(len(POSITIONS))[None, None, None]
    digit, colour, place = (captions_CP3[:, :, None, None, a] for a in range(3))
    fits = (digits >= 0) & ((digit < 0) | (digit == digits)) & ((colour < 0) | (colour == colours))
    fits = fits & ((place < 0) | (place == places))
    return (fits.any(axis=3) | (captions_CP3[:, :, 0] == MISSING)[:, :, None]).all(axis=1)
