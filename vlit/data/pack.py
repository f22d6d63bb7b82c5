"""Packing plan of one step: which records share a row, and which rank computes it. A pure function of the lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence


def pack(
    lengths: Sequence[int],
    max_tokens: int,
    world_size: int,
    *,
    image_tokens: Sequence[int] | None = None,
) -> list[list[list[int]]]:
    """Plan ``[rank][micro-batch][record numbers]``.

    Rows hold at most ``max_tokens`` (a longer record has a row of its own). All ranks get the same number of rows, at
    the same place rows of like cost, so that ranks wait little for each other; when there are fewer records than that
    takes, the last micro-batches of some ranks are ``[]``.

    Args:
        lengths: tokens of each record, images included.
        image_tokens: tokens among them that also pass the vision encoder; they count twice when work is balanced.
    """
    if world_size < 1 or max_tokens < 1:
        raise ValueError(f"world_size {world_size} and max_tokens {max_tokens} must be positive")
    extra = image_tokens if image_tokens is not None else [0] * len(lengths)
    cost = [length + images for length, images in zip(lengths, extra, strict=True)]
    order = sorted(range(len(lengths)), key=lambda n: (-lengths[n], -cost[n], n))
    rows = _first_fit(order, lengths, max_tokens)
    wanted = world_size * math.ceil(len(rows) / world_size)
    rows = _balanced(order, lengths, cost, max_tokens, min(wanted, len(lengths))) or _split(rows, lengths, wanted)
    rows += [[] for _ in range(wanted - len(rows))]
    rows.sort(key=lambda row: (-sum(cost[n] for n in row), row))
    plan: list[list[list[int]]] = [[] for _ in range(world_size)]
    spent = [0] * world_size
    for begin in range(0, wanted, world_size):
        # the dearest row of each group goes to the rank that has done least
        ranks = sorted(range(world_size), key=lambda rank: (spent[rank], rank))
        for rank, row in zip(ranks, rows[begin : begin + world_size], strict=True):
            plan[rank].append(sorted(row))
            spent[rank] += sum(cost[n] for n in row)
    return plan


def _first_fit(order: list[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """First-fit-decreasing: few rows."""
    rows: list[list[int]] = []
    free: list[int] = []
    for number in order:
        for place, room in enumerate(free):
            if lengths[number] <= room:
                rows[place].append(number)
                free[place] -= lengths[number]
                break
        else:
            rows.append([number])
            free.append(max_tokens - lengths[number])
    return rows


def _balanced(
    order: list[int], lengths: Sequence[int], cost: Sequence[int], max_tokens: int, num_rows: int
) -> list[list[int]] | None:
    """Longest record to the cheapest row it fits in: rows of like cost. None when a record fits nowhere."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    tokens, spent = [0] * num_rows, [0] * num_rows
    for number in sorted(order, key=lambda n: (-cost[n], -lengths[n], n)):
        fitting = [
            place for place in range(num_rows) if not rows[place] or tokens[place] + lengths[number] <= max_tokens
        ]
        if not fitting:
            return None
        place = min(fitting, key=lambda p: (spent[p], p))
        rows[place].append(number)
        tokens[place] += lengths[number]
        spent[place] += cost[number]
    return rows


def _split(rows: list[list[int]], lengths: Sequence[int], wanted: int) -> list[list[int]]:
    """Halve the fullest rows until there are ``wanted`` of them or none has two records."""
    rows = [list(row) for row in rows]
    while len(rows) < wanted:
        candidates = [place for place, row in enumerate(rows) if len(row) > 1]
        if not candidates:
            break
        place = max(candidates, key=lambda p: (sum(lengths[n] for n in rows[p]), -p))
        row = rows[place]
        rows[place] = row[::2]
        rows.append(row[1::2])
    return rows
