"""What is to be examined: each dataset once, whatever number of stages uses it in the same way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlit.config.schema import DataSource, RunConfig
from vlit.data.doctor.manifest import rules_of, use_of
from vlit.data.formats._base import FormatConfig
from vlit.data.index import IndexInfo, build_or_open_index
from vlit.data.source import image_folder
from vlit.data.tokenize import SampleTokenizer
from vlit.errors import DataError
from vlit.types import ModelSpec


@dataclass
class Examined:
    """A dataset, the stages that use it, and the rules its records are tokenised under."""

    name: str
    path: Path
    image_root: Path
    format: FormatConfig
    rules: dict[str, Any]
    tokenizer: SampleTokenizer
    info: IndexInfo
    uses: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Unreadable:
    """A dataset that cannot be examined as a whole; the run would not start with it."""

    name: str
    file: str
    uses: list[str]
    reason: str


def open_datasets(
    run: RunConfig, spec: ModelSpec, *, stages: Iterable[str], progress: bool = False
) -> tuple[list[Examined], list[Unreadable]]:
    """Open (and index where needed) all training and validation data of the stages."""
    opened: dict[str, Examined] = {}
    failed: dict[str, Unreadable] = {}
    for stage, use, source in _sources(run, stages):
        data = run.data_for(stage)
        path = Path(source.path).expanduser()
        name = source.name or path.stem
        root = image_folder(source, path)
        rules = rules_of(data, source.format, root)
        key = repr((name, path, root, rules))
        if key in opened or key in failed:
            (opened.get(key) or failed[key]).uses.append(use)
            continue
        try:
            info = build_or_open_index(
                path, format=source.format, cache_dir=data.cache_dir, stop_at_first_bad=False, progress=progress
            )
            if info.num_with_images and not root.is_dir():
                raise DataError(
                    f"image folder {root} does not exist (working directory {Path.cwd()}). Set images: of this data source "
                    "to the folder that the records' image paths are relative to."
                )
        except DataError as error:
            failed[key] = Unreadable(name, str(path), [use], str(error))
            continue
        opened[key] = Examined(name, path, root, source.format, rules, SampleTokenizer(spec, data), info, [use])
    return list(opened.values()), list(failed.values())


def _sources(run: RunConfig, stages: Iterable[str]) -> Iterator[tuple[str, str, DataSource]]:
    for stage in stages:
        for source in run.stages[stage].data:
            yield stage, use_of(stage), source
        for source in run.stages[stage].validation.data:
            yield stage, use_of(stage, validation=True), source
