"""Question answering sets as they are published: VQAv2 and OK-VQA, GQA, TextVQA, OCR-VQA.

Answers are trained as LLaVA-1.5 trains them (arXiv:2310.03744 §3): one short answer a question, with a line that asks for
a word or phrase. Where ten people answered, the most frequent answer is taken, the earliest of equals. Files are read
whole: VQAv2's training set takes about 3 GB of memory while its index is built.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from vlit.data.formats._image_name import pattern_of
from vlit.data.formats._reader import (
    SHORT_ANSWER,
    RecordFormat,
    an_object,
    ask,
    by_key,
    list_of,
    load_json,
    look_up,
    member,
    name_of,
    text_of,
    with_pictures,
)
from vlit.data.record import Record
from vlit.data.record_checks import BadRecord, kind_of, shown, text_field
from vlit.errors import DataError
from vlit.registry import FORMATS
from vlit.types import Turn


class _Questions(RecordFormat):
    """Short questions about one picture each."""

    suffix: str = SHORT_ANSWER
    """Line behind every question; empty: none."""
    image_name: Annotated[str, pattern_of(id="1")] = "{id}.jpg"
    """Where the picture of an image id lies, below the image folder."""

    def asked(self, question: str, answer: str) -> tuple[Turn, ...]:
        """One exchange with the line that asks for a short answer."""
        return ask(f"{question}\n{self.suffix}" if self.suffix else question, answer)

    def short(self, identity: str, image_id: str, question: str, answer: str, domain: str | None = None) -> Record:
        """The record of one short question."""
        image = self.image_name.format(id=image_id)
        turns = self.asked(question, answer)
        return Record(identity, turns, (image,), kind="short_answer", domain=domain, instruction_type="short_answer")


@FORMATS.register("vqav2")
class VqaV2Format(_Questions):
    """VQAv2 or OK-VQA: the questions' file; the annotations' file lies beside it."""

    type: str = "vqav2"
    annotations: str = ""
    """Name of the annotations' file. Empty: the published name that belongs to the questions'."""
    image_name: Annotated[str, pattern_of(id="1")] = "COCO_train2014_{id:0>12}.jpg"
    """Where the picture of an image id lies, below the image folder."""

    def files(self, path: Path) -> list[Path]:
        """Questions and annotations."""
        name = self.annotations or path.name.replace("OpenEnded_", "").replace("questions", "annotations")
        if name == path.name:
            raise DataError(f"{path}: set format.annotations to the file of the answers, whose name is not known.")
        return [path, path.with_name(name)]

    def entries(self, path: Path) -> Iterator[Any]:
        """The questions, each with its annotation."""
        questions, answers = (load_json(file) for file in self.files(path))
        held = by_key(member(answers, "annotations", self.files(path)[1]), "question_id")
        for one in member(questions, "questions", path):
            yield {**one, "annotation": look_up(held, one.get("question_id"))} if isinstance(one, dict) else one

    def to_record(self, entry: Any, number: int, path: Path) -> Record:
        """A question and its most frequent answer."""
        entry = an_object(entry)
        identity, annotation = name_of(entry, "question_id"), entry.get("annotation")
        if not isinstance(annotation, dict):
            raise BadRecord(f"question_id {identity} has no annotation", "fields")
        if "multiple_choice_answer" in annotation:
            answer = text_of(annotation, "multiple_choice_answer")
        else:
            given = list_of(annotation, "answers", dict)
            answer = most_frequent(self.usable("answers", given, lambda one: text_of(one, "answer")))
        domain = text_field(annotation, "question_type")
        return self.short(identity, name_of(entry, "image_id"), text_of(entry, "question"), answer, domain)


@FORMATS.register("gqa")
class GqaFormat(_Questions):
    """GQA's `*_questions.json`: `{id: {imageId, question, answer, fullAnswer, types}}`."""

    type: str = "gqa"
    answer: Literal["short", "full"] = "short"
    """`full`: the sentence, and no line that asks for a short answer."""

    def entries(self, path: Path) -> Iterator[Any]:
        """The questions with their ids."""
        for identity, one in load_json(path).items():
            yield {**one, "id": identity} if isinstance(one, dict) else _not_an_object("question", identity, one)

    def to_record(self, entry: Any, number: int, path: Path) -> Record:
        """A question and its answer; the structural type is the domain."""
        identity, image, question = entry["id"], name_of(entry, "imageId"), text_of(entry, "question")
        types = entry.get("types")
        domain = text_field(types, "structural") if isinstance(types, dict) else None
        if self.answer == "short":
            return self.short(identity, image, question, text_of(entry, "answer"), domain)
        turns = ask(question, text_of(entry, "fullAnswer"))
        return Record(identity, turns, (self.image_name.format(id=image),), kind="full_answer", domain=domain)


@FORMATS.register("textvqa")
class TextVqaFormat(_Questions):
    """TextVQA's `TextVQA_0.5.1_*.json`: `{"data": [{question_id, image_id, question, answers, image_classes}]}`."""

    type: str = "textvqa"

    def entries(self, path: Path) -> Iterator[Any]:
        """The questions."""
        return iter(member(load_json(path), "data", path))

    def to_record(self, entry: Any, number: int, path: Path) -> Record:
        """A question and its most frequent answer."""
        entry = an_object(entry)
        given = list_of(entry, "answers", str)
        answers = self.usable("answers", given, lambda one: text_of({"answer": one}, "answer"))
        image, question = name_of(entry, "image_id"), text_of(entry, "question")
        return self.short(name_of(entry, "question_id"), image, question, most_frequent(answers))


@FORMATS.register("ocrvqa")
class OcrVqaFormat(_Questions):
    """OCR-VQA's `dataset.json`: `{id: {imageURL, questions, answers, title, genre, split}}`, one conversation a book cover."""

    type: str = "ocrvqa"
    split: Literal["train", "val", "test", "all"] = "train"
    """Which covers are records (1, 2 and 3 in the file); those of other splits are not counted."""
    image_name: Annotated[str, pattern_of(id="1", ext=".jpg")] = "{id}{ext}"
    """Where the picture of a cover lies. `{ext}` ends it as its `imageURL` does, as OCR-VQA's download script saves it (many
    are `.gif`); without one it is `.jpg`. `{id}.jpg` for folders that hold every cover as JPEG, such as LLaVA-1.5's."""

    def entries(self, path: Path) -> Iterator[Any]:
        """The covers of the split."""
        wanted = {"train": 1, "val": 2, "test": 3}.get(self.split)
        for identity, one in load_json(path).items():
            if not isinstance(one, dict):
                yield _not_an_object("cover", identity, one)
            elif wanted in (None, one.get("split")):
                yield {**one, "id": identity}

    def to_record(self, entry: Any, number: int, path: Path) -> Record:
        """All questions about one cover."""
        questions, answers = list_of(entry, "questions", str), list_of(entry, "answers", str)
        if not questions or len(questions) != len(answers):
            raise BadRecord(f"answers has {len(answers)} entries, questions has {len(questions)}", "fields")
        turns: list[Turn] = []
        for question, answer in zip(questions, answers, strict=True):
            turns += [Turn("user", f"{question}\n{self.suffix}".strip()), Turn("assistant", answer)]
        ending = os.path.splitext(text_field(entry, "imageURL") or "")[1] or ".jpg"
        image = self.image_name.format(id=entry["id"], ext=ending)
        return Record(
            entry["id"], with_pictures(turns, 1), (image,), kind="short_answer", domain=text_field(entry, "genre"),
            instruction_type="short_answer",
        )  # fmt: skip


def most_frequent(answers: list[str]) -> str:
    """The most frequent answer, the earliest of equals."""
    if not answers:
        raise BadRecord("answers is empty, expected what people answered", "fields")
    return Counter(answers).most_common(1)[0][0]


def _not_an_object(what: str, identity: str, value: Any) -> BadRecord:
    return BadRecord(f"{what} {shown(identity)} is {kind_of(value)}, expected an object with questions")
