"""Packed attention on a CPU as blocked matrix products.

PyTorch's bf16 attention on CPU reaches about a tenth of the matmul rate. Here a block of query rows meets all keys it can
see in one batched product, a softmax and a second product, so nearly all time is spent inside the matmul library. Nothing
outside the prefix range and the own range is computed, except inside the last tile of a block, where the mask lies. Short
neighbours share a block and meet there as weight 0 times value: any finite value is hidden, a NaN is not.

    S = scale · q kᵀ + mask,  P = softmax(S),  o = P v
    dV = Pᵀ dO,  dS = P ∘ (dP - rowsum(P ∘ dP)) with dP = dO vᵀ,  dQ = scale · dS k,  dK = scale · dSᵀ q

Shape letters: T tokens of the row, H query heads, K key/value heads, G = H / K, E head size, R rows of a block, N keys of it.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlit.kernels import native
from vlit.kernels.attention.segments import Segments

BLOCK_ROWS = 256
"""Most query rows of a block. Smaller blocks skip more of the masked triangle, larger ones multiply faster."""
KEEP_KEYS = 1024
"""Blocks with at most this many keys keep their weights P for the backward pass; others compute them again."""


class Block(NamedTuple):
    """Rows ``[lo, hi)`` that see the keys ``[prefix_lo, prefix_hi)`` and, masked, ``[own_lo, hi)``.

    The last ``hi - lo`` keys carry the mask; ``cuts`` are the segment lengths inside the block when it holds several
    segments, else empty (one triangle).
    """

    lo: int
    hi: int
    prefix_lo: int
    prefix_hi: int
    own_lo: int
    cuts: tuple[int, ...]

    @property
    def num_keys(self) -> int:
        return self.prefix_hi - self.prefix_lo + self.hi - self.own_lo


@lru_cache(maxsize=64)
def plan_blocks(segments: Segments, block_rows: int = BLOCK_ROWS) -> tuple[Block, ...]:
    """Cut a row into blocks: long segments by ``block_rows``, short neighbours of a family together."""
    blocks: list[Block] = []
    for family in segments.families:
        shared = family.prefix_lo, family.prefix_hi
        together: list[int] = []  # lengths of short segments waiting for company
        row = family.lo
        for length in segments.lengths[family.first : family.last]:
            if together and sum(together) + length > block_rows:
                blocks.append(_together(row, together, shared))
                row, together = row + sum(together), []
            if length <= block_rows:
                together.append(length)
                continue
            parts = math.ceil(length / block_rows)
            for part in range(parts):
                lo, hi = row + part * length // parts, row + (part + 1) * length // parts
                blocks.append(Block(lo, hi, *shared, row, ()))
            row += length
        if together:
            blocks.append(_together(row, together, shared))
    return tuple(blocks)


def _together(row: int, lengths: list[int], shared: tuple[int, int]) -> Block:
    return Block(row, row + sum(lengths), *shared, row, tuple(lengths) if len(lengths) > 1 else ())


@lru_cache(maxsize=1024)
def _bounds(rows: int, before: int, shared: int, cuts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """First and one-past-last visible own column of each row, int64 [R]; ``before`` own keys precede the block's rows."""
    begin = torch.zeros(rows, dtype=torch.int64)
    if cuts:
        counts = torch.tensor(cuts)
        begin = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return shared + begin, shared + before + 1 + torch.arange(rows)


@lru_cache(maxsize=256)
def _hidden(rows: int, cuts: tuple[int, ...]) -> Tensor:
    """bool [R, R]: True where a query must not look at the last R keys."""
    begin, end = _bounds(rows, 0, 0, cuts)
    column = torch.arange(rows)
    return (column >= end[:, None]) | (column < begin[:, None])


def _keys(x_KTE: Tensor, block: Block) -> Tensor:
    """The keys or values of a block ``[K, N, E]``; a view when prefix and own range touch."""
    if block.prefix_hi == block.prefix_lo:
        return x_KTE[:, block.own_lo : block.hi]
    if block.prefix_hi == block.own_lo:
        return x_KTE[:, block.prefix_lo : block.hi]
    return torch.cat([x_KTE[:, block.prefix_lo : block.prefix_hi], x_KTE[:, block.own_lo : block.hi]], 1)


def _rows(x_HTE: Tensor, block: Block, groups: int) -> Tensor:
    """Query rows with the heads of a group stacked: ``[K, G · R, E]``."""
    rows = x_HTE[:, block.lo : block.hi]
    if groups == 1:
        return rows
    heads, count, size = rows.shape
    return rows.reshape(heads // groups, groups * count, size)


def _softmax(scores: Tensor, block: Block, groups: int, scale: float) -> Tensor:
    """softmax(scale · scores + mask) of ``[K, G · R, N]``; may overwrite ``scores``."""
    rows, shared = block.hi - block.lo, block.prefix_hi - block.prefix_lo
    if scores.dtype == torch.bfloat16 and native.compiled() is not None:
        lo, hi = _bounds(rows, block.lo - block.own_lo, shared, block.cuts)
        return native.softmax_(scores, lo, hi, shared=shared, scale=scale)
    masked = scores.view(scores.shape[0], groups, rows, -1)[..., -rows:]
    masked.masked_fill_(_hidden(rows, block.cuts).to(scores.device), -math.inf)
    return torch.softmax(scores.mul_(scale), -1)


def _softmax_backward(grad: Tensor, weights: Tensor, block: Block, scale: float) -> Tensor:
    """Gradient of the scores from that of the weights; may overwrite ``grad``."""
    rows, shared = block.hi - block.lo, block.prefix_hi - block.prefix_lo
    if grad.dtype == torch.bfloat16 and native.compiled() is not None:
        lo, hi = _bounds(rows, block.lo - block.own_lo, shared, block.cuts)
        return native.softmax_backward_(grad, weights, lo, hi, shared=shared, scale=scale)
    return torch._softmax_backward_data(grad, weights, -1, weights.dtype).mul_(scale)


def _contiguous(x_HTE: Tensor) -> Tensor:
    """Head-major copy: blocks of it are then cheap to cut out."""
    return x_HTE if x_HTE.is_contiguous() else native.copy_heads_(x_HTE.new_empty(x_HTE.shape), x_HTE)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_HTE: Tensor, k_KTE: Tensor, v_KTE: Tensor, segments: Segments, scale: float) -> Tensor:
        heads, tokens, size = q_HTE.shape
        groups = heads // k_KTE.shape[0]
        out_THE = q_HTE.new_empty(tokens, heads, size)
        q_HTE, k_KTE, v_KTE = (_contiguous(x) for x in (q_HTE, k_KTE, v_KTE))
        blocks, keep = plan_blocks(segments), any(ctx.needs_input_grad)
        kept: list[Tensor | None] = []
        for block in blocks:
            scores = torch.bmm(_rows(q_HTE, block, groups), _keys(k_KTE, block).transpose(1, 2))
            weights = _softmax(scores, block, groups, scale)
            result = torch.bmm(weights, _keys(v_KTE, block)).view(heads, -1, size)
            native.copy_heads_(out_THE[block.lo : block.hi].transpose(0, 1), result)
            if keep:
                kept.append(weights if block.num_keys <= KEEP_KEYS else None)
        if keep:
            ctx.save_for_backward(q_HTE, k_KTE, v_KTE, *kept)
            ctx.blocks, ctx.scale = blocks, scale
        return out_THE

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q_HTE, k_KTE, v_KTE, *kept = ctx.saved_tensors
        heads, tokens, size = q_HTE.shape
        kv_heads = k_KTE.shape[0]
        groups = heads // kv_heads
        grad_HTE = _contiguous(grad_outputs[0].transpose(0, 1))
        dq_THE = q_HTE.new_empty(tokens, heads, size)
        dk, dv = (q_HTE.new_zeros(kv_heads, tokens, size, dtype=torch.float32) for _ in range(2))
        for block, weights in zip(ctx.blocks, kept, strict=True):
            rows, keys, values = _rows(q_HTE, block, groups), _keys(k_KTE, block), _keys(v_KTE, block)
            if weights is None:
                weights = _softmax(torch.bmm(rows, keys.transpose(1, 2)), block, groups, ctx.scale)
            grad = _rows(grad_HTE, block, groups)
            _add(dv, torch.bmm(weights.transpose(1, 2), grad), block)
            ds = _softmax_backward(torch.bmm(grad, values.transpose(1, 2)), weights, block, ctx.scale)
            _add(dk, torch.bmm(ds.transpose(1, 2), rows), block)
            dq = torch.bmm(ds, keys).view(heads, -1, size)
            native.copy_heads_(dq_THE[block.lo : block.hi].transpose(0, 1), dq)
        return dq_THE.transpose(0, 1), dk.to(q_HTE.dtype), dv.to(q_HTE.dtype), None, None


def _add(total_KTE: Tensor, part_KNE: Tensor, block: Block) -> None:
    """Add a block's share of a key or value gradient to the rows it belongs to."""
    shared = block.prefix_hi - block.prefix_lo
    if shared:
        total_KTE[:, block.prefix_lo : block.prefix_hi] += part_KNE[:, :shared]
    total_KTE[:, block.own_lo : block.hi] += part_KNE[:, shared:]


def blocked_attention(q_HTE: Tensor, k_KTE: Tensor, v_KTE: Tensor, *, segments: Segments, scale: float) -> Tensor:
    """Attention of a packed row, ``[H, T, E]`` and ``[K, T, E]`` -> ``[T, H, E]``; any dtype, made for bf16 on CPU."""
    return _BlockedAttention.apply(q_HTE, k_KTE, v_KTE, segments, scale)
