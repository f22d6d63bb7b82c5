"""Saving while training goes on: copy the state, write it in threads, let rank 0's thread give the checkpoint its name.

The threads meet in the folder, not in a collective: a rank's note says that its file is on the disk (or why not), and rank 0's
thread commits when all notes are there. A save that fails (a full disk) leaves the checkpoints before it alone and is reported
with the bytes that were missing; the run goes on, and ends after ``checkpoint.max_failures`` failures in a row.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from vlit.config.schema import CheckpointConfig
from vlit.durable import bytes_below, describe_os_error, free_bytes, make_folder
from vlit.errors import CheckpointError
from vlit.train.checkpoint import Position, aside_folder, commit, read_notes, write_failure, write_share
from vlit.train.distributed import Ranks
from vlit.train.engine import Engine
from vlit.train.fragments import Fragment, num_bytes

IDLE, WRITTEN, WRITING, FAILED = range(4)
"""State of a rank's writer."""
_LAST_WAIT_S, _STILL_S = 20.0, 5.0
"""How long a run that ends with an error waits for the other ranks' files: in all, and while none of them grows. torchrun gives
a process 30 s to end, and this one has yet to say why it does."""


class StateSaver:
    """Writes the checkpoints of one stage. ``begin``, ``settle`` and ``finish`` are called on all ranks at the same place."""

    def __init__(
        self, root: Path, identity: dict[str, Any], config: CheckpointConfig, ranks: Ranks, strategy: str
    ) -> None:
        self.root, self.identity, self.config, self.ranks, self.strategy = root, identity, config, ranks, strategy
        self.failures = 0
        self._thread: threading.Thread | None = None
        self._problem: str | None = None
        self._position: Position | None = None
        self._abandoned = threading.Event()

    def __enter__(self) -> StateSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """A run that ends with an error still keeps the checkpoint it was writing; in order, :meth:`finish` settles it."""
        if self._thread is not None and error is not None:
            if self.ranks.world_size > 1:
                self._wait_for_others()
            self._thread.join()

    def _wait_for_others(self) -> None:
        """Give the other ranks time for their files, unless one is gone: then nothing happens in the folder any more."""
        assert self._thread is not None
        assert self._position is not None
        aside = aside_folder(self.root, self._position.step)
        until, held, changed = time.monotonic() + _LAST_WAIT_S, -1, 0.0
        while self._thread.is_alive() and time.monotonic() < until:
            size = bytes_below(aside)
            if size != held:
                held, changed = size, time.monotonic()
            elif time.monotonic() - changed > _STILL_S:
                break
            self._thread.join(0.1)
        self._abandoned.set()

    def begin(self, engine: Engine, position: Position) -> None:
        """Start to save the state after a step; a save that is still going on is waited for."""
        self.finish()
        fragments = list(engine.fragments())
        aside = aside_folder(self.root, position.step)
        if self.ranks.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        self.ranks.barrier()
        self._position, self._problem = replace(position, updates=engine.updates), None
        self._abandoned.clear()
        if self.config.asynchronous:
            copies = [fragment.copied() for fragment in fragments]
            self._thread = threading.Thread(target=self._write, args=(aside, copies), name="vlit-checkpoint")
            self._thread.start()
        else:
            self._write(aside, [f.copied() if f.values.device.type != "cpu" else f for f in fragments])
            self.finish()

    def status(self) -> int:
        """This rank's state; the run exchanges it at the end of every step."""
        if self._position is None:
            return IDLE
        if self._thread is not None and self._thread.is_alive():
            return WRITING
        return FAILED if self._problem else WRITTEN

    def settle(self, *, writing: bool, failed: bool) -> None:
        """Given what all ranks said: nothing while one is still writing, else note the success or the failure.

        Raises:
            CheckpointError: too many saves in a row have failed.
        """
        if failed:
            self._abandoned.set()  # rank 0 need not wait for a note that a rank could not even write
        if self._position is None or writing:
            return
        step, self._position, self._thread = self._position.step, None, None
        if not failed:
            self.failures = 0
            return
        problem = [p for p in self.ranks.gather(self._problem) if p][
            -1
        ]  # rank 0's may only say that another's is missing
        self.failures += 1
        if self.ranks.is_main:
            shutil.rmtree(aside_folder(self.root, step), ignore_errors=True)
            print(
                f"warning: the checkpoint of step {step} was not written: {problem}. Older ones are intact; failure "
                f"{self.failures} in a row of {self.config.max_failures}.",
                file=sys.stderr,
            )
        if self.failures >= self.config.max_failures:
            raise CheckpointError(
                f"{self.failures} checkpoints in a row could not be written, the last because: {problem}. Free some space (or "
                "fix the folder) and run the same command again; it goes on from the newest checkpoint."
            )

    def finish(self) -> None:
        """Wait for a save that is going on, on all ranks, and settle it."""
        wait = 0.01 if self.ranks.world_size > 1 else None
        while True:
            if self._thread is not None:
                self._thread.join(wait)
            status = self.status()
            writing, failed = self.ranks.max([int(status == WRITING), int(status == FAILED)])
            self.settle(writing=bool(writing), failed=bool(failed))
            if not writing:
                return
            wait = min(1.0, 2 * (wait or 0.01))

    def _write(self, aside: Path, fragments: list[Fragment]) -> None:
        needed = num_bytes(fragments)
        try:
            make_folder(aside)
            if free_bytes(aside) < needed:
                raise OSError("not enough room")
            write_share(aside, fragments, self.ranks)
            if self.ranks.is_main:
                self._commit(aside)
        except OSError as error:
            self._problem = describe_os_error(error, aside, needed)
        except Exception as error:  # a thread that dies silently would leave everybody waiting for its mark
            self._problem = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        if self._problem is not None and not self.ranks.is_main:
            write_failure(aside, self._problem, self.ranks)

    def _commit(self, aside: Path) -> None:
        """Wait for all notes, then give the checkpoint its name."""
        assert self._position is not None
        wait = 0.005
        while len(notes := read_notes(aside)) < self.ranks.world_size:
            if self._abandoned.is_set():
                raise CheckpointError(
                    f"{aside}: {len(notes)} of {self.ranks.world_size} ranks have written their share"
                )
            time.sleep(wait)
            wait = min(1.0, 2 * wait)
        for note in notes:
            if "problem" in note:
                raise CheckpointError(note["problem"])
        commit(
            self.root, self._position, self.identity, notes, world_size=self.ranks.world_size, strategy=self.strategy,
            keep=self.config.keep,
        )  # fmt: skip
