"""Our packed attention under transformers' own extension points, so that any decoder uses it unpatched.

Registered in ``AttentionInterface`` *and* ``AttentionMaskInterface``: with only the first, transformers builds no mask at
all and padded batches are silently wrong. Packed rows pass a one-element 4-D mask, which makes transformers hand the mask
through instead of building a T x T one; the segments travel as a keyword argument through every layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlit.errors import ModelError
from vlit.kernels.attention import (
    Backend,
    Segments,
    full_attention,
    packed_attention,
)
from vlit.kernels.planning import device_kind

NAME = "vlit_packed"
ENCODER_NAME = "vlit_encoder"
_PACKED_MASK_SHAPE = (1, 1, 1, 1)


_packed, _full = torch.compiler.disable(packed_attention), torch.compiler.disable(full_attention)
"""Opaque to torch.compile: segments differ from row to row, and a graph must not depend on them."""


def register() -> str:
    """Register the decoder's attention and mask functions; returns the name to load a model with."""
    return _register(NAME, attention_forward)


def register_encoder() -> str:
    """Register the attention of vision encoders; returns the name to load a model with."""
    return _register(ENCODER_NAME, encoder_attention_forward)


def _register(name: str, function: Callable[..., Any]) -> str:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def encoder_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a vision layer, every patch sees all: ``[B, H, S, E]`` -> ``[B, S, H, E]``.

    The fused C kernel in bf16 on a CPU that has it, PyTorch's fused attention elsewhere.
    """
    if attention_mask is None and not dropout and device_kind(query) == "cpu" and query.dtype == torch.bfloat16:
        return _full(query, key, value, scaling if scaling is not None else query.shape[-1] ** -0.5), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def packed_arguments(segments: Segments, device: torch.device, backend: Backend = "auto") -> dict[str, Any]:
    """Keyword arguments that make a decoder's forward treat its one row as packed segments."""
    return {
        "attention_mask": torch.zeros(_PACKED_MASK_SHAPE, dtype=torch.bool, device=device),
        "use_cache": False,
        "vlit_segments": segments,
        "vlit_backend": backend,
    }


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    vlit_segments: Segments | None = None,
    vlit_backend: Backend = "auto",
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer: query ``[B, H, T, E]``, key/value ``[B, K, T', E]`` -> ``[B, T, H, E]``.

    With ``vlit_segments`` the row is packed (B = 1); without, this is ordinary masked attention (generation).

    Raises:
        ModelError: a packed row arrived without its segments (the decoder drops keyword arguments), or the layer uses
            attention sinks or a mask of its own, which this attention does not compute.
    """
    if kwargs.get("s_aux") is not None:
        raise ModelError(f"{type(module).__name__} uses attention sinks, which packed attention does not support.")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if vlit_segments is not None:
        if attention_mask is None or tuple(attention_mask.shape) != _PACKED_MASK_SHAPE:
            raise ModelError(
                f"{type(module).__name__} brings a mask or bias of its own, which packed attention does not add. This language "
                "model cannot be trained packed; please report its model_type."
            )
        out = _packed(
            query[0],
            key[0],
            value[0],
            segments=vlit_segments,
            scale=scale,
            sliding_window=sliding_window,
            softcap=softcap,
            dropout=dropout,
            backend=vlit_backend,
        )
        return out.unsqueeze(0), None
    if attention_mask is not None and tuple(attention_mask.shape) == _PACKED_MASK_SHAPE and query.shape[2] > 1:
        raise ModelError(
            f"{type(module).__name__} does not pass keyword arguments to its attention, so packed samples would see each "
            "other. This language model cannot be trained packed; please report its model_type."
        )
    if softcap is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        kwargs.pop("is_causal", None)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scale, **kwargs
        )
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = softcap * torch.tanh(torch.matmul(query, key.transpose(-1, -2)) * scale / softcap)
    if attention_mask is None:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        attention_mask = causal.tril(scores.shape[-1] - scores.shape[-2])
    if attention_mask.dtype == torch.bool:
        # not -inf: a row of padding sees nothing, and its NaN would reach the others through 0 * NaN in the next layer
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + attention_mask
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2), None
