"""Packed attention on a GPU, forward and backward, without computing anything a row cannot see (flash attention, varlen).

    S = scale · q kᵀ, visible keys only,  L = log2 Σ 2^(S·log2 e),  P = 2^(S·log2 e - L),  o = P v
    Δ = rowsum(o ∘ dO),  dV = Pᵀ dO,  dS = P ∘ (dO vᵀ - Δ),  dQ = scale · dS k,  dK = scale · dSᵀ q

The online softmax is arXiv:2205.14135, the split of the backward pass into one kernel over key blocks and one over query
blocks is arXiv:2307.08691; it costs two more products than a single kernel and needs no atomics, so equal inputs give
equal bits. The query heads that share a key head are summed in registers. Each program takes one entry of a list of
:mod:`vlit.kernels.attention.triton_tables` and meets three kinds of tiles:

- full: every row sees every key, no mask;
- edge: the diagonal or the end of a range inside one segment, masked;
- mixed: a block that holds several segments. Besides the mask, non-finite numbers of one segment must not reach another
  through 0 · NaN in a product: they are replaced by 0 there and poison the rows that do see them through their scores.

Statistics and sums are fp32, products run in the dtype of the inputs (fp32: exact, without TF32).

Shape letters: T tokens of the row, H query heads, K key/value heads, E head size; M rows and N keys of a tile.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlit.kernels.attention import triton_tables as tables
from vlit.kernels.attention.segments import Segments

LOG2_E = math.log2(math.e)
LOWEST = tl.constexpr(-1.0e30)  # a maximum starts below every score; unlike with -inf, LOWEST - LOWEST is a number
FULL, EDGE, MIXED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
DELTA_ROWS = 64
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# fmt: off
# Arguments, a line each group: tensors, their strides (x_h: of the head, x_t: of the token, x_e), numbers, constants.


@triton.jit
def load_tile(pointer, start, count, stride_t, stride_e,
              E: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr, GUARD: tl.constexpr):
    """``[BLOCK, BLOCK_E]``: rows from ``start``; columns past E are 0, with GUARD also rows past ``count``."""
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK_E)[None, :]
    pointers = pointer + start.to(tl.int64) * stride_t + row * stride_t + column * stride_e
    if GUARD:
        tile = tl.load(pointers, mask=(row < count) & (column < E), other=0.0)
    elif E < BLOCK_E:
        tile = tl.load(pointers, mask=column < E, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_tile(pointer, tile, start, count, stride_t, stride_e,
               E: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """Write the first ``count`` rows and E columns in the dtype of the pointer."""
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK_E)[None, :]
    pointers = pointer + start.to(tl.int64) * stride_t + row * stride_t + column * stride_e
    tl.store(pointers, tile.to(pointer.dtype.element_ty), mask=(row < count) & (column < E))


@triton.jit
def load_block(entry):
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)


@triton.jit
def finite(tile):
    """NaN and infinities become 0."""
    return tl.where(tl.abs(tile.to(tl.float32)) < float("inf"), tile, 0.0).to(tile.dtype)


@triton.jit
def poison(tile):
    """``[rows]``: NaN for a row that holds a NaN or an infinity, else 0."""
    return tl.sum(tile.to(tl.float32) * 0.0, 1)


@triton.jit
def query_ranges(row_begin, row_end, prefix_lo, prefix_hi, own_lo, mixed, N: tl.constexpr, KIND: tl.constexpr):
    """How many tiles of this kind a query block has among the prefix and its own keys, and where each begins."""
    prefix_full = (prefix_hi - prefix_lo) // N
    own_full = tl.where(mixed, 0, (row_begin + 1 - own_lo) // N)
    own_rest = tl.cdiv(row_end - own_lo, N) - own_full
    if KIND == FULL:
        ranges = prefix_full, prefix_lo, own_full, own_lo
    elif KIND == EDGE:
        prefix_rest = tl.cdiv(prefix_hi - prefix_lo, N) - prefix_full
        ranges = prefix_rest, prefix_lo + prefix_full * N, tl.where(mixed, 0, own_rest), own_lo + own_full * N
    else:
        ranges = prefix_full * 0, prefix_lo, tl.where(mixed, own_rest, 0), own_lo
    return ranges


@triton.jit
def key_ranges(key_begin, key_end, own_end, family_lo, family_hi, mixed, M: tl.constexpr, KIND: tl.constexpr):
    """The same for a key block, with its own rows and its children's; both ranges end with full tiles.

    Number of tiles and begin of either range, then the rows where the edge tiles end and the full ones begin.
    """
    diagonal = tl.cdiv(key_end - 1 - key_begin, M) * M
    own_full = tl.where(mixed, 0, tl.maximum(own_end - key_begin - diagonal, 0) // M)
    own_split = own_end - own_full * M
    own_edge = tl.cdiv(own_split - key_begin, M)
    family_full = (family_hi - family_lo) // M
    family_split = family_hi - family_full * M
    if KIND == FULL:
        ranges = own_full, own_split, family_full, family_split, own_split, family_split
    elif KIND == EDGE:
        family_edge = tl.cdiv(family_split - family_lo, M)
        ranges = tl.where(mixed, 0, own_edge), key_begin, family_edge, family_lo, own_split, family_split
    else:
        ranges = tl.where(mixed, own_edge, 0), key_begin, own_full * 0, family_lo, own_split, family_split
    return ranges


@triton.jit
def walk(i, tiles_a, start_a, end_a, start_b, end_b, STEP: tl.constexpr):
    """Start and end of tile ``i`` of two ranges walked one after the other in one loop."""
    first = i < tiles_a
    start = tl.where(first, start_a + i * STEP, start_b + (i - tiles_a) * STEP)
    return start, tl.where(first, end_a, end_b)


@triton.jit
def visible_keys(rows, keys, end, first_key, KIND: tl.constexpr):
    """Mask ``[M, N]``: a key of the range, not after the row and, in a mixed block, of the row's own segment."""
    visible = (keys[None, :] <= rows[:, None]) & (keys[None, :] < end)
    if KIND == MIXED:
        visible = visible & (keys[None, :] >= first_key[:, None])
    return visible


@triton.jit(do_not_specialize=["lse_h"])
def forward_kernel(q, k, v, out, lse, segment_lo, blocks,
                   q_h, q_t, q_e, k_h, k_t, k_e, v_h, v_t, v_e, out_h, out_t, out_e, lse_h,
                   heads, scale_log2,
                   GROUP: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """One query block of one head; the heads of a block run next to each other and share its keys in the cache."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    row_begin, row_end, prefix_lo, prefix_hi, own_lo = load_block(blocks + tl.program_id(0) // heads * 5)
    mixed = tl.load(segment_lo + row_end - 1) > own_lo
    rows = tl.minimum(row_begin + tl.arange(0, M), row_end - 1)
    first_key = tl.load(segment_lo + rows)
    q_tile = load_tile(q + head * q_h, row_begin, row_end - row_begin, q_t, q_e, E, M, BLOCK_E, True)
    k += head // GROUP * k_h
    v += head // GROUP * v_h
    acc = tl.zeros([M, BLOCK_E], tl.float32)
    total = tl.zeros([M], tl.float32)
    peak = tl.full([M], LOWEST, tl.float32)
    for KIND in tl.static_range(3):
        tiles_a, start_a, tiles_b, start_b = query_ranges(
            row_begin, row_end, prefix_lo, prefix_hi, own_lo, mixed, N, KIND)
        for i in range(tiles_a + tiles_b):
            start, end = walk(i, tiles_a, start_a, prefix_hi, start_b, row_end, N)
            k_tile = load_tile(k, start, end - start, k_t, k_e, E, N, BLOCK_E, KIND != FULL)
            v_tile = load_tile(v, start, end - start, v_t, v_e, E, N, BLOCK_E, KIND != FULL)
            score = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            if KIND == MIXED:
                score += poison(v_tile)[None, :]
                v_tile = finite(v_tile)
            if KIND != FULL:
                keys = start + tl.arange(0, N)
                score = tl.where(visible_keys(rows, keys, end, first_key, KIND), score, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(score, 1) * scale_log2)
            weight = tl.exp2(score * scale_log2 - new_peak[:, None])
            fade = tl.exp2(peak - new_peak)
            total = total * fade + tl.sum(weight, 1)
            acc = tl.dot(weight.to(v_tile.dtype), v_tile, acc * fade[:, None], input_precision="ieee")
            peak = new_peak
    store_tile(out + head * out_h, acc / total[:, None], row_begin, row_end - row_begin, out_t, out_e, E, M, BLOCK_E)
    offsets = row_begin + tl.arange(0, M)
    tl.store(lse + head * lse_h + offsets, peak + tl.log2(total), mask=offsets < row_end)


@triton.jit(do_not_specialize=["lse_h", "tokens"])
def delta_kernel(out, d_out, delta,
                 out_h, out_t, out_e, do_h, do_t, do_e, lse_h,
                 tokens,
                 E: tl.constexpr, BLOCK_E: tl.constexpr, M: tl.constexpr):
    """delta [H, T] = rowsum(out ∘ d_out)."""
    start = tl.program_id(0) * M
    head = tl.program_id(1).to(tl.int64)
    out_tile = load_tile(out + head * out_h, start, tokens - start, out_t, out_e, E, M, BLOCK_E, True)
    do_tile = load_tile(d_out + head * do_h, start, tokens - start, do_t, do_e, E, M, BLOCK_E, True)
    product = out_tile.to(tl.float32) * do_tile.to(tl.float32)
    offsets = start + tl.arange(0, M)
    tl.store(delta + head * lse_h + offsets, tl.sum(product, 1), mask=offsets < tokens)


@triton.jit(do_not_specialize=["lse_h"])
def dq_kernel(q, k, v, d_out, lse, delta, dq, segment_lo, blocks,
              q_h, q_t, q_e, k_h, k_t, k_e, v_h, v_t, v_e, do_h, do_t, do_e, dq_h, dq_t, dq_e, lse_h,
              heads, scale, scale_log2,
              GROUP: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """dQ of one query block of one head: the tiles of the forward pass once more."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    row_begin, row_end, prefix_lo, prefix_hi, own_lo = load_block(blocks + tl.program_id(0) // heads * 5)
    mixed = tl.load(segment_lo + row_end - 1) > own_lo
    rows = tl.minimum(row_begin + tl.arange(0, M), row_end - 1)
    first_key = tl.load(segment_lo + rows)
    q_tile = load_tile(q + head * q_h, row_begin, row_end - row_begin, q_t, q_e, E, M, BLOCK_E, True)
    do_tile = load_tile(d_out + head * do_h, row_begin, row_end - row_begin, do_t, do_e, E, M, BLOCK_E, True)
    row_lse = tl.load(lse + head * lse_h + rows)
    row_delta = tl.load(delta + head * lse_h + rows)
    k += head // GROUP * k_h
    v += head // GROUP * v_h
    acc = tl.zeros([M, BLOCK_E], tl.float32)
    for KIND in tl.static_range(3):
        tiles_a, start_a, tiles_b, start_b = query_ranges(
            row_begin, row_end, prefix_lo, prefix_hi, own_lo, mixed, N, KIND)
        for i in range(tiles_a + tiles_b):
            start, end = walk(i, tiles_a, start_a, prefix_hi, start_b, row_end, N)
            k_tile = load_tile(k, start, end - start, k_t, k_e, E, N, BLOCK_E, KIND != FULL)
            v_tile = load_tile(v, start, end - start, v_t, v_e, E, N, BLOCK_E, KIND != FULL)
            score = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            d_weight = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
            d_score = tl.exp2(score * scale_log2 - row_lse[:, None]) * (d_weight - row_delta[:, None])
            if KIND != FULL:
                keys = start + tl.arange(0, N)
                d_score = tl.where(visible_keys(rows, keys, end, first_key, KIND), d_score, 0.0)
            if KIND == MIXED:
                k_tile = finite(k_tile)
            acc = tl.dot(d_score.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
    store_tile(dq + head * dq_h, acc * scale, row_begin, row_end - row_begin, dq_t, dq_e, E, M, BLOCK_E)


@triton.jit(do_not_specialize=["lse_h"])
def dkdv_kernel(q, k, v, d_out, lse, delta, dk, dv, segment_lo, blocks,
                q_h, q_t, q_e, k_h, k_t, k_e, v_h, v_t, v_e, do_h, do_t, do_e, dk_h, dk_t, dk_e, dv_h, dv_t, dv_e, lse_h,
                key_heads, scale, scale_log2,
                GROUP: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """dK and dV of one key block of one key head, summed over the query heads of its group; scores are transposed."""
    key_head = (tl.program_id(0) % key_heads).to(tl.int64)
    key_begin, key_end, own_end, family_lo, family_hi = load_block(blocks + tl.program_id(0) // key_heads * 5)
    mixed = tl.load(segment_lo + key_end - 1) > key_begin
    keys = key_begin + tl.arange(0, N)
    k_tile = load_tile(k + key_head * k_h, key_begin, key_end - key_begin, k_t, k_e, E, N, BLOCK_E, True)
    v_tile = load_tile(v + key_head * v_h, key_begin, key_end - key_begin, v_t, v_e, E, N, BLOCK_E, True)
    dk_acc = tl.zeros([N, BLOCK_E], tl.float32)
    dv_acc = tl.zeros([N, BLOCK_E], tl.float32)
    for head in range(key_head * GROUP, key_head * GROUP + GROUP):
        for KIND in tl.static_range(3):
            tiles_a, start_a, tiles_b, start_b, own_split, family_split = key_ranges(
                key_begin, key_end, own_end, family_lo, family_hi, mixed, M, KIND)
            for i in range(tiles_a + tiles_b):
                start, end = walk(i, tiles_a, start_a, own_split, start_b, family_split, M)
                q_tile = load_tile(q + head * q_h, start, end - start, q_t, q_e, E, M, BLOCK_E, KIND != FULL)
                do_tile = load_tile(d_out + head * do_h, start, end - start, do_t, do_e, E, M, BLOCK_E, KIND != FULL)
                rows = start + tl.arange(0, M)
                near = rows if KIND == FULL else tl.minimum(rows, end - 1)
                row_lse = tl.load(lse + head * lse_h + near)
                row_delta = tl.load(delta + head * lse_h + near)
                if KIND == MIXED:
                    row_lse += row_delta * 0.0
                    q_tile = finite(q_tile)
                    do_tile = finite(do_tile)
                score = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
                weight = tl.exp2(score * scale_log2 - row_lse[None, :])
                d_weight = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee")
                d_score = weight * (d_weight - row_delta[None, :])
                if KIND != FULL:
                    visible = (keys[:, None] <= rows[None, :]) & (rows[None, :] < end)
                    if KIND == MIXED:
                        first_key = tl.load(segment_lo + near)
                        visible = visible & (keys[:, None] >= first_key[None, :])
                    weight = tl.where(visible, weight, 0.0)
                    d_score = tl.where(visible, d_score, 0.0)
                dv_acc = tl.dot(weight.to(do_tile.dtype), do_tile, dv_acc, input_precision="ieee")
                dk_acc = tl.dot(d_score.to(q_tile.dtype), q_tile, dk_acc, input_precision="ieee")
    store_tile(dk + key_head * dk_h, dk_acc * scale, key_begin, key_end - key_begin, dk_t, dk_e, E, N, BLOCK_E)
    store_tile(dv + key_head * dv_h, dv_acc, key_begin, key_end - key_begin, dv_t, dv_e, E, N, BLOCK_E)


# fmt: on


@torch.library.custom_op("vlit::packed_attention", mutates_args=())
def forward_op(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], parents: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """out ``[T, H, E]`` and the base-2 log-sums ``[H, T]`` in fp32."""
    segments, tile, (heads, tokens, size) = decode(tuple(lengths), tuple(parents)), tiles_of(q).forward, q.shape
    out_THE, lse_HT = q.new_empty(tokens, heads, size), q.new_empty(heads, tokens, dtype=torch.float32)
    blocks = tables.device_query_blocks(segments, tile, q.device)
    with torch.cuda.device_of(q):
        forward_kernel[(heads * len(blocks),)](
            q, k, v, out_THE, lse_HT, tables.device_segment_lo(segments, q.device), blocks,
            *q.stride(), *k.stride(), *v.stride(), *out_THE.transpose(0, 1).stride(), tokens,
            heads, scale * LOG2_E,
            heads // k.shape[0], size, triton.next_power_of_2(size), tile.block_m, tile.block_n,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out_THE, lse_HT


@torch.library.custom_op("vlit::packed_attention_backward", mutates_args=())
def backward_op(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    lengths: Sequence[int], parents: Sequence[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq ``[H, T, E]``, dk and dv ``[K, T, E]``, in memory token by token as a projection produces them."""
    segments, tiles, (heads, tokens, size) = decode(tuple(lengths), tuple(parents)), tiles_of(q), q.shape
    d_out, out, delta_HT = d_out.transpose(0, 1), out.transpose(0, 1), torch.empty_like(lse)
    dq, dk, dv = (token_major(x) for x in (q, k, v))
    block_e = triton.next_power_of_2(size)
    with torch.cuda.device_of(q):
        delta_kernel[(-(-tokens // DELTA_ROWS), heads)](
            out, d_out, delta_HT, *out.stride(), *d_out.stride(), tokens, tokens, size, block_e, DELTA_ROWS
        )
        for kernel, grads, tile, blocks in (
            (dkdv_kernel, (dk, dv), tiles.dkdv, tables.device_key_blocks(segments, tiles.dkdv, q.device)),
            (dq_kernel, (dq,), tiles.dq, tables.device_query_blocks(segments, tiles.dq, q.device)),
        ):
            kernel[(len(grads[0]) * len(blocks),)](
                q, k, v, d_out, lse, delta_HT, *grads, tables.device_segment_lo(segments, q.device), blocks,
                *(step for x in (q, k, v, d_out, *grads) for step in x.stride()), tokens,
                len(grads[0]), scale, scale * LOG2_E,
                heads // k.shape[0], size, block_e, tile.block_m, tile.block_n,
                num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
            )  # fmt: skip
    return dq, dk, dv


@forward_op.register_fake
def _(q, k, v, lengths, parents, scale):
    return token_major(q).transpose(0, 1), q.new_empty(q.shape[:2], dtype=torch.float32)


@backward_op.register_fake
def _(d_out, q, k, v, out, lse, lengths, parents, scale):
    return token_major(q), token_major(k), token_major(v)


def _save(ctx, inputs, output) -> None:
    q, k, v, ctx.lengths, ctx.parents, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, d_out, d_lse):
    return *backward_op(d_out, *ctx.saved_tensors, ctx.lengths, ctx.parents, ctx.scale), None, None, None


forward_op.register_autograd(_backward, setup_context=_save)
decode = lru_cache(maxsize=64)(Segments)  # an operator takes lists of numbers; checking them once a batch is enough


def token_major(x_HTE: Tensor) -> Tensor:
    heads, tokens, size = x_HTE.shape
    return x_HTE.new_empty(tokens, heads, size).transpose(0, 1)


def tiles_of(q_HTE: Tensor) -> tables.Tiles:
    hopper = q_HTE.is_cuda and torch.cuda.get_device_capability(q_HTE.device) == (9, 0)
    return tables.choose_tiles(q_HTE.shape[2], q_HTE.element_size(), hopper=hopper)


def triton_attention(q_HTE: Tensor, k_KTE: Tensor, v_KTE: Tensor, *, segments: Segments, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v over the keys each row sees; one opaque operator under ``torch.compile``.

    Args:
        q_HTE: ``[H, T, E]``; k_KTE, v_KTE: ``[K, T, E]`` with H a multiple of K; any strides; fp16, bf16 or fp32; E 16..256.
        segments: lengths summing to T. scale: positive.

    Returns:
        ``[T, H, E]``, contiguous. Equal inputs give equal bits, forward and backward.

    Raises:
        ValueError: shapes, dtypes, scale or device do not fit. NotImplementedError: bf16 under Triton's interpreter.
    """
    (heads, tokens, size), dtype = q_HTE.shape, q_HTE.dtype
    shapes, dtypes = [tuple(x.shape) for x in (q_HTE, k_KTE, v_KTE)], [x.dtype for x in (q_HTE, k_KTE, v_KTE)]
    if shapes[1] != shapes[2] or shapes[1][1:] != (tokens, size) or heads % shapes[1][0]:
        raise ValueError(f"q is [H, T, E], k and v are [K, T, E] with H a multiple of K, got {shapes}")
    if tokens != segments.num_tokens:
        raise ValueError(f"the row has {tokens} tokens, its segments {segments.num_tokens}")
    if dtypes != [dtype] * 3 or dtype not in DTYPES or scale <= 0:
        raise ValueError(f"q, k, v share one dtype of {DTYPES} and scale is positive, got {dtypes} and {scale}")
    tables.choose_tiles(size, q_HTE.element_size(), hopper=False)
    if INTERPRETED and dtype == torch.bfloat16:
        raise NotImplementedError("Triton's interpreter takes bf16 bits for integers in products; give it fp32 or fp16")
    if not INTERPRETED and not (q_HTE.is_cuda or q_HTE.is_meta):
        raise ValueError(f"the Triton kernels need CUDA tensors, got {q_HTE.device}; choose another attention backend")
    return forward_op(q_HTE, k_KTE, v_KTE, segments.lengths, segments.parents, scale)[0]
