"""Single turns about one picture become one conversation, as LLaVA-1.5 did with its VQA sets (arXiv:2310.03744 §3.4).

A picture is then read once for all its questions also by trainers that cannot share it between records (ours can:
``data.share_images``), and a published mixture is matched in its number of records.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from vlit.data.record import Record
from vlit.errors import ConfigError
from vlit.types import IMAGE_PLACEHOLDER, Turn


def join_turns(records: Iterable[Record], *, at_most: int) -> Iterator[Record]:
    """Records of one picture joined in their order, each with at most ``at_most`` exchanges; a longer one stays as it is.

    A joined record stands where the first of its records stood and keeps that one's id; ``provenance.joined`` lists all ids.
    ``kind``, ``domain`` and ``instruction_type`` stay where all agree; ``options`` stand in the questions anyway.
    Left alone are records without or with several pictures, with a system turn, or whose picture is not in their first turn.
    All records are held in memory.

    Raises:
        ConfigError: ``at_most`` is below 2.
    """
    if at_most < 2:
        raise ConfigError(
            f"joining turns: at most {at_most} exchanges a record; 2 or more are needed to join anything."
        )
    groups: list[list[Record]] = []
    open_group: dict[str, tuple[int, int]] = {}  # picture -> (place in groups, exchanges)
    for record in records:
        size = len(record.turns) // 2
        if not _can_join(record):
            groups.append([record])
            continue
        picture = record.images[0]
        place, exchanges = open_group.get(picture, (-1, at_most))
        if exchanges + size <= at_most:
            groups[place].append(record)
            open_group[picture] = place, exchanges + size
        else:
            open_group[picture] = len(groups), size
            groups.append([record])
    return (_joined(group) for group in groups)


def _can_join(record: Record) -> bool:
    return len(record.images) == 1 and len(record.turns) >= 2 and IMAGE_PLACEHOLDER in record.turns[0].text


def _joined(group: list[Record]) -> Record:
    first, *others = group
    if not others:
        return first
    turns = list(first.turns)
    for record in others:
        question = record.turns[0].text.replace(IMAGE_PLACEHOLDER, "").strip()
        turns += [Turn("user", question), *record.turns[1:]]
    same: dict[str, Any] = {
        name: getattr(first, name) if all(getattr(r, name) == getattr(first, name) for r in others) else None
        for name in ("kind", "domain", "instruction_type")
    }
    shared = {
        key: value for key, value in first.provenance.items() if all(r.provenance.get(key) == value for r in others)
    }
    return replace(
        first, turns=tuple(turns), options=(), regions=tuple(dict.fromkeys(x for r in group for x in r.regions)),
        provenance=shared | {"joined": [r.id for r in group]}, **same,
    )  # fmt: skip
