"""Training through DeepSpeed ZeRO 1, 2 and 3.

DeepSpeed's engine is driven directly: accelerate's wrapper takes the optimizer step inside ``backward``, where our step
looks at loss and gradients first and discards what is not finite. Three kinds of DeepSpeed optimizer stand behind the same
few questions (:mod:`vlit.train.zero.optimizers`).
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vlit.config.deepspeed import stage_of
from vlit.config.schema import OptimizerConfig, RuntimeConfig, TuningConfig
from vlit.errors import ConfigError
from vlit.kernels.cross_entropy import CrossEntropy
from vlit.models.assemble import VisionLanguageModel
from vlit.models.tuning import part_of_parameters
from vlit.train.distributed import Ranks
from vlit.train.fragments import MASTER, Fragment, FragmentReader
from vlit.train.optimizer import ADAMW_STATES, adamw, clip_factor, entries_of, groups_of, norms_by_part
from vlit.train.zero.config import deepspeed_config
from vlit.train.zero.optimizers import wrap
from vlit.train.zero.shards import gathered
from vlit.types import PackedBatch


class ZeroEngine:
    """Masters and optimizer states, with ZeRO-2 gradients, with ZeRO-3 weights, spread over the ranks."""

    lockstep = True

    def __init__(
        self,
        model: VisionLanguageModel,
        *,
        tuning: TuningConfig,
        lr: float,
        config: OptimizerConfig,
        runtime: RuntimeConfig,
        dtype: torch.dtype,
        ranks: Ranks,
    ) -> None:
        deepspeed = import_deepspeed()
        self.model, self.ranks, self.updates = model, ranks, 0
        self.stage = stage_of(runtime.strategy)
        parts = part_of_parameters(model)
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.shapes = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in self.parameters.items()}
        self.peak_lr = {part: tuning.of(part).lr or lr for part in {parts[n] for n in self.parameters}}
        groups = groups_of(self.shapes, parts, config)
        entries = entries_of(groups, self.parameters, config)
        self._client = _optimizer(entries, config, offloaded=runtime.offload.optimizer != "none")
        model.vision_on_every_row = self.stage == 3
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        settings = deepspeed_config(runtime, dtype, on_cpu=ranks.device.type == "cpu")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._deepspeed: Any = _initialize(deepspeed, model, self._client, settings, own=runtime.deepspeed)
        for name, buffer in model.named_buffers():  # a cast to bf16 would ruin rotary frequencies and image statistics
            owner, _, own = name.rpartition(".")
            model.get_submodule(owner).register_buffer(own, buffers[name].to(buffer.device), persistent=False)
        if self.stage == 3:
            head = model.llm.head
            for weight in (head.weight, head.bias):
                if weight is not None:
                    deepspeed.zero.register_external_parameter(model.llm.head_loss, weight)
        self._optimizer = wrap(self._deepspeed.optimizer, self._client, [group.part for group in groups])

    def loss(self, row: PackedBatch) -> CrossEntropy:
        return self._deepspeed(row)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """DeepSpeed averages over ranks; the gradient of the global loss is their sum."""
        self._deepspeed.set_gradient_accumulation_boundary(last)
        self._deepspeed.backward(loss * self.ranks.world_size)

    def norms(self) -> dict[str, Tensor]:
        squares = {part: torch.zeros((), device=self.ranks.device) for part in sorted(self.peak_lr)}
        for part, gradient in self._optimizer.gradients():
            squares[part] += gradient.float().square().sum().to(self.ranks.device)
        summed = self.ranks.sum(torch.stack(list(squares.values())))
        return norms_by_part(list(zip(squares, summed.unbind(), strict=True)))

    def step(self, lr_factor: float, clip: float | None, norm: Tensor) -> None:
        scale = clip_factor(norm, clip)
        if scale is not None and float(scale) < 1.0:
            for _, gradient in self._optimizer.gradients():
                gradient.mul_(scale.to(gradient.device))
        for group in self._client.param_groups:
            group["lr"] = self.peak_lr[group["part"]] * lr_factor
        self._deepspeed.step()
        self.updates += 1

    def discard(self) -> None:
        self._optimizer.discard()

    def fragments(self) -> Iterator[Fragment]:
        for name, parameter in self.parameters.items():
            numel = math.prod(self.shapes[name])
            kinds = (MASTER, *(ADAMW_STATES if self.updates else ()))
            for kind in kinds:
                for start, values in self._optimizer.ranges(parameter, None if kind == MASTER else kind):
                    yield Fragment(name, kind, self.shapes[name], start, values[: max(0, numel - start)].reshape(-1))

    @torch.no_grad()
    def restore(self, reader: FragmentReader, updates: int) -> None:
        self.updates = updates
        if updates:
            self._optimizer.make_states(ADAMW_STATES, updates)
        for name, parameter in self.parameters.items():
            self._optimizer.set_weight(parameter, reader.whole(name))
            numel = math.prod(self.shapes[name])
            for kind in (MASTER, *(ADAMW_STATES if updates else ())):
                state = None if kind == MASTER else kind
                for start, values in self._optimizer.ranges(parameter, state):
                    held = max(0, min(values.numel(), numel - start))
                    full = torch.zeros(values.numel())
                    full[:held] = reader.range(name, kind, start, held)
                    self._optimizer.set_range(parameter, state, full)

    def whole_weights(self) -> dict[str, Tensor]:
        if self.stage < 3:
            return dict(self.model.state_dict()) if self.ranks.is_main else {}
        weights = dict(gathered(self.model, self.ranks))
        buffers = {name: b for name, b in self.model.state_dict().items() if name not in weights}
        return weights | buffers if self.ranks.is_main else {}

    def close(self) -> None:
        self._optimizer.discard()
        self._deepspeed.destroy()


def import_deepspeed() -> Any:
    """The package, quiet. ConfigError with the way to install it when it is missing."""
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"runtime.strategy: ZeRO needs the package deepspeed ({error}). Install it with pip install 'vlit[deepspeed]', or "
            "set runtime.strategy: ddp."
        ) from error
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    return deepspeed


def _initialize(
    deepspeed: Any, model: nn.Module, client: torch.optim.Optimizer, settings: dict[str, Any], *, own: Any
) -> Any:
    """DeepSpeed's engine. ConfigError where an operator that it compiles on first use cannot be built here, or where it
    refuses a combination that the run's ``own`` settings have made.
    """
    try:
        return deepspeed.initialize(model=model, optimizer=client, config=settings)[0]
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        if "JIT load" not in str(error):
            if own is None or isinstance(error, torch.OutOfMemoryError):
                raise
            raise ConfigError(
                f"runtime.deepspeed: DeepSpeed does not start with it ({' '.join(str(error).split())[:300]}). Leave out what "
                "it names, or the whole key."
            ) from error
        raise ConfigError(
            f"runtime.offload: DeepSpeed cannot build what this needs ({error}). For nvme install the system library libaio "
            "(Debian: libaio-dev) and a C++ compiler, or offload to cpu."
        ) from error


def _optimizer(entries: list[dict[str, Any]], config: OptimizerConfig, *, offloaded: bool) -> torch.optim.Optimizer:
    """AdamW; DeepSpeed's vectorised one where the states live in host memory and its kernel can be built."""
    if offloaded and torch.cuda.is_available():
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(entries, lr=0.0, betas=config.betas, eps=config.eps, adamw_mode=True)
    return adamw(entries, config)
