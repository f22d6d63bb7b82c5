"""Files that are complete or absent: written aside, flushed to the disk, renamed.

A reader never sees half a file, and after a power cut the name holds the old content or the new one. ``fsync`` of the folder
makes the rename itself durable; without it a file system may forget the new name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> str:
    """Write and flush one file that nobody reads yet; returns the sha256 of what was written."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def replace_file(path: Path, content: str | bytes | Iterable[bytes]) -> None:
    """Give ``path`` this content in one step. Its folder must exist; chunks are written as they come."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.writing")
    if isinstance(content, str):
        content = content.encode()
    try:
        write_file(aside, [content] if isinstance(content, bytes) else content)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(path.parent)


def replace_folder(aside: Path, final: Path) -> None:
    """Give the finished folder ``aside`` the name ``final``; a folder of that name is replaced.

    Its files must have been flushed (:func:`write_file`, :func:`sync_tree`). A kill between the two renames leaves the old
    folder under ``.<name>.old``; :func:`recover_folder` brings it back.
    """
    old = final.with_name(f".{final.name}.old")
    sync_folder(aside)
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.rename(final, old)
    try:
        os.rename(aside, final)
    except OSError:
        recover_folder(final)
        raise
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def make_folder(folder: Path) -> None:
    """Create a folder with its parents so that a power cut does not take their names back."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for created in missing:
        sync_folder(created.parent)


def recover_folder(final: Path) -> None:
    """Undo a replacement that was killed between its renames."""
    old = final.with_name(f".{final.name}.old")
    if old.is_dir() and not final.exists():
        os.rename(old, final)


def sync_tree(folder: Path) -> None:
    """Flush every file below ``folder`` and the folders themselves."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written below ``folder`` (or its nearest existing parent)."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def bytes_below(folder: Path) -> int:
    """Bytes of the files in a folder and below, which others may be changing; 0 without one."""
    total = 0
    with contextlib.suppress(OSError):
        for path in folder.rglob("*"):
            with contextlib.suppress(OSError):
                total += path.stat().st_size if path.is_file() else 0
    return total


def describe_os_error(error: OSError, folder: Path, needed: int | None = None) -> str:
    """One line for a failed write: what the system said, and how much room there was and is needed."""
    free = f"{free_bytes(folder) / 1e9:,.2f} GB free"
    wanted = f", {needed / 1e9:,.2f} GB needed" if needed is not None else ""
    return f"{folder}: {error.strerror or error} ({free}{wanted})"


def plain(value: Any) -> Any:
    """``value`` as JSON would give it back (tuples become lists), for comparing with what was read."""
    return json.loads(json.dumps(value))


def sealed(content: dict[str, Any]) -> str:
    """JSON text of ``content`` with a checksum of itself under ``sha256``."""
    return json.dumps({**content, "sha256": _json_sha256(plain(content))}, indent=2)


def read_sealed(path: Path) -> dict[str, Any]:
    """What :func:`sealed` wrote.

    Raises:
        OSError, ValueError: the file cannot be read, or is not what was written.
    """
    held = json.loads(path.read_bytes())
    if not isinstance(held, dict) or held.pop("sha256", None) != _json_sha256(held):
        raise ValueError(f"{path.name} does not match its checksum")
    return held


def _json_sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
