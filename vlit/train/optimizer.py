"""Trainable weights with their fp32 masters, optimizer groups per part, and the learning-rate schedule.

In bf16 the model computes with rounded copies; gradients are summed and applied in fp32 on the masters, so neither many
micro-batches nor small updates are lost to rounding. In fp32 the master *is* the parameter.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vlit.config.schema import OptimizerConfig, ScheduleConfig, TuningConfig
from vlit.models.assemble import VisionLanguageModel
from vlit.models.tuning import part_of_parameters


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


class TrainedWeights:
    """All trainable parameters of a stage: accumulate, clip, step, save, restore.

    Args:
        model: with ``requires_grad`` already set by ``apply_tuning``.
        lr: peak rate of parts that have none of their own.
    """

    def __init__(self, model: VisionLanguageModel, *, tuning: TuningConfig, lr: float, config: OptimizerConfig) -> None:
        parts = part_of_parameters(model)
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.part = {name: parts[name] for name in self.parameters}
        self.masters: dict[str, nn.Parameter] = {
            n: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for n, p in self.parameters.items()
        }
        groups: dict[tuple[bool, str, bool], list[nn.Parameter]] = {}
        for name, master in self.masters.items():
            matrix = master.ndim >= 2
            muon = config.type == "muon" and master.ndim == 2 and self.part[name] != "embeddings"
            groups.setdefault((muon, self.part[name], matrix), []).append(master)
        self.peak_lr = {part: tuning.of(part).lr or lr for part in set(self.part.values())}
        self.optimizers: list[torch.optim.Optimizer] = []
        for wanted in (False, True):
            entries: list[dict[str, Any]] = [
                {"params": own, "part": part, "weight_decay": config.weight_decay if matrix else 0.0}
                for (muon, part, matrix), own in groups.items()
                if muon is wanted
            ]
            if entries and wanted:
                self.optimizers.append(torch.optim.Muon(entries, lr=lr, adjust_lr_fn="match_rms_adamw"))
            elif entries:
                self.optimizers.append(
                    torch.optim.AdamW(entries, lr=lr, betas=config.betas, eps=config.eps, fused=True)
                )

    def accumulate(self) -> None:
        """Move the gradients of one micro-batch onto the masters."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """fp32 gradient of every trainable parameter; zeros where a rank's micro-batches did not reach it."""
        for master in self.masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return {name: master.grad for name, master in self.masters.items() if master.grad is not None}

    def norms(self) -> dict[str, Tensor]:
        """2-norm of the gradient by part, and under ``total`` that of all."""
        grads = self.gradients()
        squares: dict[str, Tensor] = {}
        for name, norm in zip(grads, torch._foreach_norm(list(grads.values())), strict=True):
            part = self.part[name]
            squares[part] = squares.get(part, torch.zeros_like(norm)) + norm * norm
        total = torch.stack(list(squares.values())).sum()
        return {part: square.sqrt() for part, square in squares.items()} | {"total": total.sqrt()}

    def step(self, lr_factor: float, clip: float | None, norm: Tensor) -> None:
        """Clip to ``clip`` given the gradient's norm, apply one optimizer step, refresh the model's rounded copies."""
        if clip is not None:
            scale = torch.clamp(clip / (norm + 1e-6), max=1.0)
            torch._foreach_mul_(list(self.gradients().values()), scale)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.peak_lr[group["part"]] * lr_factor
            optimizer.step()
        self.copy_to_model()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for name, parameter in self.parameters.items():
            parameter.grad = None
            self.masters[name].grad = None

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Round the masters into the model."""
        rounded = [(p, self.masters[name]) for name, p in self.parameters.items() if self.masters[name] is not p]
        if rounded:
            torch._foreach_copy_([p for p, _ in rounded], [master for _, master in rounded])

    def tensors(self) -> dict[str, Tensor]:
        """Masters by parameter name, for checkpoints."""
        return {name: master.detach() for name, master in self.masters.items()}

    def optimizer_state(self) -> list[dict[str, Any]]:
        """State of the optimizers; tensors and plain values only, so ``weights_only`` loading reads it."""
        return [optimizer.state_dict() for optimizer in self.optimizers]

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], optimizer_state: list[dict[str, Any]]) -> None:
        """Inverse of :meth:`tensors` and :meth:`optimizer_state`; bit for bit in fp32."""
        for name, master in self.masters.items():
            master.copy_(tensors[name])
        self.copy_to_model()
        for optimizer, state in zip(self.optimizers, optimizer_state, strict=True):
            optimizer.load_state_dict(state)
