"""Scenes in words: passages that a language model reads instead of a picture, and chats about them.

This is the only text the tiny LLaMA is pretrained on. A passage states the things of a scene in one of several styles,
in any order: sentences, captions, tags ("red-7-top-left", one word), and a *map*, which is 4 x 4 tags in reading order, the
way a table in plain text shows where things stand. A vision encoder with 16 patch tokens hands its features over alike:
in reading order, each knowing several attributes at once, some knowing none.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from vlit.synth.digits.annotations import CAPTION_FORMS, caption_of
from vlit.synth.digits.instructions import converse
from vlit.synth.digits.questions import DIGITS, KINDS, Thing, Turn
from vlit.synth.digits.scenes import COLOUR_NAMES, POSITIONS

BOS, EOS, UNKNOWN = "<s>", "</s>", "<unk>"
USER, ASSISTANT = "USER: ", " ASSISTANT:"
MAP_SIDE = 4
MAP_EMPTY = "-"
RETOLD_SHARE, RETOLD_SENTENCES = 0.3, 8
"""Share of pretraining texts that tell a tagged scene again in sentences."""
CONCLUSION_WEIGHTS = dict.fromkeys(KINDS, 1) | {"yes_no": 4, "choice": 5, "compare": 4, "extreme": 3, "sum": 3}
"""Kinds in the last part of pretraining: the value is found by then, what follows from it is not."""
PLAIN_SHARE = 0.1
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


def tag(thing: Thing) -> str:
    """``red-7-top-left``: one word that holds all three attributes."""
    return f"{thing.colour}-{thing.digit}-{thing.position}"


def tags(things: Sequence[Thing], rng: Random) -> str:
    return ", ".join(tag(thing) for thing in rng.sample(things, len(things)))


def chart(things: Sequence[Thing], rng: Random) -> str:
    """A map of 4 x 4 words in reading order: one to four of a quadrant's four words are the tag of its thing."""
    at = {thing.position: thing for thing in things}
    cells = [[""] * MAP_SIDE for _ in range(MAP_SIDE)]
    for number, position in enumerate(POSITIONS):
        named = rng.randint(1, 4) if position in at else 0
        words = [tag(at[position])] * named + [MAP_EMPTY] * (4 - named) if named else [MAP_EMPTY] * 4
        rng.shuffle(words)
        for cell, word in enumerate(words):
            cells[2 * (number // 2) + cell // 2][2 * (number % 2) + cell % 2] = word
    return "".join(f" {word}" for row in cells for word in row)


STYLES = {"sentences": sentences, "caption": caption, "tags": tags, "map": chart}
STYLE_WEIGHTS = {"sentences": 1, "caption": 1, "tags": 1, "map": 3}


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


def retold_pieces(things: Sequence[Thing], rng: Random) -> list[tuple[str, bool]]:
    """A passage and the same scene told again several times in other words and another order.

    The shortest way to learn retrieval: every digit, colour and place is to be found by the words just before it.
    """
    style = rng.choice(("tags", "map"))
    again = " ".join(sentences(things, rng) for _ in range(max(1, RETOLD_SENTENCES // len(things))))
    return [(BOS + write_passage(things, rng, style=style) + "\n", False), (again + "\n", True)]


def write_text(rng: Random, *, turns: int) -> list[tuple[str, bool]]:
    """One pretraining text about a random scene."""
    things = random_things(rng)
    if rng.random() < RETOLD_SHARE:
        return retold_pieces(things, rng)
    passage = write_passage(things, rng)
    if rng.random() < PLAIN_SHARE:
        named = [(t.digit, t.colour, t.position) for t in things]
        return plain_pieces(passage, caption_of(named, rng.randrange(len(CAPTION_FORMS))))
    return chat_pieces(passage, converse(things, rng, turns=turns))


def write_conclusions(rng: Random, *, turns: int) -> list[tuple[str, bool]]:
    """A chat about a tagged scene, mostly of questions that need a conclusion."""
    things = random_things(rng)
    passage = write_passage(things, rng, style=rng.choice(("tags", "map", "map", "map")))
    return chat_pieces(passage, converse(things, rng, turns=turns, turn_weights=CONCLUSION_WEIGHTS))
