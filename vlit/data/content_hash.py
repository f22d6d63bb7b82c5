"""What a dataset is, as one hash: the content of its files, read again only when one of them may have changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from vlit.data.cache import write_atomically
from vlit.data.progress import phase
from vlit.errors import DataError

_CHUNK = 8 << 20


def content_hash_of(path: Path, files: Sequence[Path], folder: Path, *, progress: bool) -> str:
    """blake2b of a dataset's files (of several: of names and hashes, in order). Remembered in ``folder`` by (name, inode,
    size, change time) of each, which any write to a file alters.

    Raises:
        DataError: a file is missing, or a folder where the format wants a file.
    """
    if not files:
        raise DataError(f"{path}: holds no file that this format reads. Check data path and format.")
    stats = [_stat(file) for file in files]
    resolved = str(path.resolve())
    marks = [
        [str(f.resolve()), s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for f, s in zip(files, stats, strict=True)
    ]
    signature = marks[0] if files[0] == path and len(files) == 1 else [resolved, _digest(json.dumps(marks).encode())]
    memo = folder / f"{hashlib.blake2b(resolved.encode(), digest_size=16).hexdigest()}.hash"
    with contextlib.suppress(OSError, ValueError, KeyError):
        held = json.loads(memo.read_bytes())
        if held["signature"] == signature:
            return str(held["hash"])
    total = sum(found.st_size for found in stats)
    with phase(f"hash {path.name}", total=total, unit="bytes", show=progress and total > 64 << 20) as report:
        hashes = [_hash(file, report) for file in files]
    single = len(files) == 1 and files[0] == path
    names = [os.path.relpath(file, path if path.is_dir() else path.parent) for file in files]
    result = hashes[0] if single else _digest(json.dumps([names, hashes]).encode())
    with contextlib.suppress(OSError):
        write_atomically(memo, json.dumps({"signature": signature, "hash": result}).encode())
    return result


def _stat(file: Path) -> os.stat_result:
    try:
        found = file.stat()
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read ({error.strerror}). Check data path and working directory ({Path.cwd()})."
        ) from error
    if not stat.S_ISREG(found.st_mode) and not file.is_dir():
        raise DataError(f"{file}: is no regular file (a pipe or a device). Write its content to a file and name that.")
    if file.is_dir():
        raise DataError(f"{file}: is a folder, expected a .json or .jsonl file. Name the file in it.")
    return found


def _hash(path: Path, report: Callable[[int], object]) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            report(len(chunk))
    return digest.hexdigest()


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=32).hexdigest()
