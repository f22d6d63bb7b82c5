"""The embedded teacher in the language of the digits world: what its small language model can read, write and learn from.

The teacher `annotations` speaks plain English about any picture. A model of a million weights that knows some hundred words
learns nothing from that; this teacher asks and answers as the world's own questions do, and fits pictures of that world only.
Like every teacher it receives a view (captions and boxes of COCO files) and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, NamedTuple

from vlit.errors import DataError
from vlit.registry import TEACHERS
from vlit.synth.digits import questions
from vlit.synth.digits.instructions import converse, in_reading_order
from vlit.synth.digits.questions import FAMILIES, KINDS, Thing, Turn
from vlit.synth.digits.scenes import COLOUR_NAMES
from vlit.synth.engine.parse import Pair
from vlit.synth.engine.views import View
from vlit.synth.teachers.annotations import AnnotationsConfig, AnnotationsTeacher, blocks, tagged

CONVERSATION_TURNS = 5
DRAWS = 12
"""Questions drawn for one request; the different ones among them are kept, up to the number asked for."""


class Domain(NamedTuple):
    """Which forms of a lookup and of a judgement (``questions.py``) belong to one of MMInstruct's domains."""

    lookups: Sequence[int]
    judgements: Sequence[int]


DOMAINS: Mapping[str, Domain] = {
    "object_recognition": Domain((0, 1), (0, 1, 5)),
    "attribute_recognition": Domain((2,), (2, 4)),
    "object_localization": Domain((3,), (3, 7)),
    "object_counting": Domain((4,), (6,)),
}


@TEACHERS.register("digits")
class DigitsTeacherConfig(AnnotationsConfig):
    """Answers from the annotations of the digits world, in that world's few words; its judgements say their reason first."""

    type: str = "digits"

    def build(self, **kwargs: Any) -> DigitsTeacher:
        """The teacher."""
        return DigitsTeacher(self.seed)


class DigitsTeacher(AnnotationsTeacher):
    """Tasks of the recipes `llava` and `mminstruct` (with ``answers: reasoned``)."""

    name = "digits"

    @property
    def tasks(self) -> Mapping[str, Callable[[dict[str, Any], Random], str]]:
        return TASKS

    def known_domains(self) -> set[str] | None:
        return set(DOMAINS)


def things_of(view: View) -> tuple[Thing, ...]:
    """The things of a view in reading order, by the quadrant of their middle.

    Raises:
        DataError: a box whose name is no digit, or that has no colour of the world.
    """
    seen: list[tuple[str, str, float, float]] = []
    for thing in view.things:
        colour = thing.attributes.get("color")
        if thing.name not in questions.DIGITS or colour not in COLOUR_NAMES:
            raise DataError(
                f'teacher digits: picture "{view.image}" shows "{thing.phrase}"; it knows coloured digits only. Use the '
                "teacher annotations for other pictures."
            )
        x0, y0, x1, y1 = thing.box
        seen.append((thing.name, colour, (x0 + x1) / 2, (y0 + y1) / 2))
    return in_reading_order(seen)


def _conversation(facts: dict[str, Any], rng: Random) -> str:
    kinds = dict.fromkeys((*FAMILIES["conversation"], *FAMILIES["color_keyed"]), 1.0)
    turns = converse(things_of(View.of(facts)), rng, turns=CONVERSATION_TURNS, turn_weights=kinds, caption_share=0.0)
    return blocks([Pair(turn.question, turn.answer) for turn in turns])


def _reasoning(facts: dict[str, Any], rng: Random) -> str:
    things = things_of(View.of(facts))
    turns = [KINDS[kind](things, rng) for kind in rng.sample(FAMILIES["complex_reasoning"], 3)]
    return blocks([Pair(turn.question, turn.answer) for turn in turns if turn is not None][:1])


def _describe(facts: dict[str, Any], rng: Random) -> str:
    return questions.ask_description(things_of(View.of(facts)), rng).answer


def _domain(facts: dict[str, Any], rng: Random) -> str:
    things, domain, kind = things_of(View.of(facts["view"])), DOMAINS[facts["domain"]], facts["kind"]
    found: dict[str, Pair] = {}
    for _ in range(DRAWS):
        turn = _ask(things, rng, domain, kind)
        if turn is not None and len(found) < facts["questions"]:
            question, _, _ = turn.question.partition("\n")
            found.setdefault(question, Pair(question, turn.answer, turn.choices))
    return tagged(list(found.values()))


def _ask(things: Sequence[Thing], rng: Random, domain: Domain, kind: str) -> Turn | None:
    """One turn without the words that ask for a form of answer: these are the recipe's."""
    if kind == "judgement":
        return questions.ask_yes_no(things, rng, forms=domain.judgements)
    if kind == "choice":
        return questions.ask_choice(things, rng, forms=domain.lookups)
    if kind == "short":
        turn = questions.ask_short(things, rng, forms=domain.lookups)
        return Turn(turn.kind, turn.question.removesuffix(f" {questions.ONE_WORD}"), turn.answer)
    turn = questions.ask_long(things, rng)
    return Turn(turn.kind, turn.question.removesuffix(f" {questions.FULL_SENTENCE}"), turn.answer)


TASKS: dict[str, Callable[[dict[str, Any], Random], str]] = {
    "conversation": _conversation,
    "detail": _describe,
    "reasoning": _reasoning,
    "caption": _describe,
    "domain": _domain,
}
