"""Where the samples of a packed row lie, and which of them continue a shared prefix.

A row is N segments end to end. A segment without a parent is a sample of its own, or a *prefix*: the leading tokens that
several records of one image have in common. A segment with a parent continues that prefix: its row t sees the keys
``[prefix_lo, prefix_hi)`` and ``[segment_lo, t]``, exactly what it would see in a record of its own. The children of a
prefix follow it directly and in one piece (a *family*), so the rows that share a prefix are contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from vlit.types import NO_PARENT, PackedBatch


class Family(NamedTuple):
    """Rows ``[lo, hi)`` of one or more segments that share the prefix ``[prefix_lo, prefix_hi)`` (empty: no prefix).

    ``first``/``last`` are the range of segment numbers ``[first, last)``.
    """

    lo: int
    hi: int
    prefix_lo: int
    prefix_hi: int
    first: int
    last: int


@dataclass(frozen=True)
class Segments:
    """Lengths and parents of the N segments of one packed row of T tokens; pure numbers, no tensors.

    Raises:
        ValueError: an empty row, a segment without tokens, or a parent that is not a prefix directly before its children.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"every segment needs at least one token, got lengths {self.lengths}")
        if len(self.parents) != len(self.lengths):
            raise ValueError(f"{len(self.lengths)} lengths, {len(self.parents)} parents")
        for number, parent in enumerate(self.parents):
            if parent == NO_PARENT:
                continue
            direct = 0 <= parent < number and self.parents[parent] == NO_PARENT
            if not direct or any(between != parent for between in self.parents[parent + 1 : number]):
                raise ValueError(
                    f"segment {number} names segment {parent} as its prefix; a prefix has no parent of its own and stands "
                    f"directly before its children (parents: {self.parents})"
                )

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First row of every segment."""
        starts, total = [], 0
        for length in self.lengths:
            starts.append(total)
            total += length
        return tuple(starts)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.starts[-1] + self.lengths[-1]

    @cached_property
    def prefix_lengths(self) -> tuple[int, ...]:
        """Tokens of the prefix each segment continues; 0 without one."""
        return tuple(0 if parent == NO_PARENT else self.lengths[parent] for parent in self.parents)

    @cached_property
    def longest(self) -> int:
        """Most keys that any row sees."""
        return max(length + prefix for length, prefix in zip(self.lengths, self.prefix_lengths, strict=True))

    @property
    def single(self) -> bool:
        """The row is one sample."""
        return len(self.lengths) == 1

    @cached_property
    def families(self) -> tuple[Family, ...]:
        """The row cut where the prefix changes, in order; adjacent segments without a prefix are one family."""
        families: list[Family] = []
        first = 0
        for number in range(1, len(self.lengths) + 1):
            if number < len(self.lengths) and self.parents[number] == self.parents[first]:
                continue
            parent = self.parents[first]
            lo, hi = self.starts[first], self.starts[number - 1] + self.lengths[number - 1]
            prefix_lo = 0 if parent == NO_PARENT else self.starts[parent]
            prefix_hi = 0 if parent == NO_PARENT else prefix_lo + self.lengths[parent]
            families.append(Family(lo, hi, prefix_lo, prefix_hi, first, number))
            first = number
        return tuple(families)

    @cached_property
    def num_pairs(self) -> int:
        """Query-key pairs the mathematics needs: own triangle plus own rows times prefix."""
        return sum(
            length * (length + 1) // 2 + length * prefix
            for length, prefix in zip(self.lengths, self.prefix_lengths, strict=True)
        )


def segments_of(batch: PackedBatch) -> Segments:
    """The segments of a packed row."""
    return Segments(tuple(s.length for s in batch.segments), tuple(s.parent for s in batch.segments))


def make_segments(lengths: Sequence[int], parents: Sequence[int] | None = None) -> Segments:
    """Segments of a row; without ``parents`` every segment is a sample of its own."""
    return Segments(tuple(lengths), tuple(parents) if parents is not None else (NO_PARENT,) * len(lengths))
