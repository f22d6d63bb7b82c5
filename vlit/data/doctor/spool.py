"""Findings on disk: what is held in memory is one integer an item, however many findings there are."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import orjson

from vlit.data.doctor.checks import Finding


class Spool:
    """The findings of ``count`` numbered items (images, or rows of an index). Deleted by :meth:`close`."""

    def __init__(self, count: int, folder: Path) -> None:
        self._offsets = np.full(count, -1, np.int64)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (lives as long as the spool)
        self._end = 0

    def add(self, number: int, findings: list[Finding]) -> None:
        """Keep the findings of one item; they follow those it has already."""
        held = self.of(number) if self._offsets[number] >= 0 else []
        line = orjson.dumps([list(finding) for finding in (*held, *findings)]) + b"\n"
        self._file.seek(self._end)
        self._file.write(line)
        self._offsets[number] = self._end
        self._end += len(line)

    def has(self) -> np.ndarray:
        """bool [count]: the items that have findings."""
        return self._offsets >= 0

    def of(self, number: int) -> list[Finding]:
        """The findings of one item."""
        if self._offsets[number] < 0:
            return []
        self._file.seek(int(self._offsets[number]))
        return [Finding(*found) for found in orjson.loads(self._file.readline())]

    def close(self) -> None:
        self._file.close()
