"""Running the real code without data: on the meta device tensors have shapes and no contents.

The planner (:mod:`vlit.plan`) executes a training step there to see what it allocates. Code that behaves differently by kind
of device asks :func:`device_kind`, which answers for a meta tensor what the planner is planning for; kernels outside of
PyTorch (C, Triton) allocate and save what they always do and leave out the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor

Kind = Literal["cpu", "cuda"]
_planned: Kind | None = None


@contextmanager
def planned_for(kind: Kind) -> Iterator[None]:
    """Inside, meta tensors stand for tensors of this kind of device."""
    global _planned
    held, _planned = _planned, kind
    try:
        yield
    finally:
        _planned = held


def device_kind(tensor: Tensor) -> str:
    """``cpu``, ``cuda``, ...: the tensor's own device, or what a meta tensor stands for inside :func:`planned_for`."""
    return _planned if _planned is not None and tensor.is_meta else tensor.device.type
