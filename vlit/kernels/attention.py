"""Causal attention over packed rows: a sample never sees its neighbour.

A packed row holds N samples end to end. :class:`Segments` groups samples of similar length once per batch; each group is
gathered into a dense block ``[n, longest]`` with the padding on the right. Under a causal mask a real query never
reaches a key to its right, so the padding needs no mask at all, and what the padded queries compute is thrown away.

Shape letters: T tokens of the row, H query heads, K key/value heads, E head size, n samples of a group, M longest of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_GROUP_WASTE = 1.25
"""Samples share a group while the longest is at most this many times the shortest (or within 16 tokens of it)."""


@dataclass(frozen=True, slots=True)
class Group:
    """Samples computed together: ``gather`` [n, M] row positions (padding repeats the sample's first position)."""

    gather: Tensor  # int64 [n * M]
    count: int
    longest: int


@dataclass(frozen=True, slots=True)
class Segments:
    """Where the samples of one packed row lie; built once per batch and passed to every layer."""

    lengths: tuple[int, ...]
    groups: tuple[Group, ...]
    restore: Tensor  # int64 [T]: row position -> position in the concatenation of all groups

    @property
    def single(self) -> bool:
        """The row is one sample: no gathering is needed."""
        return len(self.lengths) == 1


def make_segments(lengths: Sequence[int], device: torch.device | str = "cpu") -> Segments:
    """Group the samples of a row with lengths summing to T. Raises ValueError on an empty or non-positive length."""
    if not lengths or min(lengths) < 1:
        raise ValueError(f"every segment needs at least one token, got lengths {tuple(lengths)}")
    counts = torch.tensor(lengths, dtype=torch.int64)
    starts = torch.cumsum(counts, 0) - counts
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and (longest <= MAX_GROUP_WASTE * lengths[i] or longest - lengths[i] <= 16):
            batches[-1].append(i)
        else:
            batches.append([i])
    groups, restore, offset = [], torch.empty(int(counts.sum()), dtype=torch.int64), 0
    for members in batches:
        longest = lengths[members[0]]
        column = torch.arange(longest)
        real = column < counts[members].unsqueeze(1)
        gather = torch.where(real, starts[members].unsqueeze(1) + column, starts[members].unsqueeze(1))
        flat = offset + torch.arange(len(members) * longest).view(len(members), longest)
        restore[gather[real]] = flat[real]
        groups.append(Group(gather=gather.reshape(-1).to(device), count=len(members), longest=longest))
        offset += len(members) * longest
    return Segments(lengths=tuple(lengths), groups=tuple(groups), restore=restore.to(device))


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
    """softmax(scale · q kᵀ + causal mask within each segment) v, without computing anything across segments.

    Args:
        q_HTE: queries ``[H, T, E]``; k_KTE, v_KTE: ``[K, T, E]`` with H a multiple of K (grouped-query attention).
        sliding_window: a query sees at most this many positions, itself included (Mistral, Gemma).
        softcap: logits become ``softcap · tanh(logits / softcap)`` (Gemma 2).
        dropout: probability of dropping an attention weight.

    Returns:
        ``[T, H, E]``.
    """
    heads, tokens, size = q_HTE.shape
    if segments.single:
        out = _causal(q_HTE[None], k_KTE[None], v_KTE[None], scale, sliding_window, softcap, dropout)
        return out[0].transpose(0, 1)
    q_THE, k_TKE, v_TKE = (x.transpose(0, 1) for x in (q_HTE, k_KTE, v_KTE))
    blocks = []
    for group in segments.groups:
        q, k, v = (
            x.index_select(0, group.gather).view(group.count, group.longest, -1, size).transpose(1, 2)
            for x in (q_THE, k_TKE, v_TKE)
        )
        out = _causal(q, k, v, scale, sliding_window, softcap, dropout)
        blocks.append(out.transpose(1, 2).reshape(group.count * group.longest, heads, size))
    return torch.cat(blocks).index_select(0, segments.restore).view(tokens, heads, size)


def _causal(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None, dropout: float
) -> Tensor:
    """Dense causal attention ``[n, H, M, E]``; the fastest exact path for the device, dtype and options."""
    length = q.shape[2]
    window = window if window is not None and window < length else None
    if softcap is None:
        grouped = q.shape[1] != k.shape[1]
        mask = None if window is None else _visible(length, window, q.device)
        dtype = q.dtype
        if q.device.type == "cpu" and dtype == torch.bfloat16:
            # PyTorch's bf16 attention on CPU reaches about a tenth of the matmul rate; its fp32 one is faster and exacter.
            q, k, v = q.float(), k.float(), v.float()
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, dropout_p=dropout, enable_gqa=grouped
        )
        return out.to(dtype)
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = softcap * torch.tanh(torch.matmul(q * scale, k.transpose(-1, -2)) / softcap)
    scores = scores.masked_fill(~_visible(length, window, q.device), -math.inf)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    if dropout:
        weights = F.dropout(weights, dropout)
    return torch.matmul(weights, v)


def _visible(length: int, window: int | None, device: torch.device) -> Tensor:
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask if window is None else mask.triu(1 - window)
