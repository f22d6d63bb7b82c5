"""Packed attention through PyTorch's own dense attention: any device, any dtype, every option. The truth of the others.

Segments of similar length and equal prefix length are gathered into dense blocks, padding on the right. Under a causal
mask a real query never reaches a key to its right, so the padding needs no mask, and what padded queries compute is thrown
away. The keys of a segment are those of its prefix, then its own.

Shape letters: T tokens of the row, H query heads, K key/value heads, E head size, n segments of a group, M longest of it,
P tokens of their prefixes.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vlit.kernels.attention.segments import Segments

MAX_GROUP_WASTE = 1.25
"""Segments share a group while the longest is at most this many times the shortest (or within 16 tokens of it)."""


class _Group(NamedTuple):
    """Segments computed together; padding repeats a segment's first row."""

    queries: Tensor  # int64 [n * M] rows
    keys: Tensor  # int64 [n * (P + M)] rows
    num_segments: int
    longest: int
    prefix: int


@lru_cache(maxsize=64)
def _groups(segments: Segments, device: torch.device) -> tuple[tuple[_Group, ...], Tensor]:
    """The groups, and for every row its place in the concatenation of their queries, int64 [T]."""
    lengths, prefixes = segments.lengths, segments.prefix_lengths
    order = sorted(range(len(lengths)), key=lambda i: (prefixes[i], -lengths[i], i))
    members: list[list[int]] = []
    for i in order:
        first = members[-1][0] if members else -1
        alike = first >= 0 and prefixes[first] == prefixes[i]
        if alike and (lengths[first] <= MAX_GROUP_WASTE * lengths[i] or lengths[first] - lengths[i] <= 16):
            members[-1].append(i)
        else:
            members.append([i])
    counts, starts = torch.tensor(lengths), torch.tensor(segments.starts)
    groups, restore, offset = [], torch.empty(segments.num_tokens, dtype=torch.int64), 0
    for own in members:
        longest, prefix = lengths[own[0]], prefixes[own[0]]
        column, begin = torch.arange(longest), starts[own].unsqueeze(1)
        real = column < counts[own].unsqueeze(1)
        queries = torch.where(real, begin + column, begin)
        place = offset + torch.arange(len(own) * longest).view(len(own), longest)
        restore[queries[real]] = place[real]
        keys = queries
        if prefix:
            shared = torch.tensor([segments.starts[segments.parents[i]] for i in own]).unsqueeze(1)
            keys = torch.cat([shared + torch.arange(prefix), queries], 1)
        groups.append(_Group(queries.reshape(-1).to(device), keys.reshape(-1).to(device), len(own), longest, prefix))
        offset += len(own) * longest
    return tuple(groups), restore.to(device)


def dense_attention(
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
    """Attention of a packed row, ``[H, T, E]`` and ``[K, T, E]`` -> ``[T, H, E]`` (options as in ``packed_attention``)."""
    heads, tokens, size = q_HTE.shape
    if segments.single:
        out = _attend(q_HTE[None], k_KTE[None], v_KTE[None], scale, sliding_window, softcap, dropout)
        return out[0].transpose(0, 1)
    q_THE, k_TKE, v_TKE = (x.transpose(0, 1) for x in (q_HTE, k_KTE, v_KTE))
    groups, restore = _groups(segments, q_HTE.device)
    outs = []
    for group in groups:
        q = q_THE.index_select(0, group.queries).view(group.num_segments, group.longest, -1, size).transpose(1, 2)
        k, v = (
            x.index_select(0, group.keys)
            .view(group.num_segments, group.prefix + group.longest, -1, size)
            .transpose(1, 2)
            for x in (k_TKE, v_TKE)
        )
        out = _attend(q, k, v, scale, sliding_window, softcap, dropout)
        outs.append(out.transpose(1, 2).reshape(group.num_segments * group.longest, heads, size))
    return torch.cat(outs).index_select(0, restore).view(tokens, heads, size)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None, dropout: float
) -> Tensor:
    """Causal attention of ``[n, H, M, E]`` over ``[n, K, P + M, E]``; query i sees the keys up to P + i."""
    rows, keys = q.shape[2], k.shape[2]
    window = window if window is not None and window < keys else None
    if softcap is None:
        mask = _visible(rows, keys, window, q.device) if window is not None or keys > rows else None
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, dropout_p=dropout,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = softcap * torch.tanh(torch.matmul(q * scale, k.transpose(-1, -2)) / softcap)
    scores = scores.masked_fill(~_visible(rows, keys, window, q.device), -math.inf)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    if dropout:
        weights = F.dropout(weights, dropout)
    return torch.matmul(weights, v)


def _visible(rows: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    offset = keys - rows
    mask = torch.ones(rows, keys, dtype=torch.bool, device=device).tril(offset)
    return mask if window is None else mask.triu(offset + 1 - window)
