"""MIMIC-IT with pictures in Parquet, as Otter's own files are now: looked up by id, copied once, or refused by name."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.test_format_shapes import read
from tests.test_format_use import picture
from vlit.data.images import resolve_image
from vlit.data.members import MissingMember
from vlit.errors import DataError

pandas: Any = pytest.importorskip("pandas")
PICTURES = {f"D3_IMG_{n}": picture((n, 0, 0)) for n in range(7)}
TEXTS = {name: base64.b64encode(content).decode() for name, content in PICTURES.items()}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_pandas(path: Path) -> None:
    """By the lines of Otter's docs/mimicit_format.md."""
    pandas.DataFrame.from_dict(TEXTS, orient="index", columns=["base64"]).to_parquet(path, row_group_size=3)


def write_named_index(path: Path) -> None:
    frame = pandas.DataFrame({"picture": list(TEXTS), "base64": list(TEXTS.values())}).set_index("picture")
    frame.to_parquet(path, row_group_size=3)


def write_plain(path: Path) -> None:
    pq.write_table(pa.table({"base64": list(TEXTS.values()), "id": list(TEXTS)}), path, row_group_size=3)


@pytest.mark.parametrize("write", [write_pandas, write_named_index, write_plain])
def test_pictures_of_a_parquet_file_are_found_by_their_id(write: Any, tmp_path: Path, cache: Path) -> None:
    write(tmp_path / "D3.parquet")
    one = {"instruction": "What?", "answer": "A tile.", "rel_ins_ids": []}
    data = {f"D3_INS_{n}": {**one, "image_ids": [name]} for n, name in enumerate(PICTURES)}
    (tmp_path / "D3_instructions.json").write_text(json.dumps({"meta": {}, "data": data}))
    records = read("mimicit", tmp_path / "D3_instructions.json", images_file="D3.parquet")
    assert [record.images for record in records] == [(f"D3.parquet#{name}",) for name in PICTURES]
    first = resolve_image(records[4].images[0], tmp_path)
    copied = {file.read_bytes() for file in cache.rglob("*") if file.parent == first.parent or file.suffix == ".bin"}
    assert copied == {PICTURES[f"D3_IMG_{n}"] for n in (3, 4, 5)}, "the row group of three, and no other"
    for record, content in zip(records, PICTURES.values(), strict=True):
        assert resolve_image(record.images[0], tmp_path).read_bytes() == content


def test_a_damaged_picture_spoils_itself_only_and_an_unknown_id_is_missing(tmp_path: Path) -> None:
    frame = pandas.DataFrame({"base64": [TEXTS["D3_IMG_1"], "%%%", None]}, index=["a", "b", "c"])
    frame.to_parquet(tmp_path / "D3.parquet")
    assert resolve_image("D3.parquet#a", tmp_path).read_bytes() == PICTURES["D3_IMG_1"]
    for name in "bc":
        with pytest.raises(DataError, match=rf"D3\.parquet: '{name}' is not an image as base64 text"):
            resolve_image(f"D3.parquet#{name}", tmp_path)
    with pytest.raises(MissingMember, match="holds no image 'd'"):
        resolve_image("D3.parquet#d", tmp_path)
    pq.write_table(pa.table({"image": [b"x"], "id": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(
        MissingMember, match="has the columns image, id; pictures that are named by keys stand in a column"
    ):
        resolve_image("other.parquet#a", tmp_path)


def test_records_of_text_only_need_no_list_of_pictures(tmp_path: Path) -> None:
    """As in Otter's LIMA and other text-only sets."""
    one = {"instruction": "Hi?", "answer": "Yes.", "rel_ins_ids": []}
    data = {"absent": one, "null": {**one, "image_ids": None}, "empty": {**one, "image_ids": []}}
    (tmp_path / "LIMA_instructions.json").write_text(json.dumps({"meta": {}, "data": data}))
    records = read("mimicit", tmp_path / "LIMA_instructions.json")
    assert [(r.id, r.images, r.kind) for r in records] == [(name, (), "text") for name in ("absent", "null", "empty")]
