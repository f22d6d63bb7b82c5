"""Every registered format passes this suite: a small dataset of the published shape in ``tests/formats/<name>/`` becomes
records, the records become LLaVA's files, and these are read again as the same; every planted mistake is one bad row.

``case.json`` says where the dataset lies, the format's settings, and the mistakes: a place in a file (``at``) that gets another
``value`` (or none), or a second dataset (``path``); the number of the record, and a word of the reason.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlit.data.formats._base import BadRow, FormatConfig, Row, record_of
from vlit.data.formats.llava import LlavaFormat
from vlit.data.images import load_view, resolve_image
from vlit.data.record import Record, from_json, read_records, to_json, write_records
from vlit.data.record_checks import check_conversation
from vlit.data.writers import write_llava, write_parquet
from vlit.registry import FORMATS

from .data_fixtures import make_spec

FOLDER = Path(__file__).parent / "formats"
CASES: dict[str, dict[str, Any]] = {
    path.parent.name: json.loads(path.read_text()) for path in FOLDER.glob("*/case.json")
}
MISTAKES = [(name, number) for name, case in sorted(CASES.items()) for number in range(len(case["bad"]))]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLIT_CACHE", str(tmp_path / "cache"))


def picture_bytes() -> bytes:
    """A small PNG."""
    return (FOLDER / "sharegpt" / "a.png").read_bytes()


def format_of(name: str, folder: Path) -> FormatConfig:
    settings = {key: str(folder) if value == "@" else value for key, value in CASES[name].get("format", {}).items()}
    return FORMATS.get(name).model_validate({"type": name, **settings})


def rows_of(name: str, folder: Path, path: str | None = None) -> list[Row | BadRow]:
    return list(format_of(name, folder).iter_rows(folder / (path or CASES[name]["path"])))


def records_of(name: str) -> list[Record]:
    rows = rows_of(name, FOLDER / name)
    assert [row for row in rows if isinstance(row, BadRow)] == []
    return [record_of(row) for row in rows if isinstance(row, Row)]


def root_of(name: str) -> Path:
    path = FOLDER / name / CASES[name]["path"]
    if "images" in CASES[name]:
        return FOLDER / name / CASES[name]["images"]
    return path if path.is_dir() else path.parent


def test_every_registered_format_has_a_dataset_here_and_mistakes_of_several_kinds(record_property: Any) -> None:
    own = {name for name in FORMATS.names() if FORMATS.get(name).__module__.startswith("vlit.")}
    assert own == set(CASES)
    for name, case in sorted(CASES.items()):
        line = f"{len(records_of(name))} records, {len(case['bad'])} mistakes: {case['about']}"
        record_property(name, line)
        print(f"{name:14} {line}")
        assert case["bad"], name
    assert len(CASES) >= 20
    assert len(MISTAKES) >= 70


@pytest.mark.parametrize("name", sorted(CASES))
def test_records_are_what_the_dataset_says(name: str) -> None:
    """``expected.jsonl`` was compared with the dataset by eye."""
    expected = [json.loads(line) for line in (FOLDER / name / "expected.jsonl").read_text().splitlines()]
    assert [to_json(record) for record in records_of(name)] == expected


@pytest.mark.parametrize("name", sorted(CASES))
def test_records_written_as_llava_are_read_again_as_the_same(name: str, tmp_path: Path) -> None:
    records = records_of(name)
    assert records
    for record in records:
        check_conversation([t.role for t in record.turns], [t.text for t in record.turns], record.images)
        assert from_json(json.loads(json.dumps(to_json(record)))) == record
    for out in (tmp_path / "out.json", tmp_path / "out.jsonl"):
        assert write_llava(out, records) == len(records)
        rows = list(LlavaFormat().iter_rows(out))
        assert [record_of(row) for row in rows if isinstance(row, Row)] == records
        assert list(read_records(out)) == records


@pytest.mark.parametrize("name", sorted(CASES))
def test_reading_twice_gives_the_same_records(name: str) -> None:
    assert records_of(name) == records_of(name)


@pytest.mark.parametrize("name", sorted(CASES))
def test_all_pictures_decode_and_survive_parquet(name: str, tmp_path: Path) -> None:
    records, root, spec = records_of(name), root_of(name), make_spec("none")
    files = {image: resolve_image(image, root) for record in records for image in record.images}
    views = {image: load_view(file, policy="pad", spec=spec) for image, file in files.items()}
    assert views
    assert all(view.shape == (3, 32, 32) and view.std() > 0 for view in views.values())
    out = tmp_path / "out.parquet"
    assert write_parquet(out, records, find_image=lambda image: files[image]) == len(records)
    again = [record_of(row) for row in FORMATS.get("parquet")(type="parquet").iter_rows(out)]
    assert [{**to_json(r), "image": None, "images": None} for r in again] == [
        {**to_json(r), "image": None, "images": None} for r in records
    ]
    for before, after in zip(records, again, strict=True):
        assert len(after.images) == len(before.images)
        for old, new in zip(before.images, after.images, strict=True):
            assert resolve_image(new, tmp_path).read_bytes() == files[old].read_bytes()
            np.testing.assert_array_equal(load_view(resolve_image(new, tmp_path), policy="pad", spec=spec), views[old])


@pytest.mark.parametrize(("name", "number"), MISTAKES, ids=lambda value: str(value))
def test_a_mistake_is_one_bad_row_with_number_and_field(name: str, number: int, tmp_path: Path) -> None:
    mistake = CASES[name]["bad"][number]
    folder = tmp_path / name
    shutil.copytree(FOLDER / name, folder)
    path = mistake.get("path", CASES[name]["path"])
    if "at" in mistake:
        start = folder / path
        plant(start / mistake["file"] if start.is_dir() else start.parent / mistake.get("file", start.name), mistake)
    rows = rows_of(name, folder, path)
    bad = [row for row in rows if isinstance(row, BadRow)]
    assert [row.record for row in bad] == [mistake["record"]], bad
    assert mistake["field"] in bad[0].reason
    assert "\n" not in bad[0].reason
    assert len(bad[0].reason) < 400
    assert [row.record for row in rows] == list(range(len(rows)))
    if "at" in mistake:
        assert len(rows) == len(records_of(name) if path == CASES[name]["path"] else rows)


def plant(file: Path, mistake: dict[str, Any]) -> None:
    lines = file.suffix == ".jsonl"
    content = [json.loads(line) for line in file.read_text().splitlines()] if lines else json.loads(file.read_text())
    *way, last = mistake["at"]
    place = content
    for key in way:
        place = place[key]
    assert "value" not in mistake or place[last] != mistake["value"]
    if "value" in mistake:
        place[last] = mistake["value"]
    else:
        del place[last]
    file.write_text("".join(json.dumps(one) + "\n" for one in content) if lines else json.dumps(content))


def test_a_line_that_is_no_json_is_one_bad_row(tmp_path: Path) -> None:
    looked_at = 0
    for name, case in CASES.items():
        if not case["path"].endswith(".jsonl"):
            continue
        shutil.copytree(FOLDER / name, tmp_path / name)
        path = tmp_path / name / case["path"]
        lines = path.read_text().splitlines()
        path.write_text("\n".join([lines[0][:-2], *lines[1:]]))
        bad = [row for row in rows_of(name, tmp_path / name) if isinstance(row, BadRow)]
        assert [(row.record, row.check) for row in bad] == [(0, "json")], name
        looked_at += 1
    assert looked_at >= 2


def test_point_clouds_are_counted_under_their_own_name(tmp_path: Path) -> None:
    path = tmp_path / "3d.json"
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A chair."}]
    path.write_text(json.dumps([{"id": n, "pcl": f"{n}.npy", "conversations": turns} for n in range(3)]))
    rows = list(FORMATS.get("lamm")(type="lamm").iter_rows(path))
    assert [(row.check, row.record) for row in rows if isinstance(row, BadRow)] == [
        ("point_cloud", n) for n in range(3)
    ]


def test_lamm_s_pictures_keep_the_dataset_that_they_are_from(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A chair."}]
    sources: list[dict[str, str]] = [{"src_image": "coco2017"}, {"src_dataset": "locount", "src_image": "x"}, {}]
    path = tmp_path / "2d.json"
    path.write_text(json.dumps([{"image": "a.jpg", "conversations": turns, **source} for source in sources]))
    rows = list(FORMATS.get("lamm")(type="lamm").iter_rows(path))
    assert [record_of(row).provenance for row in rows if isinstance(row, Row)] == [
        {"dataset": "coco2017"}, {"dataset": "locount"}, {},
    ]  # fmt: skip


def test_a_canonical_file_is_written_once_for_all(tmp_path: Path) -> None:
    records = [record for name in sorted(CASES) for record in records_of(name)]
    assert write_records(tmp_path / "all.jsonl", records) == len(records) > 45
    assert list(read_records(tmp_path / "all.jsonl")) == records
