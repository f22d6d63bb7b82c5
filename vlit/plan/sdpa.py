"""Which of PyTorch's attention kernels a call would take on the planned device.

``scaled_dot_product_attention`` chooses by device; for meta tensors it falls back to plain mathematics, which holds all
attention weights. Inside :class:`FusedAttention` it takes the kernel of the planned device instead, whose meta version
allocates and saves what the kernel does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vlit.kernels.planning import Kind


class FusedAttention(TorchFunctionMode):
    """While active, PyTorch's attention on meta tensors is that of ``kind``."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind = kind

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return _attention(self.kind, *args, **kwargs)
        return func(*args, **kwargs)


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
