"""Which weights are stepped together, by which optimizer, at which rate: the same for every engine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlit.config.schema import OptimizerConfig, ScheduleConfig


def learning_rate_factor(step: int, total_steps: int, schedule: ScheduleConfig) -> float:
    """Share of the peak rate at 0-based ``step``: linear warm-up from 1/warmup, then the schedule down to ``min_ratio``."""
    warmup = schedule.warmup_steps
    if warmup is None:
        warmup = math.ceil(schedule.warmup_ratio * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    if schedule.type == "constant":
        return 1.0
    shape = 1 - progress if schedule.type == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return schedule.min_ratio + (1 - schedule.min_ratio) * shape


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters of one part that share rate, decay and optimizer."""

    part: str
    decays: bool
    muon: bool
    names: tuple[str, ...]


def groups_of(shapes: dict[str, tuple[int, ...]], part: dict[str, str], config: OptimizerConfig) -> list[Group]:
    """Groups in a fixed order: by optimizer, then as the parameters come. Biases and norms (one dimension) never decay."""
    found: dict[tuple[bool, str, bool], list[str]] = {}
    for name, shape in shapes.items():
        muon = config.type == "muon" and len(shape) == 2 and part[name] != "embeddings"
        found.setdefault((muon, part[name], len(shape) >= 2), []).append(name)
    ordered = sorted(found.items(), key=lambda item: item[0][0])
    return [Group(own, decays, muon, tuple(names)) for (muon, own, decays), names in ordered]


def entries_of(groups: list[Group], tensors: dict[str, nn.Parameter], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameter groups as torch optimizers take them."""
    decay = config.weight_decay
    return [
        {
            "params": [tensors[name] for name in group.names],
            "part": group.part,
            "weight_decay": decay if group.decays else 0.0,
        }
        for group in groups
    ]


def adamw(entries: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Fused AdamW; rates are set before every step."""
    return torch.optim.AdamW(entries, lr=0.0, betas=config.betas, eps=config.eps, fused=True)


ADAMW_STATES = ("exp_avg", "exp_avg_sq")
MUON_STATES = ("momentum_buffer",)


def norms_by_part(squares: list[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """(part, squared norm) of many tensors -> 2-norm by part, and under ``total`` that of all."""
    summed: dict[str, Tensor] = {}
    for part, square in squares:
        summed[part] = summed[part] + square if part in summed else square
    total = torch.stack(list(summed.values())).sum()
    return {part: square.sqrt() for part, square in summed.items()} | {"total": total.sqrt()}


def clip_factor(norm: Tensor, clip: float | None) -> Tensor | None:
    """What all gradients are multiplied by so that their norm is at most ``clip``."""
    return None if clip is None else torch.clamp(clip / (norm + 1e-6), max=1.0)
