"""A watchdog for runs that hang: it says which rank stands where, prints the stacks and ends the process.

The training loop names the phase it enters; a thread looks how long a phase lasts. A rank that waits in a collective is a
victim: it ends the run only when no other rank is still entitled to the time it takes, so that a long validation on rank 0 or
a first compilation is no hang. The time in which the process itself was stopped (``scontrol suspend``) does not count.

Limit: a C extension that never releases the GIL stops this thread too. The other ranks then see its heartbeat stand still.
"""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from vlit.train.cluster.exit_codes import EXIT_HANG, RankLostError
from vlit.train.cluster.hang_report import culprits, hang_report, name_of
from vlit.train.cluster.peers import Board, Peer
from vlit.train.distributed import Ranks

_LOST_CONNECTION = ("peer", "gloo", "nccl", "connection", "timed out", "broken pipe", "tcpstore", "collective")


class Phase(NamedTuple):
    """Where this process is. One tuple, replaced as a whole, so that threads need no lock."""

    number: int
    name: str
    step: int
    collective: bool
    limit_s: float
    since: float


class Watchdog:
    """Context manager around training; ``timeout_s`` None switches it off.

    Every rank of a run must open the same number of watchdogs in the same order (their records are told apart by that number).
    """

    _opened = 0

    def __init__(self, ranks: Ranks, timeout_s: float | None, *, output_dir: Path | None = None) -> None:
        self.rank, self.world_size, self.timeout_s, self.output_dir = (
            ranks.rank,
            ranks.world_size,
            timeout_s,
            output_dir,
        )
        self.interval = min(2.0, max(0.2, (timeout_s or math.inf) / 10))
        self.listen_s = max(
            2.5 * self.interval, min(30.0, (timeout_s or 0.0) / 10)
        )  # a loader may hold the GIL for long
        self._host, self._pid, self._parent = socket.gethostname(), os.getpid(), os.getppid()
        self._phase = Phase(0, "start", 0, False, timeout_s or math.inf, time.monotonic())
        self._stuck, self._beat, self._ended = 0.0, 0, ""
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._board: Board | None = None

    # The training loop's side --------------------------------------------------------------------------------------

    def phase(
        self, name: str, step: int | None = None, *, collective: bool = False, allow_s: float | None = None
    ) -> None:
        """Say that ``name`` begins. Costs about a microsecond.

        Args:
            step: default: the step of the phase before.
            collective: the phase waits for all ranks (a reduction, a barrier, the forward pass under ZeRO-3).
            allow_s: seconds this phase may last instead of the watchdog's ``timeout_s``; ``math.inf``: as long as it takes.
        """
        before = self._phase
        limit = allow_s if allow_s is not None else self.timeout_s or math.inf
        now = time.monotonic()
        self._phase = Phase(before.number + 1, name, before.step if step is None else step, collective, limit, now)

    def __enter__(self) -> Watchdog:
        if self.timeout_s is None:
            return self
        Watchdog._opened += 1
        self.phase("start")
        targets = [self._watch]
        if self.world_size > 1:
            run, restart = os.environ.get("TORCHELASTIC_RUN_ID", ""), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._board = Board(f"vlit-watchdog/{run}/{restart}/{Watchdog._opened}", self.rank, self.world_size)
            targets.append(self._publish)
        self._threads = [threading.Thread(target=t, name=f"vlit{t.__name__}", daemon=True) for t in targets]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not self._threads or os.getpid() != self._pid:
            return
        self._ended = f"{type(error).__name__}: {error}" if error is not None else "finished its work"
        self._stop.set()
        for thread in self._threads:
            thread.join(2.0)
        self._threads = []
        if error is not None and self.world_size > 1 and _looks_like_a_lost_connection(error):
            with _deaf_to_sigterm():  # torchrun stops the survivors at once; this one first says why it ends
                lost = self._lost_peers()
                if lost:
                    raise RankLostError(f"{name_of(self._record())} cannot go on in {self._where()}: {lost}") from error

    # The threads' side ---------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        seen, last, told = -1, time.monotonic(), False
        while not self._stop.wait(self.interval):
            phase, now = self._phase, time.monotonic()
            passed = min(now - last, 2 * self.interval)  # longer: this process itself was stopped meanwhile
            self._stuck = min(now - phase.since, passed) if phase.number != seen else self._stuck + passed
            seen, last = phase.number, now
            if self._stuck > phase.limit_s:
                self._judge(phase)
                last = time.monotonic()
            if not told and self._is_orphan():
                told = True
                print(f"rank {self.rank}: its torchrun is gone; stopping as on SIGTERM", file=sys.stderr, flush=True)
                os.kill(self._pid, signal.SIGTERM)

    def _judge(self, phase: Phase) -> None:
        """End the process, unless a rank that we wait for may still take its time, or we moved on while asking."""
        others = self._board.read(watch_s=self.listen_s) if self._board else {}
        if self._phase.number != phase.number or self._stop.is_set():
            return
        if phase.collective and any(
            p.alive and not p.collective and (p.left is None or p.left > 0) for p in (others or {}).values()
        ):
            return
        assert self.timeout_s is not None
        report = hang_report(self._record(), others, self.world_size, limit_s=phase.limit_s)
        self._end(report)

    def _end(self, report: str) -> None:
        """Report and stacks to stderr first (a hanging file system must not swallow them), then to the output folder."""
        with tempfile.TemporaryFile() as file:
            file.write(report.encode())
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)
            file.seek(0)
            content = file.read()
        os.write(2, content)
        if self.output_dir is not None:
            path = self.output_dir / f"hang-rank-{self.rank}.txt"
            writer = threading.Thread(target=lambda: path.write_bytes(content), daemon=True)
            writer.start()
            writer.join(5.0)
        os._exit(EXIT_HANG)

    def _publish(self) -> None:
        assert self._board is not None
        while True:
            self._beat += 1
            ended = self._stop.is_set()
            self._board.publish(self._record())
            if ended:
                return
            self._stop.wait(self.interval)

    def _record(self) -> Peer:
        phase = self._phase
        seconds = time.monotonic() - phase.since
        left = None if math.isinf(phase.limit_s) else phase.limit_s - self._stuck
        return Peer(
            self.rank, self._host, self._pid, phase.name, phase.step, phase.collective, seconds, left, self._beat,
            ended=self._ended or None,
        )  # fmt: skip

    def _is_orphan(self) -> bool:
        return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self._parent

    def _where(self) -> str:
        return f'"{self._phase.name}" of step {self._phase.step}'

    def _lost_peers(self) -> str:
        """Which ranks are gone, after a collective failed. Those of this host are known at once, others by their silence."""
        if self._board is None:
            return ""
        for watch_s in (0.0, 0.3, 2.5 * self.interval):
            others = self._board.read(watch_s=watch_s, limit_s=5.0)
            lost = [p for p in (others or {}).values() if not p.alive]
            if lost:
                return "; ".join(f"{name_of(p)} {why}" for p, why in culprits(lost))
        return ""


@contextmanager
def _deaf_to_sigterm() -> Iterator[None]:
    """Ignore SIGTERM; for good when an error is raised inside, because the process then ends by itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGTERM, held)


def _looks_like_a_lost_connection(error: BaseException) -> bool:
    """Whether the error, or one it happened in the wake of, comes from a collective whose other side is gone."""
    import torch

    chain: BaseException | None = error
    while chain is not None:
        if (
            isinstance(chain, (RuntimeError, OSError))
            and not isinstance(chain, torch.OutOfMemoryError)
            and any(word in str(chain).lower() for word in _LOST_CONNECTION)
        ):
            return True
        chain = chain.__cause__ or chain.__context__
    return False
