"""The process of one system: imports, loads, prepares, then makes one optimizer step for each request of the parent.

Peak memory on a CPU is the high-water mark of the resident memory during the steps minus the resident memory right after
the imports; on a GPU it is what torch allocated at most. Weights, batch, gradients and optimizer are in both.
"""

from __future__ import annotations

import time
import traceback
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.systems import SYSTEMS, Job

NOT_INSTALLED = "is not installed"
PRELOAD = [f"benchmarks.systems.{name}" for name in ("worker", "vlit_system", "transformers_system")]
"""Imported once by the server that workers on a CPU are forked from; nothing is computed there."""


class Finished(Exception):
    """The parent asks for no more steps."""


class PipeClock:
    """The worker's end of the pipe, as a :class:`benchmarks.systems.Clock`."""

    def __init__(self, connection: Connection, job: Job) -> None:
        self.connection, self.job = connection, job
        self.seconds = self.start = 0.0
        self.profiler: Any = None

    def begin(self) -> None:
        try:
            request = self.connection.recv()
        except (EOFError, ConnectionResetError):
            request = "finish"  # the parent is gone
        if request == "finish":
            raise Finished
        self.profiler = _profiler(self.job.device) if request == "profile" else None
        if self.profiler:
            self.profiler.__enter__()
        self.start = time.perf_counter()

    def end(self) -> None:
        if self.job.device == "cuda":
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.start
        if self.profiler:
            self.profiler.__exit__(None, None, None)

    def report(self, loss: float, grad_norm: float) -> None:
        if self.profiler:
            _write_profile(self.profiler, self.job, self.seconds)
        result = {"seconds": self.seconds, "loss": float(loss), "grad_norm": float(grad_norm)}
        with suppress(BrokenPipeError):
            self.connection.send(result | {"memory_mb": peak_memory_mb(self.job.device)})


def serve(connection: Connection, job: Job) -> None:
    """Body of the process. What goes wrong is sent to the parent as ``{"failed": reason}``."""
    torch.set_num_threads(job.threads)
    try:
        module = import_module(f"benchmarks.systems.{SYSTEMS[job.system]}")
        imported = resident_mb()
        system = module.make(job)
        forget_peak(job.device)
        connection.send(
            {
                "positions": system.positions,
                "padding": system.padding,
                "note": system.note,
                "imported_mb": 0.0 if job.device == "cuda" else imported,
            }
        )
        system.run(PipeClock(connection, job))
    except Finished:
        pass
    except ImportError as error:
        missing = error.name == job.system
        connection.send({"failed": f"{job.system} {NOT_INSTALLED}" if missing else f"import failed: {error}"})
    except torch.cuda.OutOfMemoryError:
        connection.send({"failed": "out of GPU memory"})
    except Exception as error:
        traceback.print_exc()
        connection.send({"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"})
    connection.close()


def _profiler(device: str) -> Any:
    from torch.profiler import ProfilerActivity, profile

    return profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda"))


def _write_profile(profiler: Any, job: Job, seconds: float) -> None:
    order = "self_cuda_time_total" if job.device == "cuda" else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=60)
    with Path(str(job.profile)).open("a", encoding="utf-8") as file:
        file.write(f"{job.case}, {job.system}: one step under the profiler, {seconds:.2f} s\n{table}\n")


def resident_mb() -> float:
    """Resident memory now."""
    return _status("VmRSS")


def peak_memory_mb(device: str) -> float:
    """Highest memory since :func:`forget_peak`."""
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else _status("VmHWM")


def forget_peak(device: str) -> None:
    """Start the high-water mark anew: loading a checkpoint is no part of a step."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):  # where it is refused the mark includes loading, for every system alike
        Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> float:
    """A line of ``/proc/self/status`` in MiB; NaN where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:")), float("nan"))
