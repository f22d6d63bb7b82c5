"""What one process knows about itself and its machine, for the comparison before a run. Every value is plain JSON."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from vlit import __version__
from vlit.config.schema import OffloadConfig, RunConfig
from vlit.data.cache import cache_folder
from vlit.data.load import resolve_num_workers
from vlit.train.distributed import Ranks, compute_dtype

PACKAGES = (
    "torch", "transformers", "tokenizers", "accelerate", "deepspeed", "peft", "bitsandbytes", "safetensors", "numpy", "triton",
    "pillow", "torchvision", "timm", "open_clip_torch",
)  # fmt: skip
LOCAL_KEYS = ("data.cache_dir", "data.num_workers", "runtime.num_threads")
"""Configuration that may differ between the processes of a run without changing what they compute."""
ENVIRONMENT = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")
IMAGE_BYTES = 3 * 448 * 448
"""Assumed size of one picture on its way from a data worker."""


def gather_facts(run: RunConfig, ranks: Ranks, identities: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of this process. Takes milliseconds: nothing is imported, no weight is read."""
    leaves = config_leaves(run)
    return {
        "rank": ranks.rank,
        "local_rank": int(os.environ.get("LOCAL_RANK", "0")),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "versions": versions(),
        "precision": str(compute_dtype(run.runtime, ranks.device)).removeprefix("torch."),
        "config": digest(leaves),
        "data": {name: str(value) for name, value in identities.items()},
        "environment": {k: v for k, v in os.environ.items() if k in ENVIRONMENT or k.startswith("NCCL_")},
        **device_facts(ranks.device),
        **machine_facts(run, ranks),
    }


def versions() -> dict[str, str]:
    """Installed versions of what decides the arithmetic, and a digest of vlit's own source files."""
    found = {"python": platform.python_version(), "vlit": f"{__version__} (source {source_digest()})"}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


@cache
def source_digest() -> str:
    """First eight hex digits of the sha256 of all Python and C files of the package: two checkouts of one version differ."""
    root = Path(__file__).resolve().parent.parent
    total = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".c", ".h")):
        total.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return total.hexdigest()[:8]


def device_facts(device: torch.device) -> dict[str, Any]:
    """Name and memory (bytes) of the device this process computes on."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return {
            "device": torch.cuda.get_device_name(device),
            "memory_free": free,
            "memory_total": total,
            "bf16": bool(torch.cuda.is_bf16_supported(including_emulation=False)),
        }
    free, total = _ram()
    native = any(
        getattr(torch.cpu, check, lambda: False)() for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    return {"device": f"cpu ({platform.machine()})", "memory_free": free, "memory_total": total, "bf16": native}


def machine_facts(run: RunConfig, ranks: Ranks) -> dict[str, Any]:
    """Cores, memory and disk space (bytes) of the host, and what the data workers of this process take of its shared memory."""
    output, cached = Path(run.output_dir), cache_folder(run.data.cache_dir)
    workers = resolve_num_workers(run.data.num_workers)
    records = max(-(-stage.global_batch // ranks.world_size) for stage in run.stages.values())
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "ram_free": _ram()[0],
        "shm_free": _free(Path("/dev/shm")),
        "shm_needed": workers * 3 * records * IMAGE_BYTES,  # two steps ahead and the one in hand
        "workers": workers,
        "output_free": _free(output),
        "cache_free": _free(cached),
        "cache_dir": str(cached),
    }


def offload_problems(offload: OffloadConfig) -> list[str]:
    """What keeps this process from writing where it is to offload."""
    if offload.nvme_path is None or "nvme" not in (offload.optimizer, offload.parameters):
        return []
    try:
        with tempfile.TemporaryFile(dir=offload.nvme_path) as file:
            file.write(b"vlit")
    except OSError as error:
        return [
            f"runtime.offload.nvme_path {offload.nvme_path}: cannot be written by user {os.getuid()} "
            f"({error.strerror or error}). Name a folder on a fast local disk that is there and writable on every host, or set "
            "runtime.offload to cpu."
        ]
    return []


def config_leaves(run: RunConfig) -> dict[str, Any]:
    """Dotted key -> value of the configuration, without what may differ between machines."""
    found: dict[str, Any] = {}

    def walk(value: Any, prefix: str) -> None:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                walk(item, f"{prefix}.{key}" if prefix else str(key))
        else:
            found[prefix] = value

    walk(run.model_dump(mode="json"), "")
    return {key: value for key, value in found.items() if key not in LOCAL_KEYS}


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _free(path: Path) -> int | None:
    """Free bytes of the file system that holds ``path`` or would hold it; None when unknown."""
    for folder in (path.absolute(), *path.absolute().parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(folder).free
    return None


def _ram() -> tuple[int, int]:
    """(available, total) bytes, within the limit of the container if it has one."""
    import psutil

    memory = psutil.virtual_memory()
    free, total = int(memory.available), int(memory.total)
    with contextlib.suppress(OSError, ValueError, KeyError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text()) - _cached_files(group / "memory.stat")
        free, total = min(free, max(0, limit - used)), min(total, limit)
    return free, total


def _cached_files(path: Path) -> int:
    """Bytes of files that a container holds in memory and gives up when it needs room."""
    counts = dict(line.split() for line in path.read_text().splitlines())
    return int(counts["active_file"]) + int(counts["inactive_file"])
