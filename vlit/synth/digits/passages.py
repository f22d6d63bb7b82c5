"""Scenes in words: passages that a language model reads instead of a picture, and chats about them.

This is the only text the tiny LLaMA is pretrained on. A passage states the things of a scene in one of several styles,
in any order. One style is a *map*: a text of 4 x 4 words in reading order, four words to a quadrant, the way a table in
plain text shows where things stand. A vision encoder with 16 patch tokens hands its features over in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from vlit.synth.digits.annotations import CAPTION_FORMS, caption_of
from vlit.synth.digits.instructions import converse
from vlit.synth.digits.questions import DIGITS, Thing, Turn
from vlit.synth.digits.scenes import COLOUR_NAMES, POSITIONS

BOS, EOS, UNKNOWN = "<s>", "</s>", "<unk>"
USER, ASSISTANT = "USER: ", " ASSISTANT:"
MAP_SIDE = 4
MAP_EMPTY = "-"
PLAIN_SHARE = 0.15
"""Share of pretraining texts without a chat: a passage followed by a caption and a line break."""


def random_things(rng: Random) -> tuple[Thing, ...]:
    """One to four things in reading order, drawn like the scenes of the world."""
    number = rng.randint(1, len(POSITIONS))
    places = sorted(rng.sample(range(len(POSITIONS)), number))
    colours = rng.sample(COLOUR_NAMES, number)
    return tuple(Thing(rng.choice(DIGITS), c, POSITIONS[p]) for c, p in zip(colours, places, strict=True))


def sentences(things: Sequence[Thing], rng: Random) -> str:
    forms = (
        "The digit at the {position} is a {colour} {digit}.",
        "There is a {colour} {digit} at the {position}.",
        "The {colour} {digit} is at the {position}.",
        "At the {position} you see the digit {digit} in {colour}.",
    )
    return " ".join(rng.choice(forms).format(**vars(thing)) for thing in rng.sample(things, len(things)))


def caption(things: Sequence[Thing], rng: Random) -> str:
    shuffled = rng.sample(things, len(things))
    return caption_of([(t.digit, t.colour, t.position) for t in shuffled], rng.randrange(len(CAPTION_FORMS)))


def notes(things: Sequence[Thing], rng: Random) -> str:
    """``red 7 top-left, blue 3 bottom-right``: things and the words of each thing in any order."""
    parts = []
    for thing in rng.sample(things, len(things)):
        words = [thing.digit, thing.colour, thing.position]
        rng.shuffle(words)
        parts.append(" ".join(words))
    return ", ".join(parts)


def chart(things: Sequence[Thing], rng: Random) -> str:
    """A map of 4 x 4 words in reading order; a quadrant's four words name its digit and colour, sometimes its place."""
    at = {thing.position: thing for thing in things}
    with_places = rng.random() < 0.5
    cells = [[""] * MAP_SIDE for _ in range(MAP_SIDE)]
    for number, position in enumerate(POSITIONS):
        words = [MAP_EMPTY] * 4
        if position in at:
            known = [at[position].digit, at[position].colour] + [position] * with_places
            words = known + [rng.choice((*known, MAP_EMPTY)) for _ in range(4 - len(known))]
            rng.shuffle(words)
        for cell, word in enumerate(words):
            cells[2 * (number // 2) + cell // 2][2 * (number % 2) + cell % 2] = word
    return "".join(f" {word}" for row in cells for word in row)


STYLES = {"sentences": sentences, "caption": caption, "notes": notes, "map": chart}
STYLE_WEIGHTS = {"sentences": 1, "caption": 1, "notes": 1, "map": 3}


def write_passage(things: Sequence[Thing], rng: Random, *, style: str | None = None) -> str:
    """The things in words, in the given style or in one drawn by ``STYLE_WEIGHTS``."""
    chosen = style or rng.choices(list(STYLE_WEIGHTS), list(STYLE_WEIGHTS.values()))[0]
    return STYLES[chosen](things, rng)


def chat_pieces(passage: str, turns: Sequence[Turn]) -> list[tuple[str, bool]]:
    """The text of a chat in Vicuna's form as (piece, takes loss); answers and their end token take loss."""
    pieces: list[tuple[str, bool]] = []
    for number, turn in enumerate(turns):
        opening = BOS + USER + f"{passage}\n" if number == 0 else USER
        pieces += [(f"{opening}{turn.question}{ASSISTANT}", False), (f" {turn.answer}{EOS}", True)]
    return pieces


def plain_pieces(passage: str, summary: str) -> list[tuple[str, bool]]:
    """A passage, a caption of the same scene, a line break: the form of feature alignment without a chat."""
    return [(BOS + passage, False), (f"{summary}\n", True)]


def write_text(rng: Random, *, turns: int) -> list[tuple[str, bool]]:
    """One pretraining text about a random scene."""
    things = random_things(rng)
    passage = write_passage(things, rng)
    if rng.random() < PLAIN_SHARE:
        named = [(t.digit, t.colour, t.position) for t in things]
        return plain_pieces(passage, caption_of(named, rng.randrange(len(CAPTION_FORMS))))
    return chat_pieces(passage, converse(things, rng, turns=turns))
