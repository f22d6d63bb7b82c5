"""Agreement of a conversation with annotations, and answers that their own question gives away.

*Ours.* The published reviews name correctness as an axis; the formula of the survey is not public. Here it is the share of
claims that agree with the annotations, NaN where no claim can be compared.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, cast

from vlit.data.record import Box, Record
from vlit.synth.quality.annotations import Annotations, Thing
from vlit.synth.quality.asserted import asserted
from vlit.synth.quality.form import without_form
from vlit.synth.quality.phrases import CLAUSE, Phrase, Token, is_understood, read_counts, read_phrases, read_tokens
from vlit.synth.quality.words import QUANTITIES, RELATIONS, content, lemma, meaning, number_of, tokens

MIN_IOU = 0.5
CHECKS = ("exists", "count", "colour", "place", "box", "yes_no")
_BOX = re.compile(r"\[\s*(\d*\.?\d+)\s*,\s*(\d*\.?\d+)\s*,\s*(\d*\.?\d+)\s*,\s*(\d*\.?\d+)\s*\]")
_SUM = re.compile(r"=\s*\d+")
_OPTION = re.compile(r"\n\s*\(?[A-H][.)]\s")
_HOW_MANY = re.compile(r"\bhow (?:many|much)\b", re.IGNORECASE)
_ASKS = re.compile(r"^(is|are|do|does|did|can|could|was|were|has|have|will|would)\b", re.IGNORECASE)


@dataclass
class Agreement:
    """Claims by check, and those that disagree."""

    claims: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)

    def note(self, check: str, agrees: bool) -> None:
        """Count one claim."""
        self.claims[check] += 1
        self.wrong[check] += not agrees

    @property
    def share(self) -> float:
        """Share of claims that agree; NaN without a claim."""
        total = sum(self.claims.values())
        return 1 - sum(self.wrong.values()) / total if total else float("nan")


def agreement_of(record: Record, known: Annotations) -> Agreement:
    """Compare every question and answer of a record with what its picture shows."""
    found = Agreement()
    things = known.of(record)
    if things is None:
        return found
    question = ""
    for turn in record.turns:
        if turn.role == "user":
            question = asked_of(turn.text)
        elif turn.role == "assistant":
            _compare(question, turn.text, things, known, found)
    return found


def asked_of(text: str) -> str:
    """The question itself, without placeholder, options and instructions about the form of the answer."""
    text = without_form(text.replace("<image>", " ").strip().split("\n")[0])
    head, mark, _ = text.partition("?")
    return head + mark


def yes_or_no(answer: str) -> str | None:
    """``yes`` or ``no`` of a judgement, said at its beginning or its end."""
    words = tokens(answer)
    for word in (*words[:1], *words[-1:]):
        if word in ("yes", "no"):
            return word
    return None


def _compare(question: str, answer: str, things: tuple[Thing, ...], known: Annotations, found: Agreement) -> None:
    asked = read_tokens(question, known)
    verdict = yes_or_no(answer)
    told = is_understood(asked) and asserted(question) == question.lower()
    if verdict and _ASKS.match(question) and told:
        _judge(asked, verdict, things, found)
    if _BOX.search(answer):
        _compare_boxes(question, answer, things, known, found)
    answer = _SUM.sub("", _BOX.sub(" ", answer))
    said = read_tokens(answer, known)
    how_many = question.lower().startswith(("how many", "count"))
    if len(said) <= 2 and not verdict:
        if told:
            _short(asked, said, things, found, how_many=how_many)
        return
    for clause in CLAUSE.split(answer):
        words = read_tokens(asserted(clause), known)
        exact = how_many or (
            any(token.kind == "is" for token in words[:3]) and "there" in (token.value for token in words[:2])
        )
        for number, name, colour, _ in read_counts(words):
            _note_count(number, name, colour, things, found, exact=exact)
        for phrase in read_phrases(words):
            _exists(phrase, things, found)


def _note_count(
    number: int, name: Token, colour: str | None, things: tuple[Thing, ...], found: Agreement, *, exact: bool = True
) -> None:
    """Compare a count of a label or group, of a colour where one is given; where a crowd is among them nobody knows it."""
    counted = _count(name, colour, things)
    if counted is not None:
        found.note("count", counted == number if exact else counted >= number)


def _count(name: Token, colour: str | None, things: tuple[Thing, ...]) -> int | None:
    """Things of a label or group, of a colour where one is given; None with a crowd among them."""
    group, label = (name.value, None) if name.kind == "group" else (None, name.value)
    phrase = Phrase(label, group, colour)
    return None if any(phrase.may_fit(thing) for thing in things) else sum(phrase.fits(thing) for thing in things)


def _with(phrase: Phrase, token: Token) -> Phrase:
    """The phrase with one more property."""
    return replace(phrase, **cast(Any, {token.kind: token.value}))


def _exists(phrase: Phrase, things: tuple[Thing, ...], found: Agreement) -> None:
    """Note whether a thing is there (or, negated, is not); a miss is blamed on the one property that is off."""
    if phrase.colour is not None and not any(thing.colour for thing in things):
        phrase = Phrase(phrase.label, phrase.group, None, phrase.place, phrase.negated)
        if not phrase.speaks:
            return
    check = "colour" if phrase.colour is not None else "place" if phrase.place is not None else "exists"
    there = any(phrase.fits(thing) for thing in things)
    if not there and any(phrase.may_fit(thing) for thing in things):
        return
    if there != phrase.negated:
        found.note(check, True)
        return
    if not phrase.negated and phrase.colour is not None:
        if any(phrase.fits(thing, leave_out="colour") for thing in things):
            check = "colour"
        elif phrase.label is not None and any(phrase.fits(thing, leave_out="label") for thing in things):
            check = "exists"
        else:
            check = "place" if phrase.place is not None else "exists"
    elif not phrase.negated and phrase.label is not None:
        check = "exists"
    found.note(check, False)


def _short(
    asked: list[Token], said: list[Token], things: tuple[Thing, ...], found: Agreement, *, how_many: bool
) -> None:
    """An answer of a word or two takes its subject from the question, which the grammar understands whole."""
    values = [token for token in said if token.kind in ("label", "group", "colour", "place", "number")]
    if len(values) != 1:
        return
    if how_many:
        names = [token for token in asked if token.kind in ("label", "group") and number_of(token.value) is None]
        number = number_of(values[0].value)
        if len(names) == 1 and number is not None:
            colour = next((token.value for token in asked if token.kind == "colour"), None)
            _note_count(number, names[0], colour, things, found)
        return
    if values[0].kind in ("number", "group"):
        return
    subjects = read_phrases([token for token in asked if not (token.kind == "other" and token.value == "color")])
    if len(subjects) > 1 or any(getattr(subject, values[0].kind) for subject in subjects):
        return
    loose = [token for token in asked if token.kind in ("colour", "place")]
    subject = subjects[0] if subjects else _with(Phrase(), loose[0]) if len(loose) == 1 else Phrase()
    phrase = _with(subject, values[0])
    if phrase.speaks and subject != Phrase():
        _exists(phrase, things, found)


def _judge(asked: list[Token], verdict: str, things: tuple[Thing, ...], found: Agreement) -> None:
    """Whether yes or no is right for a question that the grammar understands whole."""
    number = next((place for place, token in enumerate(asked) if token.value == "number"), None)
    if number is not None:
        numbers = [int(token.value) for token in asked if token.value.isdigit()]
        names = [token for token in asked if token.kind in ("label", "group") and not token.value.isdigit()]
        if len(numbers) == 1 and len(names) == 1:
            counted = _count(names[0], None, things)
            if counted is not None:
                found.note("yes_no", (counted == numbers[0]) == (verdict == "yes"))
        return
    if any(token.kind == "no" for token in asked) or read_counts(asked) or any(t.value == "or" for t in asked):
        return
    phrases = read_phrases(asked, predicate=asked[0].kind == "is" and len(asked) > 1 and asked[1].value != "there")
    if not phrases or (any(phrase.colour for phrase in phrases) and not any(thing.colour for thing in things)):
        return
    if len(asked) > 1 and asked[0].kind == "is" and asked[1].value != "there" and len(phrases) == 1:
        p = phrases[0]
        if sum(value is not None for value in (p.label, p.group, p.colour, p.place)) < 2:
            return  # "Is the dog …": nothing was said of it that could be told
    is_so = all(any(phrase.fits(thing) for thing in things) for phrase in phrases)
    if not is_so and any(phrase.may_fit(thing) for phrase in phrases for thing in things):
        return
    found.note("yes_no", is_so == (verdict == "yes"))


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inside = max(wide, 0.0) * max(high, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside
    return inside / union if union > 0 else 0.0


def _compare_boxes(question: str, answer: str, things: tuple[Thing, ...], known: Annotations, found: Agreement) -> None:
    """Every normalised [x0, y0, x1, y1] against the things that the words before it (or the question) name."""
    start = 0
    for match in _BOX.finditer(answer):
        box: Box = tuple(float(edge) for edge in match.groups())  # type: ignore[assignment]
        phrases = read_phrases(read_tokens(answer[start : match.start()], known))
        phrases = phrases or read_phrases(read_tokens(question, known))
        start = match.end()
        if max(box) > 1 or not phrases:
            continue
        best = max((iou(box, thing.box) for thing in things if phrases[-1].fits(thing)), default=None)
        crowded = any(phrases[-1].may_fit(thing) for thing in things)
        if best is not None and (best >= MIN_IOU or not crowded):
            found.note("box", best >= MIN_IOU)


def leaks(question: str, answer: str) -> bool:
    """Whether every word of meaning in the answer stands in the question already.

    Directions and quantities are such words, and so is how two things of the answer stand to each other ("The man is on the
    horse."). Judgements, questions with options and "this or that" questions name their answer by design and are left out.
    """
    if _OPTION.search(question) or _ASKS.match(question.replace("<image>", "").strip()) or yes_or_no(answer):
        return False
    asked = {lemma(word) for word in tokens(_HOW_MANY.sub("how", question.replace("<image>", " ")))}
    if "or" in asked:
        return False
    words = tokens(answer)
    said = set(meaning(words)) | {lemma(word) for word in words if word in QUANTITIES}
    if len(set(content(words))) > 1:
        said |= {lemma(word) for word in words if word in RELATIONS}
    return bool(said) and said <= asked
