"""The processes that load steps ahead of training: how they start, how a step gets across, what one was at when it died.

torch hands over every tensor of its own as a file descriptor, which the training process has to ask the worker's process for:
a step of 28 rows of 7 tensors is 196 open files and as many round trips, while training waits. Here a step crosses as one.

A worker that is killed, or whose picture library crashes, says nothing itself. Each notes in shared memory which record it is
about to work on, so that its death becomes an error with a step and a record in it.
"""

from __future__ import annotations

import gc
import os
import signal
from dataclasses import dataclass, replace
from multiprocessing.sharedctypes import RawArray
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from vlit.types import StepBatch

ORPHAN_SECONDS = 600
"""How long a data worker outlives a SIGTERM, so that its training process can finish the step and save."""


def init_worker(worker: int) -> None:
    """Single-threaded, and deaf to what asks the run to stop: torchrun and Slurm signal whole process groups, and a data worker
    that dies takes the training process with it before the checkpoint is written. A worker ends when its parent does.

    What it inherited is taken out of garbage collection, which would write to every object of the training process and so copy
    its memory into the worker.
    """
    gc.freeze()
    gc.collect()  # resets the count of old objects, which decides when the next one is
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(ORPHAN_SECONDS))


class _Place(NamedTuple):
    """Where a tensor lies in the bytes of its step."""

    offset: int
    dtype: torch.dtype
    shape: torch.Size


@dataclass(slots=True)
class Fetched:
    """A step on its way out of a worker. ``error`` replaces an exception, whose traceback would bury the message."""

    step: int
    batch: StepBatch | None
    error: str | None = None

    def pin_memory(self, device: object = None) -> Fetched:
        """Called by torch's loader when a GPU is there."""
        if self.batch is not None:
            self.batch.micro_batches = [m.map(torch.Tensor.pin_memory) for m in self.batch.micro_batches]
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled with all its tensors in one."""
        if self.batch is None:
            return Fetched, (self.step, None, self.error)
        raw: list[Tensor] = []
        end = 0

        def put(tensor: Tensor) -> Any:
            nonlocal end
            raw.append(tensor.contiguous().view(-1).view(torch.uint8))
            place = _Place(end, tensor.dtype, tensor.shape)
            filling = -raw[-1].numel() % _ALIGNMENT
            raw.append(torch.zeros(filling, dtype=torch.uint8))
            end += raw[-2].numel() + filling
            return place

        rows = [row.map(put) for row in self.batch.micro_batches]
        return _unpacked, (
            self.step,
            replace(self.batch, micro_batches=rows),
            torch.cat(raw) if raw else None,
        )


_ALIGNMENT = 64
"""Bytes; a tensor must begin at a multiple of its values' size."""


def _unpacked(step: int, batch: StepBatch, raw: Tensor | None) -> Fetched:
    def take(place: Any) -> Tensor:
        assert raw is not None
        num_bytes = place.shape.numel() * place.dtype.itemsize
        return raw[place.offset : place.offset + num_bytes].view(place.dtype).view(place.shape)

    return Fetched(step, replace(batch, micro_batches=[row.map(take) for row in batch.micro_batches]))


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
