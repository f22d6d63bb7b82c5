"""Accelerators by name: published peak, memory, links. Every time the planner states is calculated from these figures.

Peaks are dense bf16 products with fp32 sums, as the makers' data sheets give them (NVIDIA A100, H100, H200, B200, L40S and RTX
4090 data sheets; sparse figures halved). Memory is what the driver reports. Links are bytes a second in one direction.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

from vlit.errors import ConfigError, did_you_mean
from vlit.kernels.planning import Kind

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator (or this machine's CPU) and how it reaches its neighbours."""

    name: str
    kind: Kind
    memory: float  # bytes
    peak: float | None  # FLOP/s, bf16 dense; None: unknown, then no times are given
    memory_rate: float = 0.0  # bytes/s
    link: float = 0.0  # bytes/s to the other devices of the machine
    network: float = 0.0  # bytes/s of the machine's network, for each of its devices
    per_node: int = 8


def _gpu(name: str, mib: int, tflops: float, memory: float, link: float, network: float) -> Device:
    return Device(name, "cuda", mib * 2**20, tflops * 1e12, memory * 1e9, link * 1e9, network * 1e9)


DEVICES = {
    device.name: device
    for device in (
        _gpu("A100-40", 40_960, 312.0, 1_555, 300, 25),
        _gpu("A100-80", 81_920, 312.0, 2_039, 300, 25),
        _gpu("H100", 81_559, 989.4, 3_350, 450, 50),
        _gpu("H200", 143_771, 989.4, 4_800, 450, 50),
        _gpu("B200", 183_359, 2_250.0, 8_000, 900, 50),
        _gpu("L40S", 46_068, 362.0, 864, 32, 25),
        _gpu("RTX4090", 24_564, 165.2, 1_008, 32, 12.5),
    )
}

LINK_SHARE = 0.7
"""Share of a link's rate that large collectives reach (assumed)."""
LATENCY_S = 2e-5
"""Seconds of one collective, times the base-2 logarithm of the ranks (assumed)."""
HOST_RATE = 25e9
"""Bytes/s between a GPU and host memory (PCIe 4 x16, assumed)."""
HOST_MEMORY_RATE = 200e9
"""Bytes/s of a machine's main memory, shared by its GPUs (assumed): what bounds an optimizer step on the CPU."""
DISK_RATE = 2e9
"""Bytes/s a machine writes to its disk or file system (assumed)."""
NVME_RATE = 3e9
"""Bytes/s a machine reads from or writes to the local NVMe disk of ``runtime.offload``, shared by its GPUs (assumed)."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """Equal devices in equal machines."""

    device: Device
    count: int

    @property
    def nodes(self) -> int:
        return -(-self.count // self.device.per_node)

    @property
    def bus_rate(self) -> float:
        """Bytes/s that each rank moves in a large ring collective. Between machines all network cards carry one ring each."""
        device = self.device
        rate = device.link if self.nodes == 1 else min(device.link, device.network * min(device.per_node, self.count))
        return LINK_SHARE * rate

    def describe(self) -> str:
        return f"{self.count}x{self.device.name}"


def parse_gpus(text: str) -> Cluster:
    """``8xH100`` or ``H200``.

    Raises:
        ConfigError: not of this form, or an unknown name.
    """
    match = re.fullmatch(r"(?:(\d+)x)?([A-Za-z0-9-]+)", text.strip())
    if match is None or match[1] == "0":
        raise ConfigError(f'--gpus "{text}": expected COUNTxNAME, for example 8xH100.')
    names = {name.lower(): name for name in DEVICES}
    if match[2].lower() not in names:
        raise ConfigError(f'--gpus "{text}": unknown accelerator "{match[2]}". {did_you_mean(match[2], DEVICES)}')
    return Cluster(DEVICES[names[match[2].lower()]], int(match[1] or 1))


def this_machine(device: str) -> Cluster:
    """The GPUs torch sees here, or the CPU. Peak and links of a GPU that is not in the table stay unknown."""
    import torch

    if device != "cpu" and torch.cuda.is_available():
        name, memory = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
        known = [d for d in DEVICES.values() if d.name.split("-")[0].lower() in name.lower().replace(" ", "")]
        base = known[-1] if known else Device(name, "cuda", memory, None, link=32e9, network=12.5e9)
        return Cluster(replace(base, memory=float(memory)), torch.cuda.device_count())
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Cluster(Device("CPU", "cpu", float(pages), None, per_node=1), 1)
