"""Which of PyTorch's attention kernels a call would take on the planned device.

``scaled_dot_product_attention`` chooses by device; for meta tensors it falls back to plain mathematics, which holds all
attention weights. Inside :func:`fused_attention` it takes the kernel of the planned device instead, whose meta version
allocates and saves what the kernel does. The function is replaced where callers look it up: a torch function mode would be
suspended during the backward pass, where recomputation needs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlit.kernels.planning import Kind


@contextmanager
def fused_attention(kind: Kind) -> Iterator[None]:
    """Inside, PyTorch's attention on meta tensors is that of ``kind``."""
    held: Any = F.scaled_dot_product_attention

    def chosen(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _attention(kind, query, *args, **kwargs) if query.is_meta else held(query, *args, **kwargs)

    F.scaled_dot_product_attention = chosen
    try:
        yield
    finally:
        F.scaled_dot_product_attention = held


def _attention(
    kind: Kind, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    ops = torch.ops.aten
    mask = attn_mask
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype)
    if kind == "cpu" and not dropout_p:
        return ops._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale
        )[0]
    if kind == "cuda" and mask is None and query.dtype != torch.float32:
        return ops._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:
        repeat = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    if kind == "cuda":
        return ops._scaled_dot_product_efficient_attention(
            query, key, value, mask, query.requires_grad, dropout_p, is_causal, scale=scale
        )[0]
    return ops._scaled_dot_product_attention_math(query, key, value, mask, dropout_p, is_causal, scale=scale)[0]
