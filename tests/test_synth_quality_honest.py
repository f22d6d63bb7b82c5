"""`vlit synth quality` says what it could not read or compare, and does not let it pass as checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlit.cli import main
from vlit.data.formats._base import BadRow, record_of
from vlit.data.formats.llava import LlavaFormat
from vlit.errors import ConfigError, DataError
from vlit.serve import quality
from vlit.serve.quality import measure_quality
from vlit.synth.quality.annotations import read_annotations
from vlit.synth.quality.sources import match_annotations
from vlit.synth.quality.text import read_record

WORDS = ("river", "bridge", "market", "castle", "harbour", "forest", "meadow", "tunnel")
LONG = "Suppose the two boats beside the old bridge were exchanged, which of them would then be nearest to the shore?"


def line(number: int, **more: Any) -> dict[str, Any]:
    turns = [
        {"from": "human", "value": f"<image>\nWhat is beside the {WORDS[number]}?"},
        {"from": "gpt", "value": f"A dog and {number + 2} tall trees."},
    ]
    return {"id": f"r{number}", "image": f"train/{number}.png", "conversations": turns} | more


def write_data(folder: Path, *, count: int = 6, more: dict[int, dict[str, Any]] | None = None) -> Path:
    """``count`` records with a picture of their own each; ``more`` changes some of them."""
    (folder / "images" / "train").mkdir(parents=True)
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(folder / "images" / "train" / f"{number}.png")
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps(line(n, **(more or {}).get(n, {}))) + "\n" for n in range(count)))
    return path


def write_coco(path: Path, names: list[str], *, label: str = "dog") -> Path:
    pictures = [{"id": n, "file_name": name, "width": 64, "height": 64} for n, name in enumerate(names)]
    boxes = [
        {"id": n, "image_id": n, "category_id": 1, "bbox": [4, 4, 20, 20], "area": 400, "iscrowd": 0}
        for n in range(len(names))
    ]
    categories = [{"id": 1, "name": label, "supercategory": "animal"}]
    path.write_text(json.dumps({"images": pictures, "annotations": boxes, "categories": categories}))
    return path


def ids_of(path: Path) -> list[str]:
    return [json.loads(text)["id"] for text in path.read_text().splitlines()]


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any pass over the dataset fails."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("it was measured")

    monkeypatch.setattr(quality, "measure", refuse)


# --- records ------------------------------------------------------------------------------------------------------------


def test_records_with_keys_of_their_own_are_measured_and_kept_byte_for_byte(tmp_path: Path, capsys: Any) -> None:
    path = write_data(tmp_path, more={1: {"source": "coco"}, 4: {"task_type": "vqa", "source": "coco"}})
    card = measure_quality(path, keep=["clean"], workers=1)
    assert card["bad_records"] == 0
    assert card["ignored_keys"] == {"source": 2, "task_type": 1}
    assert "source (2), task_type (1)" in capsys.readouterr().err
    assert (tmp_path / "d.quality" / "kept.jsonl").read_bytes() == path.read_bytes()


def test_a_record_is_what_the_llava_format_reads() -> None:
    values = [line(0, source="x"), line(1, id=None), line(2, image=None), {"id": "a"}, line(3, kind=3), [1]]
    values.append({key: value for key, value in line(4).items() if key != "id"})
    bad = 0
    for number, value in enumerate(values):
        raw = json.dumps(value).encode()
        row = LlavaFormat().parse(number, raw)
        if isinstance(row, BadRow):
            bad += 1
            with pytest.raises(DataError) as error:
                read_record(number, raw)
            assert row.reason in str(error.value)
        else:
            assert read_record(number, raw)[0] == record_of(row)
    assert bad == 4


def test_records_without_ids_get_their_row_beyond_the_first_chunk(tmp_path: Path) -> None:
    from vlit.synth.quality import scan

    count = scan.RECORDS_AT_ONCE + 3
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Nobody knows."}]
    (tmp_path / "d.jsonl").write_text((json.dumps({"conversations": turns}) + "\n") * count + "{broken\n")
    found = scan.measure(tmp_path / "d.jsonl")
    assert found.fields["id"][:count] == [str(row) for row in range(count)]
    assert [row for row, _ in found.tally.bad] == [count]


def test_bad_records_are_printed_with_the_first_reason_and_reported(tmp_path: Path, capsys: Any) -> None:
    path = write_data(tmp_path, more={2: {"conversations": []}, 5: {"kind": 7}})
    card = measure_quality(path, keep=["clean"], workers=1)
    said = capsys.readouterr().err
    assert "2 records, left out; the first: d.jsonl#2:" in said
    assert "conversations is a list" in said
    assert card["bad_records"] == card["kept"]["reasons"]["unreadable"] == 2
    assert card["first_bad"].startswith("d.jsonl#2:")
    removed = [json.loads(text) for text in (tmp_path / "d.quality" / "removed.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in removed] == [2, 5]
    assert "kind is a number" in removed[1]["reasons"][0]


def test_a_file_without_a_readable_record_is_an_error_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"id": "a"}\n{"id": "b"}\n')
    with pytest.raises(DataError, match=r"none of 2 records .* conversations is missing"):
        measure_quality(tmp_path / "d.jsonl", workers=1)


# --- pictures -----------------------------------------------------------------------------------------------------------


def test_records_with_a_missing_or_broken_picture_are_not_clean(tmp_path: Path, capsys: Any) -> None:
    two = [{"from": "human", "value": "<image><image>\nCompare."}, {"from": "gpt", "value": "They differ a lot."}]
    text = [{"from": "human", "value": "Name a fruit."}, {"from": "gpt", "value": "Apple."}]
    more: dict[int, dict[str, Any]] = {
        4: {"image": ["train/4.png", "train/nowhere.png"], "conversations": two},
        5: {"image": None, "conversations": text},
    }
    path = write_data(tmp_path, more=more)
    (tmp_path / "images/train/1.png").unlink()
    (tmp_path / "images/train/3.png").write_bytes((tmp_path / "images/train/3.png").read_bytes()[:900])
    card = measure_quality(path, keep=["clean"], workers=1)
    assert ids_of(tmp_path / "d.quality" / "kept.jsonl") == ["r0", "r2", "r5"]
    assert card["kept"]["reasons"] == {"readable>=1": 3}
    assert card["diversity"]["pictures"]["unreadable"] == card["diversity"]["pictures"]["records_with_unreadable"] == 3
    removed = [json.loads(text) for text in (tmp_path / "d.quality" / "removed.jsonl").read_text().splitlines()]
    assert [(entry["id"], entry["reasons"][0].split(",")[0]) for entry in removed] == [
        ("r1", "readable is 0"), ("r3", "readable is 0"), ("r4", "readable is 0.5"),
    ]  # fmt: skip
    said = capsys.readouterr().err
    assert "3 of 6 pictures, of 3 records; the first: " in said
    assert "1.png" in said
    assert "pictures: records with unreadable" in (tmp_path / "d.quality" / "card.html").read_text()
    measure_quality(path, select=3, workers=1)
    assert ids_of(tmp_path / "d.quality" / "kept.jsonl") == ["r0", "r2", "r5"]


def test_without_a_picture_folder_clean_says_that_pictures_were_not_looked_at(tmp_path: Path, capsys: Any) -> None:
    path = write_data(tmp_path)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    card = measure_quality(path, keep=["clean"], workers=1)
    assert "readable>=1" in card["not_checked"]
    assert "not checked correctness>=1" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--images for readable"):
        measure_quality(path, keep=["readable"], workers=1)


# --- annotations --------------------------------------------------------------------------------------------------------


def test_annotations_that_match_nothing_are_an_error_that_shows_both_names(tmp_path: Path, unmeasured: None) -> None:
    path = write_data(tmp_path)
    coco = write_coco(tmp_path / "own.json", [f"train/{n}.png" for n in range(6)])
    with pytest.raises(DataError) as error:
        measure_quality(path, annotations=[f"train/={coco}"], keep=["clean"], workers=1)
    assert f"--annotations train/={coco}: none of its 6 pictures" in str(error.value)
    assert '"train/train/0.png"' in str(error.value)
    assert '"train/0.png"' in str(error.value)


def test_what_annotations_match_is_counted_and_printed(tmp_path: Path, capsys: Any) -> None:
    path = write_data(tmp_path)
    coco = write_coco(tmp_path / "own.json", ["0.png", "1.png", "2.png", "other.png"])
    card = measure_quality(path, annotations=[f"train/={coco}"], keep=["clean"], workers=1)
    said = capsys.readouterr().err
    assert f"annotations train/={coco}: 3 pictures of the dataset" in said
    assert "annotations tell of 3 of 6 records, 3 make claims" in said
    assert card["correctness"]["annotated_records"] == 3
    measure_quality(path, annotations=[f"train/={coco}"], keep=["annotated>=1"], workers=1)
    assert ids_of(tmp_path / "d.quality" / "kept.jsonl") == ["r0", "r1", "r2"]


def test_of_several_annotations_one_may_match_nothing_where_its_pictures_are_in_the_folder(tmp_path: Path) -> None:
    path = write_data(tmp_path)
    good = f"train/={write_coco(tmp_path / 'a.json', ['0.png', '1.png'])}"
    cat = f"train/={write_coco(tmp_path / 'b.json', ['1.png', '2.png'], label='cat')}"
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "unused.png")
    unused = str(write_coco(tmp_path / "c.json", ["unused.png"]))
    lost = f"val/={write_coco(tmp_path / 'd.json', ['0.png'])}"
    sources = [good, cat, unused]
    known, matched = match_annotations(path, sources, images=tmp_path / "images")
    assert matched == {good: 2, cat: 2, unused: 0}
    assert known == read_annotations(sources)
    for wrong in ([good, lost], [unused]):
        with pytest.raises(DataError, match="none of its 1 pictures"):
            match_annotations(path, wrong, images=tmp_path / "images")


def test_regions_need_records_that_have_them_and_stand_alone(tmp_path: Path) -> None:
    path = write_data(tmp_path)
    with pytest.raises(DataError, match="has regions"):
        measure_quality(path, annotations=["regions"], workers=1)
    with pytest.raises(ConfigError, match="takes the place of files"):
        measure_quality(path, annotations=["regions", "x.json"], workers=1)
    other = write_data(tmp_path / "b", more={2: {"regions": [{"label": "dog", "box": [0.1, 0.1, 0.5, 0.5]}]}})
    assert measure_quality(other, annotations=["regions"], workers=1)["correctness"]["annotated_records"] == 1


# --- evaluation sets ----------------------------------------------------------------------------------------------------


def test_an_evaluation_folder_that_can_find_nothing_is_an_error(tmp_path: Path) -> None:
    path = write_data(tmp_path)
    folder = tmp_path / "test"
    folder.mkdir()
    (folder / "readme.txt").write_text("No pictures.")
    with pytest.raises(DataError, match=f"--eval-images {folder}: no picture"):
        measure_quality(path, eval_images=[folder], keep=["uncontaminated"], workers=1)
    (folder / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=f"--eval-images {folder}: none of its 1 pictures can be decoded"):
        measure_quality(path, eval_images=[folder], keep=["uncontaminated"], workers=1)
    Image.open(tmp_path / "images/train/2.png").save(folder / "b.png")
    card = measure_quality(path, eval_images=[folder], keep=["uncontaminated"], workers=1)
    assert card["kept"]["reasons"] == {"eval_image==0": 1}
    assert card["diversity"]["pictures"]["unreadable_of_evaluation_sets"] == 1


def test_a_later_picture_of_a_record_is_compared_with_evaluation_sets_too(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\n<image>\nWhich?"}, {"from": "gpt", "value": "Both."}]
    path = write_data(tmp_path, more={3: {"image": ["train/3.png", "train/2.png"], "conversations": turns}})
    folder = tmp_path / "test"
    folder.mkdir()
    Image.open(tmp_path / "images/train/2.png").save(folder / "b.png")
    card = measure_quality(path, eval_images=[folder], keep=["uncontaminated"], workers=1)
    assert card["kept"]["reasons"] == {"eval_image==0": 2}  # records 2 and 3


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "the file is empty"),
        ("[]", "no records"),
        ('[{"question": "Which dog?"}]', "has 13 words"),
        ("{x", "not JSON"),
    ],
)
def test_an_evaluation_text_that_can_find_nothing_is_an_error(tmp_path: Path, content: str, reason: str) -> None:
    path = write_data(tmp_path)
    texts = tmp_path / "q.json"
    texts.write_text(content)
    with pytest.raises(DataError, match=reason) as error:
        measure_quality(path, eval_texts=[texts], keep=["uncontaminated"], workers=1)
    assert f"--eval-texts {texts}" in str(error.value)


def test_an_evaluation_text_is_found(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": f"<image>\n{LONG}"}, {"from": "gpt", "value": "The red one."}]
    path = write_data(tmp_path, more={3: {"conversations": turns}})
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "Short?"}) + "\n" + json.dumps({"q": [LONG]}) + "\n")
    card = measure_quality(path, eval_texts=[tmp_path / "q.jsonl"], keep=["uncontaminated"], workers=1)
    assert card["kept"]["reasons"] == {"eval_text==0": 1}


# --- places to write, numbers -------------------------------------------------------------------------------------------


def test_the_folder_of_what_is_kept_is_made(tmp_path: Path) -> None:
    path = write_data(tmp_path)
    kept = tmp_path / "new" / "folder" / "x.jsonl"
    assert main(["synth", "quality", str(path), "--write", str(kept), "--workers", "1"]) == 0
    assert ids_of(kept) == [f"r{n}" for n in range(6)]
    assert (kept.parent / "x.metrics.parquet").is_file()


@pytest.mark.parametrize("option", ["--write", "--out"])
def test_a_place_that_cannot_be_written_is_refused_before_measuring(
    option: str, tmp_path: Path, unmeasured: None, capsys: Any
) -> None:
    path = write_data(tmp_path)
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "x"
    place = place / "kept.jsonl" if option == "--write" else place
    assert main(["synth", "quality", str(path), option, str(place), "--workers", "1"]) == 2
    said = capsys.readouterr().err
    assert option in said
    assert "cannot be made" in said


@pytest.mark.parametrize("count", ["0", "-3"])
def test_a_selection_of_nothing_is_refused_before_anything_is_read(count: str, tmp_path: Path, capsys: Any) -> None:
    missing = tmp_path / "nowhere.jsonl"
    assert main(["synth", "quality", str(missing), f"--select={count}"]) == 2
    assert f"--select {count}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
