"""The three ways a benchmark is asked: with its pictures, blind, and with another scene's pictures.

A model that looks must lose its lead in the last two; a lead that stays was never about the pictures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from random import Random

from vlit.errors import EvaluationError
from vlit.eval.benchmark import Question

ROWS = ("image", "blind", "shuffled")


def ask_row(questions: Sequence[Question], row: str, *, seed: int = 0) -> list[Question]:
    """The questions as one row asks them, same order and ids."""
    if row == "image":
        return list(questions)
    if row == "blind":
        return [replace(question, images=()) for question in questions]
    if row == "shuffled":
        return shuffle_images(questions, seed=seed)
    raise EvaluationError(f'row "{row}": unknown. Known: {", ".join(ROWS)}.')


def shuffle_images(questions: Sequence[Question], *, seed: int = 0) -> list[Question]:
    """Give every question the pictures of another scene; all questions of one scene get the same other scene.

    Scenes are told apart by the bytes of their picture files, so a copy under another name does not count as different.
    The new assignment is one random cycle through all scenes (Sattolo's algorithm): no scene keeps its own pictures.
    Questions with n pictures exchange with questions with n pictures; text-only questions stay as they are.

    Raises:
        EvaluationError: all questions with n pictures show the same pictures.
    """
    scenes: dict[int, dict[tuple[str, ...], tuple[Path, ...]]] = {}
    keys = [tuple(_content(path) for path in question.images) for question in questions]
    for question, key in zip(questions, keys, strict=True):
        scenes.setdefault(len(key), {}).setdefault(key, question.images)
    other: dict[tuple[str, ...], tuple[Path, ...]] = {(): ()}
    for count, group in sorted(scenes.items()):
        if count == 0:
            continue
        if len(group) < 2:
            name = next(iter(group.values()))[0]
            raise EvaluationError(
                f"row shuffled: all questions with {count} picture(s) show the same one ({name}); there is no other to "
                "exchange it with. Leave the row out, or ask about more pictures."
            )
        names = sorted(group)
        cycle = _one_cycle(len(names), Random(f"{seed}:{count}"))
        other |= {name: group[names[at]] for name, at in zip(names, cycle, strict=True)}
    return [replace(question, images=other[key]) for question, key in zip(questions, keys, strict=True)]


def _one_cycle(length: int, rng: Random) -> list[int]:
    """A uniformly random permutation that consists of a single cycle; hence without fixed points for length > 1."""
    order = list(range(length))
    for last in range(length - 1, 0, -1):
        at = rng.randrange(last)
        order[last], order[at] = order[at], order[last]
    return order


@lru_cache(maxsize=100_000)
def _content(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
