"""The target of coverage-guided fuzzing: bytes in, records out. Imports nothing heavy, since every import is instrumented."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from vlit.data import json_stream
from vlit.data.formats._base import BadRow, Row
from vlit.data.formats.llava import LlavaFormat
from vlit.errors import DataError

_FOLDER = Path(tempfile.mkdtemp(prefix="vlit-guided-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
_GOOD = [
    {
        "id": "a",
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "é"}],
    },
    {"id": 2, "images": ["a", "b"], "kind": "k", "conversations": [{"from": "user", "value": '"\\"[,]{}'}]},
]


def seeds() -> Path:
    """A folder with valid files to start from."""
    folder = _FOLDER / "seeds"
    folder.mkdir()
    (folder / "array").write_text(json.dumps(_GOOD), encoding="utf-8")
    (folder / "indented").write_text(json.dumps(_GOOD, indent=1, ensure_ascii=False), encoding="utf-8")
    (folder / "lines").write_text("".join(json.dumps(record) + "\n" for record in _GOOD), encoding="utf-8")
    return folder


def rows_of(content: bytes, *, chunk: int) -> list[Row | BadRow] | None:
    path = _FOLDER / "f.json"
    path.write_bytes(content)
    json_stream.CHUNK_BYTES = chunk
    try:
        return list(LlavaFormat().iter_rows(path))
    except DataError:
        return None


def check_bytes(content: bytes) -> None:
    """The same rows for any size of chunks, and none missing when the file is an array that Python's json reads."""
    rows = rows_of(content, chunk=1 << 20)
    assert rows == rows_of(content, chunk=1 + len(content) % 7)
    try:
        whole = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return
    if isinstance(whole, list):
        assert rows is not None
        assert len(rows) == len(whole)
