"""Fused bf16 attention on a CPU with AVX512-BF16: packed causal rows, and whole images for vision encoders.

The arithmetic is in ``native/flash.c``; here a row is cut into tiles of query rows, once for all layers. Scores never reach
main memory: the backward pass computes them again, tile by tile (arXiv:2307.08691). Softmax and every sum are fp32; weights
and their gradients are rounded to bf16 where they enter a product.

Shape letters: T tokens of the row, H query heads, K key/value heads, E head size, B images, S tokens of an image.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlit.kernels import native
from vlit.kernels.attention.segments import NO_PARENT, Segments, make_segments
from vlit.kernels.planning import device_kind

MAX_HEAD_SIZE = 256

_int = ctypes.c_int64
_pointer = ctypes.c_void_p


@lru_cache(maxsize=1)
def _lanes() -> int:
    """Most query rows of a tile, an even number; 0 where the kernel cannot run."""
    kernels = native.compiled()
    return 0 if kernels is None else int(kernels.vlit_flash_lanes())


def available(q: Tensor) -> bool:
    """Whether the kernel takes these queries: bf16 on a CPU with AVX512-BF16, E a multiple of 16 up to 256, a C compiler."""
    size = q.shape[-1]
    fits = device_kind(q) == "cpu" and q.dtype == torch.bfloat16 and size % 16 == 0 and 0 < size <= MAX_HEAD_SIZE
    return fits and _lanes() > 0


class _Run(NamedTuple):
    """Adjacent rows of one segment, and the lane of the tile where they begin (even: lanes are contracted in pairs)."""

    row: int
    num_rows: int
    lane: int
    segment: int


class Plan(NamedTuple):
    """A row cut into tiles: int64 arrays laid out like the structs of ``native/flash.h``, and their numbers of entries."""

    causal: bool
    num_segments: int
    num_tiles: int
    num_trees: int
    packed: int
    arrays: tuple[Any, ...]


@lru_cache(maxsize=64)
def plan_tiles(segments: Segments, causal: bool = True) -> Plan:
    """Cut a row into tiles. Segments that continue one prefix share tiles, others do not; costly tiles come first.

    A *tree* is a segment without a prefix and all segments that continue it: no key is seen by two trees.
    """
    lanes, firsts = _lanes(), [number for number, parent in enumerate(segments.parents) if parent == NO_PARENT]
    runs: list[_Run] = []
    tiles: list[tuple[int, int, int]] = []
    trees: list[tuple[int, int, int, int, int]] = []
    for first, last in zip(firsts, [*firsts[1:], len(segments.lengths)], strict=True):
        rest = (
            segments.lengths[first] - 1
        ) % lanes + 1  # the tile that is not full comes first, where it sees few keys
        cut = [(NO_PARENT, tile) for tile in _cut(segments, [first], rest, lanes)]
        cut += [(first, tile) for tile in _cut(segments, range(first + 1, last), lanes, lanes)]
        costs = [_cost(segments, tile, prefix, causal) for prefix, tile in cut]
        begin = len(tiles)
        for index in sorted(range(len(cut)), key=lambda index: -costs[index]):
            prefix, tile = cut[index]
            tiles.append((len(runs), len(runs) + len(tile), prefix))
            runs += tile
        trees.append((begin, len(tiles), first, last, sum(costs)))
    trees.sort(key=lambda tree: -tree[-1])
    tree_of = {number: index for index, tree in enumerate(trees) for number in range(tree[2], tree[3])}
    rows, packed = [], 0
    for number, length in enumerate(segments.lengths):
        rows.append((segments.starts[number], length, packed, tree_of[number]))
        packed += -(-length // 8) * 8
    arrays = tuple(_array(table) for table in (rows, runs, tiles, trees))
    return Plan(causal, len(rows), len(tiles), len(trees), packed, arrays)


def _cut(segments: Segments, numbers: Iterable[int], room: int, lanes: int) -> Iterator[list[_Run]]:
    """Fill tiles with the rows of the segments in order: ``room`` lanes in the first, ``lanes`` in the others."""
    tile: list[_Run] = []
    lane = 0
    for number in numbers:
        row, end = segments.starts[number], segments.starts[number] + segments.lengths[number]
        while row < end:
            if lane >= room:
                yield tile
                tile, lane, room = [], 0, lanes
            count = min(end - row, room - lane)
            tile.append(_Run(row, count, lane, number))
            row, lane = row + count, lane + count + count % 2
    if tile:
        yield tile


def _cost(segments: Segments, tile: list[_Run], prefix: int, causal: bool) -> int:
    """Query-key pairs a tile computes, about."""
    cost = 0 if prefix == NO_PARENT else (tile[-1].lane + tile[-1].num_rows) * segments.lengths[prefix]
    for run in tile:
        seen = run.row + run.num_rows - segments.starts[run.segment] if causal else segments.lengths[run.segment]
        cost += run.num_rows * seen
    return cost


def _array(table: list[Any]) -> Any:
    numbers = [number for row in table for number in row]
    return (_int * len(numbers))(*numbers)


class _View(ctypes.Structure):
    _fields_ = [("data", _pointer), ("batch", _int), ("head", _int), ("row", _int)]


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, _int) for name in ("batch", "heads", "kv_heads", "rows", "size", "causal", "threads")),
        *((name, _int) for name in ("num_segments", "num_tiles", "num_trees", "packed")),
        ("scale", ctypes.c_double),
        *((name, _pointer) for name in ("segments", "runs", "tiles", "trees")),
    ]


class _Tensors(ctypes.Structure):
    _fields_ = [(name, _pointer) for name in ("q", "k", "v", "out", "grad", "grad_q", "grad_k", "grad_v", "lse")]


def _view(x_BHTE: Tensor) -> _View:
    return _View(x_BHTE.data_ptr(), *x_BHTE.stride()[:3])


def _problem(q_BHTE: Tensor, k_BKTE: Tensor, plan: Plan, scale: float) -> Any:
    batch, heads, tokens, size = q_BHTE.shape
    return ctypes.byref(
        _Problem(
            batch, heads, k_BKTE.shape[1], tokens, size, plan.causal, torch.get_num_threads(),
            plan.num_segments, plan.num_tiles, plan.num_trees, plan.packed, scale,
            *(ctypes.addressof(array) for array in plan.arrays),
        )
    )  # fmt: skip


def _call(name: str, *arguments: Any) -> None:
    kernels = native.compiled()
    assert kernels is not None
    if getattr(kernels, name)(*arguments):
        raise MemoryError(f"{name}: no memory for the buffers of a thread. Make the row shorter or use fewer threads.")


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Tensor:
        """With or without the dimension B in front; added here, views cost no gradient of their own."""
        q_BHTE, k_BKTE, v_BKTE = (_strided(x) for x in (q, k, v))
        batch, heads, tokens, size = q_BHTE.shape
        out_BTHE = q_BHTE.new_empty(batch, tokens, heads, size)
        lse_BHT = q_BHTE.new_empty(batch, heads, tokens, dtype=torch.float32)
        if not q.is_meta:
            views = [ctypes.byref(_view(x)) for x in (q_BHTE, k_BKTE, v_BKTE, out_BTHE.transpose(1, 2))]
            _call("vlit_flash_forward", _problem(q_BHTE, k_BKTE, plan, scale), *views, _pointer(lse_BHT.data_ptr()))
        ctx.save_for_backward(q_BHTE, k_BKTE, v_BKTE, out_BTHE, lse_BHT)
        ctx.plan, ctx.scale, ctx.packed = plan, scale, q.dim() == 3
        return out_BTHE[0] if ctx.packed else out_BTHE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q_BHTE, k_BKTE, v_BKTE, out_BTHE, lse_BHT = ctx.saved_tensors
        grad_BHTE = _strided(grad_outputs[0]).transpose(1, 2)
        grads = [_like_projection(x) for x in (q_BHTE, k_BKTE, v_BKTE)]
        if not grad_BHTE.is_meta:
            views = [_view(x) for x in (q_BHTE, k_BKTE, v_BKTE, out_BTHE.transpose(1, 2), grad_BHTE, *grads)]
            tensors = _Tensors(*(ctypes.addressof(view) for view in views), lse_BHT.data_ptr())
            _call("vlit_flash_backward", _problem(q_BHTE, k_BKTE, ctx.plan, ctx.scale), ctypes.byref(tensors))
        return *(grad[0] if ctx.packed else grad for grad in grads), None, None


def _strided(x: Tensor) -> Tensor:
    """The same values in four dimensions, the elements of a row side by side."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x if x.dim() == 4 else x[None]


def _like_projection(x_BHTE: Tensor) -> Tensor:
    """An empty tensor of this shape in the memory order ``[B, T, H, E]``, that of the projection before the attention."""
    batch, heads, tokens, size = x_BHTE.shape
    return x_BHTE.new_empty(batch, tokens, heads, size).transpose(1, 2)


def flash_cpu_attention(q_HTE: Tensor, k_KTE: Tensor, v_KTE: Tensor, *, segments: Segments, scale: float) -> Tensor:
    """Causal attention of a packed row, ``[H, T, E]`` and ``[K, T, E]`` -> ``[T, H, E]``; see ``packed_attention``.

    Equal inputs give equal bits, whatever the number of threads. A NaN or an infinite score spoils the rows that see it
    and no other segment.

    Raises:
        ValueError: shapes, dtypes, segments or scale that do not fit together, or :func:`available` is False.
    """
    _check(q_HTE, k_KTE, v_KTE, segments.num_tokens, scale)
    plan = plan_tiles(segments)
    return _FlashAttention.apply(q_HTE, k_KTE, v_KTE, plan, scale)


def flash_cpu_full(q_BHSE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, *, scale: float) -> Tensor:
    """Attention of a vision encoder, ``[B, H, S, E]`` and ``[B, K, S, E]`` -> ``[B, S, H, E]``: queries see all S keys.

    Raises:
        ValueError: as :func:`flash_cpu_attention`.
    """
    _check(q_BHSE, k_BKSE, v_BKSE, q_BHSE.shape[2], scale)
    plan = plan_tiles(make_segments([q_BHSE.shape[2]]), causal=False)
    return _FlashAttention.apply(q_BHSE, k_BKSE, v_BKSE, plan, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, tokens: int, scale: float) -> None:
    heads, kv_heads = q.shape[-3], k.shape[-3]
    expected = (*q.shape[:-3], kv_heads, *q.shape[-2:])
    if k.shape != expected or v.shape != expected or not kv_heads or heads % kv_heads:
        raise ValueError(
            f"k and v need the shape {list(q.shape)} of q with a number of heads that divides {heads}, "
            f"got {list(k.shape)} and {list(v.shape)}"
        )
    if q.shape[-2] != tokens:
        raise ValueError(f"the segments hold {tokens} tokens, q holds {q.shape[-2]}")
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if not available(q) or k.dtype != q.dtype or v.dtype != q.dtype or k.device != q.device or v.device != q.device:
        raise ValueError(
            f"the fused CPU kernel takes bf16 on a CPU with AVX512-BF16 and head sizes in steps of 16 up to {MAX_HEAD_SIZE}, "
            f"got {q.dtype}/{k.dtype}/{v.dtype} on {q.device}, head size {q.shape[-1]}; use blocked_attention"
        )
