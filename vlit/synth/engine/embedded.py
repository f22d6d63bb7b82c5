"""What the embedded teacher says: questions and answers that follow from a view's boxes and captions, nothing else.

No language model: sentences are built from named boxes, so each answer is as true as the annotations. It makes every recipe
run offline and gives tests answers that can be checked. Its wording is plain; it is no substitute for a large teacher.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from random import Random
from typing import NamedTuple

from vlit.synth.engine.parse import Pair
from vlit.synth.engine.views import Thing, View

MAX_NAMED = 8
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


class Lookup(NamedTuple):
    """A question about one value: the value, other values it could have, and the sentence that states a value."""

    question: str
    value: str
    others: tuple[str, ...]
    sentence: str


def article(phrase: str) -> str:
    """``a red 7``, ``an 8``, ``an orange``."""
    return f"an {phrase}" if re.match(r"[aeiou]|8|11\b|18\b", phrase, flags=re.IGNORECASE) else f"a {phrase}"


def joined(parts: Sequence[str]) -> str:
    """``a, b and c``."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def plural(name: str, count: int) -> str:
    """``2 dogs``, ``1 dog``; digits keep an apostrophe-free s (``2 7s``)."""
    if count == 1:
        return name
    return name + ("es" if re.search(r"(s|x|ch|sh)$", name) else "s")


def capital(text: str) -> str:
    """First letter upper case."""
    return text[:1].upper() + text[1:]


def alone(things: Sequence[Thing], key: Callable[[Thing], str]) -> list[Thing]:
    """Things that no other thing shares ``key`` with, so that a question by it has one answer."""
    counts = Counter(key(thing) for thing in things)
    return [thing for thing in things if counts[key(thing)] == 1]


def place_words(place: str) -> str:
    """``at the top-left``, ``in the center``."""
    return "in the center" if place == "center" else f"at the {place}"


# ---- the six domains it can answer in (names of prompts/mminstruct/domains) ----------------------------------------------


def counting(view: View, rng: Random) -> Lookup | None:
    """How many of one name, or of all."""
    if not view.countable:
        return None
    counts = Counter(thing.name for thing in view.countable)
    name = rng.choice(sorted(counts))
    number = counts[name]
    others = tuple(str(n) for n in range(1, max(6, number + 3)) if n != number)
    things = plural(name, 2)
    return Lookup(
        f"How many {things} are in the image?", str(number), others, f"the number of {things} in the image is {{}}"
    )


def localization(view: View, rng: Random) -> Lookup | None:
    """Where a thing is that can be named without doubt."""
    candidates = alone(view.countable, lambda t: t.phrase)
    if not candidates:
        return None
    thing = rng.choice(candidates)
    places = [f"{row}-{column}" for row in ("top", "bottom") for column in ("left", "right")] + ["center"]
    others = tuple(place for place in places if place != thing.place)
    question = f"In which part of the image is the {thing.phrase}?"
    return Lookup(question, thing.place, others, f"the {thing.phrase} is at the {{}} of the image")


def attributes(view: View, rng: Random) -> Lookup | None:
    """An attribute of a thing known by its name."""
    candidates = [t for t in alone(view.countable, lambda t: t.name) if t.attributes]
    if not candidates:
        return None
    thing = rng.choice(candidates)
    name, value = rng.choice(sorted(thing.attributes.items()))
    pool = {"red", "green", "blue", "yellow", "white", "pink"} | {t.attributes.get(name, value) for t in view.things}
    question = f"What {name} is the {thing.name} in the image?"
    return Lookup(question, value, tuple(sorted(pool - {value})), f"the {thing.name} is {{}}")


def recognition(view: View, rng: Random) -> Lookup | None:
    """What stands at a place."""
    candidates = [t for t in alone(view.things, lambda t: t.place) if t.name not in view.crowds]
    if not candidates:
        return None
    thing = rng.choice(candidates)
    names = {t.name for t in view.things} | (
        {str(n) for n in range(10)} if thing.name.isdigit() else {"tree", "car", "person"}
    )
    where = place_words(thing.place)
    others = names - {thing.name, *view.crowds}  # which may be there as well
    return Lookup(f"What can be seen {where}?", thing.name, tuple(sorted(others)), f"{where} there is the {{}}")


def relation(view: View, rng: Random) -> Lookup | None:
    """On which side of another thing a thing is."""
    candidates = alone(view.countable, lambda t: t.phrase)
    pairs = [(a, b) for a in candidates for b in candidates if a is not b and abs(_middle(a) - _middle(b)) > 0.15]
    if not pairs:
        return None
    first, second = rng.choice(pairs)
    side = "left" if _middle(first) < _middle(second) else "right"
    question = f"On which side of the {second.phrase} is the {first.phrase}?"
    others = tuple({"left", "right"} - {side})
    return Lookup(question, side, others, f"the {first.phrase} is to the {{}} of the {second.phrase}")


def comparison(view: View, rng: Random) -> Lookup | None:
    """Which of two things covers more of the picture."""
    candidates = alone(view.countable, lambda t: t.phrase)
    pairs = [(a, b) for a in candidates for b in candidates if a.area > 1.3 * b.area]
    if not pairs:
        return None
    pair = list(rng.choice(pairs))
    larger, smaller = pair
    rng.shuffle(pair)
    question = f"Which covers more of the image, the {pair[0].phrase} or the {pair[1].phrase}?"
    return Lookup(question, larger.phrase, (smaller.phrase,), "the {} covers more of the image than the other one")


def _middle(thing: Thing) -> float:
    return (thing.box[0] + thing.box[2]) / 2


DOMAINS: dict[str, Callable[[View, Random], Lookup | None]] = {
    "object_counting": counting,
    "object_localization": localization,
    "attribute_recognition": attributes,
    "object_recognition": recognition,
    "spatial_relation": relation,
    "attribute_comparison": comparison,
}


def domain_pair(view: View, domain: str, kind: str, rng: Random) -> Pair | None:
    """One question of a domain in one of MMInstruct's four types; None where the view does not allow it."""
    found = DOMAINS[domain](view, rng)
    if found is None or (kind == "choice" and len(found.others) < 3):
        return None
    if kind == "judgement":
        is_true = rng.random() < 0.5
        value = found.value if is_true else rng.choice(found.others)
        return Pair(f"Is it true that {found.sentence.format(value)}?", "Yes" if is_true else "No")
    if kind == "choice":
        options = [*rng.sample(found.others, 3), found.value]
        rng.shuffle(options)
        return Pair(found.question, "ABCD"[options.index(found.value)], tuple(options))
    if kind == "short":
        return Pair(found.question, found.value)
    return Pair(found.question, f"Looking at the image, {found.sentence.format(found.value)}.")


# ---- whole texts ------------------------------------------------------------------------------------------------------------


def overview(view: View) -> str:
    """One sentence: how many objects there are; where there is a crowd, of what."""
    if view.crowds:
        return f"There is a group of {joined([plural(name, 2) for name in view.crowds])} in the image."
    count = len(view.things)
    word = NUMBERS[count] if count < len(NUMBERS) else str(count)
    return f"There {'is' if count == 1 else 'are'} {word} {plural('object', count)} in the image."


def describe(view: View) -> str:
    """All that is known: overview, every thing with its place, and who stands beside whom."""
    if not view.things:
        return " ".join(view.captions)
    things = sorted(view.things, key=lambda t: -t.area)[:MAX_NAMED]
    sentences = [overview(view)]
    sentences += [f"{capital(place_words(t.place))} there is {article(t.phrase)}." for t in things]
    row = sorted(alone([t for t in things if t.name not in view.crowds], lambda t: t.phrase), key=_middle)
    sentences += [
        f"The {a.phrase} is to the left of the {b.phrase}." for a, b in pairwise(row) if _middle(b) - _middle(a) > 0.15
    ]
    return " ".join(sentences)


def converse(view: View, rng: Random, *, turns: int = 4) -> list[Pair]:
    """Different questions with one answer each; from the captions alone where there are no boxes."""
    if not view.things:
        asked = ("What does the image show?", "How would you put it in other words?")
        return [Pair(q, caption) for q, caption in zip(asked, view.captions, strict=False)]
    domains = list(DOMAINS)
    rng.shuffle(domains)
    pairs = [] if view.crowds else [Pair("How many objects can you see in the image?", overview(view))]
    for domain in domains:
        found = DOMAINS[domain](view, rng)
        if found is not None:
            pairs.append(Pair(found.question, capital(found.sentence.format(found.value)) + "."))
    return pairs[:turns]


def reason(view: View, rng: Random) -> Pair | None:
    """A question whose answer follows from several facts, step by step."""
    things = view.things
    if len(things) >= 2 and all(t.name.isdigit() for t in things):
        listed = joined([f"{article(t.phrase)} {place_words(t.place)}" for t in things])
        numbers = [int(t.name) for t in things]
        if rng.random() < 0.5 or numbers.count(max(numbers)) > 1:
            total = f"{' + '.join(map(str, numbers))} = {sum(numbers)}"
            return Pair(
                "What do the digits in the image add up to?", f"The image shows {listed}. Adding them, {total}."
            )
        return Pair(
            "Which digit in the image is the largest?",
            f"The image shows {listed}. The largest of {joined([str(n) for n in numbers])} is {max(numbers)}.",
        )
    found = comparison(view, rng)
    if found is not None:
        return Pair(
            found.question,
            f"{overview(view)} The {found.value} takes up a larger area than the {found.others[0]}, so it covers more.",
        )
    counts = Counter(t.name for t in view.countable).most_common(2)
    if len(counts) == 2 and counts[0][1] > counts[1][1]:
        (most, n), (least, m) = counts
        return Pair(
            f"Are there more {plural(most, 2)} or more {plural(least, 2)} in the image?",
            f"There are {n} {plural(most, n)} and {m} {plural(least, m)}, so there are more {plural(most, 2)}.",
        )
    return None
