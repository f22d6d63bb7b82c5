"""What asks for a form of answer is no content: different questions about a picture stay, reworded ones are found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlit.cli import main
from vlit.data.formats._reader import OPTION_LETTER, SHORT_ANSWER
from vlit.data.record import Record, read_records, write_records
from vlit.serve.quality import measure_quality
from vlit.synth.digits.questions import FULL_SENTENCE, ONE_WORD, REASON_AND_LETTER
from vlit.synth.engine.prompts import read_list
from vlit.synth.quality.form import asks_for_form, without_form
from vlit.synth.quality.scan import measure
from vlit.types import Turn

THINGS = ("dog", "cat", "horse", "car", "bench", "kite", "boat", "bird", "cup", "chair", "table", "bus")


def ask(identity: str, question: str, answer: str) -> Record:
    turns = (Turn("user", f"<image>\n{question}"), Turn("assistant", answer))
    return Record(identity, turns, ("a.png",))


@pytest.mark.parametrize("kind", ["choice", "judgement", "long", "short", "judgement_reasoned", "choice_reasoned"])
def test_the_wordings_of_recipes_are_known(kind: str) -> None:
    wordings = read_list(f"format/{kind}")[0]
    assert len(wordings) >= 5
    for wording in wordings:
        assert without_form(f"Which dog is it?\n{wording}").strip() == "Which dog is it?", wording


def test_the_wordings_of_readers_and_the_world_are_known() -> None:
    for wording in (SHORT_ANSWER, OPTION_LETTER, ONE_WORD, REASON_AND_LETTER, FULL_SENTENCE):
        assert asks_for_form(wording), wording


@pytest.mark.parametrize(
    "question",
    ["What does the word on the sign say?", "Describe what you see.", "Describe the image in detail.", "Give the dog's name.",
     "Write a sentence about the dog.", "Which option is cheaper on the menu?", "Is the answer on the board right?"],
)  # fmt: skip
def test_questions_about_the_picture_are_not_taken_for_wordings(question: str) -> None:
    assert without_form(f"Look at the boat. {question}") == f"Look at the boat. {question}"


def test_a_question_of_nothing_but_form_stays() -> None:
    assert without_form("<image>\nAnswer yes or no.") == "<image>\nAnswer yes or no."


def write_vqa(folder: Path) -> None:
    """A VQAv2-like set: twelve questions of each of four kinds about one picture of its own."""
    folder.mkdir()
    asked = (
        ("Is there a {} in the image?", ("yes", "no")), ("What color is the {}?", ("white", "black")),
        ("How many {}s are shown in the image?", ("1", "2")),
        ("Is there a {} in the lower corner behind the large white building?", ("yes", "no")),
    )  # fmt: skip
    questions: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    for picture, (form, values) in enumerate(asked, 1):
        noise = np.random.default_rng(picture).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"COCO_train2014_{picture:012d}.jpg")
        for number, thing in enumerate(THINGS):
            identity = picture * 100 + number
            value = values[number % 2]
            questions.append({"question_id": identity, "image_id": picture, "question": form.format(thing)})
            answers.append(
                {
                    "question_id": identity, "image_id": picture, "multiple_choice_answer": value,
                    "answers": [{"answer": value, "answer_confidence": "yes", "answer_id": 1}] * 10,
                }
            )  # fmt: skip
    (folder / "v2_OpenEnded_mscoco_train2014_questions.json").write_text(json.dumps({"questions": questions}))
    (folder / "v2_mscoco_train2014_annotations.json").write_text(json.dumps({"annotations": answers}))


def test_different_questions_about_a_picture_are_kept_and_repeated_ones_are_not(tmp_path: Path) -> None:
    write_vqa(tmp_path / "vqa")
    made = tmp_path / "vqa.jsonl"
    questions = tmp_path / "vqa" / "v2_OpenEnded_mscoco_train2014_questions.json"
    assert main(["convert", "--from", "vqav2", str(questions), str(made)]) == 0
    records = list(read_records(made))
    assert len(records) == 48
    assert all(SHORT_ANSWER in record.turns[0].text for record in records)
    (tmp_path / "q.jsonl").write_text(
        json.dumps({"text": f"What brand of soda is shown in the image?\n{SHORT_ANSWER}"})
        + "\n" + json.dumps({"text": "Which of the seven boats that lie beside the old bridge is nearest to the shore?"})
    )  # fmt: skip
    card = measure_quality(made, images=tmp_path / "vqa", eval_texts=[tmp_path / "q.jsonl"], keep=["clean"], workers=1)
    assert (card["kept"]["records"], card["kept"]["removed"]) == (48, 0)
    again = [Record(f"again-{record.id}", record.turns, record.images) for record in records[::5]]
    write_records(tmp_path / "twice.jsonl", [*records, *again])
    assert (measure(tmp_path / "twice.jsonl").earlier >= 0).sum() == len(again) == 10


@pytest.mark.parametrize(
    ("second", "duplicate"),
    [
        ("Is there a dog on the left side of the large white building near the water? Answer with a sentence.", False),
        ("Is there any dog visible on the left side of the large white building near the water?", True),
        ("Do you see a dog on the left side of the large white building near the water in the picture?", True),
        ("Is there a cat on the left side of the large white building near the water?", False),
        ("Is there a dog on the right side of the large white building near the water?", False),
        ("Is there a dog on the left side of the large red building near the water?", False),
    ],
)
def test_questions_that_differ_in_what_they_are_about_are_two(second: str, duplicate: bool, tmp_path: Path) -> None:
    first = "Is there a dog on the left side of the large white building near the water?"
    write_records(tmp_path / "d.jsonl", [ask("a", first, "Yes."), ask("b", second, "Yes.")])
    assert (measure(tmp_path / "d.jsonl").earlier[1] == 0) is np.bool_(duplicate)


def test_one_form_asked_for_in_other_words_is_one_form(tmp_path: Path) -> None:
    question = "What stands on the left side of the large white building near the water?"
    short, long = read_list("format/short")[0], read_list("format/long")[0]
    asked = [f"{question}\n{wording}" for wording in (*short, *long)]
    write_records(tmp_path / "d.jsonl", [ask(str(n), text, "A dog.") for n, text in enumerate(asked)])
    assert measure(tmp_path / "d.jsonl").earlier.tolist() == [
        -1,
        *[0] * (len(short) - 1),
        -1,
        *[len(short)] * (len(long) - 1),
    ]
