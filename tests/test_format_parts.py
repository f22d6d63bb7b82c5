"""Records of several parts do without those that cannot be used, say how many, and are bad when none is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.test_format_shapes import exchange, read
from vlit.data.formats._base import BadRow
from vlit.registry import FORMATS

SIZE = {"image_id": 1, "width": 800, "height": 600}


def region(x: float, y: float, width: float, height: float, phrase: str) -> dict[str, Any]:
    return {"x": x, "y": y, "width": width, "height": height, "phrase": phrase}


def regions_file(folder: Path, *pictures: list[dict[str, Any]]) -> Path:
    (folder / "image_data.json").write_text(json.dumps([{**SIZE, "image_id": n} for n in range(len(pictures))]))
    path = folder / "region_descriptions.json"
    path.write_text(json.dumps([{"id": n, "regions": regions} for n, regions in enumerate(pictures)]))
    return path


def test_regions_over_the_edge_are_cut_off_and_unusable_ones_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = [
        region(-20, 30, 60, 30, "over the left edge"),
        region(700, 540, 200, 90, "over two edges"),
        region(900, 0, 10, 10, "beside"),
        region(800, 0, 10, 10, "touching"),
        region(-30, 0, 30, 10, "touching, left"),
        region(900, 0, 0, 10, "a line beside"),
        region(400, 300, 0, 0, "a point"),
        region(0, 0, 8, 6, " "),
        region(0, 0, 800, 600, "all"),
    ]
    path = regions_file(tmp_path, mixed, [region(0, 0, 8, 6, "good")])
    first, second = read("visual_genome", path)
    assert {r.label: r.box for r in first.regions} == {
        "over the left edge": (0.0, 0.05, 0.05, 0.1),
        "over two edges": (0.875, 0.9, 1.0, 1.0),
        "a point": (0.5, 0.5, 0.5, 0.5),
        "all": (0.0, 0.0, 1.0, 1.0),
    }
    assert len(second.regions) == 1
    note = "note: region_descriptions.json: regions left out (empty, or beside the picture): 5, of 1 record(s)\n"
    assert capsys.readouterr().err == note
    (some, _) = read("visual_genome", path, max_per_image=3)
    assert [r.label for r in some.regions] == ["over the left edge", "over two edges", "a point"]


def test_a_picture_is_bad_when_no_region_is_left_or_the_file_is_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = regions_file(
        tmp_path, [region(900, 0, 10, 10, "beside"), region(0, 0, 8, 6, "")], [], [{"x": 0}, region(0, 0, 8, 6, "good")]
    )
    rows = list(FORMATS.get("visual_genome")(type="visual_genome").iter_rows(path))
    reasons = [row.reason for row in rows if isinstance(row, BadRow)]
    assert reasons == [
        "box (900, 0, 910, 10) lies beside the picture of 800 x 600",
        "regions is empty, expected descriptions",
        "y is missing, expected a number",
    ]
    assert capsys.readouterr().err == "", "bad records are counted as such"


def test_an_empty_question_sentence_or_answer_among_several_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = {"id": 1, "width": 640, "height": 480, "file_name": "a.jpg"}
    box = {"id": 2, "image_id": 1, "bbox": [0, 0, 640, 480]}
    said = [{"sent": "navy"}, {"sent": ""}]
    asked = {"question_id": 5, "image_id": 1, "question": "Which?"}
    given = [{"answer": text} for text in ("", "", "a tail")]
    qas = [{"question": "?", "answer": ""}, {"question": "Hue?", "answer": "Green."}]
    for name, content in (
        ("instances.json", {"images": [picture], "annotations": [box]}),
        ("refs.json", [{"ref_id": 4, "image_id": 1, "ann_id": 2, "split": "train", "sentences": said}]),
        ("question_answers.json", [{"id": 1, "qas": qas}]),
        ("OpenEnded_questions.json", {"questions": [asked]}),
        ("annotations.json", {"annotations": [{"question_id": 5, "answers": given}]}),
        ("TextVQA.json", {"data": [{**asked, "answers": ["", "a tail", "a tail"]}]}),
    ):  # fmt: skip
        (tmp_path / name).write_text(json.dumps(content))
    for name, file, what, count, answer in (
        ("refcoco", "refs.json", "sentences", 1, "[0.00, 0.00, 1.00, 1.00]"),
        ("visual_genome", "question_answers.json", "questions", 1, "Green."),
        ("vqav2", "OpenEnded_questions.json", "answers", 2, "a tail"),
        ("textvqa", "TextVQA.json", "answers", 1, "a tail"),
    ):
        (record,) = read(name, tmp_path / file)
        assert exchange(record)[1:] == [answer], name
        line = f"note: {file}: {what} left out (empty, or beside the picture): {count}, of 1 record(s)\n"
        assert capsys.readouterr().err == line, name
