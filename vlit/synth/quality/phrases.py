"""From words to what they claim: noun phrases with the label, group, colour and place they give to one thing.

A grammar of seven token types, not a parser: name (label or group of the annotations), colour, place, number, "is", determiner,
"and". Whatever it does not understand makes no claim, so it misses claims rather than inventing them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, cast

from vlit.synth.quality.annotations import Annotations, Thing
from vlit.synth.quality.words import (
    AUXILIARIES,
    COLOURS,
    DETERMINERS,
    POSITIONS,
    PREPOSITIONS,
    REASONING,
    RELATIONS,
    STOP,
    TOKEN,
    VERBS,
    lemma,
    number_of,
    word_set,
)  # fmt: skip

CLAUSE = re.compile(r"[.!;?\n]+(?=\s|$)|,?\s+so\s+(?=yes|no|the)|\n")
_SEEN = frozenset(
    ("see", "picture", "scene", "total", "visible", "there", "it", "you", "do", "how", "many", "count", "number", "of",
     "which", "what", "where", "who", "name", "color", "place", "paint")
)  # fmt: skip


_PIECE = re.compile(rf"({TOKEN.pattern})(\W*)")
"""A word, and what stands before the next one: a space, or something that ends a noun."""
_BEFORE_VERBS = word_set("to they you we i who not can could may might must shall should will would")
_ACTS = word_set(
    """appear appears belongs covers faces flies grazes jumps lay lays lean leans lie lies looks occupies passes remain remains
    rest rests seems sleep sleeps stays takes touches waits watches alone asleep away nearby present together visible"""
)
"""Words that may follow a thing and are no noun, beside the verbs of ``words.VERBS``."""


class Token(NamedTuple):
    """One word or name. ``kind``: label, group, colour, place, number, is, det, and, no, its, other."""

    kind: str
    value: str
    plural: bool = False


@dataclass(frozen=True, slots=True)
class Phrase:
    """What a noun phrase says of one thing; None: says nothing."""

    label: str | None = None
    group: str | None = None
    colour: str | None = None
    place: str | None = None
    negated: bool = False

    @property
    def speaks(self) -> bool:
        """Whether it can be compared: it names a thing, or two of its properties."""
        known = sum(value is not None for value in (self.colour, self.place))
        return self.label is not None or (known > 0 and (self.group is not None or known > 1))

    def may_fit(self, crowd: Thing) -> bool:
        """Whether a crowd may hold what the phrase says: colours and places of its members are not known."""
        return crowd.crowd and replace(self, colour=None, place=None).fits(crowd)

    def fits(self, thing: Thing, *, leave_out: str = "") -> bool:
        """Whether a thing is what the phrase says, one property left out of the comparison."""
        if self.label is not None and leave_out != "label" and thing.label != self.label:
            return False
        if self.group is not None and thing.group != self.group:
            return False
        if thing.crowd and (self.colour is not None or self.place is not None):
            return False
        if self.colour is not None and leave_out != "colour" and thing.colour != self.colour:
            return False
        if self.place is None or leave_out == "place":
            return True
        x, y = (thing.box[0] + thing.box[2]) / 2, (thing.box[1] + thing.box[3]) / 2
        left, top, right, low = POSITIONS[self.place]
        return left <= x <= right and top <= y <= low


def read_tokens(text: str, known: Annotations) -> list[Token]:
    """Typed tokens of a clause; names of several words are one token.

    A name that is a colour here ("an orange cat"), a verb ("to book a room") or the first part of a longer noun ("a train
    station") is no name.
    """
    pieces = _PIECE.findall(text.lower())
    words = [word for word, _ in pieces]
    bases = [lemma(word) for word in words]
    ends = [not gap.isspace() for _, gap in pieces[:-1]] + [True]
    found: list[Token] = []
    at = 0
    while at < len(words):
        size = _name_at(bases, at, known)
        if not size:
            found.append(_token(words[at]))
            at += 1
            continue
        kind, name = known.names[tuple(bases[at : at + size])]
        last = at + size - 1
        token = Token(kind, name, words[last] != bases[last])
        if number_of(name) is None:
            if size == 1 and words[at] in COLOURS:
                token = _colour_or_name(token, words, bases, ends, at, known)
            elif not token.plural and (
                (not ends[last] and _is_noun(words, bases, last + 1, known))
                or (size == 1 and at > 0 and words[at - 1] in _BEFORE_VERBS)
            ):
                token = Token("other", words[last])
        found.append(token)
        at += size
    return found


def _name_at(bases: list[str], at: int, known: Annotations) -> int:
    """Words of the longest name that begins here; 0 without one."""
    for size in range(min(known.longest, len(bases) - at), 0, -1):
        if tuple(bases[at : at + size]) in known.names:
            return size
    return 0


def _is_noun(words: list[str], bases: list[str], at: int, known: Annotations) -> bool:
    """Whether a word goes on with the noun before it: a name, or none of the words known to be something else."""
    word = words[at]
    if number_of(word) is not None:
        return False
    if _name_at(bases, at, known) and word not in COLOURS:
        return True
    other = word in STOP or word in COLOURS or word in POSITIONS or word in RELATIONS or word in REASONING
    return not (other or bases[at] in VERBS or word in _ACTS or word.endswith(("ing", "ed", "ly")) or "'" in word)


def _colour_or_name(
    token: Token, words: list[str], bases: list[str], ends: list[bool], at: int, known: Annotations
) -> Token:
    """What a name that is a colour too means here: the colour of a name behind it, of something unknown, or itself."""
    last = at
    while not ends[last] and (
        words[last + 1] in COLOURS
        or (words[last + 1] == "and" and not ends[last + 1] and words[last + 2] in COLOURS and not token.plural)
    ):
        last += 1
    if token.plural or ends[last] or not _is_noun(words, bases, last + 1, known):
        return token
    return _token(words[at]) if _name_at(bases, last + 1, known) else Token("other", words[at])


@lru_cache(maxsize=1 << 15)
def _token(word: str) -> Token:
    if word in COLOURS:
        return Token("colour", "gray" if word == "grey" else word)
    if word in POSITIONS:
        return Token("place", word)
    if word in ("is", "are", "was", "were"):
        return Token("is", word)
    if word in ("its", "it"):
        return Token("its", word)
    if word in ("no", "not", "without", "neither", "nor") or word.endswith("n't"):
        return Token("no", word)
    if number_of(word) is not None:
        return Token("number", str(number_of(word)))
    if word in ("and", "or"):
        return Token("and", word)
    return Token("det", word) if word in DETERMINERS else Token("other", word)


def read_counts(found: list[Token]) -> list[tuple[int, Token, str | None, int]]:
    """(number, name, colour, place of the number) of every "three (red) dogs" in a clause."""
    counts = []
    for at, token in enumerate(found):
        value = number_of(token.value) if token.kind in ("number", "label") else None
        if value is None:
            continue
        after = found[at + 1 : at + 3]
        colour = after[0].value if after and after[0].kind == "colour" else None
        noun = after[1:] if colour else after
        if (
            noun
            and noun[0].kind in ("label", "group")
            and number_of(noun[0].value) is None
            and noun[0].plural == (value != 1)
        ):
            before = found[at - 1].kind if at else ""
            if before not in ("det", "label", "number"):
                counts.append((value, noun[0], colour, at))
    return counts


def read_phrases(found: list[Token], *, predicate: bool = False) -> list[Phrase]:
    """Noun phrases of a clause in order; a subject and what "is" says of it are one phrase.

    ``predicate``: a question such as "Is the digit a 7?", where "a" goes on with the subject.
    """
    skip = {at for _, _, _, at in read_counts(found)}
    if skip:  # "there are 3 dogs": the number counts, it is not a name
        skip |= {at + 1 for at in skip} | {
            at + 2 for at in skip if at + 1 < len(found) and found[at + 1].kind == "colour"
        }
    done: list[Phrase] = []
    now = Phrase()
    before = ""
    for at, token in enumerate(found):
        kind = token.kind
        if at in skip or (token.value == "that" and at + 1 < len(found) and found[at + 1].kind == "is"):
            before = kind
            continue
        if kind == "its":
            now, before = (done.pop() if now == Phrase() and done else now), kind
            continue
        holds = now.label is not None or now.group is not None or now.colour is not None
        indefinite = token.value in ("a", "an")
        goes_on = before == "is" or before in PREPOSITIONS or (predicate and indefinite)
        if kind == "and" or (kind == "det" and holds and not goes_on) or kind == "no":
            done.append(now)
            now = Phrase(negated=kind == "no")
        elif kind in ("label", "group", "colour", "place"):
            taken = getattr(now, kind) is not None
            late = kind == "colour" and now.place is None and (now.label or now.group) and before not in ("is", "det")
            if taken or (late and not predicate):
                done.append(now)
                now = Phrase()
            now = replace(now, **cast(Any, {kind: token.value}))
        before = token.value if kind == "other" else kind
    done.append(now)
    return [phrase for phrase in done if phrase.speaks]


def is_understood(found: list[Token]) -> bool:
    """Whether every word of a question is one the grammar knows, so that its yes or no can be told."""
    return all(
        token.kind != "other"
        or token.value in AUXILIARIES
        or token.value in PREPOSITIONS
        or lemma(token.value) in _SEEN
        for token in found
    )
