"""Products with weights in 8 or 4 bits (bitsandbytes) on the meta device: what they make, and what they need while they run.

bitsandbytes chooses among its implementations by the device of the tensors, and a few of them cannot say what they make
without data. Nothing is imported from it unless a model has such layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vlit.kernels.planning import Kind


@contextmanager
def packed_products(kind: Kind) -> Iterator[None]:
    """While open, meta tensors meet the 8-bit product that training on a device of ``kind`` takes.

    On a CPU that is a product with the unpacked weight; everywhere else LLM.int8()'s, which is what meta tensors meet anyway.
    """
    if kind != "cpu":
        yield
        return
    from bitsandbytes.autograd import _functions

    functions: Any = _functions
    held = functions.MatMul8bitLt
    functions.MatMul8bitLt = functions.MatMul8bitFp
    try:
        yield
    finally:
        functions.MatMul8bitLt = held


def workspace_of_packed(operator: str, args: tuple[Any, ...], result: Any) -> int:
    """Bytes that one of bitsandbytes' operators needs besides arguments and results; 0 for those that show what they make."""
    if (
        operator == "bitsandbytes.gemm_4bit.default"
    ):  # of more than a few tokens: the weight unpacked, its scales in fp32
        weights = math.prod(args[2])
        return weights * args[0].element_size() + weights // args[4] * 4
    if operator == "bitsandbytes.int8_mixed_scaled_mm.default":
        return int(result[0].numel()) * 4  # int32 sums
    return 0


def _int8_rows(x: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """LLM.int8()'s activations, with no outliers: how many there are depends on the data."""
    if not x.is_meta:
        return None
    outliers = torch.empty(0, dtype=torch.int64, device="meta") if threshold else None
    rows = torch.empty(x.numel() // x.shape[-1], device="meta")
    return torch.empty(x.shape, dtype=torch.int8, device="meta"), rows, outliers


def _int8_product(
    x: Tensor, packed_x: Tensor, weight: Tensor, *rest: Any, **kwargs: Any
) -> tuple[Tensor, Tensor] | None:
    if not x.is_meta:
        return None
    return x.new_empty((*packed_x.shape[:-1], weight.shape[0])), x.new_empty(0)


PACKED_ANSWERS: dict[str, Callable[..., Any]] = {
    "bitsandbytes.int8_vectorwise_quant.default": _int8_rows,
    "bitsandbytes.int8_mixed_scaled_mm.default": _int8_product,
}
"""Operators whose result is made here (see :data:`vlit.plan.workspace.ANSWERS`)."""
