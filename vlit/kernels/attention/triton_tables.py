"""Work lists and tile sizes of the Triton attention kernels: numbers only, made once per batch and reused by every layer.

A kernel program takes one entry of a list. A *query block* is at most BLOCK_M rows inside one family and meets key tiles of
BLOCK_N: the prefix, then from the start of its first row's segment to its last row. A *key block* is at most BLOCK_N keys
and meets row tiles of BLOCK_M: from its first key to the end of its last key's segment, then the children of its segment.
Only tiles that hold a visible pair are listed, and the heaviest entries come first, so no long block starts last.

Shape letters: T tokens of the row, B entries of a list.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlit.kernels.attention.segments import NO_PARENT, Segments

MIN_BLOCK = 16
"""Smallest tile side the tensor cores take; smaller ones pass the interpreter and fail to compile."""
MIXED_TILE = 1.5
"""Assumed cost of a tile of a block that holds several segments (mask and guards) against a plain tile."""
BLOCK_OVERHEAD = 2.0
"""Assumed cost of starting and finishing a block, in tiles."""


@dataclass(frozen=True)
class Tile:
    """BLOCK_M query rows by BLOCK_N keys, and how a program runs them. Raises ValueError on an impossible size."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        for block in (self.block_m, self.block_n):
            if block < MIN_BLOCK or block & (block - 1):
                raise ValueError(f"a tile side is a power of two of at least {MIN_BLOCK}, got {block}")


@dataclass(frozen=True)
class Tiles:
    """The tile of each kernel."""

    forward: Tile
    dq: Tile
    dkdv: Tile


# Largest head size -> tiles. Chosen so that the loop over full tiles keeps its numbers in registers (no spills) and its
# pipeline fits the shared memory: 227 KB a block on Hopper, at most 99 KB elsewhere. fp32 runs without tensor cores.
_HOPPER_16_BIT = {
    64: Tiles(Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
    128: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    256: Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 64, 8, 2)),
}
_OTHER_16_BIT = {
    64: Tiles(Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    128: Tiles(Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)),
    256: Tiles(Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
}
_32_BIT = {
    64: Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    128: Tiles(Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), Tile(32, 16, 4, 1)),
    256: Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}
LARGEST_HEAD = 256


def choose_tiles(head_size: int, element_bytes: int, *, hopper: bool) -> Tiles:
    """Tiles for a head size (16..256) and 2- or 4-byte numbers. Raises ValueError outside of that."""
    table = {2: _HOPPER_16_BIT if hopper else _OTHER_16_BIT, 4: _32_BIT}.get(element_bytes, {})
    for largest, tiles in table.items():
        if MIN_BLOCK <= head_size <= largest:
            return tiles
    raise ValueError(
        f"head size {head_size} with {element_bytes}-byte numbers: the Triton kernels take {MIN_BLOCK}..{LARGEST_HEAD} and "
        "2 or 4 bytes; choose another attention backend"
    )


def _cut(
    lo: int, hi: int, ends: Sequence[int], size: int, cost: Callable[[int, int], float], fresh: float
) -> list[tuple[int, int]]:
    """Cut ``[lo, hi)`` into blocks of at most ``size``: at a segment end, or full where that is cheaper.

    A block ends where its cost, less ``fresh`` (the cost of starting a full block at a segment, per position) for every
    position it takes, is least; within a few per cent of the best cut on packed rows. Long segments end their last block,
    short ones share blocks, and under a long prefix a block is always worth filling.
    """
    blocks = []
    while lo < hi:
        reach = min(lo + size, hi)
        choices = [reach, *reversed(ends[bisect_right(ends, lo) : bisect_left(ends, reach)])]
        end = min(choices, key=lambda end: cost(lo, end) - (end - lo) * fresh)
        blocks.append((lo, end))
        lo = end
    return blocks


def _own_tiles(length: int, step: int, mixed: bool) -> float:
    return -(-length // step) * (MIXED_TILE if mixed else 1.0)


def _heaviest_first(entries: Sequence[tuple[float, tuple[int, ...]]]) -> np.ndarray:
    ordered = sorted(entries, key=lambda entry: -entry[0])
    return np.array([numbers for _, numbers in ordered], dtype=np.int32)


@lru_cache(maxsize=64)
def query_blocks(segments: Segments, block_m: int, block_n: int) -> np.ndarray:
    """int32 ``[B, 5]``: row_begin, row_end, prefix_lo, prefix_hi, own_lo (start of the first row's segment)."""
    starts, entries = segments.starts, []
    ends = [start + length for start, length in zip(starts, segments.lengths, strict=True)]
    for family in segments.families:
        prefix_tiles = -(-(family.prefix_hi - family.prefix_lo) // block_n)

        def cost(lo: int, hi: int, prefix_tiles: int = prefix_tiles) -> float:
            own_lo = starts[bisect_right(starts, lo) - 1]
            mixed = starts[bisect_right(starts, hi - 1) - 1] > own_lo
            return BLOCK_OVERHEAD + prefix_tiles + _own_tiles(hi - own_lo, block_n, mixed)

        fresh = (BLOCK_OVERHEAD + prefix_tiles + -(-block_m // block_n)) / block_m
        inside = ends[family.first : family.last]
        for lo, hi in _cut(family.lo, family.hi, inside, block_m, cost, fresh):
            own_lo = starts[bisect_right(starts, lo) - 1]
            entries.append((cost(lo, hi), (lo, hi, family.prefix_lo, family.prefix_hi, own_lo)))
    return _heaviest_first(entries)


@lru_cache(maxsize=64)
def key_blocks(segments: Segments, block_m: int, block_n: int) -> np.ndarray:
    """int32 ``[B, 5]``: key_begin, key_end, own_query_end (end of the last key's segment), family_lo, family_hi.

    ``[family_lo, family_hi)`` are the rows of the children that see these keys as their prefix; empty for other segments.
    A segment with children has its blocks to itself.
    """
    starts, entries = segments.starts, []
    ends = [start + length for start, length in zip(starts, segments.lengths, strict=True)]
    children = {
        segments.parents[f.first]: (f.lo, f.hi) for f in segments.families if segments.parents[f.first] != NO_PARENT
    }
    first = 0
    while first < len(starts):
        last = first + 1
        while first not in children and last < len(starts) and last not in children:
            last += 1
        family_lo, family_hi = children.get(first, (0, 0))
        family_tiles = -(-(family_hi - family_lo) // block_m)

        def cost(lo: int, hi: int, family_tiles: int = family_tiles) -> float:
            head, tail = bisect_right(starts, lo) - 1, bisect_right(starts, hi - 1) - 1
            return BLOCK_OVERHEAD + family_tiles + _own_tiles(ends[tail] - lo, block_m, tail > head)

        fresh = (BLOCK_OVERHEAD + -(-block_n // block_m)) / block_n
        for lo, hi in _cut(starts[first], ends[last - 1], ends[first:last], block_n, cost, fresh):
            own_end = ends[bisect_right(starts, hi - 1) - 1]
            entries.append((cost(lo, hi), (lo, hi, own_end, family_lo, family_hi)))
        first = last
    return _heaviest_first(entries)


class TileCount(NamedTuple):
    """Score tiles per head: what a list computes, the fewest that could hold every visible pair, all T x T of them."""

    computed: int
    needed: int
    dense: int


def count_tiles(segments: Segments, tile: Tile, *, keys: bool = False) -> TileCount:
    """Tiles the query blocks (or with ``keys`` the key blocks) compute: how block-sparse the kernels are on this row."""
    m, n, tokens = tile.block_m, tile.block_n, segments.num_tokens
    if keys:
        begin, _, own_end, lo, hi = key_blocks(segments, m, n).T
        computed = -(-(own_end - begin) // m) + -(-(hi - lo) // m)
    else:
        _, end, lo, hi, own_lo = query_blocks(segments, m, n).T
        computed = -(-(end - own_lo) // n) + -(-(hi - lo) // n)
    return TileCount(int(computed.sum()), -(-segments.num_pairs // (m * n)), -(-tokens // m) * -(-tokens // n))


@lru_cache(maxsize=32)
def device_segment_lo(segments: Segments, device: torch.device) -> Tensor:
    """int32 ``[T]`` on the device: first row of every row's segment."""
    return _to_device(np.repeat(np.array(segments.starts, dtype=np.int32), segments.lengths), device)


@lru_cache(maxsize=64)
def device_query_blocks(segments: Segments, tile: Tile, device: torch.device) -> Tensor:
    """:func:`query_blocks` on the device."""
    return _to_device(query_blocks(segments, tile.block_m, tile.block_n), device)


@lru_cache(maxsize=64)
def device_key_blocks(segments: Segments, tile: Tile, device: torch.device) -> Tensor:
    """:func:`key_blocks` on the device."""
    return _to_device(key_blocks(segments, tile.block_m, tile.block_n), device)


def _to_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Through pinned memory: a copy from ordinary memory would make the host wait for all work already queued."""
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
