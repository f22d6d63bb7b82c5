"""What the steps of a stage left out: the same list, the same count and the same error on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlit.data.quarantine import check_budget, line_of, read_quarantine, rewrite_quarantine
from vlit.data.source import RecordSource
from vlit.train.distributed import Ranks
from vlit.train.metrics import LinesFile
from vlit.types import QuarantineEntry


class Quarantine:
    """The bad records met so far: each counted once over all ranks and all starts, listed by rank 0.

    Args:
        path: ``quarantine.jsonl`` of the stage.
        sources: the stage's datasets.
        budget: ``data.quarantine_budget``.
        step: where the stage goes on. Lines of later steps are taken back, since an earlier start's work there is done again.
    """

    def __init__(self, path: Path, sources: Sequence[RecordSource], budget: float, ranks: Ranks, *, step: int) -> None:
        self._path, self._budget, self._ranks = path, budget, ranks
        self._sources = {source.name: source for source in sources}
        self._file = LinesFile(path)
        self._bad: dict[str, set[int]] = {name: set() for name in self._sources}
        for source, record in ranks.share(ranks.on_main(lambda: _kept_until(path, step))):
            self._bad.setdefault(source, set()).add(record)

    def add(self, found: Sequence[QuarantineEntry]) -> None:
        """What loading a step left out on this rank. To be called by all ranks when any of them left something out.

        Raises:
            DataError: more of a dataset is left out than the budget allows; the same words on every rank.
        """
        everywhere = [entry for held in self._ranks.gather(list(found)) for entry in held]
        everywhere.sort(key=lambda entry: (entry.source, entry.record))
        new = []
        for entry in everywhere:
            if entry.record not in self._bad[entry.source]:
                self._bad[entry.source].add(entry.record)
                new.append(entry)
        if new and self._ranks.is_main:
            self._file.add("".join(map(line_of, new)))
        for name in dict.fromkeys(entry.source for entry in everywhere):
            source = self._sources[name]
            num_bad = source.num_quarantined + len(self._bad[name])
            num_all = source.num_quarantined + len(source)
            own = [entry for entry in everywhere if entry.source == name]
            check_budget(name, num_bad, num_all, self._budget, self._path, own)


def _kept_until(path: Path, step: int) -> list[tuple[str, int]]:
    """Take back the lines of steps after ``step``; gives (source, record) of the others that were found while loading."""
    held = read_quarantine(path)
    kept = [row for row in held if row.get("step", 0) <= step]
    if path.is_file():
        rewrite_quarantine(path, kept, [])
    return [(row["source"], row["record"]) for row in kept if row["found"] == "loading"]
