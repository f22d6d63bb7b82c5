"""Columnar index of a dataset file: built once, memory-mapped ever after.

A row of the Arrow file is one valid record in canonical form (id, kind, images, turns). Workers share its pages through
the page cache and hold no Python object per record, so their memory does not grow (pains A-59, A-61). The cache key is
the content of the source file, the format's config and the index version; the file is written aside and renamed, so a
killed build leaves nothing behind that could be taken for an index.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlit.data.cache import lock, writable_cache, write_atomically
from vlit.data.content_hash import content_hash_of
from vlit.data.formats._base import BadRow, FormatConfig, Row, place_of
from vlit.data.progress import phase
from vlit.errors import DataError

INDEX_VERSION = 2
ROWS_PER_BATCH = 2048
_MAX_CHARACTERS = 128 << 20


@dataclass(frozen=True)
class IndexInfo:
    """What is known of an index without opening it."""

    path: str  # the Arrow file
    num_records: int  # good ones
    num_bad: int
    num_with_images: int
    content_hash: str
    bad: list[dict[str, Any]] = field(default_factory=list)  # record, id, reason, check; at most MAX_BAD_KEPT


MAX_BAD_KEPT = 100_000
MAX_BAD_LISTED = 50


def build_or_open_index(
    path: Path,
    *,
    format: FormatConfig,
    cache_dir: str | None,
    stop_at_first_bad: bool,
    progress: bool,
) -> IndexInfo:
    """The index of ``path``; built if the cache does not hold it. Processes that want the same one wait for the first.

    Raises:
        DataError: the file cannot be read, holds no valid record, or (``stop_at_first_bad``) has bad ones. The file is read
            to its end all the same, so that one message lists them all.
    """
    folder = writable_cache(cache_dir, "index")
    content_hash = content_hash_of(path, format.files(path), folder, progress=progress)
    identity = json.dumps([INDEX_VERSION, content_hash, format.model_dump(mode="json")], sort_keys=True)
    base = folder / hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
    info = _read_info(base)
    if info is None:
        with lock(base.with_suffix(".lock")):
            info = _read_info(base)  # another process may have built it while this one waited
            if info is None:
                info = _build(path, base, format=format, content_hash=content_hash, progress=progress)
    if stop_at_first_bad and info.num_bad:
        raise _bad_records_error(path, info)
    return info


def _bad_records_error(path: Path, info: IndexInfo) -> DataError:
    """The error that bad records raise under ``data.on_bad_sample: error``: one line each, none left for the next run."""
    lines = _listed(path, info.bad, info.num_bad)
    remedy = "or set data.on_bad_sample: quarantine (now: error; 0 quarantined so far)."
    if info.num_bad == 1:
        return DataError(f"{lines[0]}. Fix the record, {remedy}")
    head = f"{path.name}: {info.num_bad} of {info.num_bad + info.num_records} records are bad. Fix them, {remedy}"
    return DataError("\n  ".join([head, *lines]))


def _listed(path: Path, bad_rows: list[dict[str, Any]], num_bad: int) -> list[str]:
    """A line for each of the first ``MAX_BAD_LISTED`` bad records, and one for the number of the others."""
    shown = bad_rows[:MAX_BAD_LISTED]
    lines = [f"{place_of(path, bad['record'], bad['id'])}: {bad['reason']}" for bad in shown]
    return [*lines, f"and {num_bad - len(shown)} more; vlit doctor lists all"] if num_bad > len(shown) else lines


class ArrowRows:
    """Random access to the rows of an index. Opened on first use, in whichever process uses it; pickles as its path."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._dataset: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_dataset": None}

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self._open()[row]

    def table(self) -> Any:
        """All rows as a memory-mapped pyarrow table: record, id, kind, images, turns."""
        import pyarrow as pa

        with pa.memory_map(self.path) as file:
            return pa.ipc.open_stream(file).read_all()

    def first_images(self) -> np.ndarray:
        """int64 [rows]: equal for rows whose first image reference is the same, -1 for rows without an image."""
        import pyarrow as pa
        import pyarrow.compute as pc

        parts = []
        for chunk in self._open().data.column("images").chunks:
            has_image = pc.greater(pc.list_value_length(chunk), 0)
            first = pc.if_else(has_image, chunk.offsets.slice(0, len(chunk)), None)
            parts.append(chunk.values.take(first))
        codes = pa.chunked_array(parts, pa.string()).combine_chunks().dictionary_encode().indices
        return codes.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)

    def _open(self) -> Any:
        if self._dataset is None:
            from datasets import Dataset

            self._dataset = Dataset.from_file(self.path)
        return self._dataset


def _build(path: Path, base: Path, *, format: FormatConfig, content_hash: str, progress: bool) -> IndexInfo:
    import pyarrow as pa

    schema = pa.schema(
        [
            ("record", pa.int64()),
            ("id", pa.string()),
            ("kind", pa.string()),
            ("images", pa.list_(pa.string())),
            ("turns", pa.list_(pa.struct([("role", pa.string()), ("text", pa.string())]))),
        ]
    )
    aside = base.with_name(f"{base.name}.{os.getpid()}.tmp")
    counts = {"rows": 0, "bad": 0, "with_images": 0}
    bad_rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    try:
        with (
            phase(f"index {path.name}", total=None, unit="records", show=progress) as report,
            aside.open("wb") as file,
            pa.ipc.new_stream(file, schema) as writer,
        ):

            def keep_bad(bad: BadRow) -> None:
                counts["bad"] += 1
                if len(bad_rows) < MAX_BAD_KEPT:
                    bad_rows.append(bad._asdict())

            for rows in _batches(format.iter_rows(path), keep_bad):
                writer.write_batch(_record_batch(rows, schema))
                counts["rows"] += len(rows)
                counts["with_images"] += sum(1 for row in rows if row.images)
                report(len(rows))
        if not counts["rows"]:
            head = f"{path}: no valid record ({counts['bad']} bad ones). Check the file."
            raise DataError("\n  ".join([head, *_listed(path, bad_rows, counts["bad"])]))
        arrow = base.with_suffix(".arrow")
        size = aside.stat().st_size
        os.replace(aside, arrow)
    except OSError as error:
        raise DataError(
            f"{aside}: the index of {path.name} cannot be written ({error.strerror}). Make room there, or set data.cache_dir."
        ) from error
    finally:
        aside.unlink(missing_ok=True)
    meta = {
        "source": str(path.resolve()),
        "content_hash": content_hash,
        "bytes": size,
        "num_records": counts["rows"],
        "num_bad": counts["bad"],
        "num_with_images": counts["with_images"],
        "seconds": round(time.perf_counter() - started, 2),
        "bad": bad_rows,
    }
    write_atomically(base.with_suffix(".json"), json.dumps(meta).encode())
    info = _read_info(base)
    if info is None:
        raise DataError(f"{base}.json: written but not readable. Check the disk under data.cache_dir.")
    return info


def _batches(rows: Iterator[Row | BadRow], on_bad: Callable[[BadRow], None]) -> Iterator[list[Row]]:
    held: list[Row] = []
    characters = 0  # a column of a batch must stay below 2 GiB
    for row in rows:
        if isinstance(row, BadRow):
            on_bad(row)
            continue
        held.append(row)
        characters += sum(map(len, row.texts))
        if len(held) == ROWS_PER_BATCH or characters > _MAX_CHARACTERS:
            yield held
            held, characters = [], 0
    if held:
        yield held


def _record_batch(rows: list[Row], schema: Any) -> Any:
    """Columns from flat lists: about ten times faster than nested Python objects."""
    import pyarrow as pa

    def offsets(lengths: Iterator[int]) -> Any:
        total, ends = 0, [0]
        for length in lengths:
            total += length
            ends.append(total)
        return pa.array(ends, pa.int32())

    turns = pa.StructArray.from_arrays(
        [
            pa.array([role for row in rows for role in row.roles], pa.string()),
            pa.array([text for row in rows for text in row.texts], pa.string()),
        ],
        fields=list(schema.field("turns").type.value_type),
    )
    return pa.record_batch(
        [
            pa.array([row.record for row in rows], pa.int64()),
            pa.array([row.id for row in rows], pa.string()),
            pa.array([row.kind for row in rows], pa.string()),
            pa.ListArray.from_arrays(
                offsets(len(row.images) for row in rows), pa.array([i for row in rows for i in row.images], pa.string())
            ),
            pa.ListArray.from_arrays(offsets(len(row.texts) for row in rows), turns),
        ],
        schema=schema,
    )


def _read_info(base: Path) -> IndexInfo | None:
    """None unless both files of a finished index are there and whole, else it is built again. The description is written
    last, so it is the done-mark.
    """
    meta_path, arrow = base.with_suffix(".json"), base.with_suffix(".arrow")
    try:
        meta = json.loads(meta_path.read_bytes())
        if arrow.stat().st_size != meta["bytes"]:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return IndexInfo(
        path=str(arrow),
        num_records=meta["num_records"],
        num_bad=meta["num_bad"],
        num_with_images=meta["num_with_images"],
        content_hash=meta["content_hash"],
        bad=meta["bad"],
    )
