"""Questions from a JSONL file: one object a line, any pictures, one of four published scoring rules."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from vlit.config.component import ComponentConfig
from vlit.data.images import resolve_image
from vlit.errors import DataError, EvaluationError, did_you_mean
from vlit.eval.benchmark import Question, Results, score_all
from vlit.eval.scoring import SCORERS
from vlit.registry import BENCHMARKS
from vlit.types import IMAGE_PLACEHOLDER

KEYS = ("question_id", "image", "question", "answer", "answers", "kind", "choices")


@BENCHMARKS.register("qa")
class QaConfig(ComponentConfig):
    """Any question file: `question_id, image, question, answer | answers, kind, choices` an object a line."""

    type: Literal["qa"] = "qa"
    path: str
    """Question file (`.jsonl`)."""
    images: str = ""
    """Folder the questions' image paths are relative to. Empty: the folder of `path`."""
    follow_links: bool = False
    """Follow links inside that folder that lead out of it. Default: such a picture is refused."""
    scorer: Literal["exact", "vqa", "mcq", "yes_no"] = "exact"
    """`exact` match after strip, lower case and trailing period; `vqa` soft accuracy over at least 4 human answers;
    `mcq` compares option letters; `yes_no` compares judgements."""
    suffix: str = ""
    """Put after every question on its own line, for example `Answer the question using a single word or phrase.`"""
    chance: Mapping[str, float] = Field(default_factory=dict)
    """Chance level per kind as a fraction, shown beside the scores."""
    max_questions: int | None = None
    """Only the first so many questions."""
    name: str | None = None
    """Name in results and reports. Default: the file's stem."""

    def build(self, **kwargs: Any) -> QaBenchmark:
        path = Path(self.path)
        return QaBenchmark(
            name=self.name or path.stem,
            path=path,
            image_root=Path(self.images) if self.images else path.parent,
            follow_links=self.follow_links,
            scorer=self.scorer,
            suffix=self.suffix,
            chance=self.chance,
            max_questions=self.max_questions,
        )


class QaBenchmark:
    """Reads and scores a question file; implements :class:`vlit.eval.benchmark.Benchmark`."""

    def __init__(
        self,
        name: str,
        path: Path,
        *,
        image_root: Path,
        follow_links: bool = False,
        scorer: str = "exact",
        suffix: str = "",
        chance: Mapping[str, float] | None = None,
        max_questions: int | None = None,
    ) -> None:
        self.name = name
        self.path = path
        self.image_root = image_root
        self.follow_links = follow_links
        self.scorer = scorer
        self.suffix = suffix
        self.chance = dict(chance or {})
        self.max_questions = max_questions
        self._questions: list[Question] | None = None

    def load(self) -> list[Question]:
        """Questions in file order.

        Raises:
            EvaluationError: file missing, unreadable line, unknown or missing key, duplicate id, no such picture.
        """
        if self._questions is None:
            self._questions = self._read()
        return list(self._questions)

    def score_one(self, question: Question, prediction: str) -> float:
        return SCORERS[self.scorer](prediction, question.answers, question.choices)

    def score(self, predictions: Mapping[str, str]) -> Results:
        return score_all(self, self.load(), predictions, chance=self.chance)

    def _read(self) -> list[Question]:
        if not self.path.is_file():
            raise EvaluationError(
                f"{self.path}: no such question file. Check benchmark path, or build the world first."
            )
        questions: list[Question] = []
        seen: dict[str, int] = {}
        with self.path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                question = self._parse(line, f"{self.path}#{number}")
                if question.id in seen:
                    raise EvaluationError(
                        f'{self.path}#{number}: question_id "{question.id}" is already on line {seen[question.id]}. '
                        "Ids must be unique."
                    )
                seen[question.id] = number
                questions.append(question)
                if len(questions) == self.max_questions:
                    break
        if not questions:
            raise EvaluationError(f"{self.path}: holds no question.")
        return questions

    def _parse(self, line: str, place: str) -> Question:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise EvaluationError(f"{place}: not valid JSON: {error}. Each line is one object.") from error
        if not isinstance(row, dict):
            raise EvaluationError(f"{place}: expected an object, got {type(row).__name__}.")
        for key in row:
            if key not in KEYS:
                raise EvaluationError(f'{place}: unknown key "{key}". {did_you_mean(key, KEYS)}')
        for key in ("question_id", "question"):
            if key not in row:
                raise EvaluationError(f'{place}: key "{key}" is missing.')
        if ("answer" in row) == ("answers" in row):
            raise EvaluationError(f'{place}: needs exactly one of the keys "answer" and "answers".')
        answers = row["answers"] if "answers" in row else [row["answer"]]
        if not answers:
            raise EvaluationError(f'{place}: "answers" is empty.')
        if self.scorer == "vqa" and len(answers) < 4:
            raise EvaluationError(
                f"{place}: scorer vqa needs at least 4 human answers, this question has {len(answers)}."
            )
        names = row.get("image") or []
        try:
            images = tuple(
                resolve_image(str(name), self.image_root, follow_links=self.follow_links)
                for name in ([names] if isinstance(names, str) else names)
            )
        except DataError as error:
            reason = str(error).replace("data.follow_links: true", "follow_links=true")
            raise EvaluationError(f"{place}: {reason}") from error
        for image in images:
            if not image.is_file():
                raise EvaluationError(
                    f"{place}: no picture {image}. Set images: to the folder the names are relative to."
                )
        text = str(row["question"])
        placeholders = text.count(IMAGE_PLACEHOLDER)
        if placeholders not in (0, len(images)):
            raise EvaluationError(
                f"{place}: {placeholders} {IMAGE_PLACEHOLDER} in the question, {len(images)} pictures in the record. "
                "Name one picture per placeholder, or leave the placeholders out."
            )
        return Question(
            id=str(row["question_id"]),
            images=images,
            question=f"{text}\n{self.suffix}" if self.suffix else text,
            answers=tuple(str(answer) for answer in answers),
            kind=str(row.get("kind") or "all"),
            choices=tuple(str(choice) for choice in row.get("choices") or ()),
        )
