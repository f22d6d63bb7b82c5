"""Memory of one rank by component, for every way of dividing the work.

``none`` and ``ddp`` are what the executed step held (:mod:`vlit.plan.execute`). ZeRO divides what belongs to parameters
(arXiv:1910.02054 §5, Ψ trained parameters, F frozen ones, N ranks, bf16 with Adam) and leaves what a micro-batch makes. Frozen
weights have neither gradients nor states; zero3 divides them as well. vlit sums gradients in fp32 over rows, so a gradient
takes G = 4 bytes where the paper's takes 2:

    zero1   2F + 2Ψ + GΨ + 12Ψ/N        zero2   2F + 2Ψ + (G + 12)Ψ/N        zero3   2F/N + (2 + G + 12)Ψ/N + gathered weights
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlit.plan.execute import Executed
from vlit.plan.hardware import GIB, Cluster
from vlit.plan.offload import NOWHERE, OFFLOADS, Elsewhere, Offload, optimizer_elsewhere, weights_elsewhere

Strategy = Literal["none", "ddp", "zero1", "zero2", "zero3"]

DDP_BUCKET_BYTES = 4 << 26
"""fp32 gradients that ``ddp`` sums at a time (``vlit/train/distributed.py``)."""
REDUCE_BUCKET = 50_000_000
"""Gradient values that ZeRO reduces at a time (``vlit/train/zero/config.py``); two buckets: one fills, the other travels."""
GRADIENT_BYTES = 4
"""Bytes of a summed gradient under ZeRO (``data_types.grad_accum_dtype``)."""
GATHER_BUCKET = 50_000_000
"""Weight values that zero1 and zero2 send at a time after the update."""
PREFETCH_BUCKET = 50_000_000
"""Weight values that zero3 gathers ahead of the module that needs them (``vlit/train/zero/config.py``)."""
LIVE_WEIGHTS = 1_000_000_000
"""Weight values that zero3 keeps gathered because they are needed again soon (DeepSpeed's ``stage3_max_live_parameters`` and
``stage3_max_reuse_distance``)."""
CUDA_CONTEXT = 0.6 * GIB
"""CUDA context, kernels and cuBLAS workspace of a process (assumed)."""
COLLECTIVE_BUFFERS = 0.5 * GIB
"""What NCCL keeps when there are several ranks (assumed)."""
MARGIN = 0.10
"""Share of a GPU's memory that a proposal leaves free: the prediction's error and the caching allocator's fragments."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """Sizes that dividing depends on; counts of values, but for those with ``bytes`` in their name."""

    trained: int
    frozen: int  # without packed weights
    largest_gathered: int  # values of the largest module that zero3 gathers at once
    bytes_each: int  # 2 in bf16, 4 in fp32
    state_bytes: int = 8  # a trained value's optimizer states: 8 (AdamW), 4 (Muon)
    packed_bytes: int = 0  # a quantised decoder's weights, which no strategy divides

    @property
    def weights(self) -> int:
        return (self.trained + self.frozen) * self.bytes_each

    @property
    def masters(self) -> int:
        return 4 * self.trained if self.bytes_each < 4 else 0


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank by component at its highest moment, and what offloading keeps elsewhere for this rank.

    ``logits_highest`` is the most that the head and its cross-entropy hold; that moment may be another one.
    """

    components: dict[str, int]
    where: str
    elsewhere: Elsewhere = NOWHERE
    logits_highest: int = 0

    @property
    def total(self) -> int:
        return sum(self.components.values())

    @property
    def host(self) -> int:
        return self.elsewhere.host

    @property
    def nvme(self) -> int:
        return self.elsewhere.nvme

    def fits(self, cluster: Cluster) -> bool:
        return self.total <= (1 - MARGIN) * cluster.device.memory


NAMES = {
    "weights": "weights", "masters": "fp32 masters", "gradients": "gradients", "optimizer": "optimizer states",
    "saved": "activations", "logits": "logits", "temporary": "temporaries", "workspace": "operator workspace",
}  # fmt: skip


def memory(
    executed: Executed, parameters: Parameters, cluster: Cluster, strategy: Strategy, offload: Offload | str = "none"
) -> Memory:
    """What one rank holds at its highest moment; ``offload`` may be a name of :data:`~vlit.plan.offload.OFFLOADS`."""
    whole = strategy in ("none", "ddp")
    peak = executed.peak if whole else executed.without_gradients
    found = {NAMES[name]: peak.bytes.get(name, 0) for name in NAMES}
    found["activations"] += peak.bytes.get("activations", 0)
    ranks, elsewhere = cluster.count, NOWHERE
    if strategy == "ddp":
        found["communication buffers"] = min(DDP_BUCKET_BYTES, 4 * parameters.trained)
    elif not whole:
        places = OFFLOADS[offload] if isinstance(offload, str) else offload
        kept, elsewhere = _offloaded(_divided(parameters, ranks, strategy, places), parameters, ranks, strategy, places)
        found |= kept
    if cluster.device.kind == "cuda":
        found["runtime base"] = int(CUDA_CONTEXT + (COLLECTIVE_BUFFERS if ranks > 1 else 0))
    shown = {name: value for name, value in found.items() if value or name == "logits"}
    return Memory(shown, f"{peak.phase}, {peak.operator}", elsewhere, executed.logits_highest)


def _divided(parameters: Parameters, ranks: int, strategy: Strategy, offload: Offload) -> dict[str, int]:
    """A rank's share of what belongs to parameters, wherever it is, and the buffers of communicating."""
    size, trained = parameters.bytes_each, parameters.trained
    share = {
        "fp32 masters": (4 * trained if offload.any else parameters.masters)
        // ranks,  # apart from fp32 weights as well
        "optimizer states": parameters.state_bytes * trained // ranks,
        "gradients": GRADIENT_BYTES * trained // (1 if strategy == "zero1" else ranks),
    }
    buckets = 2 * min(REDUCE_BUCKET, trained) * GRADIENT_BYTES
    if strategy != "zero3":
        return share | {"communication buffers": buckets + min(GATHER_BUCKET, trained) * size}
    everything = trained + parameters.frozen
    gathered = min(max(parameters.largest_gathered + PREFETCH_BUCKET, LIVE_WEIGHTS), everything)
    return share | {
        "weights": parameters.weights // ranks + parameters.packed_bytes,
        "gathered weights": gathered * size,
        "communication buffers": buckets,
    }


def _offloaded(
    share: dict[str, int], parameters: Parameters, ranks: int, strategy: Strategy, offload: Offload
) -> tuple[dict[str, int], Elsewhere]:
    """What of a rank's share stays on its GPU, and what is elsewhere."""
    kept, owned = dict(share), parameters.trained // ranks
    states = share["fp32 masters"] + share["optimizer states"]
    elsewhere = optimizer_elsewhere(offload.optimizer, owned, states=states)
    if offload.optimizer != "none":
        kept |= {"fp32 masters": 0, "optimizer states": 0}
        kept["gradients"] = share["gradients"] if strategy == "zero1" else 0
    if offload.parameters != "none":
        weights = share["weights"] - parameters.packed_bytes  # packed weights stay, on every GPU
        elsewhere += weights_elsewhere(offload.parameters, owned, weights=weights, bytes_each=parameters.bytes_each)
        kept["weights"] = parameters.packed_bytes
    return kept, elsewhere
