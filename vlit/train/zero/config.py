"""Our runtime settings -> DeepSpeed's configuration. Users never write its JSON, but may add keys that vlit does not own."""

from __future__ import annotations

from typing import Any

import torch

from vlit.config.deepspeed import deepspeed_mistakes, read_options, stage_of
from vlit.config.schema import RuntimeConfig
from vlit.errors import ConfigError


def deepspeed_config(runtime: RuntimeConfig, dtype: torch.dtype, *, on_cpu: bool) -> dict[str, Any]:
    """DeepSpeed's configuration of a run.

    Both accumulation settings are 1 and vlit drives the boundary itself; clipping is done by vlit, so that it is the same
    for every engine; gradients are summed in fp32, whatever the weights are.

    Raises:
        ConfigError: one line for each mistake of ``runtime.deepspeed``.
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
    return _merged(config, _extra(runtime))


REDUCE_BUCKET = 50_000_000
"""Gradient values summed at a time (200 MB of fp32, twice that with overlap)."""
PREFETCH_BUCKET = 50_000_000
"""Weight values gathered ahead of their use under ZeRO-3."""
PERSISTENT_VALUES = 10_000
"""Weights smaller than this stay whole on every rank under ZeRO-3: gathering a norm costs more than holding it."""


def _place(device: str, nvme_path: str | None, *, pin: bool) -> dict[str, Any]:
    return {"device": device, "pin_memory": pin} | ({"nvme_path": nvme_path} if device == "nvme" else {})


def _extra(runtime: RuntimeConfig) -> dict[str, Any]:
    mistakes = deepspeed_mistakes(runtime)
    if mistakes:
        raise ConfigError("\n".join(f"{key}: {text}" for key, text in mistakes))
    return {} if runtime.deepspeed is None else read_options(runtime.deepspeed)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
