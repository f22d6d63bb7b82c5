"""Damaged dataset files and records: all named at once, none dropped in silence, no other record touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data_fixtures import conversation, make_spec, write_dataset
from tests.data_fixtures import tokenizer_dir as tokenizer_dir
from vlit.config.schema import DataConfig, DataSource
from vlit.data.images import load_view
from vlit.data.load import StepLoader
from vlit.data.mixture import Mixture
from vlit.data.source import RecordSource, open_source
from vlit.data.tokenize import SampleTokenizer
from vlit.errors import DataError


def opened(path: Path, *, policy: str = "error", budget: float = 1.0, manifest: Path | None = None) -> RecordSource:
    data = DataConfig(cache_dir=str(path.parent / "cache"), on_bad_sample=policy, quarantine_budget=budget)
    return open_source(DataSource(path=str(path)), data=data, seed=0, quarantine_path=manifest, progress=False)


def refusal_of(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        opened(path)
    return str(caught.value)


def test_a_missing_file_is_named_and_nothing_is_created(tmp_path: Path):
    assert "nowhere.json: cannot be read (No such file or directory)" in refusal_of(tmp_path / "nowhere.json")
    assert list(tmp_path.rglob("*.arrow")) == []


def test_a_file_cut_off_at_any_byte_is_refused_with_the_byte_or_lacks_nothing(tmp_path: Path):
    whole = json.dumps([{"id": n, "conversations": conversation("q[,]", 'a"{')} for n in range(3)], indent=1).encode()
    path = tmp_path / "data.json"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        message = refusal_of(path)
        assert "data.json" in message
        assert "is empty" in message or ("the file ends inside record" in message and "starts at byte" in message)
        assert list(tmp_path.rglob("*.arrow")) == [], f"an index was left for a file cut off at byte {length}"
    path.write_bytes(whole)
    assert len(opened(path)) == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"not json at all\n", r"data\.json#0: the record is not valid JSON"),
        (b"\x89PNG\r\n\x1a\n\0\0", r"#0: the record is not valid JSON"),
        ('[{"id": 1}]'.encode("utf-16"), r"not UTF-8 text .*Save it as UTF-8"),
        (b'{"data": [\n {"id": 1}\n]}', r"one JSON object over several lines"),
        (b'{"data": [{"id": 1}]}', r"conversations is missing.*has the keys data"),
        (b'[{"id": 1}}', r"closed by \} at byte 10"),
        (b"null", r"#0: the record is null"),
        (b"[]", r"no valid record \(0 bad ones\)"),
    ],
    ids=["text", "binary", "utf-16", "object over lines", "object on a line", "wrong bracket", "null", "empty array"],
)  # fmt: skip
def test_a_file_of_another_kind_says_what_it_is_and_what_is_expected(tmp_path: Path, content: bytes, words: str):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"(?s)data\.json.*{words}"):
        opened(path)


def test_lines_and_an_array_of_the_same_records_are_the_same_dataset(tmp_path: Path):
    records = json.loads(write_dataset(tmp_path, 30).read_text())
    (tmp_path / "lines.jsonl").write_text("\n\n".join(json.dumps(record) for record in records))
    (tmp_path / "blanks.json").write_text(" " * 5000 + json.dumps(records))
    array, lines, blanks = (opened(tmp_path / name) for name in ("data.json", "lines.jsonl", "blanks.json"))
    assert len(array) == len(lines) == len(blanks) == 30
    for index in range(30):
        same = [(s.id, s.turns, s.images) for s in (array.sample(index), lines.sample(index), blanks.sample(index))]
        assert same[0] == same[1] == same[2]


GOOD = {"id": "good", "conversations": conversation("q", "a")}
BAD: list[tuple[str, dict[str, Any] | str, str]] = [
    # id, the record's own fields, what the line about it must say
    ("no turns", {}, "conversations is missing"),
    ("null turns", {"conversations": None}, "conversations is missing"),
    ("wrong turns", {"conversations": "hi"}, "conversations is a string"),
    ("empty turns", {"conversations": []}, "conversations is a list, expected a list of turns"),
    ("bot", {"conversations": [{"from": "bot", "value": "q"}]}, "turn 0 is from 'bot'"),
    ("no value", {"conversations": [*conversation("q"), {"from": "gpt"}]}, "turn 1 (gpt) has the value null"),
    ("number", {"conversations": [*conversation("q"), {"from": "gpt", "value": 7}]}, "turn 1 (gpt) has the value a number"),
    ("gpt first", {"conversations": conversation("q", "a")[::-1]}, "turn 0 is from gpt, expected human"),
    ("two humans", {"conversations": conversation("q", "a")[:1] * 2}, "turn 1 is from human, expected gpt"),
    ("odd", {"conversations": conversation("q", "a", "q")}, "the last of 3 turns is not from gpt"),
    ("empty answer", {"conversations": conversation("q", "")}, "turn 1 (gpt) is empty"),
    ("blank answer", {"conversations": conversation("q", " \n\t")}, "turn 1 (gpt) is empty"),
    ("no image", {"conversations": conversation("<image>\nq", "a")}, "1 <image> placeholder, the record lists 0 images"),
    ("unused image", {"image": "a", "conversations": conversation("q", "a")}, "0 <image> placeholders, the record lists 1"),
    ("more", {"image": "a", "conversations": conversation("<image><image>", "a")}, "2 <image> placeholders, the record"),
    ("fewer", {"image": ["a", "b"], "conversations": conversation("<image>", "a")}, "1 <image> placeholder, the record"),
    ("in answer", {"image": "a", "conversations": conversation("q", "<image>")}, "turn 1 (assistant) holds <image>"),
    ("outside", {"image": "../a", "conversations": conversation("<image>", "a")}, "leaves the image folder"),
]  # fmt: skip


def bad_dataset(tmp_path: Path) -> Path:
    """Every kind of bad record, each after a good one: records 1, 3, 5, ... are bad."""
    records: list[Any] = []
    for name, fields, _ in BAD:
        records += [GOOD, {"id": name, **fields}]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    return path


def test_all_bad_records_are_listed_together_each_with_number_id_field_and_value(tmp_path: Path):
    lines = refusal_of(bad_dataset(tmp_path)).split("\n")
    assert lines[0] == (
        f"data.json: {len(BAD)} of {2 * len(BAD)} records are bad. Fix them, or set data.on_bad_sample: quarantine "
        "(now: error; 0 quarantined so far)."
    )
    assert len(lines) == 1 + len(BAD)
    for number, (line, (name, _, words)) in enumerate(zip(lines[1:], BAD, strict=True)):
        assert line.startswith(f'  data.json#{2 * number + 1} (id "{name}"): ')
        assert words in line


def test_of_very_many_bad_records_the_first_are_listed_and_all_are_counted(tmp_path: Path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([GOOD, *({"id": n} for n in range(300))]))
    lines = refusal_of(path).split("\n")
    assert "300 of 301 records are bad" in lines[0]
    assert len(lines) == 52
    assert lines[-1].strip() == "and 250 more; vlit doctor lists all"


def test_quarantine_counts_every_bad_record_and_keeps_every_good_one_whole(tmp_path: Path):
    manifest = tmp_path / "quarantine.jsonl"
    source = opened(bad_dataset(tmp_path), policy="quarantine", manifest=manifest)
    assert (len(source), source.num_quarantined) == (len(BAD), len(BAD))
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [(row["record"], row["id"]) for row in rows] == [(2 * n + 1, name) for n, (name, *_) in enumerate(BAD)]
    for index in range(len(source)):
        assert [turn.text for turn in source.sample(index).turns] == ["q", "a"]


def test_a_bad_record_in_the_middle_shifts_no_other_records_pictures(
    tmp_path: Path, tokenizer_dir: Callable[[str], str]
):
    path = write_dataset(tmp_path, 24)
    records = json.loads(path.read_text())
    records[7]["conversations"][0]["value"] += " <image>"  # more placeholders than pictures
    records[8]["image"] = [records[8]["image"], "img/0.png"]  # more pictures than placeholders
    (tmp_path / "img" / "broken.png").write_bytes(b"<html>")
    records[10]["image"] = ["img/broken.png", "img/1.png"]  # found only while loading
    path.write_text(json.dumps(records))
    data = DataConfig(
        template="llama3", cache_dir=str(tmp_path / "c"), on_bad_sample="quarantine", quarantine_budget=0.5
    )
    source = open_source(DataSource(path=str(path)), data=data, seed=0, progress=False)
    tokenizer = SampleTokenizer(make_spec(tokenizer_dir("llama3")), data)
    loader = StepLoader(
        Mixture([source], seed=0), tokenizer, data, global_batch=12, micro_batch_tokens=2000, total_steps=2, num_workers=0
    )  # fmt: skip
    by_id = {record["id"]: record for record in records}
    seen, views = [], 0
    for step in loader:
        for micro in step.micro_batches:
            pixels = list(micro.pixels.numpy())
            for name in micro.sample_ids:
                images = by_id[name].get("image", [])
                for image in [images] if isinstance(images, str) else images:
                    expected = load_view(tmp_path / image, policy="pad", spec=tokenizer.spec)
                    np.testing.assert_array_equal(pixels.pop(0), expected, err_msg=name)
                    views += 1
                seen.append(name)
            assert pixels == []
    assert set(seen) == set(by_id) - {"r7", "r8", "r10"}
    assert views > 15


def test_a_missing_picture_is_named_with_its_record_and_resolved_path(tmp_path: Path):
    path = write_dataset(tmp_path, 20)
    (tmp_path / "img" / "2.png").unlink()
    message = refusal_of(path)
    assert 'data.json#2 (id "r2")' in message
    assert str(tmp_path / "img" / "2.png") in message


def test_equal_ids_and_one_picture_in_many_records_are_all_kept_in_the_same_order_each_time(tmp_path: Path):
    write_dataset(tmp_path, 1)
    path = tmp_path / "same.json"
    records = [
        {"id": "x", "image": "img/0.png", "conversations": conversation(f"<image> {n}", f"a{n}")} for n in range(9)
    ]
    path.write_text(json.dumps(records))
    orders = []
    for _ in range(2):
        source = opened(path)
        mixture = Mixture([source], seed=3)
        orders.append([source.sample(mixture.record(n)[1]).turns[1].text for n in range(9)])
    assert sorted(orders[0]) == [f"a{n}" for n in range(9)]
    assert orders[0] == orders[1]


def test_an_index_that_lost_its_end_is_built_again(tmp_path: Path):
    path = write_dataset(tmp_path, 50)
    opened(path)
    (index,) = tmp_path.rglob("*.arrow")
    whole = index.read_bytes()
    for damage in (whole[: len(whole) // 2], b""):
        index.write_bytes(damage)
        assert opened(path).sample(49).id == "r49"
        assert index.read_bytes() == whole
    description = index.with_suffix(".json")
    description.write_text(description.read_text()[:40])
    assert opened(path).sample(49).id == "r49"
