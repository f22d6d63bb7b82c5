"""The processes of a run compare notes over the key-value store of their process group.

Unlike a collective, every wait has a time limit and knows who did not come.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

from vlit.errors import TrainingError
from vlit.train.distributed import Ranks

_ACKNOWLEDGE_S = 5.0


class Meeting:
    """One exchange of notes. Every rank opens the same meetings in the same order."""

    _opened = 0

    def __init__(self, ranks: Ranks, topic: str) -> None:
        Meeting._opened += 1
        self.rank, self.world_size = ranks.rank, ranks.world_size
        self.missing: list[int] = []
        self._prefix = f"vlit/{topic}/{Meeting._opened}"
        self._store: Any = None
        if ranks.world_size > 1:
            self._store = torch.distributed.distributed_c10d._get_default_store()
        self._alone: dict[str, Any] = {}

    def publish(self, name: str, value: Any) -> None:
        """Leave a note of this rank."""
        if self._store is None:
            self._alone[name] = value
        else:
            self._store.set(self._key(name, self.rank), json.dumps(value))

    def note_of(self, name: str, rank: int) -> Any:
        """A note that is known to be there."""
        return self._alone[name] if self._store is None else json.loads(self._store.get(self._key(name, rank)))

    def gather(self, name: str, value: Any, timeout_s: float) -> dict[int, Any]:
        """Every rank's note on rank 0 (those that came in time; the others are in ``missing``), one's own elsewhere."""
        self.publish(name, value)
        if self._store is None or self.rank != 0:
            return {self.rank: value}
        came = self._wait(name, list(range(self.world_size)), timeout_s)
        self.missing = [rank for rank in range(self.world_size) if rank not in came]
        return {rank: self.note_of(name, rank) for rank in came}

    def decide(self, name: str, verdict: Callable[[], dict[str, Any]], *, timeout_s: float) -> dict[str, Any]:
        """Rank 0's verdict on every rank. One with ``problems`` is acknowledged by all before rank 0 goes on to raise it.

        Raises:
            TrainingError: rank 0 gave no verdict in time.
        """
        name = f"{name}-verdict"
        if self.rank == 0:
            try:
                told = verdict()
            except Exception as error:  # the others must not wait for a verdict that never comes
                told = {"problems": [f"rank 0 failed: {type(error).__name__}: {error}"], "spokesmen": []}
            self.publish(name, told)
            if self._store is not None and told.get("problems"):
                self._wait(f"{name}-read", list(range(1, self.world_size)), _ACKNOWLEDGE_S)
            return told
        if not self._wait(name, [0], timeout_s):
            raise TrainingError(
                f"rank 0 gave no answer to rank {self.rank} within {timeout_s:.0f} s. Look at the log and the host of rank 0."
            )
        told = self.note_of(name, 0)
        self.publish(f"{name}-read", True)
        return told

    def _wait(self, name: str, ranks: list[int], timeout_s: float) -> list[int]:
        """Ranks whose note is there, after at most ``timeout_s``."""
        keys = {rank: self._key(name, rank) for rank in ranks}
        try:
            self._store.wait(list(keys.values()), timedelta(seconds=timeout_s))
            return ranks
        except RuntimeError:  # some did not come in time, or the store is gone
            return [rank for rank, key in keys.items() if self._is_there(key)]

    def _is_there(self, key: str) -> bool:
        try:
            return bool(self._store.check([key]))
        except RuntimeError:
            return False

    def _key(self, name: str, rank: int) -> str:
        return f"{self._prefix}/{name}/{rank}"
