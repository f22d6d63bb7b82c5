"""A few examples of each check for the page: where, why, what the record says, and a small picture."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from vlit.data.doctor.checks import Finding, severity_of
from vlit.data.doctor.datasets import Examined
from vlit.data.doctor.image_file import ThumbnailJob
from vlit.data.doctor.pictures import Pictures
from vlit.data.doctor.pool import run_job
from vlit.data.doctor.records import read_samples
from vlit.data.doctor.spool import Spool
from vlit.data.doctor.tally import Example, Tally
from vlit.data.formats._base import place_of
from vlit.types import Sample

EXCERPT_TURNS, EXCERPT_CHARACTERS, RAW_BYTES = 4, 240, 400
_THUMBNAILS_PER_TASK = 8


class Examples:
    """Takes examples as records are counted; :meth:`finish` fills in what is read only for them."""

    def __init__(self, tally: Tally, pictures: Pictures, of_images: Spool) -> None:
        self._tally = tally
        self._pictures = pictures
        self._of_images = of_images
        self._refused: dict[int, dict[int, list[Example]]] = {}  # dataset -> record -> examples without an excerpt

    def take(
        self, number: int, dataset: Examined, table: Any, row: int | None, record: int, identity: str | None,
        findings: list[Finding],
    ) -> None:  # fmt: skip
        """Keep the record as an example of those of its checks that have few."""
        wanted = {f.check: f for f in reversed(findings) if self._tally.wants_example(f.check)}
        if not wanted:
            return
        excerpt = "" if row is None else excerpt_of(next(read_samples(table, row, row + 1, dataset.name)))
        for check, finding in wanted.items():
            image = "" if row is None else self._picture_for(finding, self._pictures.of_row(number, row))
            example = Example(dataset.name, place_of(dataset.path, record, identity), finding.reason, image, excerpt)
            self._tally.add_example(check, example)
            if row is None:
                self._refused.setdefault(number, {}).setdefault(record, []).append(example)

    def _picture_for(self, finding: Finding, images: list[int]) -> str:
        """The image the finding speaks of, else the first of the record; empty when it does not decode."""
        for image in images:
            found = self._of_images.of(image)
            sound = all(severity_of(f.check) == "note" for f in found)
            if sound and (finding in found or not finding.check.startswith("image_")):
                return str(self._pictures.file(image))
        return ""

    def finish(self, datasets: list[Examined], *, workers: int) -> None:
        """Read the excerpts of refused records, and make the pictures (in a process that may die of them)."""
        for number, by_record in self._refused.items():
            last = max(by_record) + 1
            raw_records = datasets[number].format.raw_records(datasets[number].path)
            for record, raw in enumerate(itertools.islice(raw_records, last)):
                for example in by_record.get(record, ()):
                    text = raw[:RAW_BYTES].decode("utf-8", "replace")
                    example.excerpt = text + "…" * (len(raw) > RAW_BYTES)
        shown = [example for examples in self._tally.examples.values() for example in examples if example.image]
        items = [(number, str(Path(example.image))) for number, example in enumerate(shown)]
        tasks = (items[at : at + _THUMBNAILS_PER_TASK] for at in range(0, len(items), _THUMBNAILS_PER_TASK))
        for done in run_job(ThumbnailJob(), tasks, workers=min(workers, 4)):
            for number, thumbnail in (done.extra or {}).items():
                shown[number].thumbnail = thumbnail


def excerpt_of(sample: Sample) -> str:
    """The beginning of a conversation, a line a turn."""
    lines = []
    for turn in sample.turns[:EXCERPT_TURNS]:
        text = " ".join(turn.text.split())
        lines.append(f"{turn.role}: {text[:EXCERPT_CHARACTERS]}{'…' * (len(text) > EXCERPT_CHARACTERS)}")
    if len(sample.turns) > EXCERPT_TURNS:
        lines.append(f"… {len(sample.turns) - EXCERPT_TURNS} more turns")
    return "\n".join(lines)
