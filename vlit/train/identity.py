"""What decides the result of a stage: its data, opened, and its identity, which a checkpoint must share to be resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vlit.config.schema import RunConfig
from vlit.data.doctor.manifest import manifest_of
from vlit.data.mixture import Mixture
from vlit.data.source import RecordSource, open_source
from vlit.data.stage_order import stage_mixture

FREE = ("validation", "checkpoint", "max_non_finite_steps")
"""Settings of a stage that do not change what it computes; nothing under ``runtime`` but the precision does either."""


def open_mixture(run: RunConfig, stage: str, *, progress: bool) -> Mixture[RecordSource]:
    """The stage's datasets, opened, validated and mixed."""
    data, folder = run.data_for(stage), Path(run.output_dir) / stage
    quarantine, manifest = folder / "quarantine.jsonl", manifest_of(run)
    sources = [
        open_source(
            source,
            data=data,
            seed=run.seed,
            quarantine_path=quarantine,
            progress=progress,
            manifest=manifest,
            stage=stage,
        )
        for source in run.stages[stage].data
    ]
    return stage_mixture(run, stage, sources)


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
