"""Decisions as an append-only JSONL file: each is flushed to the disk before the reviewer sees it taken.

A line torn by a crash was never acknowledged, so it is cut off when the file is opened again. One process writes at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import orjson

from vlit.durable import sync_folder
from vlit.errors import DataError

Action = Literal["accept", "edit", "reject"]
ACTIONS = ("accept", "edit", "reject")


@dataclass(frozen=True, slots=True)
class Decision:
    """One line of the log. ``record`` is the row, ``digest`` the hash of its line when it was decided on.

    ``turns`` are the reviewer's words: those of an edit, or of the reviewer's edit ``edit`` that stands before another decision
    about the same text. They are empty where nothing was edited.
    """

    number: int
    reviewer: str
    record: int
    digest: str
    action: str  # accept, edit, reject, undo
    turns: tuple[str, ...] = ()
    undoes: int = -1
    edit: int = -1


class DecisionLog:
    """The decisions that stand: the last of each reviewer on each record, undone ones left out."""

    def __init__(self, path: Path, *, write: bool = True) -> None:
        self.path = path
        self.lock = threading.Lock()
        self.standing: dict[tuple[str, int], list[Decision]] = {}
        self._history: dict[str, list[Decision]] = {}
        self._count = 0
        self._file: int | None = None
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(self._file)
                raise DataError(f"{path}: another review of this dataset is running. End it first.") from error
            sync_folder(path.parent)
        if path.exists():
            self._read(repair=write)

    def _read(self, *, repair: bool) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if repair and whole < len(content) and self._file is not None:
            os.ftruncate(self._file, whole)
            os.fsync(self._file)
        for number, line in enumerate(content[:whole].splitlines()):
            try:
                held = orjson.loads(line)
                self._take(Decision(held["number"], held["reviewer"], held["record"], held["digest"], held["action"],
                                    tuple(held.get("turns", ())), held.get("undoes", -1)))  # fmt: skip
            except (orjson.JSONDecodeError, KeyError, TypeError) as error:
                raise DataError(
                    f"{self.path}: line {number + 1} is not a decision ({error!r}). Restore the file."
                ) from error

    def _take(self, decision: Decision) -> None:
        self._count = max(self._count, decision.number + 1)
        mine = self._history.setdefault(decision.reviewer, [])
        key = (decision.reviewer, decision.record)
        if decision.action == "undo":
            with contextlib.suppress(StopIteration):
                gone = next(d for d in reversed(mine) if d.number == decision.undoes)
                mine.remove(gone)
                self.standing[key].remove(gone)
                if not self.standing[key]:
                    del self.standing[key]
            return
        held = self.standing.setdefault(key, [])
        if decision.turns:
            decision = replace(decision, edit=decision.number)
        elif held and held[-1].digest == decision.digest:
            decision = replace(decision, turns=held[-1].turns, edit=held[-1].edit)
        mine.append(decision)
        held.append(decision)

    def decide(self, reviewer: str, record: int, digest: str, action: str, turns: Iterable[str] = ()) -> Decision:
        """Append a decision; returns when the disk holds it."""
        with self.lock:
            decision = Decision(self._count, reviewer, record, digest, action, tuple(turns))
            self._append(decision)
            self._take(decision)
            return decision

    def undo(self, reviewer: str) -> Decision | None:
        """Take a reviewer's last standing decision back; returns it, None without one."""
        with self.lock:
            mine = self._history.get(reviewer)
            if not mine:
                return None
            last = mine[-1]
            undo = Decision(self._count, reviewer, last.record, last.digest, "undo", undoes=last.number)
            self._append(undo)
            self._take(undo)
            return last

    def _append(self, decision: Decision) -> None:
        if self._file is None:
            raise DataError(f"{self.path}: opened for reading.")
        line: dict[str, Any] = {
            "number": decision.number, "time": round(time.time(), 3), "reviewer": decision.reviewer,
            "record": decision.record, "digest": decision.digest, "action": decision.action,
        }  # fmt: skip
        if decision.turns:
            line["turns"] = list(decision.turns)
        if decision.undoes >= 0:
            line["undoes"] = decision.undoes
        start = os.fstat(self._file).st_size
        data = orjson.dumps(line) + b"\n"
        try:
            if os.write(self._file, data) != len(data):
                raise OSError("short write")
            os.fsync(self._file)
        except OSError:
            with contextlib.suppress(OSError):  # the disk is full: no half line may stay before the next one
                os.ftruncate(self._file, start)
            raise

    def last(self, reviewer: str, record: int) -> Decision | None:
        """A reviewer's standing decision on a record."""
        held = self.standing.get((reviewer, record))
        return held[-1] if held else None

    def by_record(self) -> dict[int, dict[str, Decision]]:
        """Standing decisions of every record by reviewer."""
        with self.lock:
            found: dict[int, dict[str, Decision]] = {}
            for (reviewer, record), held in self.standing.items():
                found.setdefault(record, {})[reviewer] = held[-1]
            return found

    def reviewers(self) -> list[str]:
        """Names of all who have a standing decision."""
        with self.lock:
            return sorted({reviewer for reviewer, _ in self.standing})

    def close(self) -> None:
        """Let another process write."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
