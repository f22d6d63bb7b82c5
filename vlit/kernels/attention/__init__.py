"""Causal attention over packed rows: a sample never sees its neighbour, siblings share their prefix.

One function, several backends:

| backend   | where | what |
|-----------|-------|------|
| `triton`  | GPU   | our fused kernels, forward and deterministic backward |
| `flash`   | CPU   | our fused C kernel, bf16 (AVX512-BF16) |
| `blocked` | CPU   | blocked matrix products and a C softmax |
| `dense`   | any   | PyTorch's own attention on gathered segments; every option; the truth of the others |
| `flex`    | GPU   | torch's FlexAttention, for comparison |
| `varlen`  | GPU   | torch's `varlen_attn`, for comparison; rows without shared prefixes |
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vlit.kernels.attention.segments import NO_PARENT, Family, Segments, make_segments, segments_of
from vlit.kernels.planning import device_kind

__all__ = [
    "NO_PARENT",
    "Backend",
    "Family",
    "Segments",
    "choose_backend",
    "full_attention",
    "make_segments",
    "packed_attention",
    "segments_of",
]

Backend = Literal["auto", "triton", "flash", "blocked", "dense", "flex", "varlen"]


def choose_backend(q_HTE: Tensor, k_KTE: Tensor, segments: Segments, *, options: bool = False) -> Backend:
    """The fastest exact backend for these queries; ``options``: a window, soft cap or dropout is asked for.

    On a GPU the Triton kernels are taken once they have proved right there (see ``proof.py``).
    """
    if options:
        return "dense"
    kind = device_kind(q_HTE)
    if kind == "cuda":
        return "triton" if _triton_works(q_HTE, k_KTE) else "dense"
    if kind == "cpu":
        if q_HTE.dtype == torch.bfloat16:
            return "flash" if _flash_works(q_HTE, k_KTE) else "blocked"
        return "blocked" if any(parent != NO_PARENT for parent in segments.parents) else "dense"
    return "dense"


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
    backend: Backend = "auto",
) -> Tensor:
    """softmax(scale · q kᵀ + mask) v, where row t sees ``[prefix_lo, prefix_hi)`` and ``[segment_lo, t]`` and nothing else.

    Args:
        q_HTE: queries ``[H, T, E]``; k_KTE, v_KTE: ``[K, T, E]`` with H a multiple of K (grouped-query attention).
        sliding_window: a query sees at most this many positions, itself included (Mistral, Gemma).
        softcap: logits become ``softcap · tanh(logits / softcap)`` (Gemma 2).
        dropout: probability of dropping an attention weight.
        backend: a window that cannot hide anything, and no soft cap and dropout, leave the choice free; else ``dense``.

    Returns:
        ``[T, H, E]``.

    Raises:
        ValueError, NotImplementedError: the named backend cannot do what is asked, or not on this machine.
    """
    if sliding_window is not None and sliding_window >= segments.longest:
        sliding_window = None
    options = sliding_window is not None or softcap is not None or bool(dropout)
    chosen = choose_backend(q_HTE, k_KTE, segments, options=options) if backend == "auto" else backend
    if chosen == "dense":
        from vlit.kernels.attention.dense import dense_attention

        return dense_attention(
            q_HTE, k_KTE, v_KTE, segments=segments, scale=scale, sliding_window=sliding_window, softcap=softcap,
            dropout=dropout,
        )  # fmt: skip
    if options:
        raise ValueError(
            f"attention backend {chosen} knows no sliding window, soft cap or dropout (asked for: {sliding_window}, "
            f"{softcap}, {dropout}). Use auto or dense."
        )
    return _function(chosen)(q_HTE, k_KTE, v_KTE, segments=segments, scale=scale)


def _function(backend: str) -> Callable[..., Tensor]:
    if backend == "triton":
        from vlit.kernels.attention.triton import triton_attention

        return triton_attention
    if backend == "flash":
        from vlit.kernels.attention.flash_cpu import flash_cpu_attention

        return flash_cpu_attention
    if backend == "blocked":
        from vlit.kernels.attention.blocked import blocked_attention

        return blocked_attention
    if backend in ("flex", "varlen"):
        from vlit.kernels.attention import gpu_peers

        return gpu_peers.flex_attention if backend == "flex" else gpu_peers.varlen_attention
    raise ValueError(
        f"unknown attention backend {backend!r}. Known: auto, triton, flash, blocked, dense, flex, varlen."
    )


def full_attention(q_BHSE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, scale: float) -> Tensor:
    """Attention of a vision encoder, every query sees all keys: ``[B, H, S, E]``, ``[B, K, S, E]`` -> ``[B, S, H, E]``.

    The fused C kernel where it runs, PyTorch's fused attention elsewhere.
    """
    from vlit.kernels.attention import flash_cpu

    if flash_cpu.available(q_BHSE):
        return flash_cpu.flash_cpu_full(q_BHSE, k_BKSE, v_BKSE, scale=scale)
    grouped = q_BHSE.shape[1] != k_BKSE.shape[1]
    out = F.scaled_dot_product_attention(q_BHSE, k_BKSE, v_BKSE, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def _flash_works(q_HTE: Tensor, k_KTE: Tensor) -> bool:
    from vlit.kernels.attention.flash_cpu import available, flash_cpu_attention
    from vlit.kernels.attention.proof import proves_right

    groups = q_HTE.shape[0] // k_KTE.shape[0]
    if q_HTE.is_meta:
        return available(q_HTE)
    return available(q_HTE) and proves_right(flash_cpu_attention, q_HTE.device, q_HTE.dtype, q_HTE.shape[-1], groups)


def _triton_works(q_HTE: Tensor, k_KTE: Tensor) -> bool:
    if find_spec("triton") is None or not 16 <= q_HTE.shape[-1] <= 256:
        return False
    if q_HTE.is_meta:
        return True
    from vlit.kernels.attention.proof import proves_right
    from vlit.kernels.attention.triton import triton_attention

    groups = q_HTE.shape[0] // k_KTE.shape[0]
    return proves_right(triton_attention, q_HTE.device, q_HTE.dtype, q_HTE.shape[-1], groups)
