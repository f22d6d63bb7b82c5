"""The processes that load steps ahead of training: how they start, and what one was at when it died.

A worker that is killed, or whose picture library crashes, says nothing itself. Each notes in shared memory which record it is
about to work on, so that its death becomes an error with a step and a record in it.
"""

from __future__ import annotations

import os
import signal
from multiprocessing.sharedctypes import RawArray
from typing import Any

import torch
from torch.utils.data import get_worker_info

ORPHAN_SECONDS = 600
"""How long a data worker outlives a SIGTERM, so that its training process can finish the step and save."""


def init_worker(worker: int) -> None:
    """Single-threaded, and deaf to what asks the run to stop: torchrun and Slurm signal whole process groups, and a data worker
    that dies takes the training process with it before the checkpoint is written. A worker ends when its parent does."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(ORPHAN_SECONDS))


class Whereabouts:
    """(step, source, record) that each worker is at; -1: none."""

    def __init__(self, num_workers: int) -> None:
        self._places: Any = RawArray("q", [-1] * (3 * num_workers))

    def note(self, step: int, source: int = -1, record: int = -1) -> None:
        """Called by a worker before it begins."""
        info = get_worker_info()
        if info is not None:
            self._places[3 * info.id : 3 * info.id + 3] = [step, source, record]

    def of(self, worker: int) -> tuple[int, int, int]:
        """What a worker noted last."""
        step, source, record = self._places[3 * worker : 3 * worker + 3]
        return step, source, record


def cause_of(exitcode: int) -> str:
    """What ended a process, and what to do about it."""
    if exitcode == -signal.SIGKILL:
        return (
            "was killed (SIGKILL), mostly by the kernel because memory was short; see dmesg, lower data.num_workers, or "
            "leave the record out"
        )
    if exitcode == -signal.SIGBUS:
        return "died of SIGBUS, mostly because /dev/shm is full; make it larger or lower data.num_workers"
    how = f"died of {signal.Signals(-exitcode).name}" if exitcode < 0 else f"ended with exit code {exitcode}"
    return f"{how}; `vlit doctor` finds files that crash a decoder, and training then leaves their records out"
