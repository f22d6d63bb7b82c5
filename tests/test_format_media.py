"""What a record shows or says beside its turns is kept, or the record is refused under its own name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data_fixtures import conversation
from tests.test_format_shapes import exchange, read
from vlit.data.doctor.checks import CHECKS
from vlit.data.formats._base import BadRow, Row
from vlit.registry import FORMATS

HTML = ("Explain <video> and <source>.", "Fix this:\n<video>\n<source src='a.mp4'>\n</video>", "<video> is what?")


def rows_of(name: str, folder: Path, records: list[dict[str, Any]]) -> list[Row | BadRow]:
    path = folder / ("a.parquet" if name == "parquet" else "a.json")
    if name == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text(json.dumps(records))
    return list(FORMATS.get(name)(type=name).iter_rows(path))


@pytest.mark.parametrize("name", ["llava", "sharegpt", "lamm", "parquet"])
def test_records_about_videos_and_point_clouds_are_counted_as_such(name: str, tmp_path: Path) -> None:
    empty = {"id": "x", "video": None, "videos": [], "pcl": None, "image": None}
    other = [{"video": "a.mp4"}, {"videos": ["a.mp4"]}, {"pcl": "a.npy"}, {"video": "a.mp4", "image": "a.jpg"}]
    records = [{**empty, **one, "conversations": conversation("What happens?", "Rain.")} for one in (*other, {})]
    placeholders = ["<video>\nWhat happens?", "What happens?\n<video>", "\n<video>\n"]
    records += [{**empty, "conversations": conversation(text, "Rain.")} for text in (*placeholders, *HTML)]
    rows = rows_of(name, tmp_path, records)
    assert [row.check if isinstance(row, BadRow) else "" for row in rows] == [
        "video", "video", "point_cloud", "video", "", "video", "video", "video", "", "", "",
    ]  # fmt: skip
    assert {row.check for row in rows if isinstance(row, BadRow)} <= CHECKS.keys()
    assert isinstance(rows[0], BadRow)
    assert rows[0].reason == "video: the record shows the video 'a.mp4', no picture"


def test_a_video_as_a_part_of_a_message_is_counted_as_one(tmp_path: Path) -> None:
    parts = [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "What happens?"}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Rain."}]
    (row,) = rows_of("sharegpt", tmp_path, [{"messages": chat}])
    assert isinstance(row, BadRow)
    assert row.check == "video"


@pytest.mark.parametrize("name", ["sharegpt", "parquet"])
def test_a_system_text_beside_the_turns_is_the_first_turn(name: str, tmp_path: Path) -> None:
    turns = conversation("q", "a")
    records = [{"system": text, "conversations": turns} for text in ("Be brief.", "", None, " ")]
    rows = rows_of(name, tmp_path, records)
    assert [(row.roles[0], row.texts[0]) for row in rows if isinstance(row, Row)] == [
        ("system", "Be brief."), ("user", "q"), ("user", "q"), ("user", "q"),
    ]  # fmt: skip
    twice = {"system": "Be brief.", "conversations": [{"from": "system", "value": "Be long."}, *turns]}
    (bad,) = rows_of(name, tmp_path, [twice])
    assert isinstance(bad, BadRow)
    assert bad.reason == "system is given twice, beside the turns and as the first of them"


def test_a_chat_s_system_text_stands_before_role_and_content_too(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "a.json").write_text(json.dumps([{"system": "Be brief.", "messages": chat}]))
    assert exchange(read("sharegpt", tmp_path / "a.json")[0]) == ["Be brief.", "q", "a"]
