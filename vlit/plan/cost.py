"""FLOPs, seconds, bytes between ranks and bytes on disk of a stage. All calculated; nothing here was measured on a GPU.

Time of a step = products at the stated share of the peak, plus what moves through memory once a row (gradient sums) and once a
step (update), plus communication: the reduction of ``ddp`` waits for the last row and hides behind nothing; ZeRO overlaps its
traffic with computing, so only what exceeds the computing counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from vlit.models.assemble import VisionLanguageModel
from vlit.models.flops import UsefulFlops
from vlit.plan.hardware import DISK_RATE, HOST_MEMORY_RATE, HOST_RATE, LATENCY_S, NVME_RATE, Cluster
from vlit.plan.memory import (
    DDP_BUCKET_BYTES,
    GRADIENT_BYTES,
    PREFETCH_BUCKET,
    REDUCE_BUCKET,
    Parameters,
    Strategy,
)
from vlit.plan.offload import Offload, weights_elsewhere
from vlit.plan.workload import Workload

SELECTIVE_COST = 0.04
"""Extra time of ``gradient_checkpointing: selective`` as a share of the step: it repeats no product, but norms, rotations and
activation functions (assumed; a CPU lost 11 %, docs/performance.md)."""


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs of one average record, for each ``gradient_checkpointing``."""

    useful: float
    repeated: dict[str, float]

    def executed(self, recompute: str) -> float:
        return self.useful + self.repeated[recompute]


def work(model: VisionLanguageModel, load: Workload) -> Work:
    """FLOPs a record of a tuned model: useful ones, and those that recomputation repeats."""
    flops = UsefulFlops(model)
    images, tokens, pairs, labels = (load.mean(what) for what in ("images", "tokens", "pairs", "labels"))
    useful = flops.per_image * images + flops.per_token * tokens + flops.per_pair * pairs + flops.per_label * labels
    backward = any(p.requires_grad for p in model.parameters())
    forward = 2.0 * _linear_weights(model.llm.trunk) * tokens + flops.per_pair / (3.5 if backward else 1.0) * pairs
    if any(p.requires_grad for p in model.encoder.parameters()):
        forward += 2.0 * _linear_weights(model.encoder) * model.encoder.spec.tokens_per_view * images
    return Work(useful, {"none": 0.0, "selective": SELECTIVE_COST * useful, "full": forward})


def _linear_weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes one rank sends in one step, and how many collectives that takes."""

    bytes: float
    collectives: float


def traffic(strategy: Strategy, parameters: Parameters, ranks: int, rows: int, recompute: str) -> Traffic:
    """Bytes a step (arXiv:1910.02054 §7): an all-reduce sends 2(N-1)/N of its data from each rank, a reduce-scatter or an
    all-gather half of that.

        ddp      2(N-1)/N · 4Ψ                                fp32 sums, once a step
        zero1    (N-1)/N · (4Ψ + 2Ψ)                          the same, and the updated weights
        zero2    (N-1)/N · (4Ψ · rows + 2Ψ)                   gradients are reduced after every row
        zero3    (N-1)/N · (4Ψ + passes · 2(Ψ + F)) · rows    passes: forward and backward, and the repeated forward of ``full``
    """
    if ranks == 1 or strategy == "none":
        return Traffic(0.0, 0)
    part, size = (ranks - 1) / ranks, parameters.bytes_each
    gradients, every = GRADIENT_BYTES * parameters.trained, parameters.weights
    if strategy == "ddp":
        return Traffic(2 * part * gradients, math.ceil(gradients / DDP_BUCKET_BYTES))
    if strategy in ("zero1", "zero2"):
        reductions = rows if strategy == "zero2" else 1
        sent = gradients * reductions + parameters.trained * size
        return Traffic(part * sent, math.ceil(parameters.trained * (reductions + 1) / REDUCE_BUCKET))
    passes = _passes(recompute)
    sent = (gradients + passes * every) * rows
    values = parameters.trained + passes * (parameters.trained + parameters.frozen)
    return Traffic(part * sent, math.ceil(values * rows / PREFETCH_BUCKET))


def _passes(recompute: str) -> int:
    """Times a row needs all weights."""
    return 3 if recompute == "full" else 2


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one step of all ranks."""

    compute: float
    memory: float  # gradient sums and update, and the way to main memory and back
    communication: float  # what is not hidden
    sent: float  # bytes each rank sends
    nvme: float = 0.0  # reading and writing what is offloaded to disk

    @property
    def total(self) -> float:
        return self.compute + self.memory + self.communication + self.nvme


def step_time(
    work: Work, load: Workload, parameters: Parameters, cluster: Cluster, *,
    strategy: Strategy, offload: Offload, recompute: str, rows: int, share: float,
) -> StepTime | None:  # fmt: skip
    """None where the device's peak is not known."""
    device, ranks = cluster.device, cluster.count
    if device.peak is None:
        return None
    compute = work.executed(recompute) * load.global_batch / (ranks * device.peak * share)
    owned = parameters.trained / (1 if strategy in ("none", "ddp") else ranks)
    moved = 10.0 * parameters.trained * rows + (28.0 * owned if offload.optimizer == "none" else 0.0)
    host, nvme = _offload_seconds(parameters, cluster, offload, owned=owned, recompute=recompute, rows=rows)
    memory_seconds = moved / device.memory_rate + host
    sent = traffic(strategy, parameters, ranks, rows, recompute)
    seconds = (
        sent.bytes / cluster.bus_rate + sent.collectives * LATENCY_S * math.log2(max(2, ranks)) if sent.bytes else 0.0
    )
    exposed = seconds if strategy == "ddp" else max(0.0, seconds - compute)
    return StepTime(compute, memory_seconds, exposed, sent.bytes, nvme)


def _offload_seconds(
    parameters: Parameters, cluster: Cluster, offload: Offload, *, owned: float, recompute: str, rows: int
) -> tuple[float, float]:
    """Seconds a step for main memory and the link to it, and for the NVMe disk; nothing of it is taken to be hidden.

    The ranks of a machine share its main memory and its disk. An optimizer on disk is read and written once a step: masters,
    states, and gradients, which are written before they are read. A rank sends its share of offloaded weights to its GPU for
    every pass of every row, and takes the updated ones back; frozen ones on disk are never written again.
    """
    neighbours, size = min(cluster.device.per_node, cluster.count), parameters.bytes_each
    host = disk = 0.0
    if offload.optimizer != "none":
        host += 28.0 * owned * neighbours / HOST_MEMORY_RATE
        host += size * owned * (rows + 1) / HOST_RATE  # gradients out, weights in
    if offload.optimizer == "nvme":
        disk += 2 * (4 + parameters.state_bytes + GRADIENT_BYTES) * owned
    if offload.parameters != "none":
        weights, uses = parameters.weights // cluster.count, _passes(recompute) * rows
        host += uses * weights / HOST_RATE
        if offload.optimizer == "none":
            host += size * owned / HOST_RATE
        away = weights_elsewhere(offload.parameters, int(owned), weights=weights, bytes_each=size).nvme
        frozen = weights - size * owned
        disk += uses * away + max(0.0, away - frozen)
    return host, disk * neighbours / NVME_RATE


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Resumable checkpoints and the model folder of a stage."""

    state_bytes: int  # masters and optimizer states
    model_bytes: int  # the model folder: what training changed
    write_seconds: float  # of one state, at DISK_RATE of each machine
    copy_seconds: float  # GPU to host memory, what an asynchronous save costs training


def checkpoints(parameters: Parameters, changed: int, cluster: Cluster) -> Checkpoints:
    """Cost of one checkpoint; ``changed``: values that the model folder holds."""
    state = (4 + parameters.state_bytes) * parameters.trained
    return Checkpoints(
        state_bytes=state,
        model_bytes=changed * parameters.bytes_each,
        write_seconds=state / (DISK_RATE * cluster.nodes),
        copy_seconds=state / cluster.count / HOST_RATE if cluster.device.kind == "cuda" else 0.0,
    )
