"""Our runtime settings -> DeepSpeed's configuration. Users never write its JSON, but may add keys that vlit does not own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from vlit.config.schema import RuntimeConfig
from vlit.errors import ConfigError, did_you_mean

OWNED = {
    "train_batch_size": "stages.<name>.global_batch",
    "train_micro_batch_size_per_gpu": "stages.<name>.micro_batch_tokens",
    "gradient_accumulation_steps": "stages.<name>.micro_batch_tokens",
    "gradient_clipping": "stages.<name>.clip_grad_norm",
    "optimizer": "stages.<name>.optimizer",
    "scheduler": "stages.<name>.schedule",
    "bf16": "runtime.precision",
    "fp16": "runtime.precision",
    "zero_optimization.stage": "runtime.strategy",
    "zero_optimization.offload_optimizer": "runtime.offload.optimizer",
    "zero_optimization.offload_param": "runtime.offload.parameters",
}
"""DeepSpeed keys that vlit sets, and the key of ours that decides them."""

KNOWN = {
    "activation_checkpointing", "aio", "amp", "comms_logger", "communication_data_type", "data_types", "dump_state",
    "flops_profiler", "memory_breakdown", "prescale_gradients", "gradient_predivide_factor", "steps_per_print",
    "wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization", "seed",
    "torch_autocast", "tensor_parallel", "timers", "csv_monitor", "tensorboard", "wandb", "sparse_gradients",
    "compression_training",
}  # fmt: skip
"""Top-level keys a user may add. DeepSpeed ignores an unknown one without a word, so vlit does not let it pass."""


def stage_of(strategy: str) -> int:
    """``zero2`` -> 2."""
    return int(strategy.removeprefix("zero"))


def deepspeed_config(runtime: RuntimeConfig, dtype: torch.dtype, *, on_cpu: bool) -> dict[str, Any]:
    """DeepSpeed's configuration of a run.

    Both accumulation settings are 1 and vlit drives the boundary itself; clipping is done by vlit, so that it is the same
    for every engine; gradients are summed in fp32, whatever the weights are.

    Raises:
        ConfigError: ``runtime.deepspeed`` is unreadable, sets a key that vlit owns, or one that DeepSpeed does not have.
    """
    offload = runtime.offload
    zero: dict[str, Any] = {
        "stage": stage_of(runtime.strategy),
        "overlap_comm": not on_cpu,
        "contiguous_gradients": True,
        "reduce_bucket_size": REDUCE_BUCKET,
    }
    if offload.optimizer != "none":
        zero["offload_optimizer"] = _place(offload.optimizer, offload.nvme_path, pin=not on_cpu)
    if offload.parameters != "none":
        zero["offload_param"] = _place(offload.parameters, offload.nvme_path, pin=not on_cpu)
    if zero["stage"] == 3:
        # DeepSpeed's linear adds the bias in place to a product that selective recomputation has kept; computed again, the
        # bias is added twice, and gradients are silently wrong. torch's own keeps no more memory, since it keeps no copy.
        zero["memory_efficient_linear"] = False
        zero |= {
            "stage3_prefetch_bucket_size": PREFETCH_BUCKET,
            "stage3_param_persistence_threshold": PERSISTENT_VALUES,
        }
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 62,
    }
    return _merged(config, _extra(runtime.deepspeed))


REDUCE_BUCKET = 50_000_000
"""Gradient values summed at a time (200 MB of fp32, twice that with overlap)."""
PREFETCH_BUCKET = 50_000_000
"""Weight values gathered ahead of their use under ZeRO-3."""
PERSISTENT_VALUES = 10_000
"""Weights smaller than this stay whole on every rank under ZeRO-3: gathering a norm costs more than holding it."""


def _place(device: str, nvme_path: str | None, *, pin: bool) -> dict[str, Any]:
    return {"device": device, "pin_memory": pin} | ({"nvme_path": nvme_path} if device == "nvme" else {})


def _extra(setting: dict[str, Any] | str | None) -> dict[str, Any]:
    if setting is None:
        return {}
    if isinstance(setting, dict):
        held, where = setting, "runtime.deepspeed"
    else:
        where = f"runtime.deepspeed {setting}"
        try:
            held = json.loads(Path(setting).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{where}: cannot be read as JSON ({error}). Give a mapping or the path of a file."
            ) from error
        if not isinstance(held, dict):
            raise ConfigError(f"{where}: holds {type(held).__name__}, expected an object.")
    for key in held:
        if key not in KNOWN and key not in OWNED:
            raise ConfigError(f"{where}: unknown key {key}. {did_you_mean(key, KNOWN)}")
    zero = held.get("zero_optimization", {})
    for key in (*held, *(f"zero_optimization.{inner}" for inner in (zero if isinstance(zero, dict) else ()))):
        if key in OWNED:
            raise ConfigError(f"{where}: {key} is decided by {OWNED[key]}. Remove it here and set that key.")
    return held


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
