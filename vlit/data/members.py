"""Images inside of containers: ``shard.tar#a/1.jpg``, ``part.parquet#image:17``, ``LA.json#LA_IMG_1``.

A reference is the container's path, ``#``, and the member: a name in a tar, a key of a JSON object of base64 texts,
``column:row`` (``column:row:place`` in a column of lists) of a Parquet or Arrow file, or a key of a Parquet file of base64
texts (column ``base64``; keys are the index that pandas wrote, or the column ``id`` or ``key``). The first use of a member
copies it into the cache and everything behind (decoding, doctor, preview) sees an ordinary file. Copies are named by a hash,
so no name in a container decides where anything is written.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import hashlib
import json
import os
import re
import stat
import tarfile
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from vlit.data.cache import lock, writable_cache, write_atomically
from vlit.data.json_stream import iter_json_members
from vlit.errors import DataError

_REFERENCE = re.compile(r"(.+?\.(?:tar|json|parquet|arrow))#(.+)", re.IGNORECASE | re.DOTALL)
_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".avif")
_CELL = re.compile(r"([^:]+):(\d{1,12})(?::(\d{1,6}))?")
_KEYS = ("__index_level_0__", "id", "key")
_BASE64 = "base64"
_BATCH_ROWS = 64
MAX_MEMBER_BYTES = 256 << 20


class MissingMember(DataError):
    """The container is there, the member is not."""


class Member(NamedTuple):
    """A reference into a container."""

    container: str
    name: str


def split_member(image: str) -> Member | None:
    """The parts of a reference into a container; None for an ordinary path."""
    match = _REFERENCE.fullmatch(image) if "#" in image else None
    return None if match is None else Member(match[1], match[2])


def member_file(container: Path, name: str, *, cache_dir: str | None = None) -> Path:
    """A file that holds the member's bytes.

    Raises:
        DataError: the container is missing or damaged.
        MissingMember: it does not hold the member, or only a link, or more than ``MAX_MEMBER_BYTES``.
    """
    try:
        found = os.stat(container)
    except OSError as error:
        raise DataError(f"{container}: cannot be read ({error.strerror}). Check images: of its data source.") from error
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{container}: no regular file, so it holds no image {name!r}.")
    state = (found.st_size, found.st_mtime_ns)
    folder = _folder(os.path.abspath(container), state, cache_dir, os.environ.get("VLIT_CACHE"))
    target = _target(folder, name)
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            _copy(container, name, folder)
        except (OSError, tarfile.TarError) as error:
            raise DataError(f"{container}: member {name!r} cannot be read ({error}). Replace the file.") from error
    return target


@functools.lru_cache(maxsize=4096)
def _folder(container: str, state: tuple[int, int], cache_dir: str | None, environment: str | None) -> Path:
    """Where the copies of a container's members lie; another place as soon as the container (or ``$VLIT_CACHE``) changes."""
    identity = "\0".join([os.path.realpath(container), *map(str, state)])
    return writable_cache(cache_dir, "images") / hashlib.blake2b(os.fsencode(identity), digest_size=12).hexdigest()


def _target(folder: Path, name: str) -> Path:
    digest = hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()
    suffix = os.path.splitext(name)[1].lower()
    return folder / digest[:2] / (digest[2:] + (suffix if suffix in _SUFFIXES else ".bin"))


def _copy(container: Path, name: str, folder: Path) -> None:
    kind = container.suffix.lower()
    if kind == ".parquet" and not _CELL.fullmatch(name):
        _copy_keyed(container, name, folder)
        return
    if kind in (".parquet", ".arrow"):
        _copy_cells(container, name, folder)
        return
    place = _places(container, folder).get(name)
    if place is None:
        raise MissingMember(f"{container}: holds no image {name!r}. Check the record, or replace the file.")
    begin, size = place
    if size > MAX_MEMBER_BYTES:
        raise MissingMember(f"{container}: member {name!r} has {size:,} bytes, more than {MAX_MEMBER_BYTES:,}.")
    with container.open("rb") as file:
        file.seek(begin)
        content = file.read(size)
    if len(content) != size:
        raise DataError(f"{container}: the file ends inside of {name!r}. Copy or download it again.")
    if kind == ".json":
        with contextlib.suppress(orjson.JSONDecodeError):  # bytes are no text, which is said there
            content = orjson.loads(content)
        content = _decoded(content, container, name)
    _write(_target(folder, name), content)


def _decoded(text: Any, container: Path, name: str) -> bytes:
    try:
        text = text.split(",", 1)[1] if text.startswith("data:") else text
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{container}: {name!r} is not an image as base64 text ({error}). Replace the file.") from error


def _write(target: Path, content: bytes) -> None:
    target.parent.mkdir(exist_ok=True)
    aside = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        aside.write_bytes(content)
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


@functools.lru_cache(maxsize=64)
def _places(container: Path, folder: Path) -> dict[str, list[int]]:
    """Name -> [first byte, bytes] of every member (of Parquet: [row group]). Found once by going through the container, then
    kept in the cache.
    """
    held = folder / "places.json"
    with lock(folder / "places.lock"):
        if held.is_file():
            return json.loads(held.read_bytes())
        find = {".tar": tar_places, ".json": _json_places, ".parquet": _parquet_places}[container.suffix.lower()]
        places = find(container)
        write_atomically(held, json.dumps(places).encode())
    return places


def tar_places(container: Path) -> dict[str, list[int]]:
    """Members of an uncompressed tar that are regular files. Links and devices are no images, whatever they lead to."""
    with tarfile.open(container, "r:") as tar:
        return {member.name: [member.offset_data, member.size] for member in tar if member.isreg()}


def _json_places(container: Path) -> dict[str, list[int]]:
    return {key: [begin, len(value)] for key, begin, value in iter_json_members(container)}


def _parquet_places(container: Path) -> dict[str, list[int]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(container) as file:
        column = _key_column(file, container)
        places = {}
        for group in range(file.num_row_groups):
            for batch in file.iter_batches(row_groups=[group], columns=[column]):
                places.update({str(key): [group] for key in batch.column(0).to_pylist()})
    return places


def _key_column(file: Any, container: Path) -> str:
    """The column of keys of a ``ParquetFile`` whose pictures are found by key."""
    schema = file.schema_arrow
    written = [one for one in (schema.pandas_metadata or {}).get("index_columns", []) if isinstance(one, str)]
    column = next((name for name in (*written, *_KEYS) if name in schema.names), None)
    if column is None or _BASE64 not in schema.names:
        raise MissingMember(
            f"{container}: has the columns {', '.join(schema.names)[:200]}; pictures that are named by keys stand in a column "
            f"{_BASE64}, their keys in pandas' index or a column id or key. Others are written column:row."
        )
    return column


def _copy_keyed(container: Path, name: str, folder: Path) -> None:
    """The wanted picture and all of its row group, which is decoded as a whole anyway, a few rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        place = _places(container, folder).get(name)
        if place is None:
            raise MissingMember(f"{container}: holds no image {name!r}. Check the record, or replace the file.")
        with lock(folder / f"group-{place[0]}.lock"), pq.ParquetFile(container) as file:
            if _target(folder, name).is_file():  # another process copied the group meanwhile
                return
            columns = [_key_column(file, container), _BASE64]
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=place, columns=columns):
                for row in batch.to_pylist():
                    key = str(row[columns[0]])
                    if key != name and _target(folder, key).is_file():
                        continue
                    try:
                        _write(_target(folder, key), _decoded(row[_BASE64], container, key))
                    except DataError:
                        if key == name:
                            raise
    except (pa.ArrowException, ValueError, KeyError, OSError) as error:
        raise DataError(f"{container}: cannot be read ({error}). Copy or download it again.") from error


def _copy_cells(container: Path, name: str, folder: Path) -> None:
    """The wanted cell and its neighbours: a row group is decoded as a whole, so all of its images are copied at once."""
    column, row, _ = _cell(name, container)
    try:
        first, cells = _cells(container, column, row)
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise MissingMember(f"{container}: holds no image {name!r} ({error}).") from error
    for number, cell in enumerate(cells):
        values = cell if isinstance(cell, list) else [cell]
        for item, value in enumerate(values):
            content = value.get("bytes") if isinstance(value, dict) else value
            if isinstance(content, bytes):
                place = f"{column}:{first + number}" + (f":{item}" if isinstance(cell, list) else "")
                _write(_target(folder, place), content)
    if not _target(folder, name).is_file():
        raise MissingMember(f"{container}: {name!r} holds no image bytes. Check the record, or replace the file.")


def _cell(name: str, container: Path) -> tuple[str, int, int | None]:
    match = _CELL.fullmatch(name)
    if match is None:
        raise MissingMember(f"{container}: image {name!r} is not written as column:row.")
    return match[1], int(match[2]), None if match[3] is None else int(match[3])


def _cells(container: Path, column: str, row: int) -> tuple[int, list[Any]]:
    """First row and values of the row group (Parquet) or of the row itself (Arrow) that holds ``row``."""
    import pyarrow as pa

    if container.suffix.lower() == ".arrow":
        with pa.memory_map(str(container)) as file:
            table = pa.ipc.open_stream(file).read_all()
            if row >= len(table):
                raise IndexError(f"{len(table)} rows")
            return row, table.column(column).slice(row, 1).to_pylist()
    import pyarrow.parquet as pq

    with pq.ParquetFile(container) as file:
        first = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if row < first + count:
                return first, file.read_row_group(group, columns=[column]).column(column).to_pylist()
            first += count
    raise IndexError(f"{first} rows")
