"""The collectives of a run, tried with known answers and a time limit."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vlit.train.distributed import Ranks

TIMED_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}


def try_collectives(ranks: Ranks, *, limit_s: float) -> dict[str, Any]:
    """all_gather, broadcast and all_reduce.

    Returns:
        ``wrong``: what came out wrong, with the rank it came from where that can be told; ``error``: the one that failed or
        timed out; ``clock``: the time right after the first one, which ends everywhere at once; ``gb_per_s`` of all_reduce.
    """
    result: dict[str, Any] = {"wrong": [], "error": None, "clock": time.time(), "gb_per_s": 0.0}
    rank, world, device = ranks.rank, ranks.world_size, ranks.device
    name = "all_gather"
    try:
        slots = [torch.zeros(64, device=device) for _ in range(world)]
        _finish(dist.all_gather(slots, _pattern(rank, device), async_op=True), limit_s)
        result["clock"] = time.time()
        for other, slot in enumerate(slots):
            if not torch.equal(slot, _pattern(other, device)):
                result["wrong"].append(f"all_gather gave rank {rank} a wrong answer from rank {other}")
        name = "broadcast"
        sent = _pattern(7, device) if rank == 0 else torch.zeros(64, device=device)
        _finish(dist.broadcast(sent, src=0, async_op=True), limit_s)
        if not torch.equal(sent, _pattern(7, device)):
            result["wrong"].append(f"broadcast gave rank {rank} a wrong answer from rank 0")
        name = "all_reduce"
        started = 0.0
        for _ in range(2):  # the first opens connections
            summed = torch.full((TIMED_BYTES[device.type] // 4,), float(rank + 1), device=device)
            _synchronise(device)
            started = time.perf_counter()
            _finish(dist.all_reduce(summed, async_op=True), limit_s)
            _synchronise(device)
        result["gb_per_s"] = summed.numel() * 4 / max(time.perf_counter() - started, 1e-9) / 1e9
        if not torch.equal(summed, torch.full_like(summed, world * (world + 1) / 2)):
            result["wrong"].append(f"all_reduce gave rank {rank} a wrong sum")
    except RuntimeError as error:
        result["error"] = f"{name}: {str(error).splitlines()[0][:200]}"
    return result


def _pattern(rank: int, device: torch.device) -> Tensor:
    """fp32 [64], different for every rank; whole numbers, so that equality is exact."""
    return torch.arange(64, dtype=torch.float32, device=device) + 64 * rank


def _finish(work: Any, limit_s: float) -> None:
    work.wait(timedelta(seconds=limit_s))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
