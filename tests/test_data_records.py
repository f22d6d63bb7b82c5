"""Reading LLaVA files: the JSON splitter, validation, the index and its cache, quarantine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data_fixtures import conversation, write_dataset
from vlit.config.schema import DataConfig, DataSource
from vlit.data import json_stream
from vlit.data.formats._base import BadRow, Row
from vlit.data.formats.llava import LlavaFormat
from vlit.data.json_stream import iter_json_records
from vlit.data.source import RecordSource, open_source
from vlit.errors import DataError

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(st.sampled_from('ab"\\[]{},é \n\u2028'), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("xy\"\\'{", max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    records=st.lists(json_values, max_size=6), indent=st.none() | st.integers(0, 3), chunk=st.integers(1, 40),
    bom=st.booleans(), ascii_only=st.booleans(),
)  # fmt: skip
def test_an_array_splits_into_the_records_json_reads(
    tmp_path_factory: pytest.TempPathFactory,
    records: list[Any],
    indent: int | None,
    chunk: int,
    bom: bool,
    ascii_only: bool,
):
    path = tmp_path_factory.mktemp("split") / "a.json"
    text = ("\ufeff" if bom else "") + " \n" + json.dumps(records, indent=indent, ensure_ascii=ascii_only) + "\n "
    path.write_text(text, encoding="utf-8")
    before, json_stream.CHUNK_BYTES = json_stream.CHUNK_BYTES, chunk
    try:
        assert [json.loads(raw) for raw in iter_json_records(path)] == records
    finally:
        json_stream.CHUNK_BYTES = before


def test_lines_are_records_and_blank_lines_are_not(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": "[,]"}')
    assert [json.loads(raw) for raw in iter_json_records(path)] == [{"a": 1}, {"a": "[,]"}]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["is empty"]),
        (b" \n ", ["is empty"]),
        (b'[{"a": 1}, {"b": "x', ["ends inside record 1", "cut off"]),
        (b'[{"a": 1}] [2]', ["ends after 1 records", "more text follows"]),
        (b'[{"a": 1},, {}]', ["record 1 is empty", "comma"]),
        (b'{\n "data": []\n}', ["one JSON object", "array of records"]),
        (b'[{"a": 1},]', ["record 1 is empty", "comma"]),
    ],
)
def test_a_broken_file_names_the_place_and_the_remedy(tmp_path: Path, content: bytes, words: list[str]):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(iter_json_records(path))
    for word in ["broken.json", *words]:
        assert word in str(caught.value)


def parse(record: Any, **options: Any) -> Row | BadRow:
    return LlavaFormat(**options).parse(7, json.dumps(record).encode())


def test_all_accepted_spellings_give_one_canonical_row():
    row = parse({"image": "a.jpg", "conversations": conversation("<image>\nWhat?", "This.")})
    assert row == Row(7, "7", None, ["user", "assistant"], ["<image>\nWhat?", "This."], ["a.jpg"])
    turns = [{"from": "user", "value": "q <image> and <image>"}, {"from": "assistant", "value": "a"}]
    row = parse({"id": 12, "kind": "k", "images": ["a.jpg", "b/c.png"], "conversations": turns})
    assert row == Row(7, "12", "k", ["user", "assistant"], ["q <image> and <image>", "a"], ["a.jpg", "b/c.png"])
    row = parse(
        {"id": "x", "image": None, "conversations": [{"from": "system", "value": "s"}, *conversation("q", "a")]}
    )
    assert row == Row(7, "x", None, ["system", "user", "assistant"], ["s", "q", "a"], [])


def test_image_first_moves_a_single_placeholder_as_llava_does():
    row = parse({"image": "a.jpg", "conversations": conversation("What?\n<image>", "This.")}, image_first=True)
    assert row.texts[0] == "<image>\nWhat?"
    row = parse({"image": ["a", "b"], "conversations": conversation("<image> or <image>?", "This.")}, image_first=True)
    assert row.texts[0] == "<image> or <image>?"


BAD: list[tuple[Any, str]] = [
    ([1], "the record is a list, expected an object"),
    ({"id": [1], "conversations": conversation("q", "a")}, "id is a list"),
    ({"id": 1}, "conversations is missing"),
    ({"id": 1, "conversations": []}, "conversations is a list, expected a list of turns"),
    ({"id": 1, "conversations": ["q"]}, "turn 0 is a string"),
    ({"id": 1, "conversations": [{"from": "bot", "value": "q"}]}, "turn 0 is from 'bot'"),
    ({"id": 1, "conversations": [{"from": "human"}]}, "has the value null"),
    ({"id": 1, "conversations": conversation("q", "")}, "turn 1 (gpt) is empty"),
    ({"id": 1, "conversations": conversation("q", " \n")}, "turn 1 (gpt) is empty"),
    ({"id": 1, "conversations": conversation("q", "a", "q")}, "the last of 3 turns is not from gpt"),
    ({"id": 1, "conversations": conversation("q", "a")[::-1]}, "turn 0 is from gpt, expected human"),
    ({"id": 1, "conversations": [*conversation("q", "a"), {"from": "system", "value": "s"}]}, "turn 2 is from system"),
    ({"id": 1, "conversations": conversation("<image>\nq", "a")}, "1 <image> placeholder, the record lists 0 images"),
    (
        {"id": 1, "image": "a", "conversations": conversation("q", "a")},
        "0 <image> placeholders, the record lists 1 image",
    ),
    ({"id": 1, "image": "a", "conversations": conversation("q", "<image>")}, "turn 1 (assistant) holds <image>"),
    ({"id": 1, "image": 3, "conversations": conversation("<image>", "a")}, "image is a number"),
    ({"id": 1, "image": [""], "conversations": conversation("<image>", "a")}, "image path is ''"),
    ({"id": 1, "image": "../a", "conversations": conversation("<image>", "a")}, "leaves the image folder"),
    ({"id": 1, "image": "x/../../a", "conversations": conversation("<image>", "a")}, "leaves the image folder"),
    ({"id": 1, "image": "http://h/a.jpg", "conversations": conversation("<image>", "a")}, "is not a file path"),
    ({"id": 1, "image": "a", "images": ["a"], "conversations": conversation("<image>", "a")}, "both image and images"),
    ({"id": 1, "kind": 3, "conversations": conversation("q", "a")}, "kind is a number"),
]


@pytest.mark.parametrize(("record", "reason"), BAD, ids=range(len(BAD)))
def test_a_bad_record_says_what_is_wrong(record: Any, reason: str):
    row = parse(record)
    assert isinstance(row, BadRow)
    assert reason in row.reason


def test_nan_and_lone_surrogates_are_bad_records_not_crashes():
    for raw in (b'{"id": NaN}', b'{"id": "\\ud800"}', b'{"id": 1'):
        row = LlavaFormat().parse(0, raw)
        assert isinstance(row, BadRow)
        assert "not valid JSON" in row.reason


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    return DataConfig(cache_dir=str(tmp_path / "cache"), on_bad_sample="error")


def opened(path: Path, data: DataConfig, **options: Any) -> RecordSource:
    manifest = options.pop("quarantine_path", None)
    return open_source(
        DataSource(path=str(path), **options), data=data, seed=0, quarantine_path=manifest, progress=False
    )


def test_index_gives_back_every_record(tmp_path: Path, data: DataConfig):
    path = write_dataset(tmp_path, 5000)  # more than two record batches
    source = opened(path, data)
    records = json.loads(path.read_text())
    assert len(source) == len(records) == 5000
    for index in (0, 1, 2047, 2048, 2049, 4095, 4096, 4999):
        sample, record = source.sample(index), records[index]
        assert sample.id == record["id"]
        assert sample.kind == record["kind"]
        assert [turn.text for turn in sample.turns] == [turn["value"] for turn in record["conversations"]]
        image = record.get("image", [])
        assert list(sample.images) == ([image] if isinstance(image, str) else image)
    assert source.place(17) == 'data.json#17 (id "r17")'
    with pytest.raises(IndexError, match="5000 records"):
        source.sample(5000)


def test_a_second_opening_reuses_the_index_and_changed_content_does_not(tmp_path: Path, data: DataConfig):
    path = write_dataset(tmp_path, 20)
    index_folder = tmp_path / "cache" / "index"
    opened(path, data)
    (first,) = index_folder.glob("*.arrow")
    built = first.stat().st_mtime_ns
    opened(path, data)
    path.rename(tmp_path / "renamed.json")
    assert len(opened(tmp_path / "renamed.json", data)) == 20
    assert [file.stat().st_mtime_ns for file in index_folder.glob("*.arrow")] == [built]
    write_dataset(tmp_path, 21)
    assert len(opened(path, data)) == 21
    opened(path, data, format={"type": "llava", "image_first": True})
    assert len(list(index_folder.glob("*.arrow"))) == 3
    assert not list(index_folder.glob("*.tmp"))


def test_a_killed_build_leaves_nothing_that_looks_like_an_index(tmp_path: Path, data: DataConfig):
    path = write_dataset(tmp_path, 3000)
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from vlit.data import index\n"
        "from vlit.data.formats.llava import LlavaFormat\n"
        "whole = index._record_batch\n"
        "def dying(rows, schema):\n"
        "    if rows[0].record: os._exit(9)\n"
        "    return whole(rows, schema)\n"
        "index._record_batch = dying\n"
        "index.build_or_open_index(Path(sys.argv[1]), format=LlavaFormat(), cache_dir=sys.argv[2],\n"
        "    stop_at_first_bad=True, progress=False)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(path), str(data.cache_dir)], cwd=Path(__file__).parent.parent
    )
    assert run.returncode == 9
    assert not list((tmp_path / "cache" / "index").glob("*.arrow"))
    assert len(opened(path, data)) == 3000


def spoil(path: Path, *numbers: int) -> Path:
    """Take the image of some records away."""
    records = json.loads(path.read_text())
    for number in numbers:
        assert records[number].pop("image")
    path.write_text(json.dumps(records))
    return path


def test_error_policy_refuses_a_bad_record_with_the_documented_sentence(tmp_path: Path, data: DataConfig):
    path = spoil(write_dataset(tmp_path, 20), 10)
    expected = (
        'data.json#10 (id "r10"): the text has 2 <image> placeholders, the record lists 0 images. Fix the record, or set '
        "data.on_bad_sample: quarantine (now: error; 0 quarantined so far)."
    )
    for _ in range(2):  # the second time too
        with pytest.raises(DataError) as caught:
            opened(path, data)
        assert str(caught.value) == expected


def test_quarantine_lists_bad_records_and_keeps_the_others(tmp_path: Path, data: DataConfig):
    path = spoil(write_dataset(tmp_path, 40), 10, 12)
    data = data.model_copy(update={"on_bad_sample": "quarantine", "quarantine_budget": 0.1})
    manifest = tmp_path / "out" / "quarantine.jsonl"
    for _ in range(2):  # opening again does not double the lines
        source = opened(path, data, quarantine_path=manifest)
        rows = [json.loads(line) for line in manifest.read_text().splitlines()]
        assert [(row["source"], row["record"], row["id"]) for row in rows] == [("data", 10, "r10"), ("data", 12, "r12")]
    assert len(source) == 38
    assert source.num_quarantined == 2
    assert source.sample(10).id == "r11"
    assert source.place(10) == 'data.json#11 (id "r11")'
    with pytest.raises(DataError, match=r"data\.json#10"):  # the cached index does not hide them from the other policy
        opened(path, data.model_copy(update={"on_bad_sample": "error"}))


def test_a_budget_that_is_exceeded_names_the_counts(tmp_path: Path, data: DataConfig):
    path = spoil(write_dataset(tmp_path, 40), 10, 12)
    data = data.model_copy(update={"on_bad_sample": "quarantine", "quarantine_budget": 0.04})
    with pytest.raises(DataError, match=r"2 of 40 records are quarantined \(5\.00%\).*4\.00%.*record 10"):
        opened(path, data)


def test_max_records_draws_once_and_follows_the_seed(tmp_path: Path, data: DataConfig):
    path = write_dataset(tmp_path, 100)

    def ids(seed: int) -> list[str]:
        source = open_source(DataSource(path=str(path), max_records=30), data=data, seed=seed, progress=False)
        return [source.sample(index).id for index in range(len(source))]

    assert len(ids(0)) == len(set(ids(0))) == 30
    assert ids(0) == ids(0) != ids(1)


def test_missing_things_are_named_before_training(tmp_path: Path, data: DataConfig):
    with pytest.raises(DataError, match=r"nowhere\.json: cannot be read \(No such file"):
        opened(tmp_path / "nowhere.json", data)
    with pytest.raises(DataError, match="is a folder"):
        opened(tmp_path, data)
    path = write_dataset(tmp_path, 20)
    with pytest.raises(DataError, match=r"image folder .*photos does not exist"):
        opened(path, data, images=str(tmp_path / "photos"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"16 of 16 images looked for do not exist, for example data\.json#0"):
        opened(path, data, images=str(tmp_path / "empty"))
    (tmp_path / "img" / "0.png").unlink()
    with pytest.raises(DataError, match=r"images looked for do not exist, for example .*0\.png"):
        opened(path, data)
    quarantine = data.model_copy(update={"on_bad_sample": "quarantine"})
    assert len(opened(path, quarantine)) == 20  # some are there: they are sorted out while loading
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps([{"id": 1}]))
    with pytest.raises(DataError, match=r"no valid record \(1 bad ones\).*\n.*conversations is missing"):
        opened(bad, quarantine)


def test_processes_that_want_the_same_index_build_it_once(tmp_path: Path, data: DataConfig):
    path = write_dataset(tmp_path, 3000)
    program = (
        "import sys\n"
        "from vlit.config.schema import DataConfig, DataSource\n"
        "from vlit.data.source import open_source\n"
        "data = DataConfig(cache_dir=sys.argv[2])\n"
        "print(len(open_source(DataSource(path=sys.argv[1]), data=data, seed=0, progress=False)))\n"
    )
    command = [sys.executable, "-c", program, str(path), str(data.cache_dir)]
    root = Path(__file__).parent.parent
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root, env={**os.environ}) for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in both] == ["3000", "3000"]
    assert len(list((tmp_path / "cache" / "index").glob("*.arrow"))) == 1
