"""A subset by quality and diversity. *Ours*: a greedy choice that prefers what it has taken least of.

The value of a record is quality + weight * mean over (question root, picture, type) of 1 / (1 + records taken that share
it). Values only fall as records are taken, so a lazy heap finds the best one exactly (Minoux 1978). Concept balancing of
LLaVA's CC3M-595K has the same aim: rare noun phrases first, at most 100 of a frequent one.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence

import numpy as np

DIVERSITY_WEIGHT = 1.0


def select(
    quality: np.ndarray, groups: Sequence[Sequence[str]], count: int, *, weight: float = DIVERSITY_WEIGHT
) -> np.ndarray:
    """Rows of the best ``count`` records, ascending.

    Args:
        groups: for each kind of group, the group of every record; an empty name is a group of its own.
    """
    taken: list[Counter[str]] = [Counter() for _ in groups]

    def value(row: int) -> float:
        shares = [1 / (1 + taken[g][names[row]]) if names[row] else 1.0 for g, names in enumerate(groups)]
        return float(quality[row]) + weight * (sum(shares) / len(shares) if shares else 0.0)

    heap = [(-value(row), row) for row in range(len(quality))]
    heapq.heapify(heap)
    chosen: list[int] = []
    while heap and len(chosen) < count:
        _, row = heap[0]
        now = -value(row)
        if len(heap) > 1 and now > min(heap[1][0], heap[2][0] if len(heap) > 2 else 0.0):
            heapq.heapreplace(heap, (now, row))
            continue
        heapq.heappop(heap)
        chosen.append(row)
        for counter, names in zip(taken, groups, strict=True):
            counter[names[row]] += 1
    return np.array(sorted(chosen), np.int64)
