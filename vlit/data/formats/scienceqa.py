"""ScienceQA (arXiv:2209.09513; github.com/lupantech/ScienceQA): multiple choice with lectures and solutions.

``problems.json`` is ``{qid: {"question", "choices", "answer" (index), "hint", "image", "subject", "topic", "lecture",
"solution", "split", …}}``; pictures are ``<split>/<qid>/image.png``. Questions are asked as context, question, options.
Answered with the letter, or as LLaVA v1 was trained: lecture and solution, then ``The answer is B.`` (QCM-LEA).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from vlit.data.formats._image_name import pattern_of
from vlit.data.formats._reader import LETTERS, OPTION_LETTER, RecordFormat, ask, list_of, load_json, text_of
from vlit.data.record import Record
from vlit.data.record_checks import BadRecord, kind_of, shown, text_field
from vlit.registry import FORMATS


@FORMATS.register("scienceqa")
class ScienceQaFormat(RecordFormat):
    """`problems.json` of ScienceQA."""

    type: str = "scienceqa"
    split: Literal["train", "val", "test", "all"] = "train"
    """Which problems are records; those of other splits are not counted."""
    answer: Literal["letter", "reason"] = "reason"
    """`letter`: the option's letter. `reason`: lecture and solution first, then the answer."""
    image_name: Annotated[str, pattern_of(split="train", id="1", image="image.png")] = "{split}/{id}/{image}"
    """Where a problem's picture lies, below the image folder."""

    def entries(self, path: Path) -> Iterator[Any]:
        """The problems of the split."""
        for identity, problem in load_json(path).items():
            if not isinstance(problem, dict):
                yield BadRecord(f"problem {identity} is {kind_of(problem)}, expected an object with question")
            elif self.split in ("all", problem.get("split")):
                yield {**problem, "id": identity}

    def to_record(self, entry: Any, number: int, path: Path) -> Record:
        """Context, question and lettered options; the correct one as answer."""
        question, choices = text_of(entry, "question"), list_of(entry, "choices", str)
        correct = entry.get("answer")
        if isinstance(correct, bool) or not isinstance(correct, int) or not 0 <= correct < len(choices):
            raise BadRecord(
                f"answer is {shown(correct)}, expected the number of one of {len(choices)} choices", "fields"
            )
        image, split = text_field(entry, "image"), text_field(entry, "split") or ""
        lines = [f"Context: {hint}"] if (hint := text_field(entry, "hint")) else []
        lines += [question, *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))]
        letter = LETTERS[correct]
        if self.answer == "letter":
            lines, reply = [*lines, OPTION_LETTER], letter
        else:
            reasons = [text_field(entry, key) for key in ("lecture", "solution")]
            reply = "\n".join([*(reason for reason in reasons if reason), f"The answer is {letter}."])
        images = (self.image_name.format(split=split, id=entry["id"], image=image),) if image else ()
        return Record(
            entry["id"], ask("\n".join(lines), reply, images=len(images)), images, kind=text_field(entry, "subject"),
            domain=text_field(entry, "topic"), instruction_type="multiple_choice", options=tuple(choices),
        )  # fmt: skip
