"""The short training loop that both tiny bases share: Muon on hidden matrices, AdamW on the rest, cosine schedule."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WARMUP_SHARE = 0.05
LOG_EVERY_STEPS = 50


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """A weight matrix inside a transformer layer (what Muon is for): no embedding, projection, head, bias or norm."""
    return parameter.ndim == 2 and ".layers." in name


def make_optimizers(
    parameters: Iterable[tuple[str, nn.Parameter]], *, lr: float, lr_factor: dict[str, float]
) -> list[torch.optim.Optimizer]:
    """Muon (update scaled to AdamW's size) and AdamW; ``lr_factor`` multiplies the rate of parameters by exact name."""
    matrices: list[nn.Parameter] = []
    rest: list[dict[str, Any]] = []
    for name, parameter in parameters:
        if is_hidden_matrix(name, parameter):
            matrices.append(parameter)
        else:
            rest.append({"params": [parameter], "lr": lr * lr_factor.get(name, 1.0)})
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def fp32_attention(model: Any) -> None:
    """Let ``model`` attend in fp32 whatever its dtype, causally, without a mask for padding.

    On CPU the backward of bf16 ``scaled_dot_product_attention`` takes more than twice as long as the one of fp32.
    """
    from transformers import AttentionInterface

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **_: Any
    ) -> tuple[Tensor, None]:
        out = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), is_causal=True)
        return out.to(query.dtype).transpose(1, 2).contiguous(), None

    AttentionInterface.register("digits_fp32_causal", attend)
    model.set_attn_implementation("digits_fp32_causal")


def cosine(step: int, steps: int) -> float:
    """Factor of the learning rate: linear warm-up over the first 5 %, then half a cosine down to 0."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def fit(
    model: nn.Module,
    batch_loss: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    label: str,
    lr_factor: dict[str, float] | None = None,
    log: Path | None = None,
    progress: bool = True,
) -> float:
    """Minimise ``batch_loss(step)`` over all parameters of ``model``; return the seconds it took.

    The model computes in bf16, the optimizers keep fp32 copies; ``model`` is fp32 again at the end. Gradients are
    clipped to norm 1. ``log`` receives one JSON object every 50 steps.
    """
    from rich.progress import track

    masters = {name: nn.Parameter(parameter.detach().float()) for name, parameter in model.named_parameters()}
    optimizers = make_optimizers(masters.items(), lr=lr, lr_factor=lr_factor or {})
    model.bfloat16()
    working = dict(model.named_parameters())
    base_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    model.train()
    started, losses = time.perf_counter(), []
    for step in track(range(steps), description=label, disable=not progress):
        factor = cosine(step, steps)
        for optimizer, rates in zip(optimizers, base_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        loss = batch_loss(step)
        loss.backward()
        for name, parameter in working.items():
            masters[name].grad, parameter.grad = _fp32(parameter.grad), None
        nn.utils.clip_grad_norm_(masters.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        _copy(masters, working)
        losses.append(loss.item())
        if log is not None and (step + 1) % LOG_EVERY_STEPS == 0:
            recent = sum(losses[-LOG_EVERY_STEPS:]) / LOG_EVERY_STEPS
            row = {"what": label, "step": step + 1, "loss": round(recent, 4)}
            with open(log, "a", encoding="utf-8") as file:
                file.write(json.dumps(row | {"seconds": round(time.perf_counter() - started, 1)}) + "\n")
    model.float().eval()
    _copy(masters, dict(model.named_parameters()))
    return time.perf_counter() - started


def _fp32(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.float()


@torch.no_grad()
def _copy(masters: dict[str, nn.Parameter], parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(masters[name])
