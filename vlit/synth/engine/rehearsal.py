"""What stands in for a teacher's replies and a generator's pictures when a recipe is rehearsed.

A stand-in says nothing true: it has a form that the recipe's own parser accepts and a length. Forms are those that
``parse.py`` and the recipes read: text, question-answer pairs of each type, a verdict for each numbered line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlit.synth.engine.images import GeneratorConfig, ImageGenerator
from vlit.synth.engine.parse import Pair, Rejected
from vlit.synth.engine.recipe import RecipeConfig
from vlit.synth.engine.stages import AskEach, Item
from vlit.synth.engine.teacher import BYTES_PER_TOKEN, Ask, Reply

OPTIONS = ("a tree", "a house", "a boat", "a bird")
ANSWERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("There is a tree on the left.", ()),
    ("Yes", ()),
    ("A", OPTIONS),
    ("There is a tree on the left, so yes.", ()),
    ("There is a tree on the left, so A.", OPTIONS),
)
"""An answer, with its options, for each type of question: open, judgement, choice, and the last two with their reason."""


def prose(tokens: int) -> str:
    """One line of about ``tokens`` tokens in different sentences, at least one."""
    sentences = ["There is a tree here."]
    while sum(map(len, sentences)) < tokens * BYTES_PER_TOKEN:
        sentences.append(f"Thing {len(sentences) + 1} stands beside thing {len(sentences)}.")
    return " ".join(sentences)


def tagged(pair: Pair, number: int) -> str:
    """A pair in numbered tags."""
    options = " ".join(f"{letter}. {option}" for letter, option in zip("ABCD", pair.options, strict=False))
    choices = f"<C{number}>{options}</C{number}>" if options else ""
    return f"<Q{number}>{pair.question}</Q{number}>{choices}<A{number}>{pair.answer}</A{number}>"


def several_pairs(answer: str, options: tuple[str, ...], tokens: int) -> str:
    """Pairs with one answer, about ``tokens`` tokens in all, at least one pair."""
    lines: list[str] = []
    while not lines or sum(map(len, lines)) < tokens * BYTES_PER_TOKEN:
        question = f"What can be said about thing {len(lines) + 1}?"
        lines.append(tagged(Pair(question, answer, options), len(lines) + 1))
    return "\n".join(lines)


def verdicts(ask: Ask) -> str:
    """Every numbered line of the last message is right."""
    return "\n".join(f"{number}: right" for number in re.findall(r"^(\d+)\.", ask.messages[-1].text, re.MULTILINE))


def texts(ask: Ask, tokens: int) -> Iterator[str]:
    """A reply of about ``tokens`` tokens in each known form; then text of one sentence, and single pairs."""
    for length in (tokens, 1):
        yield prose(length)
        for answer, options in ANSWERS:
            yield several_pairs(answer, options, length)
    yield verdicts(ask)


def answered(stage: AskEach, item: Item, ask: Ask, *, tokens: int) -> tuple[str, list[Item]] | None:
    """The first stand-in that ``stage`` makes items of, and these; None where it takes no known form."""
    for text in texts(ask, tokens):
        try:
            return text, stage.finish(item, Reply(text))
        except Rejected:
            continue
    return None


class Undrawn(GeneratorConfig):
    """A generator in whose place nothing is drawn."""

    type: str = "undrawn"
    real: GeneratorConfig

    def build(self, **kwargs: Any) -> ImageGenerator:
        """The stand-in. ConfigError as the real one, which is built but not used."""
        return _DrawsNothing(self.real.build(**kwargs).abilities)


class _DrawsNothing(ImageGenerator):
    def __init__(self, abilities: str) -> None:
        self.abilities = abilities

    def generate(self, prompt: str, target: Path, *, seed: int) -> None:
        pass

    def write(self, prompt: str, target: Path, *, seed: int) -> None:
        pass


def undrawn(recipe: RecipeConfig) -> RecipeConfig:
    """The recipe with its image generators exchanged for ones that draw nothing."""
    generators = {name: held for name, held in recipe if isinstance(held, GeneratorConfig)}
    return recipe.model_copy(update={name: Undrawn(real=held) for name, held in generators.items()})
