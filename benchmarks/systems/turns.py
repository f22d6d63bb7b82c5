"""The parent's side: one process a system, and whose turn it is."""

from __future__ import annotations

from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from rich.console import Console

from benchmarks.systems import Job
from benchmarks.systems.worker import PRELOAD, serve


def fresh_processes(device: str) -> Any:
    """Processes that share nothing but imports (CUDA does not even survive that)."""
    context = get_context("spawn" if device == "cuda" else "forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


class Worker:
    """A system in its process."""

    def __init__(self, job: Job) -> None:
        context = fresh_processes(job.device)
        self.job = job
        self.failed: str | None = None
        self.steps: list[dict[str, float]] = []
        self._connection: Connection
        self._connection, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, job), daemon=True)
        self._process.start()
        other.close()
        self.ready = self._receive()

    def step(self, request: str = "step") -> dict[str, float]:
        """One optimizer step; empty when the system failed."""
        if self.failed is None:
            self._connection.send(request)
            result = self._receive()
            if result and request == "step":
                self.steps.append(result)
            return result
        return {}

    def finish(self) -> None:
        if self.failed is None:
            self._connection.send("finish")
        self._process.join(timeout=60)

    def _receive(self) -> dict[str, Any]:
        try:
            message = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(timeout=60)
            message = {"failed": f"the process died with exit status {self._process.exitcode}"}
        self.failed = message.get("failed")
        return {} if self.failed else message


def take_turns(jobs: list[Job], steps: int, console: Console) -> list[Worker]:
    """Warm-up and ``steps`` steps of every job, in turns."""
    groups = [[job] for job in jobs] if jobs[0].size == "7b" else [jobs]
    workers: list[Worker] = []
    for group in groups:
        started = [Worker(job) for job in group]
        for _ in range(steps + 1):
            for worker in started:
                if result := worker.step():
                    console.print(f"{worker.job.case} {worker.job.system} {result['seconds']:.2f} s", style="dim")
        for worker in started:
            if worker.job.profile:
                worker.step("profile")
            worker.finish()
        workers += started
    return workers
