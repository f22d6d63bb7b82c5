"""Tables of conversations: Parquet and Arrow files, pictures as bytes or paths. What ``parquet`` and ``hf_datasets`` share.

Read in small batches. A picture that is stored as bytes is referred to by its place, ``part.parquet#image:17``
(:mod:`vlit.data.members`), and copied out when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

from vlit.data.formats._chat import plain_turns, with_system
from vlit.data.formats._reader import RecordFormat, text_of, turns_of, with_pictures
from vlit.data.record import KEYS, META_KEYS, Record, meta_fields, meta_of
from vlit.data.record_checks import BadRecord, identity_of, kind_of, read_turns, refuse_other_media, shown, text_field
from vlit.errors import DataError
from vlit.types import Role, Turn

BATCH_ROWS = 64
_PAIRS = ("user", "assistant")


class TableFormat(RecordFormat):
    """Rows of a table as records."""

    conversations: str = ""
    """Column of the turns. Empty: `conversations`, `messages` or `texts`, whichever is there."""
    question: str = "question"
    """Column of the question, in tables without turns."""
    answer: str = "answer"
    """Column of the answer, in tables without turns. Of a list, the first one."""
    image: str = ""
    """Column of the picture or pictures. Empty: `images` or `image`, the first that holds any."""

    def entries(self, path: Path) -> Iterator[Any]:
        """The rows of all files; pictures are replaced by references."""
        root = path if path.is_dir() else path.parent
        for file in self.files(path):
            for number, row in enumerate(rows_of(file)):
                column = self.picture_column(row)
                try:
                    found = [] if column is None else _references(row[column], column, number, file.relative_to(root))
                except BadRecord as bad:
                    yield bad
                    continue
                yield self.with_references(row, column, found)

    def picture_column(self, row: dict[str, Any]) -> str | None:
        """The column that holds a row's pictures; where all are empty the first of them."""
        there = [name for name in (self.image, "images", "image") if name and name in row]
        return next((name for name in there if row[name] not in (None, [])), there[0] if there else None)

    @staticmethod
    def with_references(row: dict[str, Any], column: str | None, found: list[str]) -> dict[str, Any]:
        """The row with references in place of its pictures."""
        return {**row, **({} if column is None else {column: None}), "pictures": found}

    def to_record(self, entry: Any, number: int, path: Path) -> Record:
        """Turns, or a question and an answer, with the pictures of the row."""
        refuse_other_media(entry)
        images: list[str] = entry["pictures"]
        identity = identity_of(entry, number)
        names = (self.conversations,) if self.conversations else ("conversations", "messages", "texts")
        key = next((name for name in names if entry.get(name) is not None), None)
        if key is None:
            turns: tuple[Turn, ...] = (
                Turn("user", self._cell(entry, self.question)),
                Turn("assistant", self._cell(entry, self.answer)),
            )
        else:
            roles, texts, inline = _turns(entry, key)
            turns, images = turns_of(roles, texts), images or inline
        optional = meta_fields(_meta(entry, len(images)))
        kind = text_field(entry, "kind")
        return Record(identity, with_pictures(turns, len(images)), tuple(images), kind=kind, **optional)

    def _cell(self, entry: dict[str, Any], column: str) -> str:
        value = entry.get(column)
        return text_of({column: value[0] if isinstance(value, list) and value else value}, column)


def rows_of(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file or Arrow stream.

    Raises:
        DataError: the file cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if file.suffix.lower() == ".parquet":
            with pq.ParquetFile(file) as parquet:
                for batch in parquet.iter_batches(batch_size=BATCH_ROWS):
                    yield from batch.to_pylist()
        else:
            with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as stream:
                for batch in stream:
                    for first in range(0, len(batch), BATCH_ROWS):
                        yield from batch.slice(first, BATCH_ROWS).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read as a table ({error}). Copy or download it again.") from error


def _references(value: Any, column: str, row: int, file: Path) -> list[str]:
    listed = isinstance(value, list)
    return pictures_of(value, column, lambda _, n: f"{file.as_posix()}#{column}:{row}" + (f":{n}" if listed else ""))


def pictures_of(value: Any, column: str, name_of_bytes: Callable[[bytes, int], str]) -> list[str]:
    """References of the picture or pictures of a cell: paths as they are, of bytes (and their place) what ``name_of_bytes``
    calls them."""
    found = []
    for place, one in enumerate(value if isinstance(value, list) else [value]):
        if one is None:
            continue
        content, path = (one.get("bytes"), one.get("path")) if isinstance(one, dict) else (one, one)
        if isinstance(content, bytes):
            found.append(name_of_bytes(content, place))
        elif isinstance(path, str):
            found.append(path)
        else:
            raise BadRecord(f"{column} is {kind_of(one)} {shown(one)}, expected bytes or a path", "image_path")
    return found


def _turns(entry: dict[str, Any], key: str) -> tuple[list[Role], list[str], list[Any]]:
    """Roles and texts of a row's turns, and references of pictures that stand in them."""
    turns = entry[key]
    first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
    if all(name in first for name in _PAIRS):  # {"user", "assistant"} pairs, as The Cauldron has them
        names = ("human", "gpt")
        flat = [
            {"from": name, "value": pair.get(part) if isinstance(pair, dict) else None}
            for pair in turns
            for name, part in zip(names, _PAIRS, strict=True)
        ]
        return *read_turns({key: flat}, key=key), []
    speaker, text = ("role", "content") if "role" in first else ("from", "value")
    turns, inline = plain_turns(turns, speaker=speaker, text=text)
    turns = with_system(entry, turns, speaker=speaker, text=text)
    return *read_turns({**entry, key: turns}, key=key, speaker=speaker, text=text), inline


def _meta(entry: dict[str, Any], num_images: int) -> dict[str, Any] | None:
    """Optional fields, which our own writer keeps as JSON in ``meta``; another table's column of that name is left alone."""
    held = entry.get("meta")
    if not isinstance(held, str):
        return None
    try:
        value = orjson.loads(held)
    except orjson.JSONDecodeError:
        return None
    ours = isinstance(value, dict) and all(key in META_KEYS for key in value) and all(key in KEYS for key in value)
    return meta_of(value, num_images) if ours else None
