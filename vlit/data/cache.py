"""Where dataset indexes are kept, also on machines whose home folder cannot be written, and how several processes share it."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from vlit.errors import DataError


def cache_folder(cache_dir: str | None) -> Path:
    """``cache_dir``, else ``$VLIT_CACHE``, else ``~/.cache/vlit``."""
    return Path(cache_dir or os.environ.get("VLIT_CACHE") or Path.home() / ".cache" / "vlit").expanduser()


def writable_cache(cache_dir: str | None, room: str) -> Path:
    """The folder ``room`` of the cache, made if needed. Where nobody named a cache and the home folder cannot be written
    (containers, batch systems), a folder of this user under the system's temporary one, and a line that says so.

    Raises:
        DataError: the named cache cannot be written; names the setting.
    """
    folder = cache_folder(cache_dir) / room
    reason = _make(folder)
    if reason is None:
        return folder
    if cache_dir or os.environ.get("VLIT_CACHE"):
        setting = "data.cache_dir" if cache_dir else "$VLIT_CACHE"
        raise DataError(f"{setting}: the cache folder {folder} cannot be written ({reason}). Name another folder.")
    user = os.getuid() if hasattr(os, "getuid") else os.getpid()
    aside = Path(tempfile.gettempdir()) / f"vlit-{user}" / room
    if reason_aside := _make(aside):
        raise DataError(
            f"neither {folder} ({reason}) nor {aside} ({reason_aside}) can be written. Set data.cache_dir or $VLIT_CACHE."
        )
    _say(f"note: {folder} cannot be written ({reason}); indexes are kept in {aside}. Set data.cache_dir to keep them.")
    return aside


def _make(folder: Path) -> str | None:
    """Make ``folder``, readable by its owner alone when new; the reason when it cannot be made or written."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.mkdir(exist_ok=True)
    except OSError as error:
        return error.strerror or str(error)
    shared = hasattr(os, "getuid") and folder.parent.name == f"vlit-{os.getuid()}"
    if shared and folder.parent.lstat().st_uid != os.getuid():
        return "it belongs to another user"
    return None if os.access(folder, os.W_OK) else "Permission denied"


@lru_cache(maxsize=8)
def _say(line: str) -> None:
    print(line, file=sys.stderr)


def write_atomically(path: Path, content: bytes) -> None:
    """Write aside, then rename: whole or absent."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    aside.write_bytes(content)
    os.replace(aside, path)


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Exclusive among the processes of this machine. Freed by the system when its holder dies."""
    with path.open("w") as file:
        # systems and file systems without locks: the rename still keeps the result whole
        with contextlib.suppress(OSError, ImportError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
