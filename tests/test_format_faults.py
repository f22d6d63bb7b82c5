"""Whatever stands in a file instead of what belongs there: rows, bad rows, or a DataError that names the file."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_formats import CASES, FOLDER, format_of
from vlit.data.formats._base import BadRow, FormatConfig, Row
from vlit.errors import DataError

VALUES = (None, 5, -1, 1.5, True, "", "x", "../x", [], [None], ["x"], [{}], {}, {"x": 1})
FILES = [
    (name, str(file.relative_to(FOLDER / name)))
    for name in sorted(CASES)
    for file in sorted((FOLDER / name).rglob("*.json*"))
    if file.name not in ("case.json", "expected.jsonl", "dataset_dict.json")
]
ALSO = {
    ("coco", "captions_train2017.json"): "captions_train2017.json",
    ("visual_genome", "question_answers.json"): "question_answers.json",
    ("refcoco", "refs.json"): "refs.json",
    ("refcoco", "instances.json"): "refs.json",
    ("mimicit", "LA.json"): None,  # pictures, which no reader opens
    ("hf_datasets", "bad/train/state.json"): "bad",
}


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield way
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*way, key))


def changed(content: Any, way: tuple[Any, ...], value: Any) -> Any:
    if not way:
        return value
    result = copy.deepcopy(content)
    place = result
    for key in way[:-1]:
        place = place[key]
    place[way[-1]] = value
    return result


def outcome(reader: FormatConfig, path: Path) -> tuple[list[Row | BadRow], str | None]:
    try:
        return list(reader.iter_rows(path)), None
    except DataError as error:
        return [], str(error)


@pytest.mark.parametrize(("name", "file"), FILES, ids=lambda value: str(value))
def test_any_value_in_any_place_is_a_row_a_bad_row_or_an_error(name: str, file: str, tmp_path: Path) -> None:
    path = ALSO.get((name, file), CASES[name]["path"])
    if path is None:
        return
    folder = tmp_path / name
    shutil.copytree(FOLDER / name, folder)
    reader, target, lines = format_of(name, folder), folder / file, file.endswith(".jsonl")
    text = target.read_text()
    content = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    outcomes = {"row": 0, "bad": 0, "error": 0}
    for way in places(content):
        for value in VALUES:
            if lines and not way:
                continue
            mutant = changed(content, way, value)
            target.write_text("".join(json.dumps(one) + "\n" for one in mutant) if lines else json.dumps(mutant))
            rows, message = outcome(reader, folder / path)
            if message is not None:
                assert any(part in message for part in (file.split("/")[-1], path.split("/")[-1])), (way, value)
                outcomes["error"] += 1
                continue
            assert [row.record for row in rows] == list(range(len(rows))), (way, value)
            for row in rows:
                assert isinstance(row, (Row, BadRow)), (way, value)
                if isinstance(row, BadRow):
                    assert row.reason, (way, value)
                    assert "\n" not in row.reason, (way, value)
                    assert len(row.reason) < 500, (way, value)
                    outcomes["bad"] += 1
                else:
                    assert all(isinstance(text, str) and text.strip() for text in row.texts), (way, value)
                    assert all(isinstance(image, str) and ".." not in image.split("/") for image in row.images), (
                        way,
                        value,
                    )
                    outcomes["row"] += 1
    assert outcomes["row"] > 0
    assert outcomes["bad"] + outcomes["error"] > 10
