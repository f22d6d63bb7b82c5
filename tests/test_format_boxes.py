"""Readers that turn pixels into boxes: every box of a record in one form, as the published systems write it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from tests.test_format_shapes import exchange, read
from vlit.data.record import Record, Region
from vlit.registry import FORMATS

PIXELS = re.compile(r"(?<![\d.])\d+(?:\.\d+)?(?: \d+(?:\.\d+)?){3}")
SIZE = (640, 480)
OVERLAP = {
    "task_name": "if_region_overlap",
    "region": ["208 187 234 207"],
    "options": ["no", "yes"],
    "prompt": "Given the region 0 212 494 267, decide if 208 187 234 207 overlaps with it.\n\n[Options]: no||||yes",
    "target": "no",
}
SELECTION = {
    "task_name": "VG_selection",
    "region": ["18 129 61 168"],
    "options": ["18 129 61 168", "450 142.5 498 222", "4 20 30 40", "14 20 30 40"],
    "prompt": 'Select what "a sign" describes.\n\n[Options]: 18 129 61 168||||450 142.5 498 222||||4 20 30 40||||14 20 30 40',
    "target": "18 129 61 168",
}


def multiinstruct(folder: Path, row: dict[str, Any], **settings: Any) -> Record:
    Image.new("RGB", SIZE).save(folder / "a.png")
    (folder / "train.jsonl").write_text(json.dumps({"unique_id": "1", "image_path": "a.png", **row}) + "\n")
    (record,) = read("multiinstruct", folder / "train.jsonl", image_folder=str(folder), **settings)
    return record


def qwen(pixels: str) -> str:
    """Qwen-VL's text by its own rule: thousandths (of 999) of width and height."""
    x0, y0, x1, y1 = (
        round(float(edge) / size * 999) for edge, size in zip(pixels.split(), (*SIZE, *SIZE), strict=True)
    )
    return f"<box>({x0},{y0}),({x1},{y1})</box>"


@pytest.mark.parametrize("row", [OVERLAP, SELECTION], ids=lambda row: row["task_name"])
def test_no_box_of_a_multiinstruct_record_stays_in_pixels(row: dict[str, Any], tmp_path: Path) -> None:
    """The right option of a selection task must not be the only one in the new form."""
    record = multiinstruct(tmp_path, row, boxes="qwen_vl")
    expected = [PIXELS.sub(lambda found: qwen(found[0]), row[key]) for key in ("prompt", "target")]
    assert exchange(record) == [f"<image>\n{expected[0]}", expected[1]]
    assert list(record.options) == [PIXELS.sub(lambda found: qwen(found[0]), option) for option in row["options"]]
    assert len(record.regions) == 1
    for text in (*exchange(record), *record.options):
        assert not PIXELS.search(text)
    assert sum(text.count("<box>") for text in exchange(record)) == (2 if row is OVERLAP else 5)


def test_four_numbers_that_are_no_box_of_the_picture_stay(tmp_path: Path) -> None:
    row = {**SELECTION, "prompt": "18 129 61 168, or 18 129 700 168, 61 129 18 168, 1 2 3 4 5, v1.18 129 61 168?"}
    record = multiinstruct(tmp_path, row, boxes="qwen_vl")
    kept = "18 129 700 168, 61 129 18 168, 1 2 3 4 5, v1.18 129 61 168?"
    assert exchange(record)[0] == f"<image>\n{qwen('18 129 61 168')}, or {kept}"


def test_multiinstruct_writes_ofa_s_bins_as_ofa_counts_them(tmp_path: Path) -> None:
    """OFA scales the longer side to 512 pixels and divides both axes by it: 480 of 640 is bin 749 of 999."""
    box = "0 240 640 480"
    row = {"task_name": "VG", "region": [box], "target": box, "prompt": "Where is the floor?"}
    assert exchange(multiinstruct(tmp_path, row, boxes="ofa"))[1] == "<bin_0> <bin_375> <bin_999> <bin_749>"
    with pytest.raises(ValidationError, match=r"boxes: ofa needs the sizes of the pictures\. Set image_folder"):
        FORMATS.get("multiinstruct")(type="multiinstruct", boxes="ofa")


def test_every_reader_that_knows_the_size_writes_the_same_bins(tmp_path: Path) -> None:
    picture, bins = (
        {"id": 1, "width": 640, "height": 480, "file_name": "a.jpg"},
        "<bin_0> <bin_375> <bin_999> <bin_749>",
    )
    box = {"id": 2, "image_id": 1, "category_id": 3, "bbox": [0, 240, 640, 240]}
    coco = {"images": [picture], "annotations": [box], "categories": [{"id": 3, "name": "floor"}]}
    ref = {"ref_id": 4, "image_id": 1, "ann_id": 2, "split": "train", "sentences": [{"sent": "floor"}]}
    region = {"x": 0, "y": 240, "width": 640, "height": 240, "phrase": "floor"}
    for name, content in (
        ("instances.json", coco),
        ("refs.json", [ref]),
        ("image_data.json", [{**picture, "image_id": 1}]),
        ("region_descriptions.json", [{"id": 1, "regions": [region]}]),
    ):
        (tmp_path / name).write_text(json.dumps(content))
    for name, file, answer in (
        ("coco", "instances.json", f"floor {bins}"),
        ("refcoco", "refs.json", bins),
        ("visual_genome", "region_descriptions.json", bins),
    ):
        (record,) = read(name, tmp_path / file, boxes="ofa")
        assert exchange(record)[1] == answer, name
        assert record.regions == (Region("floor", (0.0, 0.5, 1.0, 1.0)),), name
