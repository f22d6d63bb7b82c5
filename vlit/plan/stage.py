"""The plan of a run: every stage with its parts, data, memory, time and proposal, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlit.config.schema import RunConfig
from vlit.errors import ConfigError
from vlit.models.assemble import VisionLanguageModel, build_empty_model, model_spec
from vlit.models.quantize import original_of, packed_apart
from vlit.models.tuning import part_of_parameters
from vlit.plan.cost import Checkpoints, Work, checkpoints, work
from vlit.plan.execute import Executed, execute, tune
from vlit.plan.hardware import Cluster
from vlit.plan.memory import Parameters, Strategy
from vlit.plan.offload import Offload
from vlit.plan.parts import described
from vlit.plan.propose import Choice, Judge, Judged, candidates, prefer, propose
from vlit.plan.workload import Assumed, Workload, empty_row, workload
from vlit.types import PARTS


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage; counts of values, bytes, seconds."""

    name: str
    parts: dict[str, tuple[str, int, int]]  # mode, trained, frozen
    load: Workload
    work: Work
    parameters: Parameters
    configured: Judged
    proposed: Judged | None
    checkpoint: Checkpoints
    num_checkpoints: int
    judge: Judge
    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A run on one cluster."""

    cluster: Cluster
    share: float
    precision: str
    sources: list[dict[str, str]]
    stages: list[StagePlan]


def plan_run(
    run: RunConfig, cluster: Cluster, *, share: float = 0.4, parts: Path | None = None, assumed: Assumed | None = None,
    only: str | None = None,
) -> RunPlan:  # fmt: skip
    """Plan every stage (or ``only`` one).

    Raises:
        ConfigError, ModelError: a part or dataset is described nowhere, or a stage is unknown.
    """
    if only is not None and only not in run.stages:
        raise ConfigError(f"--stage {only}: this configuration has no such stage. Known: {', '.join(run.stages)}.")
    if not 0 < share <= 1:
        raise ConfigError(f"--share {share:g}: a share of the device's peak lies between 0 and 1, for example 0.4.")
    if parts is not None and not parts.is_dir():
        raise ConfigError(f"--parts {parts}: no such folder. Name the one that holds NAME/config.json.")
    dtype = _dtype(run, cluster)
    with described(run.model, parts) as (model, sources):
        resolved = run.model_copy(update={"model": model})
        stages = [
            plan_stage(resolved, name, cluster, share=share, assumed=assumed or Assumed(), dtype=dtype, original=run)
            for name in run.stages
            if only in (None, name)
        ]
        stages = _one_strategy(stages)
    found = [asdict(source) for source in sources]
    return RunPlan(cluster, share, str(dtype).removeprefix("torch."), found, stages)


def _one_strategy(stages: list[StagePlan]) -> list[StagePlan]:
    """``runtime.strategy`` holds for all stages: take the one that divides most, and fit the others to it."""
    chosen = [s.proposed.choice for s in stages if s.proposed is not None]
    if len({(choice.strategy, choice.offload) for choice in chosen}) < 2:
        return stages
    common = max(chosen, key=lambda choice: choice.simplicity)

    def alike(choice: Choice) -> bool:
        return (choice.strategy, choice.offload) == (common.strategy, common.offload)

    def fitted(stage: StagePlan) -> StagePlan:
        if stage.proposed is None or alike(stage.proposed.choice):
            return stage
        return replace(stage, proposed=propose(stage.judge, [choice for choice in stage.choices if alike(choice)]))

    return [fitted(stage) for stage in stages]


def plan_stage(
    run: RunConfig, name: str, cluster: Cluster, *, share: float, assumed: Assumed, dtype: torch.dtype,
    original: RunConfig | None = None,
) -> StagePlan:  # fmt: skip
    """Plan one stage of a run whose parts are described on this machine."""
    config = run.stages[name]
    model = build_empty_model(run.model, dtype=dtype)
    tune(model, config.tuning)
    spec = model_spec(original.model) if original is not None and _tokenizer_here(original) else model_spec(run.model)
    load = workload(run if original is None else original, name, spec, assumed)
    parameters = parameters_of(model, config.optimizer.type)
    effort = work(model, load)
    ranks = cluster.count

    def run_step(tokens: int, recompute: str, rows: int) -> Executed:
        row = empty_row(load.largest_row(tokens, ranks), image_size=spec.image_size)
        return execute(
            model, row, kind=cluster.device.kind, optimizer=config.optimizer, recompute=recompute,
            attention=run.runtime.attention, z_loss=config.z_loss, sums=rows > 1,
        )  # fmt: skip

    def rows_of(tokens: int) -> int:
        return load.rows_per_step(tokens, ranks, model.spec.tokens_per_view)

    judge = Judge(run_step, rows_of, load, effort, parameters, cluster, share)
    as_is = _configured(run, name, ranks)
    configured = judge.judge(as_is)
    longest = max(item.tokens for step in load.sampled for item in step)
    largest = max(longest, round(2 * load.mean("tokens") * config.global_batch / ranks))
    choices = tuple(candidates(ranks, longest, largest, muon=config.optimizer.type == "muon", configured=as_is))
    part_of = part_of_parameters(model)
    changed = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad or _written(part_of[n], config))
    return StagePlan(
        name, _parts(model, config), load, effort, parameters, configured, prefer(configured, propose(judge, choices), cluster),
        checkpoints(parameters, changed, cluster), max(0, (load.steps - 1) // config.checkpoint.every_steps), judge, choices,
    )  # fmt: skip


def _dtype(run: RunConfig, cluster: Cluster) -> torch.dtype:
    precision = run.runtime.precision
    if precision == "auto" and cluster.device.kind == "cpu":
        native = any(
            getattr(torch.cpu, f"_is_{name}_supported", lambda: False)() for name in ("avx512_bf16", "amx_tile")
        )
        precision = "bf16" if native else "fp32"
    return torch.float32 if precision == "fp32" else torch.bfloat16


def _tokenizer_here(run: RunConfig) -> bool:
    return Path(run.model.llm.tokenizer_path()).is_dir() and _described_here(run)


def _described_here(run: RunConfig) -> bool:
    paths: Sequence[str | None] = [getattr(getattr(run.model, part), "path", None) for part in ("encoder", "llm")]
    return all(path is None or (Path(path) / "config.json").is_file() for path in paths)


def _configured(run: RunConfig, name: str, ranks: int) -> Choice:
    config, offload = run.stages[name], run.runtime.offload
    strategy: Strategy
    if run.runtime.strategy == "auto":
        strategy = "none" if ranks == 1 else "ddp"
    elif ranks == 1 and offload.optimizer == offload.parameters == "none":
        strategy = "none"
    else:
        strategy = "ddp" if run.runtime.strategy == "none" else run.runtime.strategy
    on_disk = "nvme" in (offload.optimizer, offload.parameters)
    places = Offload(offload.optimizer, offload.parameters, offload.nvme_path if on_disk else None)
    return Choice(strategy, places, config.gradient_checkpointing, config.micro_batch_tokens)


def parameters_of(model: VisionLanguageModel, optimizer: str) -> Parameters:
    """What dividing the model depends on."""
    packed, own = packed_apart(model)
    cuttable = {id(p) for p in own}
    trained = sum(p.numel() for p in own if p.requires_grad)

    def cut(module: nn.Module, *, recurse: bool) -> int:
        return sum(p.numel() for p in module.parameters(recurse) if id(p) in cuttable)

    leaves, blocks = [cut(m, recurse=False) for m in model.modules()], [cut(b, recurse=True) for b in model.llm.layers]
    states = 8
    if optimizer == "muon":
        parts = part_of_parameters(model)
        matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and parts[n] != "embeddings"]
        muon = sum(p.numel() for p in matrices if p.requires_grad)
        states = round((4 * muon + 8 * (trained - muon)) / trained)
    return Parameters(
        trained, sum(p.numel() for p in own) - trained, max([*leaves, *blocks]), own[0].element_size(), states,
        sum(tensor.nbytes for tensor in packed),
    )  # fmt: skip


def _parts(model: VisionLanguageModel, config: Any) -> dict[str, tuple[str, int, int]]:
    found: dict[str, tuple[str, int, int]] = {}
    parts = part_of_parameters(model)
    for part in PARTS:
        own = {n: p for n, p in model.named_parameters() if parts[n] == part}
        if own:
            trained = sum(p.numel() for p in own.values() if p.requires_grad)
            whole = sum(original_of(model, n).numel() for n in own)
            found[part] = (config.tuning.of(part).mode, trained, whole - trained)
    return found


def _written(part: str, config: Any) -> bool:
    """Whether the model folder holds the part whole: the connector always, the language model once any of it was trained."""
    if part in ("llm", "embeddings"):
        return any(config.tuning.of(p).mode == "full" for p in ("llm", "embeddings"))
    return part == "connector" or config.tuning.of(part).mode == "full"
