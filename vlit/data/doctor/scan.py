"""The phases of ``vlit doctor``: read, images, records, write. Workers look; this process counts and writes."""

from __future__ import annotations

import heapq
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlit.config.schema import RunConfig
from vlit.data.doctor.checks import Finding, severity_of
from vlit.data.doctor.datasets import Examined, Unreadable, open_datasets
from vlit.data.doctor.examples import Examples
from vlit.data.doctor.image_file import ImageJob
from vlit.data.doctor.manifest import FILE_NAME, ManifestEntry
from vlit.data.doctor.pictures import Pictures
from vlit.data.doctor.pool import STUCK_AFTER_S, run_job
from vlit.data.doctor.records import RecordJob, Rows
from vlit.data.doctor.repeats import find_repeats
from vlit.data.doctor.spool import Spool
from vlit.data.doctor.tally import SourceTally, Tally
from vlit.data.index import ArrowRows
from vlit.data.progress import phase
from vlit.types import ModelSpec

ROWS_PER_TASK = 1024


@dataclass
class Diagnosis:
    """What was found; ``summary`` is what ``summary.json`` holds."""

    summary: dict[str, Any]
    tally: Tally
    unreadable: list[Unreadable]
    folder: Path

    @property
    def has_errors(self) -> bool:
        return bool(self.summary["bad_records"] or self.unreadable)


def all_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def examine(
    run: RunConfig,
    spec: ModelSpec,
    *,
    stages: Iterable[str],
    out: Path,
    workers: int | None = None,
    decode: bool = True,
    progress: bool = True,
    stuck_after_s: float = STUCK_AFTER_S,
) -> Diagnosis:
    """Look at every record and image of the stages; write ``manifest.jsonl`` and ``summary.json`` into ``out``.

    Nothing is written before the end: an interrupted examination leaves an older manifest as it was.

    Args:
        spec: tokenizer of the model and tokens an image takes.
        workers: processes; default: one a core.
        decode: decode every image; otherwise only its header is read.
        stuck_after_s: a record or image that takes longer is given up and reported.
    """
    started = time.perf_counter()
    workers = workers or all_cores()
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        datasets, unreadable = open_datasets(run, spec, stages=stages, progress=progress)
        tables = [ArrowRows(dataset.info.path).table() for dataset in datasets]
        pictures = Pictures(tables, [dataset.image_root for dataset in datasets], run.data.cache_dir)
        tally = Tally()
        seconds = {"reading": time.perf_counter() - started}

        clock = time.perf_counter()
        of_images = stack.enter_context(closing(Spool(len(pictures), out)))
        image_job = ImageJob(decode=decode, follow_links=run.data.follow_links, cache_dir=run.data.cache_dir)
        with phase("look at images", total=len(pictures), unit="images", show=progress) as report:
            for done in run_job(image_job, pictures.tasks(), workers=workers, stuck_after_s=stuck_after_s):
                for place, findings in done.found:
                    of_images.add(done.task[place][0], findings)
                    tally.images.update({finding.check for finding in findings})
                report(len(done.task))
        seconds["images"] = time.perf_counter() - clock

        clock = time.perf_counter()
        of_rows = [stack.enter_context(closing(Spool(len(table), out))) for table in tables]
        _look_at_records(datasets, tables, of_rows, workers=workers, progress=progress, stuck_after_s=stuck_after_s)
        seconds["records"] = time.perf_counter() - clock

        clock = time.perf_counter()
        aside = out / f"{FILE_NAME}.{os.getpid()}.tmp"
        examples = Examples(tally, pictures, of_images)
        try:
            with aside.open("w", encoding="utf-8") as file:
                for number, dataset in enumerate(datasets):
                    own = SourceTally(
                        dataset.name,
                        str(dataset.path),
                        dataset.info.content_hash,
                        dataset.uses,
                        dataset.info.num_records + dataset.info.num_bad,
                    )
                    tally.sources.append(own)
                    found = _findings(number, dataset, tables[number], pictures, of_images, of_rows[number])
                    for row, record, identity, findings in found:
                        if tally.count_record(own, findings):
                            file.write(_entry(dataset, record, identity, findings).line())
                        examples.take(number, dataset, tables[number], row, record, identity, findings)
                    _count_unlisted(dataset, tally, own)
            examples.finish(datasets, workers=workers)
            os.replace(aside, out / FILE_NAME)
        finally:
            aside.unlink(missing_ok=True)
        seconds["writing"] = time.perf_counter() - clock
    total = time.perf_counter() - started
    summary = _summary(tally, unreadable, len(pictures), seconds, total, workers=workers, decode=decode)
    (out / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return Diagnosis(summary, tally, unreadable, out)


def _look_at_records(
    datasets: list[Examined],
    tables: list[Any],
    of_rows: list[Spool],
    *,
    workers: int,
    progress: bool,
    stuck_after_s: float,
) -> None:
    job = RecordJob([dataset.info.path for dataset in datasets], [dataset.tokenizer for dataset in datasets])
    keys = [np.full(len(table), -1, np.int64) for table in tables]
    tasks = (
        Rows(number, start, min(start + ROWS_PER_TASK, len(table)))
        for number, table in enumerate(tables)
        for start in range(0, len(table), ROWS_PER_TASK)
    )
    total = sum(len(table) for table in tables)
    with phase("look at records", total=total, unit="records", show=progress) as report:
        for done in run_job(job, tasks, workers=workers, stuck_after_s=stuck_after_s):
            task: Any = done.task
            for place, findings in done.found:
                of_rows[task.dataset].add(task.start + place, findings)
            if done.extra is not None:
                keys[task.dataset][task.start : task.stop] = done.extra
            report(len(task))
    for table, own, spool in zip(tables, keys, of_rows, strict=True):
        for row, finding in find_repeats(table, own):
            spool.add(row, [finding])


Found = tuple[int | None, int, str | None, list[Finding]]
"""Row of the index (None: refused while reading), record, id, findings."""


def _findings(
    number: int, dataset: Examined, table: Any, pictures: Pictures, of_images: Spool, of_rows: Spool
) -> Iterator[Found]:
    """All findings of a dataset, record by record, in file order."""
    refused: Iterator[Found] = (
        (None, bad["record"], bad["id"], [Finding(bad["check"], bad["reason"])]) for bad in dataset.info.bad
    )
    with_findings = np.flatnonzero(of_rows.has() | pictures.shown_by(number, of_images.has()))
    records, ids = table.column("record").to_numpy(), table.column("id")

    def read() -> Iterator[Found]:
        for row in with_findings.tolist():
            findings = [finding for image in pictures.of_row(number, row) for finding in of_images.of(image)]
            yield row, int(records[row]), ids[row].as_py(), findings + of_rows.of(row)

    return heapq.merge(refused, read(), key=lambda found: found[1])


def _entry(dataset: Examined, record: int, identity: str | None, findings: list[Finding]) -> ManifestEntry:
    errors = [finding for finding in findings if severity_of(finding.check) == "error"]
    reason = "; ".join(dict.fromkeys(finding.reason.rstrip(".") for finding in errors))
    return ManifestEntry(
        dataset.uses,
        dataset.name,
        str(dataset.path),
        dataset.info.content_hash,
        record,
        identity,
        errors[0].check,
        reason,
        dataset.rules,
    )


def _count_unlisted(dataset: Examined, tally: Tally, own: SourceTally) -> None:
    """Records that were refused while reading, beyond those an index remembers; training leaves them out anyhow."""
    if unlisted := dataset.info.num_bad - len(dataset.info.bad):
        own.bad_records += unlisted
        own.checks["record"] += unlisted
        tally.records["record"] += unlisted


def _summary(
    tally: Tally,
    unreadable: list[Unreadable],
    num_images: int,
    seconds: dict[str, float],
    total: float,
    *,
    workers: int,
    decode: bool,
) -> dict[str, Any]:
    records = sum(source.records for source in tally.sources)
    bad = sum(source.bad_records for source in tally.sources)
    return {
        "records": records,
        "bad_records": bad,
        "images": num_images,
        "images_looked_at": "decoded" if decode else "header",
        "checks": tally.by_check(),
        "sources": [source.as_dict() for source in tally.sources],
        "unreadable": [failed.__dict__ for failed in unreadable],
        "seconds": {**{name: round(value, 2) for name, value in seconds.items()}, "all": round(total, 2)},
        "images_per_second": round(num_images / max(seconds["images"], 1e-9), 1),
        "records_per_second": round(records / max(seconds["records"], 1e-9), 1),
        "workers": workers,
    }
