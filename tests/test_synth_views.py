"""COCO annotations as views: what is repeated, missing or impossible is left out and counted, or named, never learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlit.errors import DataError
from vlit.synth.engine.views import picture_prefix, read_views, views_of_folder
from vlit.synth.quality.annotations import read_annotations

CATEGORIES = [{"id": 1, "name": "person"}, {"id": 2, "name": "dog"}]
PERSON = {"id": 11, "image_id": 7, "category_id": 1, "bbox": [10, 5, 20, 10]}
DOG = {"id": 12, "image_id": 7, "category_id": 2, "bbox": [50, 10, 40, 30]}
CAPTION = {"id": 11, "image_id": 7, "caption": "Someone with a dog."}


def picture(number: int, name: str) -> dict[str, Any]:
    return {"id": number, "file_name": name, "width": 100, "height": 50}


def write(folder: Path, name: str, rows: list[Any], pictures: list[Any] | None = None, below: str = "") -> Path:
    """A COCO file in ``folder/coco``, and its pictures as empty files below ``folder/images``."""
    entries = [picture(7, "a.png")] if pictures is None else pictures
    for file in (folder / "images" / below / entry["file_name"] for entry in entries if "file_name" in entry):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    path = folder / "coco" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"images": entries, "annotations": rows, "categories": CATEGORIES}))
    return path


def names(folder: Path) -> dict[str, list[str]]:
    """Names of things by image, from all files of a folder."""
    return {v.image: [thing.name for thing in v.things] for v in read_views([folder / "coco"], folder / "images")}


def assert_refused(path: Path, *words: str, quality: bool = True) -> None:
    """Views, and quality's annotations, name the file and each of the words in one DataError."""
    readers = [lambda: read_views([path], path.parent.parent / "images"), lambda: read_annotations([str(path)])]
    for read in readers[: 1 + quality]:
        with pytest.raises(DataError) as caught:
            read()
        assert all(word in str(caught.value) for word in (str(path), *words)), caught.value


def test_a_person_of_instances_and_of_keypoints_is_one_person_and_what_was_dropped_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = PERSON | {"id": 13, "bbox": [0, 0, 5, 5]}
    same_id = PERSON | {"bbox": [0, 0, 6, 6]}
    write(tmp_path, "instances_x.json", [PERSON, DOG, second, PERSON | {"id": 14, "iscrowd": 1}])
    write(tmp_path, "captions_x.json", [CAPTION])
    keypoints = write(tmp_path, "person_keypoints_x.json", [PERSON | {"keypoints": [1, 2, 2]}, second, same_id])
    views = read_views([tmp_path / "coco"], tmp_path / "images")
    assert [(t.name, t.box) for t in views[0].things] == [
        ("person", (0.1, 0.1, 0.3, 0.3)),
        ("dog", (0.5, 0.2, 0.9, 0.8)),
        ("person", (0.0, 0.0, 0.05, 0.1)),
        ("person", (0.0, 0.0, 0.06, 0.12)),
    ]
    assert views[0].captions == ("Someone with a dog.",)
    assert len(views) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"{keypoints}: 2 of 3 annotations were read before")


def test_the_same_annotation_number_in_another_file_about_another_picture_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "instances_x.json", [PERSON])
    write(tmp_path, "instances_y.json", [PERSON], [picture(7, "b.png")])
    assert names(tmp_path) == {"a.png": ["person"], "b.png": ["person"]}
    assert capsys.readouterr().err == ""


def test_keypoints_alone_are_read_and_find_their_pictures_in_the_folder_of_their_split(tmp_path: Path) -> None:
    path = write(tmp_path, "person_keypoints_val2017.json", [PERSON], below="val2017")
    assert names(tmp_path) == {"val2017/a.png": ["person"]}
    assert picture_prefix(path, tmp_path / "images") == "val2017/"


def test_quality_knows_the_things_of_both_files_once(tmp_path: Path) -> None:
    files = [
        write(tmp_path, "instances_x.json", [PERSON, DOG, DOG | {"id": 15}]),
        write(tmp_path, "person_keypoints_x.json", [PERSON]),
    ]
    for order in (files, files[::-1]):
        known = read_annotations([str(file) for file in order])
        assert known is not None
        assert sorted(thing.label for thing in known.things["a.png"]) == ["dog", "dog", "person"]


def test_pictures_that_differ_in_their_suffix_alone_stay_two(tmp_path: Path) -> None:
    pictures = [picture(7, "a.png"), picture(8, "a.jpg"), picture(9, "sub/b.png")]
    rows = [DOG, PERSON | {"image_id": 8}, DOG | {"id": 16, "image_id": 9}]
    write(tmp_path, "instances_x.json", rows, pictures)
    write(tmp_path, "captions_x.json", [CAPTION | {"image_id": 8}], pictures)
    views = read_views([tmp_path / "coco"], tmp_path / "images")
    assert [(v.id, v.image, [t.name for t in v.things], v.captions) for v in views] == [
        ("a.png", "a.png", ["dog"], ()),
        ("a.jpg", "a.jpg", ["person"], ("Someone with a dog.",)),
        ("sub-b", "sub/b.png", ["dog"], ()),
    ]
    assert {v.image: v.id for v in views_of_folder(tmp_path / "images")} == {v.image: v.id for v in views}


def test_no_two_pictures_share_an_id_however_they_are_called(tmp_path: Path) -> None:
    called = ["a/b.png", "a-b.png", "a-b.png.jpg", "a/b.jpg", "c.png"]
    pictures = [picture(number, name) for number, name in enumerate(called)]
    write(tmp_path, "instances_x.json", [DOG | {"id": n, "image_id": n} for n in range(len(called))], pictures)
    views = read_views([tmp_path / "coco"], tmp_path / "images")
    assert [view.image for view in views] == called
    assert len({view.id for view in views}) == len({v.id for v in views_of_folder(tmp_path / "images")}) == len(called)
    assert views[-1].id == "c"


def test_pictures_without_annotations_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = [picture(7, "a.png"), picture(8, "b.png"), picture(9, "c.png"), picture(10, "d.png")]
    write(tmp_path, "instances_x.json", [PERSON], pictures)
    write(tmp_path, "captions_x.json", [CAPTION | {"image_id": 9}], pictures)
    assert names(tmp_path) == {"a.png": ["person"], "c.png": []}
    assert capsys.readouterr().err == "2 of 4 pictures have no annotation; left out\n"


@pytest.mark.parametrize(
    ("caption", "words"), [(None, "missing"), (12, "a number 12"), (["a"], "a list"), (" \n", "empty")]
)
def test_a_caption_that_is_no_text_is_named_and_never_an_answer(tmp_path: Path, caption: Any, words: str) -> None:
    path = write(tmp_path, "captions_x.json", [CAPTION, CAPTION | {"id": 17, "caption": caption}])
    assert_refused(path, "annotation 17 ", f"caption is {words}", quality=False)


@pytest.mark.parametrize("box", [[0, 0, 2000, -2], [0, 0, 102, 10], [90, 40, -10, 5], [0, 0, 5], ["1", 2, 3, 4], None])
def test_a_box_that_is_none_is_refused(tmp_path: Path, box: Any) -> None:
    path = write(tmp_path, "instances_x.json", [DOG, PERSON | {"id": 18, "bbox": box}])
    assert_refused(path, "annotation 18 ", "box")


def test_a_box_over_the_edge_by_rounding_is_cut_off(tmp_path: Path) -> None:
    write(tmp_path, "instances_x.json", [PERSON | {"bbox": [-0.4, 0, 100.9, 50]}])
    assert [t.box for v in read_views([tmp_path / "coco"], tmp_path / "images") for t in v.things] == [(0, 0, 1, 1)]


def test_a_picture_without_a_file_name_or_a_size_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "instances_x.json", [PERSON], [picture(6, "a.png"), {"id": 7, "width": 9, "height": 9}])
    assert_refused(path, "images[1] (id 7)", "file_name is missing")
    with pytest.raises(DataError, match=r"images\[1\] \(id 7\).*file_name is missing"):
        picture_prefix(path, tmp_path / "images")
    for field in ("width", "height"):
        sized = {key: value for key, value in picture(7, "a.png").items() if key != field}
        assert_refused(write(tmp_path, "instances_x.json", [PERSON], [sized]), "picture 7", f"{field} is missing")
    path = write(tmp_path, "instances_x.json", [PERSON], [picture(7, "a.png") | {"width": 0}])
    assert_refused(path, "annotation 11 ", "0 x 50")


@pytest.mark.parametrize("field", ["image_id", "category_id"])
@pytest.mark.parametrize("value", [9, "7", None, [7]])
def test_an_unknown_picture_or_category_is_named_with_its_field(tmp_path: Path, field: str, value: Any) -> None:
    path = write(tmp_path, "instances_x.json", [DOG, PERSON | {field: value}])
    assert_refused(path, "annotation 11 ", f"{field} is {value!r}")


def test_an_annotation_that_is_no_object_is_named_and_switches_of_annotation_tools_are_left_alone(
    tmp_path: Path,
) -> None:
    assert_refused(write(tmp_path, "instances_x.json", [PERSON, 5]), "annotations[1]", "a number")
    given = {"occluded": False, "rotation": 0.0, "colour": "red"}
    path = write(tmp_path, "instances_x.json", [PERSON | {"attributes": given}])
    (view,) = read_views([path], tmp_path / "images")
    assert [thing.attributes for thing in view.things] == [{"colour": "red"}]


def test_a_file_of_captions_is_no_truth_to_compare_with(tmp_path: Path) -> None:
    path = write(tmp_path, "captions_x.json", [CAPTION])
    path.write_text(json.dumps({"images": [picture(7, "a.png")], "annotations": [CAPTION]}))
    with pytest.raises(DataError, match=r"captions_x\.json: not a COCO instances file"):
        read_annotations([str(path)])
