"""Several recipes over the same pictures, one after the other, into one dataset. What a build leaves in its folder::

<recipe>/      the run of each recipe (pipeline.py)
calls.jsonl    every request, reply and cost of all recipes
dataset.jsonl  the records of all recipes, in the order of the configuration; complete or absent
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import orjson

from vlit.data.record import Record, from_json, write_records
from vlit.synth.engine.pipeline import run
from vlit.synth.engine.report import Report
from vlit.synth.engine.settings import BuildConfig
from vlit.synth.engine.views import picture_prefix


@dataclass(frozen=True)
class Built:
    """What a build made; ``records`` is None while some requests are unanswered."""

    reports: dict[str, Report]
    dataset: Path
    records: int | None


def build(settings: BuildConfig, *, show: bool = True) -> Built:
    """Run every recipe, and join what they made; the world that the configuration may name is there already.

    The same call continues a build that was stopped in whatever way.

    Raises:
        BudgetExhausted: the rest does not fit into the budget, which all recipes share; what is done is kept.
        SynthError: too many requests failed in a row, or another process writes here.
    """
    dataset = Path(settings.out) / "dataset.jsonl"
    dataset.unlink(missing_ok=True)  # it would be taken for this build's until the last recipe is done
    reports = {name: run(settings.settings_of(name), show=show) for name in settings.recipes}
    if any(report.records is None for report in reports.values()):
        return Built(reports, dataset, None)
    return Built(reports, dataset, write_records(dataset, _joined(settings)))


def _joined(settings: BuildConfig) -> Iterator[Record]:
    """Records of all recipes; an id that an earlier recipe used gets the name of its recipe before it."""
    seen: set[str] = set()
    for name in settings.recipes:
        with (Path(settings.out) / name / "dataset.jsonl").open("rb") as file:
            for line in file:
                record = from_json(orjson.loads(line))
                if record.id in seen:
                    record = replace(record, id=f"{name}-{record.id}")
                seen.add(record.id)
                yield record


def annotation_sources(settings: BuildConfig) -> list[str]:
    """What answers are compared with, as ``FOLDER/=FILE``: files named for quality, or the build's with boxes."""
    if settings.quality.annotations:
        return settings.quality.annotations
    paths = [Path(path) for path in settings.annotations]
    files = [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    prefixes = {file: picture_prefix(file, Path(settings.images)) for file in files}
    return [f"{prefix}={file}" for file, prefix in prefixes.items() if prefix is not None]
