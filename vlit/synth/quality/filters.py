"""Filters: ``metric>=number`` or a name; what they remove, and why in words."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlit.errors import ConfigError, did_you_mean

NAMED: dict[str, tuple[str, ...]] = {
    "correct": ("correctness>=1",),
    "no_leaks": ("leaks==0",),
    "unique": ("duplicate==0",),
    "uncontaminated": ("eval_text==0", "eval_image==0"),
    "readable": ("readable>=1",),
    "sighted": ("blind<1",),
}
NAMED["clean"] = tuple(
    dict.fromkeys(
        rule for name in ("correct", "no_leaks", "unique", "uncontaminated", "readable") for rule in NAMED[name]
    )
)
MEANING = {
    "annotated": "1 when the annotations tell what the record's picture shows",
    "readable": "share of the record's pictures that can be decoded",
    "correctness": "share of claims that agree with the annotations",
    "claims": "claims that could be compared",
    "wrong_exists": "things said to be there that are not (or the reverse)",
    "wrong_count": "wrong counts", "wrong_colour": "wrong colours", "wrong_place": "wrong places",
    "wrong_box": "boxes below IoU 0.5", "wrong_yes_no": "judgements that are wrong",
    "leaks": "answers that stand in their question", "duplicate": "similarity to an earlier record that is kept",
    "eval_text": "13-word sequences of an evaluation set", "eval_image": "1 when the picture is one of an evaluation set",
    "blind": "share of answers that a guesser without the picture gives",
    "turns": "questions", "question_words": "words of the questions", "answer_words": "words of the answers",
    "objects": "distinct nouns or names", "relations": "words of place and comparison", "reasoning": "words of inference",
    "complexity": "mean of five squashed counts, 0 to 1",
    "quality": "mean of correctness, complexity and 1 - blind; 0 for faults",
    "judged": "share of answers that a second teacher agrees with (recipe judge)",
    "loss": "nats a token of the answers, by --model", "loss_blind": "the same without the picture",
    "gain": "loss_blind - loss: what the picture gives", "clip_score": "CLIPScore of picture and answers, by --clip",
    "cost_usd": "what the record cost",
}  # fmt: skip
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_RULE = re.compile(r"\s*([a-z_]+)\s*(>=|<=|==|!=|>|<)\s*(-?\d+(?:\.\d+)?)\s*$")


class Rule(NamedTuple):
    """Keep records whose ``metric`` compares so with ``value``."""

    metric: str
    sign: str
    value: float

    def __str__(self) -> str:
        return f"{self.metric}{self.sign}{self.value:g}"

    def keeps(self, column: np.ndarray) -> np.ndarray:
        """bool [N]; a record that was not measured (NaN) is kept."""
        return np.isnan(column) | _OPERATORS[self.sign](column, self.value)

    def reason(self, value: float) -> str:
        """Why a record was removed."""
        return f"{self.metric} is {value:.3g}, kept is {self.sign} {self.value:g} ({MEANING[self.metric]})"


def parse_filters(words: Sequence[str], *, missing: Collection[str] = ()) -> list[Rule]:
    """Rules of expressions and names; all of them must hold. A name asks for what is measured of it.

    Args:
        missing: metrics that this run does not measure.

    Raises:
        ConfigError: neither a name nor ``metric>=number``, or nothing of it is measured.
    """
    rules: list[Rule] = []
    for word in words:
        texts = NAMED.get(word.strip(), (word,))
        found = [_parse(text, word) for text in texts]
        measured = [rule for rule in found if rule.metric not in missing]
        if not measured:
            raise ConfigError(
                f'--keep "{word}": {found[0].metric} is not measured. Give --annotations for correctness, --eval-texts or '
                "--eval-images for contamination, --images for readable, --model for losses, --clip for clip_score."
            )
        rules += measured
    return list(dict.fromkeys(rules))


def not_checked(words: Sequence[str], *, missing: Collection[str]) -> list[str]:
    """Rules of the named filters that this run leaves out, as it does not measure them."""
    rules = [_parse(text, word) for word in words for text in NAMED.get(word.strip(), ())]
    return list(dict.fromkeys(str(rule) for rule in rules if rule.metric in missing))


def _parse(text: str, word: str) -> Rule:
    match = _RULE.match(text)
    if match is None:
        raise ConfigError(f'--keep "{word}": neither metric>=number nor a filter. {did_you_mean(word, NAMED)}')
    metric, sign, value = match.groups()
    if metric not in MEANING:
        raise ConfigError(f'--keep "{word}": unknown metric "{metric}". {did_you_mean(metric, MEANING)}')
    return Rule(metric, sign, float(value))


def not_measured(
    *,
    annotations: bool,
    eval_texts: bool,
    eval_images: bool,
    images: bool = True,
    model: bool = False,
    clip: bool = False,
) -> set[str]:
    """Metrics that a run without these inputs does not have."""
    compared = {"annotated", "correctness", "claims", *(name for name in MEANING if name.startswith("wrong_"))}
    missing = (set() if annotations else compared) | (set() if images else {"readable"})
    missing |= (set() if model else {"loss", "loss_blind", "gain"}) | (set() if clip else {"clip_score"})
    return missing | (set() if eval_texts else {"eval_text"}) | (set() if eval_images else {"eval_image"})


def apply_filters(rules: Sequence[Rule], columns: Mapping[str, np.ndarray]) -> dict[Rule, np.ndarray]:
    """Which records each rule keeps."""
    return {rule: rule.keeps(columns[rule.metric]) for rule in rules}
