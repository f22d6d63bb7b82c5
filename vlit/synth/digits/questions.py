"""Question kinds about a list of things, each thing a digit with a colour and a position.

A kind is one function ``(things, rng) -> Turn | None`` (None: the scene does not allow the question, for example a
comparison with one digit). The same functions serve the visual instructions (things read from COCO files) and the
text-only pretraining of the language model (things drawn at random and described in words).

Answers restate what was asked for right before the value ("The red digit is 7."), and conclusions follow the facts they rest on
("..., so no."): a small model finds a value next to its key far more easily than a bare word several tokens after the question.

Answers are balanced so that a model that cannot see gains nothing: yes and no are equally likely within every form of
a judgement, the right letter of a multiple choice is uniform, digits and colours are uniform.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from vlit.synth.digits.annotations import CAPTION_FORMS, caption_of
from vlit.synth.digits.scenes import COLOUR_NAMES, POSITIONS

LETTERS = "ABCD"
DIGITS = tuple(str(digit) for digit in range(10))
COUNTS = ("1", "2", "3", "4")
ONE_WORD = "Answer with one word."
REASON_AND_LETTER = "Say what you see and give the letter of the right option."
FULL_SENTENCE = "Answer with a full sentence."


@dataclass(frozen=True)
class Thing:
    """One digit of a scene."""

    digit: str
    colour: str
    position: str


@dataclass(frozen=True)
class Turn:
    """One question with its answer; ``choices`` holds the options of a multiple choice in the order of the letters."""

    kind: str
    question: str
    answer: str
    choices: tuple[str, ...] = ()


Things = Sequence[Thing]
Asker = Callable[[Things, Random], "Turn | None"]


def _digit_question(thing: Thing, rng: Random) -> str:
    forms = ("Which digit is at the {}?", "What digit do you see at the {}?", "Name the digit at the {}.")
    return rng.choice(forms).format(thing.position)


def _colour_question(thing: Thing, rng: Random) -> str:
    forms = ("What color is the digit at the {}?", "Which color do you see at the {}?", "Name the color at the {}.")
    return rng.choice(forms).format(thing.position)


def _count_question(rng: Random) -> str:
    return rng.choice(("How many digits are there?", "How many digits do you see?", "Count the digits."))


def _keyed_digit_question(thing: Thing, rng: Random) -> str:
    forms = ("Which digit is {}?", "Which digit is painted in {}?", "Name the digit that is {}.")
    return rng.choice(forms).format(thing.colour)


def _keyed_place_question(thing: Thing, rng: Random) -> str:
    forms = ("Where is the digit that is {}?", "Where do you see {}?", "Name the place of the digit that is {}.")
    return rng.choice(forms).format(thing.colour)


def _number_of(things: Things) -> str:
    return "There is 1 digit." if len(things) == 1 else f"There are {len(things)} digits."


def _article(digit: str) -> str:
    return f"an {digit}" if digit == "8" else f"a {digit}"


def ask_digit(things: Things, rng: Random) -> Turn:
    thing = rng.choice(things)
    return Turn("digit", _digit_question(thing, rng), f"The digit at the {thing.position} is {thing.digit}.")


def ask_colour(things: Things, rng: Random) -> Turn:
    thing = rng.choice(things)
    return Turn("color", _colour_question(thing, rng), f"The digit at the {thing.position} is {thing.colour}.")


def ask_count(things: Things, rng: Random) -> Turn:
    return Turn("count", _count_question(rng), _number_of(things))


def ask_digit_of_colour(things: Things, rng: Random) -> Turn:
    thing = rng.choice(things)
    return Turn("digit_of_color", _keyed_digit_question(thing, rng), f"The {thing.colour} digit is {thing.digit}.")


def ask_place_of_colour(things: Things, rng: Random) -> Turn:
    thing = rng.choice(things)
    return Turn(
        "place_of_color", _keyed_place_question(thing, rng), f"The {thing.colour} digit is at the {thing.position}."
    )


def ask_description(things: Things, rng: Random) -> Turn:
    forms = (
        "Describe the picture in detail.",
        "What does the picture show in detail?",
        "Describe all you see.",
    )
    sentences = [f"The digit at the {t.position} is a {t.colour} {t.digit}." for t in things]
    return Turn("description", rng.choice(forms), " ".join([_number_of(things), *sentences]))


def _two_different(things: Things, rng: Random) -> tuple[Thing, Thing] | None:
    pairs = [(a, b) for a in things for b in things if a.digit != b.digit]
    return rng.choice(pairs) if pairs else None


def ask_compare(things: Things, rng: Random) -> Turn | None:
    pair = _two_different(things, rng)
    if pair is None:
        return None
    word = rng.choice(("larger", "smaller"))
    key = rng.choice(("colour", "position"))
    names = [f"the {t.colour} digit" if key == "colour" else f"the digit at the {t.position}" for t in pair]
    question = f"Which is {word}, {names[0]} or {names[1]}?"
    best = (max if word == "larger" else min)((0, 1), key=lambda n: pair[n].digit)
    facts = " and ".join(f"{name} is {t.digit}" for name, t in zip(names, pair, strict=True))
    return Turn("compare", question, f"{facts[0].upper()}{facts[1:]}, so {names[best]}.")


def ask_extreme(things: Things, rng: Random) -> Turn | None:
    word = rng.choice(("largest", "smallest"))
    best = (max if word == "largest" else min)(things, key=lambda t: t.digit)
    if len(things) < 2 or sum(t.digit == best.digit for t in things) > 1:
        return None
    forms = ("Which digit is the {}?", "Which of the digits is the {}?", "Find the digit that is the {}.")
    listed = ", ".join(t.digit for t in things[:-1]) + f" and {things[-1].digit}"
    return Turn("extreme", rng.choice(forms).format(word), f"The digits are {listed}, so the {word} is {best.digit}.")


def ask_sum(things: Things, rng: Random) -> Turn | None:
    if len(things) < 2:
        return None
    question = rng.choice(("What is the sum of all digits?", "Add up all digits.", "What do all digits add up to?"))
    return Turn("sum", question, f"{' + '.join(t.digit for t in things)} = {sum(int(t.digit) for t in things)}.")


def ask_yes_no(things: Things, rng: Random, *, forms: Sequence[int] = range(8)) -> Turn | None:
    """Eight forms; in each the statement is true with probability one half whatever the scene.

    ``forms``: those to draw from, in order. The last one, an empty place, needs a place without a thing.
    """
    thing, truth = rng.choice(things), rng.random() < 0.5

    def stated(right: str, wrong: Sequence[str], near: Sequence[str]) -> str:
        """The value a question states: the right one, or a wrong one (half the time one that stands elsewhere)."""
        if truth:
            return right
        close = [value for value in near if value != right and value in wrong]
        return rng.choice(close) if close and rng.random() < 0.5 else rng.choice([v for v in wrong if v != right])

    digits, colours, places = ([getattr(t, name) for t in things] for name in ("digit", "colour", "position"))
    possible = [form for form in forms if form < 7 or len(things) < len(POSITIONS)]
    if not possible:
        return None
    form = rng.choice(possible)
    a_or_no = "a" if truth else "no"
    if form == 0:
        question = f"Is the digit at the {thing.position} {_article(stated(thing.digit, DIGITS, digits))}?"
        fact = f"The digit at the {thing.position} is {thing.digit}"
    elif form == 1:
        question = f"Is the {thing.colour} digit {_article(stated(thing.digit, DIGITS, digits))}?"
        fact = f"The {thing.colour} digit is {thing.digit}"
    elif form == 2:
        question = f"Is the digit at the {thing.position} {stated(thing.colour, COLOUR_NAMES, colours)}?"
        fact = f"The digit at the {thing.position} is {thing.colour}"
    elif form == 3:
        question = f"Is the {thing.colour} digit at the {stated(thing.position, POSITIONS, places)}?"
        fact = f"The {thing.colour} digit is at the {thing.position}"
    elif form == 4:
        colour = stated(thing.colour, [colour for colour in COLOUR_NAMES if colour not in colours], ())
        question, fact = f"Is there a digit that is {colour}?", f"There is {a_or_no} {colour} digit"
    elif form == 5:
        digit = stated(thing.digit, [digit for digit in DIGITS if digit not in digits], ())
        question, fact = f"Do you see {_article(digit)}?", f"There is {_article(digit) if truth else f'no {digit}'}"
    elif form == 6:
        question, fact = f"Is the number of digits {stated(str(len(things)), COUNTS, ())}?", _number_of(things)[:-1]
    else:
        place = stated(thing.position, [place for place in POSITIONS if place not in places], ())
        question, fact = f"Is there a digit at the {place}?", f"There is {a_or_no} digit at the {place}"
    return Turn("yes_no", question, f"{fact}, so {'yes' if truth else 'no'}.")


@dataclass(frozen=True)
class _Lookup:
    """A question about one value: the value, all possible values, those that stand elsewhere, the answer in full."""

    question: str
    value: str
    pool: Sequence[str]
    near: Sequence[str]
    fact: str


def _lookup(things: Things, rng: Random, forms: Sequence[int]) -> _Lookup:
    thing = rng.choice(things)
    digits, colours = [t.digit for t in things], [t.colour for t in things]
    at, of = f"The digit at the {thing.position} is", f"The {thing.colour} digit is"
    form = rng.choice(forms)
    if form == 0:
        return _Lookup(_digit_question(thing, rng), thing.digit, DIGITS, digits, f"{at} {thing.digit}")
    if form == 1:
        return _Lookup(_keyed_digit_question(thing, rng), thing.digit, DIGITS, digits, f"{of} {thing.digit}")
    if form == 2:
        return _Lookup(_colour_question(thing, rng), thing.colour, COLOUR_NAMES, colours, f"{at} {thing.colour}")
    if form == 3:
        return _Lookup(
            _keyed_place_question(thing, rng), thing.position, POSITIONS, (), f"{of} at the {thing.position}"
        )
    return _Lookup(_count_question(rng), str(len(things)), COUNTS, (), _number_of(things)[:-1])


def ask_choice(things: Things, rng: Random, *, forms: Sequence[int] = range(5)) -> Turn:
    """A question about one value with four options."""
    asked = _lookup(things, rng, forms)
    close = list(dict.fromkeys(value for value in asked.near if value != asked.value))
    wrong = rng.sample(close, rng.randint(0, len(close)))
    others = [value for value in asked.pool if value != asked.value and value not in wrong]
    options = wrong + rng.sample(others, len(LETTERS) - 1 - len(wrong))
    rng.shuffle(options)
    place = rng.randrange(len(LETTERS))
    options.insert(place, asked.value)
    lines = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True))
    question = f"{asked.question}\n{lines}\n{REASON_AND_LETTER}"
    return Turn("choice", question, f"{asked.fact}, so {LETTERS[place]}.", tuple(options))


def ask_short(things: Things, rng: Random, *, forms: Sequence[int] = range(5)) -> Turn:
    """A question about one value, answered by the value alone."""
    asked = _lookup(things, rng, forms)
    return Turn("short", f"{asked.question} {ONE_WORD}", asked.value)


def ask_long(things: Things, rng: Random) -> Turn:
    thing = rng.choice(things)
    if rng.random() < 0.5:
        question = f"What do you know about the digit at the {thing.position}?"
    else:
        question = f"What do you know about the digit that is {thing.colour}?"
    answer = f"At the {thing.position} there is the digit {thing.digit}, and its color is {thing.colour}."
    return Turn("long", f"{question} {FULL_SENTENCE}", answer)


def ask_caption(things: Things, rng: Random) -> Turn:
    """Asks for a caption. Training only: several captions of a picture are right, so it is not scored."""
    question = rng.choice(("Write a caption for the picture.", "Give the picture a caption."))
    named = [(t.digit, t.colour, t.position) for t in things]
    return Turn("caption", question, caption_of(named, rng.randrange(len(CAPTION_FORMS))))


KINDS: dict[str, Asker] = {
    "digit": ask_digit,
    "color": ask_colour,
    "count": ask_count,
    "digit_of_color": ask_digit_of_colour,
    "place_of_color": ask_place_of_colour,
    "description": ask_description,
    "compare": ask_compare,
    "extreme": ask_extreme,
    "sum": ask_sum,
    "yes_no": ask_yes_no,
    "choice": ask_choice,
    "short": ask_short,
    "long": ask_long,
}
FAMILIES = {
    "conversation": ("digit", "color", "count"),
    "color_keyed": ("digit_of_color", "place_of_color"),
    "detailed_description": ("description",),
    "complex_reasoning": ("compare", "extreme", "sum"),
    "judgement": ("yes_no",),
    "multiple_choice": ("choice",),
    "short_vqa": ("short",),
    "long_vqa": ("long",),
}
