"""What the processes of a run tell each other about where they are, outside of the collectives that may hang.

Every process keeps a record on the key-value store that torchrun hosts, through a connection of its own. Reading and writing
happen in helper threads with a time limit, because a store whose host is stopped answers nothing, not even an error.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any


@dataclass(frozen=True, slots=True)
class Peer:
    """One process as the others see it."""

    rank: int
    host: str
    pid: int
    phase: str
    step: int
    collective: bool
    """Whether the phase waits for all ranks: such a process is a victim, not a culprit."""
    seconds: float
    """Time spent in the phase."""
    left: float | None
    """Seconds the phase may still last; None: no limit."""
    beat: int
    """Grows with every record; one that stands still belongs to a stopped or dead process."""
    ended: str | None = None
    """Why the process left the run, if it did."""
    silent: bool = False
    """Its record did not change while we looked (judged by the reader)."""
    gone: bool = False
    """Its process does not run any more (known for processes of this host)."""

    @property
    def alive(self) -> bool:
        return not (self.silent or self.gone or self.ended is not None)


def connect(timeout_s: float) -> Any | None:
    """A client of the store at ``MASTER_ADDR:MASTER_PORT``; None when there is none."""
    import torch

    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not address or not port:
        return None
    limit = timedelta(seconds=timeout_s)
    try:
        return torch.distributed.TCPStore(
            address, int(port), is_master=False, wait_for_workers=False, timeout=limit
        )  # fmt: skip
    except (RuntimeError, ValueError):
        return None


def within(seconds: float, action: Any) -> Any | None:
    """``action()``, or None when it fails or takes longer (its thread is then left behind)."""
    results: list[Any] = []

    def call() -> None:
        try:
            results.append(action())
        except Exception:  # a store that went away is an answer too: none
            return

    thread = threading.Thread(target=call, name="vlit-peers-read", daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


class Board:
    """The records of all ranks of one run. ``prefix`` must be the same on all of them and new for every restart."""

    def __init__(self, prefix: str, rank: int, world_size: int) -> None:
        self.prefix, self.rank, self.world_size = prefix, rank, world_size
        self._store: Any | None = None

    def publish(self, peer: Peer) -> None:
        """Write this rank's record. A store that went away is tried again the next time."""
        self._store = self._store or connect(5.0)
        if self._store is None:
            return
        try:
            self._store.set(self._key(self.rank), json.dumps(asdict(peer)))
        except RuntimeError:
            self._store = None

    def read(self, *, watch_s: float, limit_s: float = 15.0) -> dict[int, Peer] | None:
        """The records of the others. They are read twice, ``watch_s`` apart, and one that did not change is ``silent``.

        None: the store does not answer. A rank without a record is left out.
        """
        first = within(limit_s, self._read_once)
        if first is None:
            return None
        if watch_s <= 0:
            return {rank: _judged(peer, None) for rank, peer in first.items()}
        time.sleep(watch_s)
        second = within(limit_s, self._read_once)
        if second is None:
            return None
        return {rank: _judged(peer, first.get(rank)) for rank, peer in second.items()}

    def _read_once(self) -> dict[int, Peer] | None:
        store = connect(5.0)
        if store is None:
            return None
        ranks = [rank for rank in range(self.world_size) if rank != self.rank]
        if not store.check([self._key(rank) for rank in ranks]):  # a missing key would block
            ranks = [rank for rank in ranks if store.check([self._key(rank)])]
        records = store.multi_get([self._key(rank) for rank in ranks])
        return {rank: Peer(**json.loads(record)) for rank, record in zip(ranks, records, strict=True)}

    def _key(self, rank: int) -> str:
        return f"{self.prefix}/{rank}"


def _judged(peer: Peer, before: Peer | None) -> Peer:
    silent = before is not None and before.beat == peer.beat and peer.ended is None
    gone = peer.host == socket.gethostname() and not is_running(peer.pid)
    return Peer(**(asdict(peer) | {"silent": silent, "gone": gone}))


def is_running(pid: int) -> bool:
    """Whether a process of this host exists and is not a zombie."""
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True
