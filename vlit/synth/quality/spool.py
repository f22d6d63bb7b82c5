"""Arrays that grow on the disk and are read back as one, so that a scan holds one chunk whatever the number of records."""

from __future__ import annotations

import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
_job: Callable[..., Any] | None = None
_shared: tuple[Any, ...] = ()


class Spool:
    """Rows of one dtype and width in a temporary file that has no name after :meth:`array`."""

    def __init__(self, folder: Path, dtype: Any, width: int = 1) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed with the object
        self._dtype, self._width = np.dtype(dtype), width

    def add(self, rows: np.ndarray) -> None:
        """Append rows."""
        self._file.write(np.ascontiguousarray(rows, self._dtype).tobytes())

    def array(self) -> np.ndarray:
        """All rows, mapped from the disk: [N], or [N, width]."""
        self._file.flush()
        size = self._file.seek(0, 2) // self._dtype.itemsize
        if not size:
            held = np.zeros(0, self._dtype)
        else:
            held = np.memmap(self._file, self._dtype, "r", shape=(size,))
        return held if self._width == 1 else held.reshape(-1, self._width)


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of ``size`` items, the last one shorter."""
    source = iter(items)
    while part := list(islice(source, size)):
        yield part


def _start(job: Callable[..., Any], shared: tuple[Any, ...]) -> None:
    global _job, _shared
    _job, _shared = job, shared
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next task for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(task: Any) -> Any:
    assert _job is not None
    return _job(task, *_shared)


def in_order(job: Callable[..., T], tasks: Iterable[Any], *shared: Any, workers: int) -> Iterator[T]:
    """``job(task, *shared)`` of every task on ``workers`` processes, in order; no more than a few tasks wait."""
    if workers <= 1:
        for task in tasks:
            yield job(task, *shared)
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start, initargs=(job, shared))
    waiting: deque[Future[T]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(_call, task))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
