"""One optimizer step of the real model on the meta device, and what it holds.

The order is that of training in one process (:mod:`vlit.train.replicated`): forward and backward of every row, its gradients
added to fp32 sums on the masters, then the update. The real modules, attention, cross-entropy and recomputation run; only the
arithmetic is left out. What several processes divide is computed from this in :mod:`vlit.plan.memory`.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlit.config.schema import OptimizerConfig, TuningConfig
from vlit.errors import ModelError
from vlit.kernels.attention import Backend
from vlit.kernels.planning import Kind, planned_for
from vlit.models.assemble import VisionLanguageModel
from vlit.models.quantize import is_quantised, packed_apart
from vlit.models.tuning import apply_tuning, has_lora, part_of_parameters
from vlit.plan.packed import packed_products
from vlit.plan.sdpa import fused_attention
from vlit.plan.trace import MemoryTrace, Peak
from vlit.plan.workspace import ANSWERS, workspace
from vlit.types import PackedBatch


@dataclass(frozen=True, slots=True)
class Executed:
    """Bytes of one executed step."""

    peak: Peak
    without_gradients: Peak
    """The highest moment when the rounded gradients of the parameters do not count: with ZeRO they are given away."""
    saved: int
    """What the forward pass of the row leaves for its backward pass."""
    logits_highest: int = 0
    """The most that the head and its cross-entropy hold: logits of a chunk, their fp32 copy, and the gradients of the hidden
    states and of the head's weight, which are computed with them."""


def tune(model: VisionLanguageModel, tuning: TuningConfig) -> None:
    """Freeze, unfreeze and add adapters to a model on the meta device, as a stage asks."""
    for part, module in {"vision": model.encoder, "llm": model.llm.hf}.items():
        if tuning.of(part).mode != "lora" and has_lora(module):
            raise ModelError(f"{part} holds adapters of an earlier stage; plan every stage with a model of its own.")
    with torch.device("meta"):
        apply_tuning(model, tuning)


def execute(
    model: VisionLanguageModel,
    row: PackedBatch,
    *,
    kind: Kind,
    optimizer: OptimizerConfig,
    recompute: str = "none",
    attention: Backend = "auto",
    z_loss: float = 0.0,
    sums: bool = True,
) -> Executed:
    """Run ``row`` (the largest of a step, on the meta device) and the update, with optimizer states present; report the peak.

    Args:
        model: from ``build_empty_model``, tuned by :func:`tune`.
        kind: the device that the meta tensors stand for.
        recompute: ``gradient_checkpointing`` of the stage.
        sums: the step has rows before this one, whose gradients are there already.
    """
    model.set_gradient_checkpointing(recompute)
    model.attention_backend, model.z_loss = attention, z_loss
    model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    trace = MemoryTrace(lambda *call: workspace(kind, *call), ANSWERS)
    trace.hold(model.parameters(), "weights")
    trace.hold(model.buffers(), "weights")
    trace.hold(packed_apart(model)[0], "weights")
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: trace.hold([_grad(p)], "gradients")) for p in trained.values()
    ]
    parts = part_of_parameters(model)
    try:
        products = packed_products(kind) if is_quantised(model) else nullcontext()
        with planned_for(kind), trace, fused_attention(kind), products:
            step = _Update(trained, parts, optimizer, trace)
            if sums:
                step.make_sums()
            with trace.during("forward", "saved"), trace.apart(model.llm.head_loss, "logits"):
                if kind != "cpu":
                    trace.hold(row.tensors().values(), "saved")
                loss = model(row)
                total = loss.total / torch.ones((), device="meta")
            saved = trace.live.get("saved", 0) + trace.live.get("logits", 0)
            with trace.during("backward", "temporary"):
                total.backward()
            with trace.during("adding gradients", "temporary"):
                step.accumulate()
            with trace.during("optimizer step", "temporary"):
                step.make_sums()
                step.apply()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained.values():
            parameter.grad = None
    return Executed(trace.peak, trace.peak_without_gradients, saved, trace.highest.get("logits", 0))


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


class _Update:
    """Masters, gradient sums and optimizer states of the trained parameters, as tensors without contents."""

    def __init__(
        self, trained: dict[str, nn.Parameter], parts: dict[str, str], config: OptimizerConfig, trace: MemoryTrace
    ) -> None:
        self.parameters, self.trace = trained, trace
        self.masters = {
            name: p if p.dtype == torch.float32 else nn.Parameter(torch.empty_like(p, dtype=torch.float32))
            for name, p in trained.items()
        }
        trace.hold([m for name, m in self.masters.items() if m is not trained[name]], "masters")
        muon = [
            m for n, m in self.masters.items() if config.type == "muon" and m.ndim == 2 and parts[n] != "embeddings"
        ]
        self.muon = torch.optim.Muon(muon) if muon else None
        self.momenta = [torch.empty_like(m) for m in muon]
        by_muon = {id(m) for m in muon}
        rest = [torch.empty_like(m) for m in self.masters.values() for _ in range(2) if id(m) not in by_muon]
        self.states = [*self.momenta, *rest]  # Muon keeps a momentum, AdamW two moments
        trace.hold(self.states, "optimizer")

    def accumulate(self) -> None:
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
                self.trace.hold([master.grad], "gradients")
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None

    def make_sums(self) -> None:
        """An fp32 gradient for every parameter that has none yet."""
        for master in self.masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
                self.trace.hold([master.grad], "gradients")

    def apply(self) -> None:
        """Fused AdamW needs nothing besides its states; Muon's orthogonalisation does, and runs."""
        if self.muon is not None:
            for parameter, momentum in zip(self.muon.param_groups[0]["params"], self.momenta, strict=True):
                self.muon.state[parameter]["momentum_buffer"] = momentum
            self.muon.step()
