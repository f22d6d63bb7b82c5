"""An append-only JSONL file that survives kills and power cuts: at most a torn last line, cut off at the next start.

One process writes a journal at a time (``flock``; the system releases it however the process ends). Appends from many
threads share their ``fsync`` (group commit), so a durable line costs a fraction of a disk flush.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from vlit.durable import make_folder, sync_folder
from vlit.errors import DataError, SynthError


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(byte offset, row) of every complete line. A torn end is skipped; a damaged line before others is a DataError."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file):
            row = _parse(line)
            if row is not None:
                yield offset, row
            elif file.peek(1) and file.read(1 << 20).strip(b"\0\n"):
                raise DataError(
                    f"{path}: line {number + 1} is damaged and others follow. Restore the file, or delete it to begin again."
                )
            else:
                return
            offset += len(line)


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


class Journal:
    """One journal, open for appending.

    Raises:
        SynthError: another process has it open.
        DataError: a line that is not the last is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        make_folder(path.parent)
        is_new = not path.exists()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            raise SynthError(
                f"{path}: another process is writing here. Wait for it, or choose another --out."
            ) from error
        if is_new:
            sync_folder(path.parent)
        self._end = 0
        self._synced = 0
        self._writing, self._syncing = threading.Lock(), threading.Lock()

    def recover(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Every row that is held, then cut off a torn end. Must be exhausted before the first append."""
        yield from read_rows(self.path)
        self._end = self._synced = _complete_bytes(self.path)
        os.ftruncate(self._descriptor, self._end)

    def append(self, row: dict[str, Any], *, durable: bool = True) -> int:
        """Add one line and return its offset; with ``durable`` it is on the disk when this returns."""
        line = orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
        with self._writing:
            offset, view = self._end, memoryview(line)
            while view:
                written = os.pwrite(self._descriptor, view, self._end)
                self._end += written
                view = view[written:]
            mine = self._end
        if durable:
            with self._syncing:
                if self._synced < mine:  # else another thread's flush took this line along
                    reached = self._end
                    os.fsync(self._descriptor)
                    self._synced = reached
        return offset

    def read(self, offset: int) -> dict[str, Any]:
        """The row at an offset that :meth:`append` or :meth:`recover` gave."""
        parts: list[bytes] = []
        while True:
            part = os.pread(self._descriptor, 1 << 16, offset)
            head, newline, _ = part.partition(b"\n")
            parts.append(head)
            if newline or not part:
                return dict(orjson.loads(b"".join(parts)))
            offset += len(part)

    def close(self) -> None:
        """Flush and release the lock."""
        if self._descriptor >= 0:
            os.fsync(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1


def _complete_bytes(path: Path) -> int:
    """Length of the part of a journal that consists of complete rows."""
    end = 0
    with path.open("rb") as file:
        for line in file:
            if _parse(line) is None:
                break
            end += len(line)
    return end
