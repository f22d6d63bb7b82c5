"""Datasets that are streamed (`hf_datasets` with `streaming`): the real package ``datasets`` over files of this disk."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from vlit.cli import main
from vlit.data.formats.hf_datasets import HfDatasetsFormat
from vlit.data.formats.llava import LlavaFormat
from vlit.errors import DataError


def png(colour: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), colour, np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three rows of two pictures, one, and none."""
    rows = {
        "id": ["two", "one", "none"],
        "images": [[png(1), png(2)], [png(3)], []],
        "conversations": [[{"from": "human", "value": f"{n}?"}, {"from": "gpt", "value": f"{n}."}] for n in "abc"],
    }
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "images": datasets.List(datasets.Image()),
            "conversations": datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")}),
        }
    )
    rows["images"] = [[{"bytes": one, "path": None} for one in row] for row in rows["images"]]
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
    return tmp_path / "set"


def test_a_streamed_dataset_is_converted_with_its_pictures_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    out, kept = tmp_path / "new" / "data.jsonl", tmp_path / "pictures"
    words = ["convert", str(folder), str(out), "--from", "hf_datasets", "streaming=true", f"save_images={kept}"]
    assert main(words) == 0
    samples = list(LlavaFormat().iter_samples(out, "s"))
    assert [sample.id for sample in samples] == ["two", "one", "none"]
    assert [[(kept / name).read_bytes() for name in sample.images] for sample in samples] == [
        [png(1), png(2)],
        [png(3)],
        [],
    ]
    assert [[turn.text for turn in sample.turns] for sample in samples] == [
        ["<image>\n<image>\na?", "a."],
        ["<image>\nb?", "b."],
        ["c?", "c."],
    ]


def test_two_datasets_may_keep_their_pictures_in_one_folder(folder: Path, tmp_path: Path) -> None:
    """Row 0 of both sets holds a picture; the second has its own, and one of the first's again."""
    other, kept = tmp_path / "other", tmp_path / "pictures"
    other.mkdir()
    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.Value("string"), "image": datasets.Image()}
    )
    rows = [
        {"question": "q", "answer": str(n), "image": {"bytes": content, "path": None}}
        for n, content in enumerate([png(7), png(1), b"no picture"])
    ]
    datasets.Dataset.from_list(rows, features=features).to_parquet(other / "train-00000-of-00001.parquet")
    for name, out in ((folder, "a.jsonl"), (other, "b.jsonl")):
        words = ["convert", str(name), str(tmp_path / out), "--from", "hf_datasets", "streaming=true"]
        assert main([*words, f"save_images={kept}"]) == 0
    first, second = (
        [
            [(kept / image).read_bytes() for image in sample.images]
            for sample in LlavaFormat().iter_samples(tmp_path / out, "s")
        ]
        for out in ("a.jsonl", "b.jsonl")
    )
    assert first == [[png(1), png(2)], [png(3)], []]
    assert second == [[png(7)], [png(1)], [b"no picture"]]
    assert len(list(kept.iterdir())) == 5, "png(1) is stored once, nothing else is left behind"


def test_what_cannot_be_streamed_and_what_cannot_be_trained_on_says_what_to_do(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"split validation cannot be streamed .* Check the name"):
        list(HfDatasetsFormat(streaming=True, split="validation").iter_rows(folder))
    with pytest.raises(DataError, match="cannot be streamed"):
        list(HfDatasetsFormat(streaming=True).iter_rows(tmp_path / "nothing"))
    with pytest.raises(DataError, match=r"column images holds pictures\. Set save_images=FOLDER"):
        list(HfDatasetsFormat(streaming=True).iter_rows(folder))
    with pytest.raises(DataError, match=r"has no files to train on\. Make some: vlit convert"):
        HfDatasetsFormat(streaming=True).files(folder)
