"""The processes of a run through accelerate, and how each uses its machine: rank, device, threads, memory, precision, sums."""

from __future__ import annotations

import atexit
import ctypes
import gc
import hashlib
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from vlit.config.schema import RuntimeConfig
from vlit.errors import ConfigError, TrainingError, VlitError

T = TypeVar("T")


BUCKET = 1 << 26
"""Values summed over ranks at a time: 256 MB of fp32."""


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
        """Sum every tensor over all ranks in place, in buffers of at most ``BUCKET`` values (one larger tensor: its own)."""
        if self.world_size == 1:
            return
        bucket: list[Tensor] = []
        for number, tensor in enumerate(tensors):
            bucket.append(tensor)
            held = sum(t.numel() for t in bucket)
            if number + 1 == len(tensors) or held + tensors[number + 1].numel() > BUCKET:
                flat = bucket[0].view(-1) if len(bucket) == 1 else torch.cat([t.reshape(-1) for t in bucket])
                torch.distributed.all_reduce(flat)
                if len(bucket) > 1:
                    parts = flat.split([t.numel() for t in bucket])
                    torch._foreach_copy_(bucket, [part.view_as(t) for t, part in zip(bucket, parts, strict=True)])
                bucket = []

    def max(self, values: list[int]) -> list[int]:
        """The largest of each number over all ranks, in one exchange."""
        if self.world_size == 1:
            return values
        held = torch.tensor(values, device=self.device)
        torch.distributed.all_reduce(held, op=torch.distributed.ReduceOp.MAX)
        return held.tolist()

    def share(self, value: Any) -> Any:
        """Rank 0's object, on every rank."""
        if self.world_size == 1:
            return value
        held = [value]
        torch.distributed.broadcast_object_list(held, src=0, device=self.device)
        return held[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's object, on every rank."""
        if self.world_size == 1:
            return [value]
        held: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(held, value)
        return held

    def on_main(self, function: Callable[[], T]) -> T | None:
        """Call ``function`` on rank 0 only and give its result there (None elsewhere); its error is everybody's.

        Raises:
            Whatever vlit error rank 0 met, with the same text on every rank, so that nobody waits for a rank that is gone.
        """
        result, problem = None, None
        if self.is_main:
            try:
                result = function()
            except (VlitError, OSError, MemoryError) as error:
                problem = error
        told = self.share(None if problem is None else f"{type(problem).__name__}: {problem}")
        if problem is not None:
            raise problem
        if told is not None:
            raise TrainingError(f"rank 0 stopped with {told}")
        return result

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
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed looks at it when it is imported
    if runtime.strategy.startswith("zero") and "RANK" not in os.environ:
        _pretend_torchrun()
    first = not torch.distributed.is_initialized()
    state = PartialState(cpu=on_cpu)
    if first and torch.distributed.is_initialized():
        atexit.register(_leave_gloo)
    if on_cpu:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
        torch.set_num_threads(runtime.num_threads or max(1, cores // local))
        keep_freed_memory()
    return Ranks(state=state, device=state.device, rank=state.process_index, world_size=state.num_processes)


def _leave_gloo(patience_s: float = 10.0) -> None:
    """Take the gloo groups down while Python still runs.

    A gloo thread drops the tensors of the last collective some time after the collective returned. Where the interpreter has
    begun to end by then, the thread finds no lock to take and the process aborts: exit code 134 in place of the run's own, in a
    quarter of the starts that were refused on two ranks (pytorch/pytorch#179291).

    Not for NCCL, whose groups can block here while another rank still is in a collective (pytorch/torchtitan#1342); nor for
    longer than ``patience_s``, because a collective that was begun and never finished would be waited for.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_backend() != "gloo":
        return

    gc.collect()  # a group that a dead cycle refers to keeps its threads
    time.sleep(0.1)  # a group that DeepSpeed still refers to: its threads need the interpreter's lock for a moment
    # last, because the others see the connections end, and this process should be the first to be gone
    thread = threading.Thread(target=torch.distributed.destroy_process_group, name="vlit-leave-gloo", daemon=True)
    thread.start()
    thread.join(patience_s)


def _pretend_torchrun() -> None:
    """One process that offloads: DeepSpeed wants a process group even so. Port 0 is one that nobody else has."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for name, value in (alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}).items():
        os.environ.setdefault(name, value)


def effective_strategy(runtime: RuntimeConfig, world_size: int) -> str:
    """``auto`` resolved, and ZeRO left out where one process has nobody to share with (pains A-22).

    Raises:
        ConfigError: ``none`` with several processes, which would train as many separate models.
    """
    offloads = runtime.offload.optimizer != "none" or runtime.offload.parameters != "none"
    if runtime.strategy == "none" and world_size > 1:
        raise ConfigError(
            f"runtime.strategy: none, but {world_size} processes were started. Use auto or ddp, or start one process."
        )
    if world_size == 1:
        return runtime.strategy if offloads else "none"
    return "ddp" if runtime.strategy == "auto" else runtime.strategy


def seed_step(seed: int, stage: str, step: int, rank: int) -> None:
    """Seed every random-number generator for one step of one rank.

    What a step draws (dropout) is a function of these four, so a resumed run needs no saved generator states, and nothing
    that happened in between (a validation, another number of steps before) can change it.
    """
    digest = hashlib.blake2b(f"{seed}/{stage}/{step}/{rank}".encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little")
    torch.manual_seed(number >> 1)
    random.seed(number)
    np.random.seed(number & 0xFFFFFFFF)


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
