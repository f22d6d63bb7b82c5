"""Processes that die in the middle of writing: at the k-th operation that changes the disk, for every k.

The process is a fork of the test, so each point costs milliseconds. ``power_cut`` also takes from every new file what was not
flushed to the disk before, which a kill alone leaves in the system's memory.
"""

from __future__ import annotations

import builtins
import io
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

OPERATIONS = ("fsync", "rename", "replace", "unlink", "remove", "rmdir", "mkdir", "truncate")
"""Functions of ``os``. ``shutil.rmtree`` and ``Path`` call them."""


class _Written:
    """A file open for writing; half of what is written may be all that comes to the disk."""

    def __init__(self, file: Any, killer: Killer) -> None:
        self._file, self._killer = file, killer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Written:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        if self._killer.is_next():
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            self._killer.die()
        return int(self._file.write(data))

    def flush(self) -> None:
        self._killer.point()
        self._file.flush()


class Killer:
    """Installs itself in this process for good. ``at`` None counts the points without dying."""

    def __init__(self, root: Path, at: int | None, *, power_cut: bool) -> None:
        self.root, self.at, self.power_cut, self.passed = root, at, power_cut, 0
        self.safe = {path.stat().st_ino for path in root.rglob("*") if path.is_file()}
        for name in OPERATIONS:
            setattr(os, name, self._watched(getattr(os, name)))
        real = io.open

        def opened(file: Any, mode: str = "r", *words: Any, **named: Any) -> Any:
            if not set(mode) & set("wxa+") or isinstance(file, int):
                return real(file, mode, *words, **named)
            self.point()
            handle = real(file, mode, *words, **named)
            self.safe.discard(os.fstat(handle.fileno()).st_ino)
            return _Written(handle, self)

        io.open = builtins.open = opened

    def is_next(self) -> bool:
        self.passed += 1
        return self.passed == self.at

    def point(self) -> None:
        if self.is_next():
            self.die()

    def die(self) -> None:
        if self.power_cut:
            for path in self.root.rglob("*"):
                if path.is_file() and path.stat().st_ino not in self.safe:
                    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
        os.kill(os.getpid(), signal.SIGKILL)

    def _watched(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *words: Any, **named: Any) -> Any:
            self.point()
            if real.__name__ in ("unlink", "remove"):  # its number may soon be another file's
                self.safe.discard(os.stat(first, dir_fd=named.get("dir_fd"), follow_symlinks=False).st_ino)
            result = real(first, *words, **named)
            if real.__name__ == "fsync":
                self.safe.add(os.fstat(first).st_ino)
            return result

        return call


def points_of(action: Callable[[], object], root: Path) -> int:
    """How many points ``action`` passes, done once in a fork."""
    reading, writing = os.pipe()
    status = _fork(action, Killer, root, None, False, report_to=writing)
    os.close(writing)
    assert status == 0, f"the action failed: {status}"
    with os.fdopen(reading) as pipe:
        return int(pipe.read())


def dies_at(point: int, action: Callable[[], object], root: Path, *, power_cut: bool) -> None:
    """Do ``action`` in a fork that is killed at ``point``."""
    status = _fork(action, Killer, root, point, power_cut)
    assert status == -signal.SIGKILL, f"point {point} was not reached or the action failed: {status}"


def _fork(
    action: Callable[[], object],
    killer: type[Killer],
    root: Path,
    at: int | None,
    power_cut: bool,
    report_to: int | None = None,
) -> int:
    child = os.fork()
    if child == 0:
        try:
            installed = killer(root, at, power_cut=power_cut)
            action()
            if report_to is not None:
                os.write(report_to, str(installed.passed).encode())
            os._exit(0)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
