"""Causal attention over packed rows: a sample never sees its neighbour, siblings share their prefix."""

from __future__ import annotations

import torch
from torch import Tensor

from vlit.kernels.attention.blocked import blocked_attention
from vlit.kernels.attention.dense import dense_attention
from vlit.kernels.attention.segments import NO_PARENT, Family, Segments, make_segments, segments_of

__all__ = ["NO_PARENT", "Family", "Segments", "make_segments", "packed_attention", "segments_of"]


def packed_attention(
    q_HTE: Tensor,
    k_KTE: Tensor,
    v_KTE: Tensor,
    *,
    segments: Segments,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale · q kᵀ + mask) v, where row t sees ``[prefix_lo, prefix_hi)`` and ``[segment_lo, t]`` and nothing else.

    Args:
        q_HTE: queries ``[H, T, E]``; k_KTE, v_KTE: ``[K, T, E]`` with H a multiple of K (grouped-query attention).
        sliding_window: a query sees at most this many positions, itself included (Mistral, Gemma).
        softcap: logits become ``softcap · tanh(logits / softcap)`` (Gemma 2).
        dropout: probability of dropping an attention weight.

    Returns:
        ``[T, H, E]``.
    """
    plain = sliding_window is None and softcap is None and not dropout
    shared = any(parent != NO_PARENT for parent in segments.parents)
    if plain and q_HTE.device.type == "cpu" and (q_HTE.dtype == torch.bfloat16 or shared):
        return blocked_attention(q_HTE, k_KTE, v_KTE, segments=segments, scale=scale)
    return dense_attention(
        q_HTE, k_KTE, v_KTE, segments=segments, scale=scale, sliding_window=sliding_window, softcap=softcap,
        dropout=dropout,
    )  # fmt: skip
