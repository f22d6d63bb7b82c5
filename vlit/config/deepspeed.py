"""``runtime.deepspeed``: the settings that a user may add to DeepSpeed's configuration, and what is wrong with them."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlit.config.schema import PositiveInt, RuntimeConfig
from vlit.errors import ConfigError, did_you_mean

OWNED = {
    "train_batch_size": "stages.<name>.global_batch",
    "train_micro_batch_size_per_gpu": "stages.<name>.micro_batch_tokens",
    "gradient_accumulation_steps": "stages.<name>.micro_batch_tokens",
    "gradient_clipping": "stages.<name>.clip_grad_norm",
    "optimizer": "stages.<name>.optimizer",
    "scheduler": "stages.<name>.schedule",
    "activation_checkpointing": "stages.<name>.gradient_checkpointing",
    "seed": "the seed of the run",
    "bf16": "runtime.precision",
    "fp16": "runtime.precision",
    "amp": "runtime.precision",
    "torch_autocast": "runtime.precision",
    "data_types.param_dtype": "runtime.precision",
    "zero_optimization.stage": "runtime.strategy",
    "zero_optimization.offload_optimizer": "runtime.offload.optimizer",
    "zero_optimization.cpu_offload": "runtime.offload.optimizer",
    "zero_optimization.offload_param": "runtime.offload.parameters",
    "zero_optimization.cpu_offload_param": "runtime.offload.parameters",
}
"""DeepSpeed keys, old names included, and what of ours decides them."""

REFUSED = {
    "compression_training": "DeepSpeed has dropped it; remove the key",
    "sparse_gradients": "DeepSpeed has dropped it; remove the key",
    "tensor_parallel": "every process has records of its own, so no tensor can be split; remove the key",
    "data_types.buffer_dtype": "vlit keeps buffers as they are, a cast ruins rotary frequencies; remove the key",
    "data_types.keep_in_fp32_modules": "vlit keeps buffers as they are; remove the key",
    "zero_optimization.cpu_offload_use_pin_memory": "vlit pins memory wherever there is a GPU; remove the key",
    "zero_optimization.zenflow": "it takes optimizer steps beside those of vlit; remove the key",
    "zero_optimization.prefetch_bucket_size": "vlit sets it as stage3_prefetch_bucket_size; write that name",
    "zero_optimization.param_persistence_threshold": "vlit sets it as stage3_param_persistence_threshold; write that name",
}
"""DeepSpeed keys that do not go with vlit, and why."""

ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "data_types.grad_accum_dtype": (
        ("fp32", "float32", "float", "torch.float32"),
        "the gradients of a step are summed in fp32, whatever the weights are",
    ),
    "zero_force_ds_cpu_optimizer": ((False,), "vlit chooses the optimizer"),
    "zero_optimization.memory_efficient_linear": (
        (False,),
        "it adds biases in place to what selective recomputation keeps, and gradients are silently wrong",
    ),
}
"""DeepSpeed keys of which only these values are right under vlit, and why."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _FileAccess(_Section):
    block_size: PositiveInt = 1 << 20
    queue_depth: PositiveInt = 8
    intra_op_parallelism: PositiveInt = 1
    single_submit: bool = False
    overlap_events: bool = True
    use_gds: bool = False


class _FlopsProfiler(_Section):
    enabled: bool = False
    recompute_fwd_factor: float = 0.0
    profile_step: int = 1
    module_depth: int = -1
    top_modules: int = 1
    detailed: bool = True
    output_file: str | None = None


class _DataTypes(_Section):
    grad_accum_dtype: str = "fp32"


class _Throughput(_Section):
    enabled: bool = True
    synchronized: bool = True


class _Timers(_Section):
    throughput: _Throughput = _Throughput()


class Options(_Section):
    """What a user may add. DeepSpeed passes over unknown keys of most sections without a word and checks few of their values.

    Sections of type ``dict`` have a model in DeepSpeed, and are checked against it where the package is installed.
    """

    aio: _FileAccess = _FileAccess()
    comms_logger: dict[str, Any] = {}
    communication_data_type: Literal["fp32", "bf16", "fp16"] = "fp32"
    csv_monitor: dict[str, Any] = {}
    data_types: _DataTypes = _DataTypes()
    dump_state: bool = False
    flops_profiler: _FlopsProfiler = _FlopsProfiler()
    gradient_predivide_factor: Annotated[float, Field(gt=0)] = 1.0
    memory_breakdown: bool = False
    prescale_gradients: bool = False
    steps_per_print: PositiveInt | None = None
    tensorboard: dict[str, Any] = {}
    timers: _Timers = _Timers()
    wall_clock_breakdown: bool = False
    wandb: dict[str, Any] = {}
    zero_allow_untested_optimizer: bool = True
    zero_force_ds_cpu_optimizer: bool = False
    zero_optimization: dict[str, Any] = {}


def stage_of(strategy: str) -> int:
    """``zero2`` -> 2."""
    return int(strategy.removeprefix("zero"))


def deepspeed_mistakes(runtime: RuntimeConfig) -> list[tuple[str, str]]:
    """Key and explanation of everything that is wrong with ``runtime.deepspeed``, however many processes there are.

    Imports DeepSpeed, where it is installed and the key is set: seconds.
    """
    if runtime.deepspeed is None:
        return []
    try:
        given = read_options(runtime.deepspeed)
    except ConfigError as error:
        return [("runtime.deepspeed", str(error))]
    found, taken = _without_refused(given)
    found += _explained(Options, Options, taken)
    for section, (model, check) in _deepspeed_models(runtime.strategy).items():
        if isinstance(taken.get(section), dict):
            found += _explained(model, check, taken[section], section)
    file = f"{runtime.deepspeed}: " if isinstance(runtime.deepspeed, str) else ""
    return [(f"runtime.deepspeed.{key}", file + text) for key, text in found]


def read_options(setting: dict[str, Any] | str) -> dict[str, Any]:
    if isinstance(setting, dict):
        return setting
    try:
        held = json.loads(Path(setting).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{setting}: cannot be read as JSON ({error}). Give a mapping or the path of a JSON file."
        ) from error
    if not isinstance(held, dict):
        raise ConfigError(f"{setting}: holds {type(held).__name__}, expected an object. Put its keys within braces.")
    return held


def _without_refused(given: dict[str, Any]) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """What does not go with vlit, with the reasons; and the settings without it."""
    found: list[tuple[str, str]] = []
    taken: dict[str, Any] = {}
    for key, value in given.items():
        reason = _reason(key, value)
        if reason is not None:
            found.append((key, reason))
            continue
        taken[key] = value
        if isinstance(value, dict):
            reasons = {inner: _reason(f"{key}.{inner}", held) for inner, held in value.items()}
            found += [(f"{key}.{inner}", why) for inner, why in reasons.items() if why is not None]
            taken[key] = {inner: held for inner, held in value.items() if reasons[inner] is None}
    return found, taken


def _reason(key: str, value: Any) -> str | None:
    if key in OWNED:
        return f"{OWNED[key]} decides it (got {_shown(value)}). Remove it here and set that."
    if key in REFUSED:
        return f"{REFUSED[key]} (got {_shown(value)})."
    right, why = ONLY.get(key, ((value,), ""))
    if any(type(value) is type(one) and value == one for one in right):
        return None
    return f"{why} (got {_shown(value)}). Remove the key, or set {json.dumps(right[0])}."


def _deepspeed_models(strategy: str) -> dict[str, tuple[Any, Callable[..., Any]]]:
    """DeepSpeed's model of each section that has one, and what makes it; none where the package is not installed."""
    try:
        with redirect_stdout(sys.stderr):  # its log would stand between the lines of a command that prints JSON
            from deepspeed.comm.config import CommsLoggerConfig
            from deepspeed.monitor.config import CSVConfig, TensorBoardConfig, WandbConfig
            from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
            from deepspeed.utils import logger
    except ImportError:
        return {}
    logger.setLevel(logging.WARNING)
    stage = stage_of(strategy) if strategy.startswith("zero") else 1
    models = {
        "comms_logger": CommsLoggerConfig,
        "csv_monitor": CSVConfig,
        "tensorboard": TensorBoardConfig,
        "wandb": WandbConfig,
    }
    checks = {section: (model, partial(model, strict=True)) for section, model in models.items()}
    return checks | {"zero_optimization": (DeepSpeedZeroConfig, partial(DeepSpeedZeroConfig, strict=True, stage=stage))}


def _explained(
    model: Any, check: Callable[..., Any], values: dict[str, Any], *section: str
) -> Iterator[tuple[str, str]]:
    """Key and explanation of what ``check``, which makes a ``model`` of the values, objects to."""
    try:
        check(**values)
    except ValidationError as error:
        for detail in error.errors():
            *inside, key = (*section, *(str(part) for part in detail["loc"]))
            if detail["type"] == "extra_forbidden":
                text = f"unknown key. {did_you_mean(key, _keys(model, inside[len(section) :], section))}"
            else:
                said = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
                text = f"{said} (got {_shown(detail['input'])})"
            yield ".".join((*inside, key)), text
    except Exception as error:  # whatever DeepSpeed's own checks raise
        yield ".".join(section), f"DeepSpeed does not take it: {type(error).__name__}: {error} (got {_shown(values)})"


def _keys(model: Any, inside: list[str], section: tuple[str, ...]) -> list[str]:
    """What may be written in ``model``, or in the model that it holds at ``inside``."""
    for place in inside:
        field = next((field for name, field in model.model_fields.items() if place in (name, field.alias)), None)
        kinds = () if field is None else (field.annotation, *get_args(field.annotation))
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if model is None:
            return []
    names = [field.alias or name for name, field in model.model_fields.items()]
    return [name for name in names if ".".join((*section, *inside, name)) not in OWNED | REFUSED]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."
