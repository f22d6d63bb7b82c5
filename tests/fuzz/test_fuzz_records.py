"""Dataset files of any bytes and any JSON: a DataError, or rows that keep every promise and miss no record."""

from __future__ import annotations

import contextlib
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from tests.data_fixtures import conversation, make_spec
from tests.fuzz.common import Property, mutated, peak_memory
from tests.tiny import build_tokenizer
from vlit.config.schema import DataConfig, DataSource
from vlit.data import json_stream
from vlit.data.formats._base import BadRow, Row
from vlit.data.formats.llava import LlavaFormat
from vlit.data.source import open_source
from vlit.data.tokenize import SampleTokenizer
from vlit.errors import DataError
from vlit.types import IGNORE_INDEX

TOKENS = (
    b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"NaN", b"-Infinity", b"1e999", b"9" * 400, b"[" * 3000, b'{"a":' * 3000, b"\\ud800",
    b'"', b"\\", b"\\u0000", b",,", b"]", b"}", b"[", b"{", b"\n", b"\r", b"\xc3", b"\xed\xa0\x80", b"<image>",
    b'"id":1,"id":2,', b'"image":"../../x",', b'"image":"file:///etc/passwd",', b'"conversations":null,', b"null", b"true",
    b"//x\n", b"\xe2\x80\xa8",
)  # fmt: skip
GOOD = [
    {"id": "a", "image": "a.png", "conversations": conversation("<image>\nWhat?", "This.")},
    {
        "id": 2,
        "images": ["a.png", "b/c.png"],
        "kind": "k",
        "conversations": conversation("<image> <image>", "A", "B", "C"),
    },
    {"conversations": [{"from": "system", "value": "s"}, *conversation('say "\\"\n[,]{}', "é \u2028 \U0001f600")]},
]
FILES = (
    json.dumps(GOOD).encode(), json.dumps(GOOD, indent=1, ensure_ascii=False).encode(),
    "".join(json.dumps(record) + "\n" for record in GOOD).encode(), json.dumps(GOOD).encode("utf-16"),
)  # fmt: skip

words = st.sampled_from(
    ["human", "gpt", "system", "user", "bot", "", " ", "<image>", "a.png", "../a", "http://h/x", "\0", "é"]
)
leaf = st.none() | st.booleans() | st.integers() | st.floats() | words | st.text(max_size=6)
anything = st.recursive(
    leaf,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
turn = st.fixed_dictionaries({}, optional={"from": words | anything, "value": words | anything}) | anything
image = words | st.lists(words | anything, max_size=3) | anything
record = (
    st.fixed_dictionaries(
        {"conversations": st.lists(turn, max_size=4) | anything},
        optional={"id": anything, "image": image, "images": image, "kind": anything},
    )
    | st.sampled_from(GOOD)
    | anything
)


@contextlib.contextmanager
def file_of(content: bytes, name: str = "f.json") -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        yield path


def check_row(row: Row | BadRow) -> None:
    if isinstance(row, BadRow):
        assert row.reason
        assert len(row.reason) < 1000
        assert "\n" not in row.reason
        return
    assert len(row.roles) == len(row.texts) > 1
    assert row.roles[-1] == "assistant"
    assert all(text.strip() for text in row.texts)
    asked = sum(text.count("<image>") for role, text in zip(row.roles, row.texts, strict=True) if role == "user")
    assert asked == len(row.images) == sum(text.count("<image>") for text in row.texts)
    assert all(image and ".." not in image.split("/") and "\0" not in image for image in row.images)


def rows_of(content: bytes, *, chunk: int = 1 << 20) -> list[Row | BadRow] | None:
    """Rows of a file of ``content``; None when the file as a whole is refused."""
    held, json_stream.CHUNK_BYTES = json_stream.CHUNK_BYTES, chunk
    rows, message = None, ""
    try:
        with file_of(content) as path:
            rows = list(LlavaFormat().iter_rows(path))
    except DataError as error:
        message = str(error)
    finally:
        json_stream.CHUNK_BYTES = held
    if rows is None:
        assert "f.json: " in message
        return None
    assert [row.record for row in rows] == list(range(len(rows)))
    for row in rows:
        check_row(row)
    return rows


def check_bytes(case: tuple[bytes, int]) -> None:
    content, chunk = case
    rows = rows_of(content, chunk=chunk)
    assert rows == rows_of(content), "the size of the chunks changes nothing"
    try:
        whole = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return  # what is in a broken file is not defined; that no other exception came out is all
    if isinstance(whole, list):
        assert rows is not None
        assert len(rows) == len(whole), "a record was skipped or invented"


def check_records(case: tuple[list[Any], bool]) -> None:
    records, lines = case
    if lines:
        content = "".join(json.dumps(record) + "\n" for record in records).encode()
        if not records or isinstance(records[0], list):
            return  # an empty file; a line that looks like an array of records
    else:
        content = json.dumps(records).encode()
    rows = rows_of(content)
    assert rows is not None
    assert len(rows) == len(records)
    for row, value in zip(rows, records, strict=True):
        if isinstance(row, Row):
            assert isinstance(value, dict)
            assert row.texts == [turn["value"] for turn in value["conversations"]]


@cache
def tokenizer() -> SampleTokenizer:
    folder = build_tokenizer(Path(tempfile.mkdtemp(prefix="vlit-fuzz-")))
    return SampleTokenizer(make_spec(str(folder)), DataConfig(max_tokens=64))


def check_source(content: bytes) -> None:
    """The whole way: index, quarantine, samples, tokens."""
    with file_of(content, "d.json") as path:
        data = DataConfig(cache_dir=str(path.parent / "c"), on_bad_sample="quarantine", quarantine_budget=1.0)
        rows = rows_of(content)
        good = None if rows is None else [row for row in rows if isinstance(row, Row)]
        source, message = None, ""
        try:
            source = open_source(DataSource(path=str(path)), data=data, seed=0, progress=False)
        except DataError as error:
            message = str(error)
        if source is None:  # the folder holds no images, so records with images end the opening too
            assert not good or any(row.images for row in good), message
            return
        assert good is not None
        assert rows is not None
        assert (len(source), source.num_quarantined) == (len(good), len(rows) - len(good))
        for index, row in enumerate(good):
            sample = source.sample(index)
            assert [turn.text for turn in sample.turns] == row.texts
            with contextlib.suppress(DataError):
                tokens = tokenizer().tokenize(sample)
                assert tokens.num_label_tokens > 0
                assert len(tokens) <= 64
                assert (tokens.labels[:-1][tokens.is_image[1:]] == IGNORE_INDEX).all()


PROPERTIES = [
    Property(
        "records: damaged bytes",
        st.tuples(mutated(st.sampled_from(FILES), tokens=TOKENS), st.integers(1, 64)),
        check_bytes,
        300,
    ),
    Property("records: any JSON", st.tuples(st.lists(record, max_size=5), st.booleans()), check_records, 200),
    Property("records: any bytes", st.tuples(st.binary(max_size=80), st.integers(1, 8)), check_bytes, 100),
    Property("records: index to tokens", mutated(st.sampled_from(FILES), tokens=TOKENS), check_source, 60),
]


@pytest.mark.parametrize("fuzz", PROPERTIES, ids=lambda fuzz: fuzz.name)
def test_records(fuzz: Property):
    before = peak_memory()
    assert fuzz.run() > fuzz.examples // 2
    assert peak_memory() - before < 300 << 20
