"""Records -> files that train at once: LLaVA's JSON or JSONL, and Parquet with the pictures inside. Complete or absent."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

from vlit.data.record import META_KEYS, Record, check, to_json, write_records
from vlit.durable import replace_file, sync_folder
from vlit.errors import DataError

ROWS_PER_GROUP = 64
"""Rows of a Parquet row group: reading one picture decodes its group, so groups are small."""


def write_llava(path: Path, records: Iterable[Record]) -> int:
    """Write ``.jsonl`` (a record a line) or ``.json`` (one array); returns the number of records.

    Raises:
        DataError: a record cannot be trained on; nothing is written.
    """
    if path.suffix != ".json":
        return write_records(path, records)
    count = 0

    def chunks() -> Iterator[bytes]:
        nonlocal count
        for record in records:
            check(record)
            yield (b",\n" if count else b"[\n") + orjson.dumps(to_json(record))
            count += 1
        yield b"\n]\n" if count else b"[]\n"

    replace_file(path, chunks())
    return count


def write_parquet(path: Path, records: Iterable[Record], *, find_image: Callable[[str], Path]) -> int:
    """Write records with their pictures as ``images`` of bytes and path; the ``parquet`` format reads them back.

    Args:
        find_image: the file of an image reference.

    Raises:
        DataError: a record cannot be trained on, or a picture cannot be read; nothing is written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    turn = pa.struct([("from", pa.string()), ("value", pa.string())])
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("kind", pa.string()),
            ("conversations", pa.list_(turn)),
            ("images", pa.list_(image)),
            ("meta", pa.string()),
        ]
    )
    aside, count = _aside(path), 0
    try:
        with pq.ParquetWriter(aside, schema, compression="zstd") as writer:
            for rows in _groups(records, find_image):
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                count += len(rows)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(path.parent)
    return count


def _groups(records: Iterable[Record], find_image: Callable[[str], Path]) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    for record in records:
        check(record)
        held = to_json(record)
        meta = {key: held[key] for key in META_KEYS if key in held}
        rows.append(
            {
                "id": record.id,
                "kind": record.kind,
                "conversations": held["conversations"],
                "images": [{"bytes": _bytes(find_image(name), record), "path": name} for name in record.images],
                "meta": orjson.dumps(meta).decode() if meta else None,
            }
        )
        if len(rows) == ROWS_PER_GROUP:
            yield rows
            rows = []
    if rows:
        yield rows


def _bytes(file: Path, record: Record) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(
            f'record "{record.id}": {file} cannot be read ({error.strerror}). Name the image folder with --images.'
        ) from error


def _aside(path: Path) -> Path:
    if not path.parent.is_dir():
        raise DataError(f"{path.parent}: no such folder. Make it first.")
    return path.with_name(f".{path.name}.{os.getpid()}.writing")
