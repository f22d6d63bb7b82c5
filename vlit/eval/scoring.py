"""Pure scoring functions: a prediction and its reference answers in, a number out. Nothing here guesses.

An answer that cannot be read (no letter, neither yes nor no) scores zero; it is never replaced by a random choice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

from vlit.errors import EvaluationError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# --- exact match ------------------------------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """Strip surrounding white space, lower the case, remove one trailing period: `` Yes.`` -> ``yes``."""
    return text.strip().lower().removesuffix(".").rstrip()


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 when the normalised prediction equals any normalised reference answer, else 0.0."""
    return float(normalise(prediction) in {normalise(answer) for answer in answers})


# --- VQA accuracy -----------------------------------------------------------------------------------------------------

_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(value) for value, word in enumerate(_NUMBER_WORDS)}
_NUMBERS["none"] = "0"
_ARTICLES = frozenset({"a", "an", "the"})
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_RESTORED = {
    full[:at] + full[at + 1 :]: full
    for full in _CONTRACTIONS.split()
    for at, letter in enumerate(full)
    if letter == "'"
}
_RESTORED["somebody'd"] = "somebodyd"  # a slip of the published table, kept because scores depend on it


def vqa_normalise(text: str) -> str:
    """The published normalisation of VQAv2, OK-VQA, TextVQA and VizWiz answers, its known quirks included.

    In order: lower case without ``,`` and ``?``, ``'s`` detached; each punctuation mark deleted if it touches a space
    anywhere in the text, else turned into a space; periods deleted unless a digit follows, at most 32 of them (the
    original passes a flag in the place of the count); ``none`` and ``zero`` ... ``ten`` -> digits; articles dropped;
    missing apostrophes of contractions restored.

    Source: the EvalAI answer processor of MMF's TextVQA evaluator, which LLaVA (arXiv:2310.03744 §4) scores with. Its
    rule for digits joined by commas can never apply (commas are gone by then) and is left out.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    cleaned = text
    for mark in _PUNCTUATION:
        touches_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if touches_space else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned, count=32)
    words = (_NUMBERS.get(word, word) for word in cleaned.lower().split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Soft accuracy: ``mean over k of min(1, #{j != k : answer_j == prediction} / 3)`` after :func:`vqa_normalise`.

    With the usual ten human answers, three equal ones give 0.9 and four give 1.0 (VQA, arXiv:1505.00468 §4).

    Raises:
        EvaluationError: fewer than four answers; then no prediction could reach 1.0 and the number would mislead.
    """
    if len(answers) < 4:
        raise EvaluationError(
            f"vqa_accuracy: {len(answers)} reference answers {list(answers)!r}, the rule needs at least 4 (data sets "
            "give 10). Use scorer: exact for questions with few answers."
        )
    wanted = vqa_normalise(prediction)
    matches = [vqa_normalise(answer) == wanted for answer in answers]
    total = sum(matches)
    return sum(min(1.0, (total - own) / 3) for own in matches) / len(answers)


# --- letters and judgements -------------------------------------------------------------------------------------------


def choice_letter(text: str, choices: Sequence[str] = ()) -> str | None:
    """The option letter a text names, or None. Rules in order; the first that matches decides.

    1. the whole text is a letter, bare or dressed: ``B``, ``b``, ``B.``, ``(B)``, ``B)``;
    2. it starts with a letter and ``.``, ``)`` or ``:``: ``B. a dog``, ``(B) a dog``;
    3. exactly one ``answer is B`` (ScienceQA's rule, which falls back to a random letter where we return None);
    4. with ``choices``: it equals exactly one option's text after :func:`normalise`.

    A letter outside the given choices is None.
    """
    bare = text.strip()
    letter: str | None = None
    if found := re.fullmatch(r"\(?([A-Za-z])[.):]*", bare):
        letter = found[1].upper()
    elif found := re.match(r"\(?([A-Z])(?:[.:](?=\s)|\))", bare):
        letter = found[1]
    elif len(named := re.findall(r"\banswer is:? \(?([A-Z])\b", bare)) == 1:
        letter = named[0]
    elif choices:
        same = [at for at, option in enumerate(choices) if normalise(option) == normalise(bare)]
        letter = LETTERS[same[0]] if len(same) == 1 else None
    if letter is not None and choices and LETTERS.index(letter) >= len(choices):
        return None
    return letter


def yes_no(text: str) -> str | None:
    """``yes`` or ``no`` when that is the first word, else None.

    Stricter than POPE's published reading (arXiv:2305.10355), which counts every text without "no" or "not" as yes.
    """
    found = re.match(r"\W*(yes|no)\b", text, flags=re.IGNORECASE)
    return found[1].lower() if found else None


def mcq_match(prediction: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """1.0 when prediction and reference name the same option letter."""
    named = choice_letter(prediction, choices)
    return float(named is not None and named in {choice_letter(answer, choices) for answer in answers})


def yes_no_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 when prediction and reference are the same judgement."""
    said = yes_no(prediction)
    return float(said is not None and said in {yes_no(answer) for answer in answers})


Scorer = Callable[[str, Sequence[str], Sequence[str]], float]
SCORERS: dict[str, Scorer] = {
    "exact": lambda prediction, answers, choices: exact_match(prediction, answers),
    "vqa": lambda prediction, answers, choices: vqa_accuracy(prediction, answers),
    "mcq": mcq_match,
    "yes_no": lambda prediction, answers, choices: yes_no_match(prediction, answers),
}
"""Name -> ``(prediction, answers, choices) -> score in 0..1``."""

# --- tables -----------------------------------------------------------------------------------------------------------


def wilson_interval(successes: float, trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927; advised for small n by Brown, Cai, DasGupta 2001).

    ``(p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)``, z the two-sided normal quantile. A fractional number of
    successes (soft accuracy) gives a slightly wide interval, since such scores vary less than 0/1 ones.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise EvaluationError(
            f"wilson_interval: {successes} successes of {trials} trials; need 0 <= successes <= trials, trials >= 1."
        )
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p, spread = successes / trials, z * z / trials
    middle = p + spread / 2
    half = z * math.sqrt(p * (1 - p) / trials + spread / (4 * trials))
    low = 0.0 if successes == 0 else (middle - half) / (1 + spread)
    high = 1.0 if successes == trials else (middle + half) / (1 + spread)
    return low, high


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Mean score of ``n`` questions with its 95 % Wilson interval; ``chance`` is what can be had without looking."""

    n: int
    accuracy: float
    ci_low: float
    ci_high: float
    chance: float | None = None

    @classmethod
    def of(cls, scores: Sequence[float], *, chance: float | None = None) -> Accuracy:
        """Summarise scores in 0..1; at least one is needed."""
        total = math.fsum(scores)
        return cls(len(scores), total / max(len(scores), 1), *wilson_interval(total, len(scores)), chance)

    def to_dict(self) -> dict[str, float | int | None]:
        return asdict(self)


def per_kind_table(
    scored: Iterable[tuple[str, float]], *, chance: Mapping[str, float] | None = None
) -> dict[str, Accuracy]:
    """``(kind, score)`` pairs -> accuracy per kind, kinds in order of appearance."""
    groups: dict[str, list[float]] = {}
    for kind, score in scored:
        groups.setdefault(kind, []).append(score)
    return {kind: Accuracy.of(scores, chance=(chance or {}).get(kind)) for kind, scores in groups.items()}


def micro(table: Mapping[str, Accuracy]) -> float:
    """Mean over questions: kinds count by their size."""
    return math.fsum(row.accuracy * row.n for row in table.values()) / sum(row.n for row in table.values())


def macro(table: Mapping[str, Accuracy]) -> float:
    """Mean over kinds: every kind counts the same."""
    return math.fsum(row.accuracy for row in table.values()) / len(table)
