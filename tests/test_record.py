"""The canonical record: its JSON is LLaVA's, reading is the exact inverse of writing, and errors name the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlit.data.formats._base import Row, record_of
from vlit.data.formats.llava import LlavaFormat
from vlit.data.record import Record, Region, from_json, read_records, to_json, write_records
from vlit.errors import DataError
from vlit.types import Turn

FULL = Record(
    "r1",
    (Turn("system", "Be brief."), Turn("user", "<image> or <image>?"), Turn("assistant", "A")),
    ("a.png", "b/c.jpg"),
    kind="choice",
    domain="animals",
    instruction_type="multiple_choice",
    options=("a cat", "a dog"),
    regions=(Region("cat", (0.1, 0.2, 0.5, 0.75)), Region("dog", (0, 0, 1, 1), 1)),
    provenance={"format": "coco", "source_id": 7, "steps": ["caption"]},
)
PLAIN = Record("2", (Turn("user", "2 + 2?"), Turn("assistant", "4")))
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>"), min_size=1).filter(str.strip)
shares = st.floats(0, 1)
boxes = st.tuples(shares, shares, shares, shares).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)


@st.composite
def records(draw: st.DrawFn) -> Record:
    images = tuple(f"{number}.png" for number in range(draw(st.integers(0, 3))))
    turns = [Turn("system", draw(words))] if draw(st.booleans()) else []
    for number in range(draw(st.integers(1, 3))):
        turns += [
            Turn("user", "<image>" * len(images) * (number == 0) + draw(words)),
            Turn("assistant", draw(words)),
        ]
    regions = [Region(draw(words), draw(boxes), draw(st.integers(0, len(images) - 1))) for _ in images[:2]]
    text = st.none() | st.text(st.characters(exclude_categories=["Cs"]))
    return Record(
        draw(st.text(st.characters(exclude_categories=["Cs"]))), tuple(turns), images, draw(text), draw(text), draw(text),
        tuple(draw(st.lists(words, max_size=3))), tuple(regions), draw(st.dictionaries(words, st.integers(-9, 9), max_size=2)),
    )  # fmt: skip


@given(records())
def test_reading_is_the_exact_inverse_of_writing(record: Record) -> None:
    assert from_json(json.loads(json.dumps(to_json(record)))) == record


def test_unset_fields_are_no_keys() -> None:
    turns = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]
    assert to_json(PLAIN) == {"id": "2", "conversations": turns}


def test_a_canonical_file_is_read_by_the_llava_format_with_all_its_fields(tmp_path: Path) -> None:
    assert write_records(tmp_path / "out.jsonl", [FULL, PLAIN]) == 2
    assert list(read_records(tmp_path / "out.jsonl")) == [FULL, PLAIN]
    rows = list(LlavaFormat().iter_rows(tmp_path / "out.jsonl"))
    assert all(isinstance(row, Row) for row in rows)
    assert [record_of(row) for row in rows if isinstance(row, Row)] == [FULL, PLAIN]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"id": None}, "id is missing"),
        ({"kind": 3}, "kind is a number 3"),
        ({"domain": []}, "domain is a list"),
        ({"options": ["a", 1]}, "options is"),
        ({"regions": [{"label": "cat", "box": [0, 0, 2, 1]}]}, "regions[0].box"),
        ({"regions": [{"label": "cat", "box": [0.5, 0, 0.2, 1]}]}, "expected x0 <= x1"),
        ({"regions": [{"label": "cat", "box": [0, 0, 1, 1], "image": 2}]}, "the record has 2 images"),
        ({"regions": [{"box": [0, 0, 1, 1]}]}, "regions[0] is"),
        ({"provenance": "coco"}, "provenance is a string"),
        ({"option": ["a"]}, 'Did you mean "options"?'),
        ({"images": ["a.png"]}, "the text has 2 <image> placeholders"),
        ({"conversations": []}, "conversations is a list"),
    ],
)
def test_a_wrong_field_is_an_error_that_names_it(change: dict[str, Any], field: str) -> None:
    with pytest.raises(DataError) as error:
        from_json(to_json(FULL) | change)
    assert field in str(error.value)


def test_a_record_that_cannot_train_is_not_written_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write_records(path, [PLAIN])
    with pytest.raises(DataError, match='record "x": the last of 1 turns'):
        write_records(path, [FULL, Record("x", (Turn("user", "?"),))])
    assert list(read_records(path)) == [PLAIN]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_damaged_line_is_an_error_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(json.dumps(to_json(PLAIN)) + '\n{"id": "3"}\n')
    with pytest.raises(DataError, match=r"out\.jsonl#1: conversations is missing"):
        list(read_records(path))
