"""What decides the result of a stage: its data, opened, and its identity, which a checkpoint must share to be resumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlit.config.schema import RunConfig
from vlit.data.doctor.manifest import manifest_of, use_of
from vlit.data.mixture import Mixture
from vlit.data.source import RecordSource, open_source
from vlit.data.stage_order import stage_mixture
from vlit.errors import DataError, VlitError
from vlit.train.checkpoint import by_step

FREE = ("validation", "checkpoint", "max_non_finite_steps")
"""Settings of a stage that do not change what it computes; nothing under ``runtime`` but the precision does either."""


@dataclass(frozen=True, slots=True)
class StageData:
    """The opened datasets of one stage."""

    mixture: Mixture[RecordSource]
    held_out: list[RecordSource]
    """For validation; empty where there are none, or the stage is finished."""


def open_mixture(run: RunConfig, stage: str, *, progress: bool) -> Mixture[RecordSource]:
    """The stage's training data, opened, validated and mixed. DataError names every dataset that cannot be opened."""
    sources, problems = _open_sources(run, stage, progress=progress, listing=True)
    if problems:
        raise DataError(together(problems))
    return stage_mixture(run, stage, sources)


def open_data(
    run: RunConfig, *, only: str | None = None, progress: bool, listing: bool = False
) -> tuple[dict[str, StageData], list[str]]:
    """The datasets of all stages (up to ``only``), each opened once, and what is wrong with those that cannot be.

    A dataset of a later stage that is missing is thus found before the first stage is trained. Builds a missing index.

    Args:
        listing: write the bad records of stages that have not begun into their ``quarantine.jsonl``. What a stage that has
            begun leaves out is part of its identity, hence in its list already.
    """
    opened: dict[str, StageData] = {}
    problems: list[str] = []
    for stage in run.stages:
        folder = Path(run.output_dir) / stage
        finished = (folder / "done.json").is_file()
        begun = (finished or bool(by_step(folder / "state"))) and not run.allow_config_drift
        sources, wrong = _open_sources(run, stage, progress=progress, listing=listing and not begun)
        held_out: list[RecordSource] = []
        if not finished:
            held_out, more = _open_sources(run, stage, validation=True, progress=progress)
            wrong += more
        if not wrong:
            opened[stage] = StageData(stage_mixture(run, stage, sources), held_out)
        problems += wrong
        if stage == only:
            break
    return opened, list(dict.fromkeys(problems))


def together(problems: Sequence[str]) -> str:
    """Several problems as one message."""
    if len(problems) == 1:
        return problems[0]
    listed = [f"({number}) {problem}" for number, problem in enumerate(problems, 1)]
    return "\n  ".join([f"{len(problems)} datasets cannot be used:", *listed])


def data_identities(opened: Mapping[str, StageData]) -> dict[str, str]:
    """Use of a dataset and its name -> content hash, to compare between processes."""
    found: dict[str, str] = {}
    for stage, data in opened.items():
        found |= {f"{use_of(stage)}/{source.name}": source.content_hash for source in data.mixture.sources}
        held_out = use_of(stage, validation=True)
        found |= {f"{held_out}/{source.name}": source.content_hash for source in data.held_out}
    return found


def _open_sources(
    run: RunConfig, stage: str, *, validation: bool = False, progress: bool, listing: bool = False
) -> tuple[list[RecordSource], list[str]]:
    config = run.stages[stage]
    given = config.validation.data if validation else config.data
    opened: list[RecordSource] = []
    problems: list[str] = []
    for source in given:
        try:
            opened.append(
                open_source(
                    source,
                    data=run.data_for(stage),
                    seed=run.seed,
                    quarantine_path=Path(run.output_dir) / stage / "quarantine.jsonl" if listing else None,
                    progress=progress,
                    manifest=manifest_of(run),
                    stage=use_of(stage, validation=validation),
                )
            )
        except VlitError as error:
            problems.append(str(error))
    return opened, problems


def stage_identity(
    run: RunConfig, stage: str, mixture: Mixture[RecordSource], tokenizer: str, dtype: torch.dtype, previous: Any
) -> dict[str, Any]:
    """All that decides what the stage's result is: a checkpoint or finished stage of another identity is refused."""
    config = run.stages[stage].model_dump(mode="json")
    for free in FREE:
        config.pop(free)
    config["data"] = [
        {"name": source.name, **{key: given[key] for key in ("weight", "share", "max_records", "format")}}
        for given, source in zip(config["data"], mixture.sources, strict=True)
    ]
    data = run.data_for(stage).model_dump(mode="json")
    return {
        "model": run.model.model_dump(mode="json"),
        "tokenizer": tokenizer,
        "share_at_most": mixture.share_at_most,
        "modality_step": mixture.modality_step,
        "data": {k: data[k] for k in ("template", "image_policy", "exact_pixels", "max_tokens", "on_bad_sample")},
        "stage": config,
        "seed": run.seed,
        "precision": str(dtype).removeprefix("torch."),
        "sources": {source.name: source.content_hash for source in mixture.sources},
        "previous": previous,
    }
