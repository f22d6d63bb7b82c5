"""Benchmarks are asked honestly: blind is blind, shuffled is another picture, failures are not scores, kills resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from vlit.errors import EvaluationError
from vlit.eval.benchmark import Question
from vlit.eval.benchmarks.qa import QaBenchmark
from vlit.eval.rows import shuffle_images
from vlit.eval.run import evaluate
from vlit.registry import BENCHMARKS

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def write_questions(root: Path, rows: list[dict]) -> Path:
    path = root / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def colour_benchmark(tmp_path: Path) -> QaBenchmark:
    """Three pictures of one colour each, two questions a picture."""
    rows = []
    for name, rgb in COLOURS.items():
        Image.new("RGB", (4, 4), rgb).save(tmp_path / f"{name}.png")
        rows.append(
            {
                "question_id": f"c-{name}",
                "image": f"{name}.png",
                "question": "Which colour?",
                "answer": name,
                "kind": "colour",
            }
        )
        rows.append(
            {
                "question_id": f"y-{name}",
                "image": f"{name}.png",
                "question": f"Is it {name}?",
                "answer": "Yes",
                "kind": "yes_no",
            }
        )
    return QaBenchmark(
        "colours", write_questions(tmp_path, rows), image_root=tmp_path, chance={"colour": 1 / 3, "yes_no": 1.0}
    )


def look(questions: list[Question]) -> list[str]:
    """A perfect answerer that really opens the pictures and says "Yes" to what it cannot see."""
    names = {rgb: name for name, rgb in COLOURS.items()}
    answers = []
    for question in questions:
        seen = names[Image.open(question.images[0]).getpixel((0, 0))] if question.images else "nothing"
        answers.append(
            f"{seen}."
            if question.kind == "colour"
            else ("Yes" if seen in (*question.question[6:-1].split(), "nothing") else "No")
        )
    return answers


def test_a_seeing_answerer_is_right_with_its_pictures_and_wrong_with_others(
    colour_benchmark: QaBenchmark, tmp_path: Path
):
    results = evaluate(
        look, colour_benchmark, tmp_path / "out", batch_size=4, checkpoint="m", settings={"max_new_tokens": 8}
    )
    accuracy = {
        row: (v["per_kind"]["colour"]["accuracy"], v["per_kind"]["yes_no"]["accuracy"])
        for row, v in results["rows"].items()
    }
    assert accuracy == {"image": (1.0, 1.0), "blind": (0.0, 1.0), "shuffled": (0.0, 0.0)}
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert results["n"] == 6
    assert results["per_kind"]["colour"]["chance"] == pytest.approx(1 / 3)
    assert results["chance"] == pytest.approx(2 / 3)
    assert results["settings"] == {"max_new_tokens": 8}
    assert json.loads((tmp_path / "out" / "timing.json").read_text()).keys() == {"seconds", "seconds_per_row"}
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 18
    assert {(line["row"], line["question_id"]) for line in lines} == {
        (row, q.id) for row in ("image", "blind", "shuffled") for q in colour_benchmark.load()
    }
    assert sum(line["correct"] for line in lines if line["row"] == "image") == 6


def test_blind_questions_carry_no_picture_and_no_placeholder(tmp_path: Path):
    q = Question("1", (tmp_path / "a.png", tmp_path / "b.png"), "Is <image> like <image>?", ("yes",), "k")
    assert q.turn_text() == "Is <image> like <image>?"
    assert Question("1", (), q.question, q.answers, "k").turn_text() == "Is  like ?"
    assert Question("1", q.images, "Alike?", q.answers, "k").turn_text() == "<image>\n<image>\nAlike?"
    assert Question("1", (), "Alike?", q.answers, "k").turn_text() == "Alike?"


def test_shuffling_gives_every_question_different_pixels_for_any_seed(tmp_path: Path):
    paths = []
    for n in range(7):
        paths.append(tmp_path / f"{n}.bin")
        paths[-1].write_bytes(bytes([n % 5]))  # 5 and 6 are copies of 0 and 1 under other names
    questions = [Question(str(n), (paths[n % 7],), "?", ("x",), "k") for n in range(21)]
    orders = set()
    for seed in range(50):
        shuffled = shuffle_images(questions, seed=seed)
        assert [q.id for q in shuffled] == [q.id for q in questions]
        for before, after in zip(questions, shuffled, strict=True):
            assert before.images[0].read_bytes() != after.images[0].read_bytes()
        assert shuffled == shuffle_images(questions, seed=seed)
        orders.add(tuple(q.images for q in shuffled))
    assert len(orders) > 10  # the seed matters


def test_shuffling_a_single_picture_is_refused(tmp_path: Path):
    path = tmp_path / "a.png"
    path.write_bytes(b"x")
    with pytest.raises(EvaluationError, match="no other to exchange"):
        shuffle_images([Question("1", (path,), "?", ("x",), "k"), Question("2", (path,), "?", ("x",), "k")])


def test_an_interrupted_evaluation_asks_only_what_is_open_and_ends_with_the_same_result(
    colour_benchmark: QaBenchmark, tmp_path: Path
):
    evaluate(look, colour_benchmark, tmp_path / "straight", batch_size=2)
    asked: list[str] = []

    def dies_late(questions: list[Question]) -> list[str]:
        if len(asked) >= 8:
            raise KeyboardInterrupt
        asked.extend(q.id for q in questions)
        return look(questions)

    with pytest.raises(KeyboardInterrupt):
        evaluate(dies_late, colour_benchmark, tmp_path / "broken", batch_size=2)
    answers = tmp_path / "broken" / "answers" / "rank-0.jsonl"
    assert [len(json.loads(line)["answers"]) for line in answers.read_text().splitlines()] == [2, 2, 2, 2]
    assert not (tmp_path / "broken" / "results.json").exists()
    with answers.open("ab") as file:
        file.write(b'{"row": "blind", "answers": [{"question_id": "c-r')  # a kill in the middle of a write
    asked_again: list[str] = []
    evaluate(
        lambda qs: asked_again.extend(q.id for q in qs) or look(qs), colour_benchmark, tmp_path / "broken", batch_size=2
    )
    assert len(asked_again) == 18 - 8
    for name in ("predictions.jsonl", "results.json"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    evaluate(lambda qs: pytest.fail("asked again"), colour_benchmark, tmp_path / "broken")


def test_a_prediction_with_a_unicode_line_separator_survives_resuming(colour_benchmark: QaBenchmark, tmp_path: Path):
    strange = "a\u2028b\x85c\nd"
    evaluate(lambda qs: [strange] * len(qs), colour_benchmark, tmp_path / "out", rows=("image",))
    evaluate(lambda qs: pytest.fail("asked again"), colour_benchmark, tmp_path / "out", rows=("image",))
    line = (tmp_path / "out" / "predictions.jsonl").read_text().split("\n")[0]
    assert json.loads(line)["prediction"] == strange


@pytest.mark.parametrize(("answer", "message"), [(None, "not a text"), (-1, "not a text")])
def test_a_failed_answer_is_an_error_and_never_a_score(
    colour_benchmark: QaBenchmark, tmp_path: Path, answer: object, message: str
):
    with pytest.raises(EvaluationError, match=message):
        evaluate(lambda qs: [answer] * len(qs), colour_benchmark, tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()


def test_too_few_answers_are_an_error(colour_benchmark: QaBenchmark, tmp_path: Path):
    with pytest.raises(EvaluationError, match="got 1 answers"):
        evaluate(lambda qs: ["x"], colour_benchmark, tmp_path / "out", batch_size=3)


def test_a_folder_never_mixes_two_checkpoints(colour_benchmark: QaBenchmark, tmp_path: Path):
    evaluate(look, colour_benchmark, tmp_path / "out", rows=("image",), checkpoint="step-1")
    with pytest.raises(EvaluationError, match=r"another checkpoint.*step-1.*step-2"):
        evaluate(look, colour_benchmark, tmp_path / "out", rows=("image",), checkpoint="step-2")


def test_a_missing_or_foreign_prediction_is_an_error(colour_benchmark: QaBenchmark):
    predictions = {q.id: "red" for q in colour_benchmark.load()}
    with pytest.raises(EvaluationError, match="belong to no question"):
        colour_benchmark.score(predictions | {"other": "x"})
    predictions.pop("c-red")
    with pytest.raises(EvaluationError, match='no prediction, first "c-red"'):
        colour_benchmark.score(predictions)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question_id": "1", "question": "?", "answr": "x"}, 'unknown key "answr".*Did you mean "answer"'),
        ({"question_id": "1", "question": "?"}, "exactly one of"),
        ({"question_id": "1", "question": "?", "answer": "x", "answers": ["x"]}, "exactly one of"),
        ({"question": "?", "answer": "x"}, '"question_id" is missing'),
        ({"question_id": "1", "question": "?", "answer": "x", "image": "gone.png"}, "no picture .*gone.png"),
        ({"question_id": "1", "question": "<image>?", "answer": "x"}, "1 <image> in the question, 0 pictures"),
    ],
)
def test_a_bad_question_is_named_by_file_and_line(tmp_path: Path, row: dict, message: str):
    good = {"question_id": "0", "question": "?", "answer": "x"}
    with pytest.raises(EvaluationError, match=rf"questions.jsonl#2: .*{message}"):
        QaBenchmark("q", write_questions(tmp_path, [good, row]), image_root=tmp_path).load()


def test_two_questions_may_not_share_an_id(tmp_path: Path):
    row = {"question_id": "0", "question": "?", "answer": "x"}
    with pytest.raises(EvaluationError, match='"0" is already on line 1'):
        QaBenchmark("q", write_questions(tmp_path, [row, row]), image_root=tmp_path).load()


def test_the_qa_config_puts_the_suffix_after_every_question_and_scores_by_its_rule(tmp_path: Path):
    rows = [{"question_id": 7, "question": "Which?\nA. cat\nB. dog", "answer": "B", "choices": ["cat", "dog"]}]
    config = BENCHMARKS.get("qa").model_validate(
        {"path": str(write_questions(tmp_path, rows)), "scorer": "mcq", "suffix": "Answer with the letter."}
    )
    benchmark = config.build()
    assert benchmark.load()[0].question == "Which?\nA. cat\nB. dog\nAnswer with the letter."
    assert benchmark.score({"7": "dog"}).overall.accuracy == 1.0


def test_the_digit_benchmark_reads_a_built_world_and_its_chance_levels(tmp_path: Path):
    pytest.importorskip("sklearn")
    from vlit.synth.digits.world import ensure_world

    paths = ensure_world(
        tmp_path / "w", train_images=40, validation_images=12, test_images=12, questions_per_kind=4, progress=False
    )
    for split in ("validation", "test"):
        benchmark = BENCHMARKS.get("digits").model_validate({"world": str(paths.root), "split": split}).build()
        questions = benchmark.load()
        assert benchmark.name == f"digits-{split}"
        assert all(q.images[0].parent.name == split for q in questions)
        results = benchmark.score({q.id: q.answers[0] for q in questions})
        assert results.overall.accuracy == 1.0
        assert results.overall.n == len(questions) == 4 * len(results.per_kind)
        assert len(results.per_kind) >= 8
        assert all(row.chance is not None and 0 <= row.chance <= 1 for row in results.per_kind.values())


def test_the_digit_benchmark_says_when_no_world_is_built(tmp_path: Path):
    with pytest.raises(EvaluationError, match="no world is built"):
        BENCHMARKS.get("digits").model_validate({"world": str(tmp_path)}).build()
