"""Words as the metrics see them: tokens, numbers, colours, content words, and the verb and noun a question turns on.

The part-of-speech rules are a short list of verbs and function words, not a tagger: questions of instruction data begin in few
ways. They cost microseconds and need no model; what they miss is counted under the verb or noun ``?``.
"""

from __future__ import annotations

import re
from functools import lru_cache


def word_set(text: str) -> frozenset[str]:
    """The words of a list between spaces."""
    return frozenset(text.split())


TOKEN = re.compile(r"[^\W\d_]+(?:[-'’][^\W\d_]+)*|\d+(?:\.\d+)?")
COLOURS = word_set(
    "red green blue yellow pink white black orange purple brown gray grey cyan magenta beige silver gold"
)
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
           "eleven": 11, "twelve": 12}  # fmt: skip
POSITIONS: dict[str, tuple[float, float, float, float]] = {
    "top-left": (0, 0, 0.5, 0.5), "top-right": (0.5, 0, 1, 0.5),
    "bottom-left": (0, 0.5, 0.5, 1), "bottom-right": (0.5, 0.5, 1, 1),
    "upper-left": (0, 0, 0.5, 0.5), "upper-right": (0.5, 0, 1, 0.5),
    "lower-left": (0, 0.5, 0.5, 1), "lower-right": (0.5, 0.5, 1, 1),
}  # fmt: skip
"""Quarters of a picture: where the centre of a thing must lie."""
DETERMINERS = word_set("a an the this that these those its their his her some any all each every another")
AUXILIARIES = word_set(
    "is are was were be been being am do does did can could will would should may might must has have had"
)
PREPOSITIONS = word_set(
    """at in on of to from with without by for into onto near behind beside between above below under over left right
    front next about around inside outside through across along against toward towards among"""
)
RELATIONS = word_set(
    """on in near behind beside between above below under over left right front next around inside outside across
    against among holding wearing riding larger smaller taller shorter bigger"""
)
REASONING = word_set(
    """because so therefore since thus hence if then suggests implies indicates likely probably means reason due
    considering although however compare compared first second finally"""
)
_WH = word_set("what which who whom whose where when why how")
_OTHER = word_set(
    """and or but not no yes it they he she you i we me us them there here as than if so please now very also only many
    much more most less few other color colour kind type number"""
)
DIRECTIONS = word_set(
    """left right front behind above below under over inside outside between beside next near top bottom up down forward
    backward backwards towards away north south east west"""
)
"""Words of place that tell one answer from another by themselves, whatever they are called in a grammar."""
QUANTITIES = word_set(
    "some any all each every no none many much more most less few fewer least several both half only one"
)
"""How many or how much, where a question asks for it."""
GENERIC = word_set("picture scene view shot photography detail thing visible something anything")
"""Nouns that every question may hold."""
STOP = DETERMINERS | AUXILIARIES | PREPOSITIONS | _WH | _OTHER - {"yes", "no", "not", "color", "colour", "number"}
VERBS = word_set(
    """describe explain name count list identify find say write give tell show see look add compare sum answer choose
    select pick locate point estimate predict infer summarize summarise determine decide judge classify detect
    recognize recognise translate read provide discuss analyze analyse suggest imagine generate create caption
    complete paint wear hold ride stand sit walk run play eat drink use make happen know think mean need want do go
    come work cook drive carry contain include mention state report calculate compute solve measure rank sort match
    fill propose outline"""
)
_FORMS = {
    "seen": "see", "saw": "see", "written": "write", "given": "give", "shown": "show", "worn": "wear", "held": "hold",
    "people": "person", "children": "child", "men": "man", "women": "woman", "mice": "mouse", "feet": "foot",
    "knives": "knife", "sheep": "sheep", "buses": "bus", "glasses": "glasses", "scissors": "scissors", "skis": "skis",
    "colour": "color", "colours": "color", "photo": "picture", "image": "picture", "photograph": "picture",
}  # fmt: skip


def tokens(text: str) -> list[str]:
    """Lower-case words and numbers in order; hyphened words are one token."""
    return TOKEN.findall(text.lower())


@lru_cache(maxsize=1 << 16)
def lemma(word: str) -> str:
    """A crude base form: plural s, -ing and -ed of known verbs, a few irregular forms."""
    if word in _FORMS:
        return _FORMS[word]
    for ending, put in (("ies", "y"), ("sses", "ss"), ("ches", "ch"), ("shes", "sh"), ("xes", "x")):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            return word.removesuffix(ending) + put
    if word.endswith("s") and len(word) > 3 and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    for ending in ("ing", "ed"):
        stem = word.removesuffix(ending)
        if stem != word:
            for base in (stem, stem + "e", stem[:-1]):
                if base in VERBS:
                    return base
    return word


def content(words: list[str]) -> list[str]:
    """Base forms of the words that carry meaning."""
    return [lemma(word) for word in words if word not in STOP]


def meaning(words: list[str]) -> list[str]:
    """Base forms of the words that tell one text from another: content words and directions."""
    return [lemma(word) for word in words if word not in STOP or word in DIRECTIONS]


def subjects(words: list[str]) -> set[str]:
    """Base forms of the things, colours, numbers, names and directions of a question; its verbs are wording."""
    found = {base for base in meaning(words) if base not in VERBS and base not in GENERIC and base not in REASONING}
    return found - {"one"}  # "Which one is it?"


def number_of(word: str) -> int | None:
    """3 of ``3`` and ``three``; None of anything else."""
    if word.isascii() and word.isdigit():
        return int(word[:9])
    return NUMBERS.get(word)


def root_of(question: str) -> tuple[str, str]:
    """The verb a question turns on and its first object, ``?`` where there is none.

    "Describe the picture in detail." -> (describe, picture); "How many dogs do you see?" -> (see, dog);
    "What color is the digit?" -> (be, color).
    """
    words = tokens(question.replace("<image>", " ").strip().split("\n")[0])[:32]
    verb = next((lemma(word) for word in words if lemma(word) in VERBS and word not in AUXILIARIES), None)
    if verb is None:
        verb = "be" if any(word in ("is", "are", "was", "were") for word in words) else "?"
    asked = next((place for place, word in enumerate(words) if word in _WH), None)
    start = 0
    if asked is not None and asked <= 2:
        start = asked + 1
    noun = "?"
    for word in words[start:]:
        base = lemma(word)
        if base in ("color", "number", "kind", "type"):
            noun = base
            break
        if (
            word in STOP
            or word in COLOURS
            or word in RELATIONS
            or base == verb
            or base in VERBS
            or number_of(word) is not None
        ):
            continue
        noun = base
        break
    return verb, noun
