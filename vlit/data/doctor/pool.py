"""Worker processes that may die: a decoder that segfaults, or the system that ends a process for its memory.

``concurrent.futures`` calls a pool broken when a worker dies, and ``multiprocessing.Pool`` waits forever. Here a worker
notes in shared memory which item it looks at, so its death is the finding of that item. The item gets a second look at
the end, alone: what kills twice is an error, what killed once (mostly memory that another item took) a note.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, Protocol

from vlit.data.doctor.checks import Finding
from vlit.errors import DataError, VlitError

STUCK_AFTER_S = 120.0
"""An item that takes longer is given up."""
_PRELOADED = [
    "vlit.data.doctor.image_file",
    "vlit.data.doctor.records",
    "transformers.models.auto.tokenization_auto",
    "transformers.processing_utils",
]
"""Imported once, in the process that workers are forked from: seconds and hundreds of megabytes that each would take."""
_BETWEEN = -1
_MAX_UNEXPLAINED = 3
_START_S = 600.0


class Job(Protocol):
    """What the workers do; pickled to each of them."""

    def start(self) -> None:
        """Load what is needed, once a worker."""
        ...

    def begin(self, task: Any) -> Iterable[Any]:
        """The items of a task, as :meth:`look` wants them."""
        ...

    def look(self, item: Any) -> list[Finding]:
        """The findings of one item."""
        ...

    def end(self) -> Any:
        """Whatever else a task gives."""
        ...


class Done(NamedTuple):
    """A task that was finished: findings by place in the task, and what :meth:`Job.end` gave (None after a death)."""

    task: Sequence[Any]
    found: list[tuple[int, list[Finding]]]
    extra: Any = None


class _Worker:
    """One process, the pipe to it, and the place in its task that it has reached."""

    def __init__(self, context: Any, job: Job) -> None:
        self.place = context.RawValue("q", _BETWEEN)
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(job, other, self.place), daemon=True)
        self.process.start()
        other.close()
        self.task: Sequence[Any] | None = None
        self._seen, self._since = _BETWEEN, time.monotonic()

    def give(self, task: Sequence[Any]) -> None:
        self.task = task
        self._seen, self._since = _BETWEEN, time.monotonic()
        with contextlib.suppress(OSError):  # it has died: noticed where its pipe is read
            self.pipe.send(task)

    def stuck_for(self) -> float:
        """Seconds since it went on to another item."""
        place = self.place.value
        if place != self._seen:
            self._seen, self._since = place, time.monotonic()
        return time.monotonic() - self._since

    def is_stuck(self, limit_s: float) -> bool:
        """Whether it takes too long over an item, or ten minutes over starting or sending."""
        seconds = self.stuck_for()
        return seconds > (max(limit_s, _START_S) if self._seen == _BETWEEN else limit_s)

    def stop(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()


def run_job(
    job: Job, tasks: Iterable[Sequence[Any]], *, workers: int, stuck_after_s: float = STUCK_AFTER_S
) -> Iterator[Done]:
    """Do all tasks on ``workers`` processes; results come as they are finished. A task can be cut by slicing.

    Closing the iterator, also by an interrupt, ends the processes.

    Raises:
        DataError: the workers cannot start, or die where no item can be held responsible.
    """
    pool = _Pool(job, stuck_after_s)
    try:
        yield from pool.run(iter(tasks), workers)
    finally:
        pool.stop()


class _Pool:
    def __init__(self, job: Job, stuck_after_s: float) -> None:
        self.context: Any
        if "forkserver" in multiprocessing.get_all_start_methods():
            self.context = multiprocessing.get_context("forkserver")
            self.context.set_forkserver_preload(_PRELOADED)
        else:
            self.context = multiprocessing.get_context("spawn")
        self.job = job
        self.stuck_after_s = stuck_after_s
        self.workers: list[_Worker] = []
        self.waiting: deque[Sequence[Any]] = deque()
        self.suspects: deque[tuple[Sequence[Any], str]] = deque()
        self.unexplained = 0

    def stop(self) -> None:
        for worker in self.workers:
            worker.stop()
        self.workers = []

    def run(self, tasks: Iterator[Sequence[Any]], workers: int) -> Iterator[Done]:
        while True:
            while len(self.workers) < workers and (task := self._next(tasks)) is not None:
                worker = _Worker(self.context, self.job)
                self.workers.append(worker)
                worker.give(task)
            if not any(worker.task is not None for worker in self.workers):
                break
            for worker, reply in self._replies():
                if reply is None:
                    yield from self._died(worker)
                    continue
                yield Done(worker.task or [], *reply)
                worker.task = None
                if (task := self._next(tasks)) is not None:
                    worker.give(task)
        self.stop()
        yield from self._second_looks()

    def _next(self, tasks: Iterator[Sequence[Any]]) -> Sequence[Any] | None:
        return self.waiting.popleft() if self.waiting else next(tasks, None)

    def _replies(self) -> list[tuple[_Worker, tuple[Any, Any] | None]]:
        """What busy workers have sent within a second; None for one that has died or is stuck."""
        busy = {worker.pipe: worker for worker in self.workers if worker.task is not None}
        replies: list[tuple[_Worker, tuple[Any, Any] | None]] = []
        for pipe in wait(list(busy), timeout=1.0):
            worker = busy.pop(pipe)
            try:
                replies.append((worker, _opened(worker.pipe.recv())))
            except (EOFError, OSError):
                replies.append((worker, None))
        replies += [(worker, None) for worker in busy.values() if worker.is_stuck(self.stuck_after_s)]
        return replies

    def _died(self, worker: _Worker) -> Iterator[Done]:
        """Take a dead (or stuck) worker out; what it was looking at is suspected, the rest of its task is done again."""
        stuck = worker.process.is_alive() and worker.is_stuck(self.stuck_after_s)
        worker.process.join(timeout=0 if stuck else 5)
        how = f"it took longer than {self.stuck_after_s:g} s" if stuck else _how(worker.process.exitcode)
        task, place = worker.task or [], worker.place.value
        self.workers.remove(worker)
        worker.stop()
        if place == _BETWEEN:
            self.unexplained += 1
            if self.unexplained > _MAX_UNEXPLAINED:
                raise DataError(
                    f"worker processes of vlit doctor die before they look at anything ({how}). Use fewer of them "
                    "(--workers), and look at the memory of this machine."
                )
            self.waiting.append(task)
            return
        self.waiting += [part for part in (task[:place], task[place + 1 :]) if len(part)]
        if stuck:  # a second look would take as long
            yield Done(task[place : place + 1], [(0, [Finding("crash", how)])])
        else:
            self.suspects.append((task[place : place + 1], how))

    def _second_looks(self) -> Iterator[Done]:
        for task, how in self.suspects:
            worker = _Worker(self.context, self.job)
            self.workers.append(worker)
            worker.give(task)
            replies: list[tuple[_Worker, tuple[Any, Any] | None]] = []
            while not replies:
                replies = self._replies()
            reply = replies[0][1]
            if reply is None:
                yield Done(task, [(0, [Finding("crash", f"the process that looked at it died, twice: {how}")])])
            else:
                once = Finding("crash_once", f"a process died while it looked at it: {how}")
                findings = reply[0][0][1] if reply[0] else []
                yield Done(task, [(0, [*findings, once])], reply[1])
            self.stop()


def _opened(reply: tuple[str, Any, Any]) -> tuple[Any, Any]:
    kind, found, extra = reply
    if kind == "error":
        raise DataError(found)
    if kind == "bug":
        raise RuntimeError(f"a worker of vlit doctor failed:\n{found}")
    return found, extra


def _how(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    return f"{name}, as a system ends a process when memory is short" if name == "SIGKILL" else name


def _serve(job: Job, pipe: Connection, place: Any) -> None:
    """The life of a worker. It ends with its pipe, and leaves interrupts to the process that started it."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with open(os.devnull, "w") as nowhere:  # C decoders write warnings to stderr that name no file
            os.dup2(nowhere.fileno(), 2)
        job.start()
        while True:
            task = pipe.recv()
            found = []
            for number, item in enumerate(job.begin(task)):
                place.value = number
                findings = _look(job, item)
                if findings:
                    found.append((number, findings))
            place.value = _BETWEEN
            pipe.send(("done", found, job.end()))
    except (EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        return
    except VlitError as error:
        pipe.send(("error", str(error), None))
    except Exception:
        pipe.send(("bug", traceback.format_exc(), None))


def _look(job: Job, item: Any) -> list[Finding]:
    try:
        return job.look(item)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers panic with an error outside of Exception
        text = " ".join(str(error).split())[:200]
        return [Finding("crash", f"{type(error).__name__}: {text}" if text else type(error).__name__)]
