"""A recipe is a list of small stages over JSON items; each finished item is one line of the stage's journal.

An item's key is the hash of stage, prompt and settings version, teacher, the item itself and the pictures looked at. So a stage
that is run again does only what is new: after a kill, with more or other pictures, or after a change of one prompt.
"""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import orjson

from vlit.synth.engine.client import Client
from vlit.synth.engine.journal import Journal
from vlit.synth.engine.parse import Rejected
from vlit.synth.engine.teacher import Ask, Declined, Reply, content_hash, picture_hash

Item = dict[str, Any]
"""One line of work; ``id`` is unique within a stage."""


@dataclass(frozen=True)
class Each:
    """Turns one item into any number of items, without a teacher. ``pictures`` gives the files that it looks at."""

    name: str
    version: str
    work: Callable[[Item], list[Item]]
    pictures: Callable[[Item], Sequence[str]] | None = None


@dataclass(frozen=True)
class AskEach:
    """Asks a teacher about each item.

    ``prepare`` returns None for an item that needs no question; ``finish`` makes items of a reply (None: of no question) or
    raises Rejected. A rejected reply is asked for again up to ``draws`` times in all, each time as another request.
    """

    name: str
    version: str
    prepare: Callable[[Item], Ask | None]
    finish: Callable[[Item, Reply | None], list[Item]]
    role: Literal["text", "vision"] = "text"
    likely_tokens_out: int = 200
    draws: int = 2


@dataclass(frozen=True)
class Whole:
    """Turns all items into others at once: selection, balancing, retrieval. Pure and seeded.

    ``pictures`` gives the files of one item that it looks at.
    """

    name: str
    version: str
    work: Callable[[list[Item]], list[Item]]
    pictures: Callable[[Item], Sequence[str]] | None = None


@dataclass(frozen=True)
class Select:
    """Keeps some of all items, told by their ids and a few more fields, so that the items need not be held. Pure and seeded.

    ``choose`` gets a list for each field, in the order of the items, and returns the numbers of those to keep.
    """

    name: str
    fields: tuple[str, ...]
    choose: Callable[[dict[str, list[Any]]], Iterable[int]]


WorkStage = Each | AskEach | Whole
"""Stages whose outcomes are kept in a journal."""
Stage = WorkStage | Select


class Items(Protocol):
    """Items that can be gone through any number of times, and are read as they are asked for."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Item]: ...


class JournalItems:
    """What a stage gave, read from its journal: 16 bytes an item stay in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines, self._places = array("Q"), array("Q")

    def add(self, offset: int, place: int) -> None:
        """Append item number ``place`` of the outcome at ``offset``."""
        self._lines.append(offset)
        self._places.append(place)

    def __len__(self) -> int:
        return len(self._lines)

    def __iter__(self) -> Iterator[Item]:
        with self._path.open("rb") as file:
            held, out = -1, []
            for offset, place in zip(self._lines, self._places, strict=True):
                if offset != held:
                    file.seek(offset)
                    held, out = offset, orjson.loads(file.readline())["out"]
                yield out[place]


class SelectedItems:
    """Some of other items, in their order."""

    def __init__(self, stage: Select, items: Items) -> None:
        self._items = items
        columns: dict[str, list[Any]] = {name: [] for name in stage.fields}
        for item in items:
            for name, column in columns.items():
                value = item.get(name)
                column.append(sys.intern(value) if isinstance(value, str) else value)
        self._kept = bytearray(len(items))
        for number in stage.choose(columns):
            self._kept[number] = 1

    def __len__(self) -> int:
        return sum(self._kept)

    def __iter__(self) -> Iterator[Item]:
        return (item for item, kept in zip(self._items, self._kept, strict=True) if kept)


@dataclass(frozen=True)
class Outcome:
    """What became of one item."""

    items: list[Item]
    rejected: str = ""


class StageStore:
    """Outcomes of a stage by key, on disk; only offsets are held in memory."""

    def __init__(self, folder: Path, number: int, name: str) -> None:
        self._journal = Journal(stage_file(folder, number, name))
        self._offsets = {row["key"]: offset for offset, row in self._journal.recover()}

    def __contains__(self, key: str) -> bool:
        return key in self._offsets

    def put(self, key: str, item_id: str, outcome: Outcome) -> None:
        """Store durably."""
        row = {"key": key, "id": item_id, "out": outcome.items}
        self._offsets[key] = self._journal.append(row | ({"rejected": outcome.rejected} if outcome.rejected else {}))

    def offset(self, key: str) -> int:
        """Where the outcome of an item stands."""
        return self._offsets[key]

    @property
    def path(self) -> Path:
        """The journal's file."""
        return self._journal.path

    def get(self, key: str) -> Outcome:
        """What was stored."""
        row = self._journal.read(self._offsets[key])
        return Outcome(row["out"], row.get("rejected", ""))

    def close(self) -> None:
        """Release the file."""
        self._journal.close()


def stage_file(folder: Path, number: int, name: str) -> Path:
    """``stages/02-ask.jsonl``."""
    return folder / "stages" / f"{number:02d}-{name}.jsonl"


def item_key(stage: WorkStage, item: Any, clients: dict[str, Client]) -> str:
    """Cache key of one item in one stage (of all items in a Whole). Pictures count by content: a file may be replaced."""
    teacher = clients[stage.role].teacher.identity() if isinstance(stage, AskEach) else None
    draws = stage.draws if isinstance(stage, AskEach) else None
    seen = [_content(path) for path in _pictures(stage, item)]
    return content_hash([stage.name, stage.version, teacher, draws, item, *([seen] if seen else [])])


def _pictures(stage: WorkStage, item: Any) -> list[str]:
    """Files that a stage looks at for an item."""
    if isinstance(stage, AskEach):
        ask = stage.prepare(item) if stage.role == "vision" else None
        return [] if ask is None else [path for message in ask.messages for path in message.images]
    if stage.pictures is None:
        return []
    return [path for one in (item if isinstance(stage, Whole) else [item]) for path in stage.pictures(one)]


def _content(path: str) -> str | None:
    """Hash of a picture; None where there is no readable file, which is told when it is looked at."""
    try:
        return picture_hash(path) if os.path.isfile(path) else None
    except OSError:
        return None


def work_on(stage: Each | AskEach, item: Item, clients: dict[str, Client]) -> Outcome:
    """The outcome of one item. Unanswered and BudgetExhausted pass through: the item stays undone."""
    reason = ""
    if isinstance(stage, Each):
        try:
            return Outcome(stage.work(item))
        except Rejected as rejected:
            return Outcome([], str(rejected))
    ask = stage.prepare(item)
    if ask is None:
        try:
            return Outcome(stage.finish(item, None))
        except Rejected as rejected:
            return Outcome([], str(rejected))
    for sample in range(stage.draws):
        try:
            return Outcome(stage.finish(item, clients[stage.role].ask(ask.draw(sample))))
        except Declined as declined:
            return Outcome([], f"declined: {declined}")
        except Rejected as rejected:
            reason = str(rejected)
    return Outcome([], reason)


def unique(items: Iterable[Item]) -> Iterator[Item]:
    """Items by id; a second item of an id is dropped, so that a record is there once whatever the stages gave."""
    seen: set[str] = set()
    for item in items:
        if item["id"] not in seen:
            seen.add(item["id"])
            yield item
