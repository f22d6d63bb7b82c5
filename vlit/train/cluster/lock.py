"""One run per output folder: a lock in ``<output_dir>/.lock``, held by rank 0 for as long as the run lives.

The lock is a POSIX record lock (``fcntl.lockf``), not ``flock``: children do not inherit it, so the data workers of a killed
run do not hold on to it, and NFS carries it. The kernel releases it when the process dies, hence a crash never leaves a lock
behind on the same host. Some shared file systems do not carry locks between hosts (Lustre without ``-o flock``, some FUSE
mounts); therefore the holder also touches the file every ten seconds, and whoever finds the name of another host in it watches
that heartbeat for a while before taking over.

Limit: on a file system without locks, two runs that start within the same moment may both take the folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from vlit.errors import CheckpointError
from vlit.train.cluster.peers import is_running
from vlit.train.distributed import Ranks

LOCK_FILE = ".lock"
_HELD: set[Path] = set()  # a process does not conflict with its own record locks


class OutputLock:
    """Context manager; raises on every rank when the folder belongs to another run or cannot be written.

    Args:
        heartbeat_s: how often the holder touches the file; a run on another host watches it for two and a half times as long.

    Raises:
        CheckpointError: names the process, host and start time of the run that holds the folder.
    """

    def __init__(self, output_dir: Path, ranks: Ranks, *, heartbeat_s: float = 10.0) -> None:
        self.path, self.ranks, self.heartbeat_s = output_dir / LOCK_FILE, ranks, heartbeat_s
        self._file: int | None = None
        self._released = threading.Event()

    def __enter__(self) -> OutputLock:
        problem, note = "", ""
        if self.ranks.is_main:
            try:
                note = self._take()
            except CheckpointError as error:
                problem = str(error)
        problem = self.ranks.share(problem)
        if problem:
            raise CheckpointError(problem)
        if note:
            print(note, file=sys.stderr)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._file is None:
            return
        self._released.set()
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, 0)  # empty: released in order. The file stays, since unlinking it would race
        with contextlib.suppress(OSError):
            os.close(self._file)
        self._file = None
        _HELD.discard(self.path.resolve())

    def _take(self) -> str:
        """Take the folder on rank 0; returns a line to print, if there is something to say."""
        folder = self.path.parent
        if self.path.resolve() in _HELD:
            raise CheckpointError(f"{folder}: this very process already has a run in it. Use another output_dir.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(
                f"output_dir {folder}: cannot be written by user {os.getuid()} ({error.strerror}). Make it writable, or set "
                "output_dir to a folder that is."
            ) from error
        try:
            note = self._claim(folder)
        except CheckpointError:
            os.close(self._file)
            self._file = None
            raise
        _HELD.add(self.path.resolve())
        threading.Thread(target=self._touch, name="vlit-lock-heartbeat", daemon=True).start()
        return note

    def _claim(self, folder: Path) -> str:
        assert self._file is not None
        locks_work = True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise CheckpointError(_refusal(folder, self._holder())) from error
            locks_work = False  # the file system has no locks; the heartbeat alone decides
        holder, note = self._holder(), ""
        if holder and not (locks_work and holder.get("host") == socket.gethostname()):
            if self._heartbeat_moves(holder):
                raise CheckpointError(_refusal(folder, holder))
            note = f"{folder}: {_who(holder)} gave no sign of life for {2.5 * self.heartbeat_s:g} s; taking over."
        elif holder:
            note = f"{folder}: {_who(holder)} is no longer running; taking over its folder."
        mine = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "command": shlex.join(sys.argv),
        }
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(mine).encode(), 0)
        os.fsync(self._file)
        return note

    def _holder(self) -> dict[str, Any]:
        """What the last holder wrote; empty when it released the lock in order."""
        assert self._file is not None
        try:
            held = json.loads(os.pread(self._file, 1 << 16, 0) or b"{}")
        except ValueError:
            held = {"pid": "unknown"}
        return held if isinstance(held, dict) else {"pid": "unknown"}

    def _heartbeat_moves(self, holder: dict[str, Any]) -> bool:
        """Whether the holder is alive, seen from here: its process, when it is of this host, else the file's time."""
        assert self._file is not None
        if holder.get("host") == socket.gethostname() and isinstance(holder.get("pid"), int):
            return is_running(holder["pid"])
        print(f"{self.path.parent}: watching whether {_who(holder)} is alive", file=sys.stderr)
        before, until = os.stat(self.path).st_mtime_ns, time.monotonic() + 2.5 * self.heartbeat_s
        while time.monotonic() < until:
            time.sleep(min(1.0, self.heartbeat_s / 4))
            if os.stat(self.path).st_mtime_ns != before:
                return True
        return False

    def _touch(self) -> None:
        while not self._released.wait(self.heartbeat_s):
            with contextlib.suppress(OSError, TypeError):
                assert self._file is not None
                os.utime(self._file)


def _who(holder: dict[str, Any]) -> str:
    known = {key: holder.get(key, "unknown") for key in ("pid", "host", "started", "command")}
    return "the run of pid {pid} on host {host}, started {started} ({command})".format(**known)


def _refusal(folder: Path, holder: dict[str, Any]) -> str:
    return (
        f"output_dir {folder} is in use by {_who(holder)}. Wait for it or end it (kill {holder.get('pid', 'PID')} on that "
        "host saves a checkpoint), or use another output_dir."
    )
