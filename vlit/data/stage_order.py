"""How a stage orders its records: whether it computes shared images once, and why not; whether steps have one modality."""

from __future__ import annotations

from collections.abc import Sequence

from vlit.config.schema import RunConfig
from vlit.data.mixture import Mixture, S


def stage_mixture(run: RunConfig, stage: str, sources: Sequence[S]) -> Mixture[S]:
    """The stage's opened sources as the stream that it trains on."""
    step = run.stages[stage].global_batch if run.data_for(stage).group_by_modality else None
    return Mixture(sources, seed=run.seed, share_at_most=share_at_most(run, stage)[0], modality_step=step)


def share_at_most(run: RunConfig, stage: str) -> tuple[int, str | None]:
    """Most records of one image that a step brings together (1: no sharing), and what stands against it under ``auto``.

    Sharing is exact unless a trained part drops activations at random: the tokens of a prefix would then be dropped alike
    for all its records, where separate records draw for themselves.
    """
    data = run.data_for(stage)
    against = _dropouts(run, stage)
    if data.share_images == "off":
        return 1, None
    if data.share_images == "auto" and against:
        names = ", ".join(f"{name} {value:g}" for name, value in sorted(against.items()))
        return (
            1,
            f"images are not shared between records, because {names} would drop shared tokens alike for all of them",
        )
    return min(data.max_shared_records, run.stages[stage].global_batch), None


def _dropouts(run: RunConfig, stage: str) -> dict[str, float]:
    """Dropout settings of the parts this stage trains."""
    tuning = run.stages[stage].tuning
    found: dict[str, float] = {}
    for part, config in (("llm", run.model.llm), ("vision", run.model.encoder)):
        own = tuning.of(part)
        if own.mode != "frozen":
            found |= {f"{part}.{name}": value for name, value in config.dropouts().items()}
        if own.mode == "lora" and own.dropout:
            found[f"tuning.{part}.dropout"] = own.dropout
    return found
