"""What a benchmark is: questions with reference answers, and a score for every answer."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vlit.errors import EvaluationError
from vlit.eval.scoring import Accuracy, macro, per_kind_table
from vlit.types import IMAGE_PLACEHOLDER


@dataclass(frozen=True, slots=True)
class Question:
    """One question about zero or more pictures.

    ``question`` holds either no ``<image>`` placeholder or exactly one per picture.
    """

    id: str
    images: tuple[Path, ...]
    question: str
    answers: tuple[str, ...]
    kind: str
    choices: tuple[str, ...] = ()

    def turn_text(self) -> str:
        """The user turn with one placeholder per picture; pictures stand first unless the question places them itself.

        Without pictures (text-only questions and the blind row) all placeholders are gone.
        """
        if not self.images:
            return self.question.replace(IMAGE_PLACEHOLDER, "").strip()
        if IMAGE_PLACEHOLDER in self.question:
            return self.question
        return f"{IMAGE_PLACEHOLDER}\n" * len(self.images) + self.question


@dataclass(frozen=True, slots=True)
class Results:
    """Scores of one set of predictions: over all questions (``overall``, micro), per kind, and per question id."""

    overall: Accuracy
    macro_accuracy: float
    per_kind: dict[str, Accuracy]
    scores: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON form without the per-question scores."""
        summary = self.overall.to_dict() | {"macro_accuracy": self.macro_accuracy}
        return summary | {"per_kind": {kind: row.to_dict() for kind, row in self.per_kind.items()}}


class Benchmark(Protocol):
    """What ``build()`` of a registered benchmark config returns."""

    name: str

    def load(self) -> list[Question]:
        """All questions in a fixed order, ids unique."""
        ...

    def score_one(self, question: Question, prediction: str) -> float:
        """Score in 0..1 of one answer."""
        ...

    def score(self, predictions: Mapping[str, str]) -> Results:
        """Score one prediction per question id; a missing or unknown id is an error, never a zero."""
        ...


def score_all(
    benchmark: Benchmark,
    questions: Sequence[Question],
    predictions: Mapping[str, str],
    *,
    chance: Mapping[str, float] | None = None,
) -> Results:
    """The common ``score``: every question exactly once, then totals. ``chance`` is per kind, as a fraction."""
    ids = {question.id for question in questions}
    if missing := [q.id for q in questions if q.id not in predictions]:
        raise EvaluationError(
            f'{benchmark.name}: {len(missing)} of {len(questions)} questions have no prediction, first "{missing[0]}". '
            "Answer them; unanswered questions are not scored as wrong."
        )
    if unknown := [key for key in predictions if key not in ids]:
        raise EvaluationError(
            f'{benchmark.name}: {len(unknown)} predictions belong to no question, first "{unknown[0]}". '
            "They come from another benchmark or split."
        )
    scores = {q.id: benchmark.score_one(q, predictions[q.id]) for q in questions}
    table = per_kind_table(((q.kind, scores[q.id]) for q in questions), chance=chance)
    return Results(Accuracy.of(list(scores.values()), chance=mean_chance(table)), macro(table), table, scores)


def mean_chance(table: Mapping[str, Accuracy]) -> float | None:
    """Chance level over all questions, or None when a kind has none."""
    levels = [(row.n, row.chance) for row in table.values()]
    if any(chance is None for _, chance in levels):
        return None
    return math.fsum(n * (chance or 0.0) for n, chance in levels) / sum(n for n, _ in levels)


def fingerprint(questions: Sequence[Question]) -> str:
    """SHA-256 over the questions' contents (picture names, not pixels): the same number means the same benchmark."""
    digest = hashlib.sha256()
    for q in questions:
        row = [q.id, [path.name for path in q.images], q.question, q.answers, q.kind, q.choices]
        digest.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()
