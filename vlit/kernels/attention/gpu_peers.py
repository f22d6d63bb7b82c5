"""PyTorch's own packed attention on a GPU, to compare the Triton kernels with: FlexAttention and ``varlen_attn``.

Same contract as :func:`vlit.kernels.attention.triton.triton_attention`: row t sees its prefix and its segment up to itself.

Shape letters: T tokens of the row, H query heads, K key/value heads, E head size, N segments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vlit.kernels.attention.segments import NO_PARENT, Segments


def flex_attention(q_HTE: Tensor, k_KTE: Tensor, v_KTE: Tensor, *, segments: Segments, scale: float) -> Tensor:
    """FlexAttention (arXiv:2412.05496), compiled, with a block mask made once per row; out ``[T, H, E]``.

    The first call compiles (seconds to a minute); a row of another length may compile again.

    Raises:
        ValueError: the tensors are not on a CUDA device (on a CPU FlexAttention has no backward).
    """
    _need_cuda("flex", q_HTE)
    out = _compiled_flex()(
        q_HTE[None],
        k_KTE[None],
        v_KTE[None],
        block_mask=_block_mask(segments, q_HTE.device),
        scale=scale,
        enable_gqa=q_HTE.shape[0] != k_KTE.shape[0],
    )
    return out[0].transpose(0, 1)


def varlen_attention(q_HTE: Tensor, k_KTE: Tensor, v_KTE: Tensor, *, segments: Segments, scale: float) -> Tensor:
    """``torch.nn.attention.varlen.varlen_attn`` (flash attention or cuDNN) on plain segments; out ``[T, H, E]``.

    Raises:
        ValueError: a segment continues a prefix, the tensors are not on a CUDA device, or the dtype is not fp16 or bf16.
    """
    _need_cuda("varlen", q_HTE)
    with_prefix = sum(parent != NO_PARENT for parent in segments.parents)
    if with_prefix:
        raise ValueError(
            f"attention backend varlen knows no shared prefix, and {with_prefix} of {len(segments.parents)} segments continue "
            "one; use triton or flex, or pack without sharing"
        )
    if q_HTE.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"attention backend varlen takes fp16 or bf16, got {q_HTE.dtype}; use triton or flex")
    from torch.nn.attention.varlen import varlen_attn

    attend: Callable[..., Any] = varlen_attn
    group = q_HTE.shape[0] // k_KTE.shape[0]
    options: dict[str, Any] = {}
    if group > 1 and "enable_gqa" in inspect.signature(attend).parameters:  # not before torch 2.12
        options["enable_gqa"] = True
    elif group > 1:
        k_KTE, v_KTE = (x.repeat_interleave(group, 0) for x in (k_KTE, v_KTE))
    q_THE, k_TKE, v_TKE = (x.transpose(0, 1) for x in (q_HTE, k_KTE, v_KTE))
    bounds, longest = _bounds(segments, q_HTE.device), max(segments.lengths)
    return attend(q_THE, k_TKE, v_TKE, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0), **options)


def _need_cuda(backend: str, q_HTE: Tensor) -> None:
    if not q_HTE.is_cuda:
        raise ValueError(
            f"attention backend {backend} needs CUDA tensors, got {q_HTE.device}; use auto, blocked or dense"
        )


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

    return torch.compile(torch_flex_attention)


@lru_cache(maxsize=16)
def _block_mask(segments: Segments, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    lengths = torch.tensor(segments.lengths)
    prefix_starts = [0 if parent == NO_PARENT else segments.starts[parent] for parent in segments.parents]
    own_lo, prefix_lo, prefix_length = (
        torch.tensor(numbers).repeat_interleave(lengths).to(device)
        for numbers in (segments.starts, prefix_starts, segments.prefix_lengths)
    )

    def visible(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        own = (key >= own_lo[row]) & (key <= row)
        return own | ((key >= prefix_lo[row]) & (key < prefix_lo[row] + prefix_length[row]))

    return create_block_mask(visible, None, None, segments.num_tokens, segments.num_tokens, device=device)


@lru_cache(maxsize=16)
def _bounds(segments: Segments, device: torch.device) -> Tensor:
    """int32 ``[N + 1]``: where each segment begins, and T."""
    return torch.tensor([*segments.starts, segments.num_tokens], dtype=torch.int32, device=device)
