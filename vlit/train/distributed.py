"""The processes of a run through accelerate, and how each uses its machine: rank, device, threads, memory, precision, sums."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlit.config.schema import RuntimeConfig
from vlit.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among the others."""

    state: Any  # accelerate.PartialState
    device: torch.device
    rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a tensor over all ranks, in place."""
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
        return values

    def sum_all(self, tensors: list[Tensor]) -> None:
        """Sum every tensor over all ranks in place, as one flat buffer per call."""
        if self.world_size == 1:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, summed in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            torch.distributed.barrier()


def start_ranks(runtime: RuntimeConfig) -> Ranks:
    """Join the process group that torchrun describes (or run alone) and choose device and threads."""
    from accelerate import PartialState

    cuda = torch.cuda.is_available()
    if runtime.device == "cuda" and not cuda:
        raise ConfigError(
            "runtime.device: cuda was asked for, but this machine has no usable CUDA GPU. Use auto or cpu."
        )
    on_cpu = runtime.device == "cpu" or not cuda
    state = PartialState(cpu=on_cpu)
    if on_cpu:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
        torch.set_num_threads(runtime.num_threads or max(1, cores // local))
        keep_freed_memory()
    return Ranks(state=state, device=state.device, rank=state.process_index, world_size=state.num_processes)


def compute_dtype(runtime: RuntimeConfig, device: torch.device) -> torch.dtype:
    """``auto``: bf16 where the device multiplies it natively, else fp32."""
    if runtime.precision == "auto":
        native = torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_multiplies_bf16()
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if runtime.precision == "bf16" else torch.float32


def _cpu_multiplies_bf16() -> bool:
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for reuse instead of returning it to the system; False elsewhere.

    A step allocates and frees the same large buffers again and again. By default each comes from fresh pages, and clearing
    them costs a tenth of a CPU training step.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    large = mallopt(m_mmap_threshold, 1 << 30) or mallopt(m_mmap_threshold, 1 << 25)  # older versions refuse more
    return bool(large and mallopt(m_trim_threshold, (1 << 31) - 1))
