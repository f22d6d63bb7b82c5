"""Memory that an operator needs only while it runs, and operators whose result is made here instead of by PyTorch.

Everything else an operator touches is an argument or a result, which :mod:`vlit.plan.trace` sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlit.kernels.planning import Kind
from vlit.plan.packed import PACKED_ANSWERS, workspace_of_packed


def workspace(kind: Kind, operator: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Bytes ``operator`` needs besides arguments and results, on a device of ``kind``; 0 for most."""
    if operator == "vlit.packed_attention_backward.default":
        return int(args[5].nbytes)  # delta, like the log-sums
    if (
        operator == "aten.add_.Tensor"
        and kind == "cpu"
        and isinstance(args[1], Tensor)
        and args[0].dtype != args[1].dtype
    ):
        return int(args[0].nbytes)  # a CPU casts the smaller type first, a GPU while it adds
    return workspace_of_packed(operator, args, result)


def _alike(x: Any, *others: Any, **kwargs: Any) -> Tensor | None:
    """Result of a pointwise operator on tensors of one shape and dtype: PyTorch takes a hundred times longer to say so."""
    if not isinstance(x, Tensor) or not x.is_meta or kwargs:
        return None
    for other in others:
        if isinstance(other, Tensor) and other.dim() and (other.shape != x.shape or other.dtype != x.dtype):
            return None
        if isinstance(other, Tensor) and not other.dim() and other.dtype != x.dtype:
            return None
    return torch.empty_like(x) if x.is_floating_point() else None


def _same(x: Any, *others: Any, **kwargs: Any) -> Any:
    return x if isinstance(x, Tensor) and x.is_meta else None


POINTWISE = ("mul.Tensor", "add.Tensor", "sub.Tensor", "neg.default", "silu.default", "gelu.default", "rsqrt.default",
             "pow.Tensor_Scalar", "sigmoid.default")  # fmt: skip
IN_PLACE = ("mul_.Tensor", "add_.Tensor", "copy_.default", "div_.Tensor", "zero_.default")

ANSWERS: dict[str, Callable[..., Any]] = {
    **{f"aten.{name}": _alike for name in POINTWISE},
    **{f"aten.{name}": _same for name in IN_PLACE},
    **PACKED_ANSWERS,
}
