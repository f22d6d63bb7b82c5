"""What ``runtime.offload`` takes off a GPU, and where DeepSpeed 0.19 keeps it (``deepspeed/runtime/zero/stage3.py``).

Optimizer and parameters go independently of each other. An offloaded optimizer is updated on the CPU, so its masters, its
states and the summed gradients leave the GPU together; with offloaded parameters alone they stay. Of one rank:

    optimizer   cpu    masters, states and gradients are in main memory
                nvme   masters, states and a copy of the gradients are on disk; gradients are summed in main memory, and a
                       sub-group at a time passes through buffers there
    parameters  cpu    the rank's share of the weights is in main memory
                nvme   it is on disk, but for trained weights where a rank has at most :data:`WEIGHTS_IN_MEMORY` of them; room
                       for that many, and the buffers of reading, are main memory in any case
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

Place = Literal["none", "cpu", "nvme"]
PLACES: tuple[Place, ...] = ("none", "cpu", "nvme")

SUB_GROUP = 1_000_000_000
"""Values that DeepSpeed updates at a time (``sub_group_size``)."""
SWAP_BUFFERS = 4
"""fp32 buffers of a sub-group's size for an optimizer on NVMe (``offload_optimizer.buffer_count``)."""
WEIGHTS_IN_MEMORY = 1_000_000_000
"""Trained weights a rank that stay in main memory with parameters on NVMe (``offload_param.max_in_cpu``)."""
READ_BUFFERS = 5 * 100_000_000
"""Values of the buffers that weights are read into (``offload_param.buffer_count`` and ``buffer_size``)."""
SUM_BYTES = 4
"""Bytes of a summed gradient, of a master, and of a swapped value."""


@dataclass(frozen=True, slots=True)
class Offload:
    """Where a run keeps optimizer and weights: as ``runtime.offload``."""

    optimizer: Place = "none"
    parameters: Place = "none"
    nvme_path: str | None = None

    @property
    def any(self) -> bool:
        return self.distance > 0

    @property
    def distance(self) -> int:
        """0: all is on the GPU. The larger, the more is elsewhere, and the farther away."""
        return PLACES.index(self.optimizer) + PLACES.index(self.parameters)

    def yaml(self) -> str:
        """As a value of ``runtime.offload``."""
        places = {"optimizer": self.optimizer, "parameters": self.parameters}
        pairs = [f"{what}: {place}" for what, place in places.items() if place != "none"]
        if "nvme" in places.values() and self.nvme_path is not None:
            pairs.append(f"nvme_path: {json.dumps(self.nvme_path)}")
        return "{" + ", ".join(pairs) + "}"


OFFLOADS = {"none": Offload(), "optimizer": Offload("cpu"), "all": Offload("cpu", "cpu")}
"""What a proposal may offload."""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Bytes of one rank outside of its GPU."""

    host: int = 0
    nvme: int = 0

    def __add__(self, other: Elsewhere) -> Elsewhere:
        return Elsewhere(self.host + other.host, self.nvme + other.nvme)


NOWHERE = Elsewhere()


def optimizer_elsewhere(place: Place, owned: int, *, states: int) -> Elsewhere:
    """An optimizer of ``owned`` trained values, whose masters and states are ``states`` bytes."""
    gradients = SUM_BYTES * owned
    if place == "none":
        return NOWHERE
    if place == "cpu":
        return Elsewhere(host=states + gradients)
    buffers = SWAP_BUFFERS * SUM_BYTES * min(owned, SUB_GROUP)
    return Elsewhere(host=gradients + buffers, nvme=states + gradients)


def weights_elsewhere(place: Place, owned: int, *, weights: int, bytes_each: int) -> Elsewhere:
    """A rank's ``weights`` (bytes), of which ``owned`` values are trained."""
    if place == "none":
        return NOWHERE
    if place == "cpu":
        return Elsewhere(host=weights)
    room = min(owned, WEIGHTS_IN_MEMORY) * bytes_each
    stay = room if owned <= WEIGHTS_IN_MEMORY else 0
    return Elsewhere(host=room + READ_BUFFERS * bytes_each, nvme=weights - stay)
