"""What we ask of DeepSpeed's three ZeRO optimizers: gradients by part, ranges of masters and states, and dropping a step.

Tested against DeepSpeed 0.19; where no public call exists, the attributes its own checkpointing uses are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Sharded(Protocol):
    """One rank's share of the optimizer. ``state`` is None for the fp32 master, else the name of an optimizer state."""

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(part, summed and averaged gradient) of this rank's share; valid after the step's last backward."""
        ...

    def discard(self) -> None:
        """Forget the gradients of this step."""
        ...

    def make_states(self, kinds: tuple[str, ...], updates: int) -> None:
        """Create the optimizer's states, to be filled by :meth:`set_range`, as if ``updates`` steps had been taken."""
        ...

    def ranges(self, parameter: nn.Parameter, state: str | None) -> Iterator[tuple[int, Tensor]]:
        """(start in the flattened parameter, fp32 values) of what this rank holds; the last values may be padding."""
        ...

    def set_range(self, parameter: nn.Parameter, state: str | None, values: Tensor) -> None:
        """Replace the one range that :meth:`ranges` gave."""
        ...

    def set_weight(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Give the model's own (perhaps rounded, perhaps sharded) weight this value; called on all ranks."""
        ...


def wrap(optimizer: Any, client: torch.optim.Optimizer, parts: list[str]) -> Sharded:
    """The answers for DeepSpeed's ``optimizer`` around our ``client``; ``parts[g]`` is the part of parameter group g."""
    kind = type(optimizer).__name__
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        return _Stage3(optimizer, client, parts)
    return _BF16(optimizer, client, parts) if kind == "BF16_Optimizer" else _Stage12(optimizer, client, parts)


class _Flat:
    """Every parameter group is one flat tensor, cut into one piece a rank."""

    def __init__(self, optimizer: Any, client: torch.optim.Optimizer, parts: list[str]) -> None:
        self.optimizer, self.client, self.parts = optimizer, client, parts

    def make_states(self, kinds: tuple[str, ...], updates: int) -> None:
        for group in self.client.param_groups:
            self.client.state[group["params"][0]] = _new_state(self.client, group["params"][0], kinds, updates)

    def _range(self, parameter: Any, state: str | None) -> Tensor | None:
        held = getattr(parameter, "_hp_mapping", None)
        if held is None:  # all of it belongs to other ranks
            return None
        flat = self.client.param_groups[held.param_group_index]["params"][0]
        values = flat if state is None else self.client.state[flat][state]
        address = held.get_hp_fragment_address()
        return values.detach().narrow(0, address.start, address.numel)

    def ranges(self, parameter: Any, state: str | None) -> Iterator[tuple[int, Tensor]]:
        values = self._range(parameter, state)
        if values is not None:
            yield parameter._hp_mapping.lp_fragment_address.start, values

    def set_range(self, parameter: nn.Parameter, state: str | None, values: Tensor) -> None:
        held = self._range(parameter, state)
        assert held is not None
        held.copy_(values)

    def set_weight(self, parameter: nn.Parameter, whole: Tensor) -> None:
        parameter.data.copy_(whole)


class _Stage12(_Flat):
    """ZeRO-1 and ZeRO-2."""

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        for group, part in enumerate(self.parts):
            if self.optimizer.cpu_offload:
                held = self.optimizer.single_partition_of_fp32_groups[group].grad
                yield from [(part, held)] if held is not None else []
            else:
                yield from ((part, gradient) for gradient in self.optimizer.averaged_gradients.get(group) or ())

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer._release_preflattened_grad_buffers()
        if self.optimizer.cpu_offload:
            self.optimizer.reset_cpu_buffers()
        for group in list(self.optimizer.averaged_gradients):
            self.optimizer.averaged_gradients[group] = None
            self.optimizer.all_grad_tensors[group] = None
        self.optimizer.micro_step_id = -1


class _BF16(_Flat):
    """ZeRO-1 in bf16, for which DeepSpeed has an optimizer of its own with fp32 gradients."""

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        yield from zip(self.parts, self.optimizer.fp32_groups_gradient_flat_partition, strict=True)

    def discard(self) -> None:
        self.optimizer.clear_hp_grads()
        self.optimizer.clear_lp_grads()


class _Stage3:
    """ZeRO-3: every parameter is cut into one piece a rank."""

    def __init__(self, optimizer: Any, client: torch.optim.Optimizer, parts: list[str]) -> None:
        self.optimizer, self.client, self.parts = optimizer, client, parts

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        for number, group in self.optimizer.sub_group_to_group_id.items():
            if self.optimizer.offload_optimizer:
                held = self.optimizer.fp32_partitioned_groups_flat[number].grad
                yield from [(self.parts[group], held)] if held is not None else []
            else:
                yield from ((self.parts[group], g) for g in self.optimizer.averaged_gradients.get(number) or ())

    def discard(self) -> None:
        self.optimizer._overflow_clean_up(1.0)

    def make_states(self, kinds: tuple[str, ...], updates: int) -> None:
        for flat in self.optimizer.fp32_partitioned_groups_flat:
            self.client.state[flat] = _new_state(self.client, flat, kinds, updates)

    def ranges(self, parameter: Any, state: str | None) -> Iterator[tuple[int, Tensor]]:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        held = (
            safe_get_local_fp32_param(parameter) if state is None else safe_get_local_optimizer_state(parameter, state)
        )
        yield torch.distributed.get_rank() * parameter.ds_tensor.ds_numel, held.detach()

    def set_range(self, parameter: nn.Parameter, state: str | None, values: Tensor) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        if state is None:
            safe_set_local_fp32_param(parameter, values)
        else:
            safe_set_local_optimizer_state(parameter, values, state)

    def set_weight(self, parameter: nn.Parameter, whole: Tensor) -> None:
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(whole)


def _new_state(client: torch.optim.Optimizer, flat: Tensor, kinds: tuple[str, ...], updates: int) -> dict[str, Any]:
    step: Any = updates  # DeepSpeed's own CPU Adam counts in an int, torch's fused AdamW in a tensor
    if isinstance(client, torch.optim.AdamW):
        step = torch.full((), float(updates), dtype=torch.float32, device=flat.device)
    return {"step": step, **{kind: torch.zeros_like(flat) for kind in kinds}}
