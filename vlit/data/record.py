"""The canonical record: what every format becomes, what the data tools work on, and what trains as it is.

A canonical file is JSONL of LLaVA's objects (``id, image, conversations``; https://github.com/haotian-liu/LLaVA) with a few
more keys, each only where it is set: ``kind``, ``domain``, ``instruction_type``, ``options``, ``regions``, ``provenance``. The
``llava`` format reads it without conversion, and :func:`from_json` gives back exactly what :func:`to_json` was given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from vlit.data.json_stream import iter_json_records
from vlit.data.record_checks import (
    SPEAKERS,
    BadRecord,
    check_conversation,
    check_placeholders,
    identity_of,
    kind_of,
    read_images,
    read_turns,
    shown,
    text_field,
)
from vlit.durable import replace_file
from vlit.errors import DataError, did_you_mean
from vlit.types import Turn

META_KEYS = ("domain", "instruction_type", "options", "regions", "provenance")
"""Optional fields that training does not read; ``Row.meta`` holds them as JSON has them."""
_META = frozenset(META_KEYS)
KEYS = ("id", "image", "images", "conversations", "kind", *META_KEYS)
Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Region:
    """A named part of image number ``image``. ``box`` = (x0, y0, x1, y1), normalised to 0..1 of the unpadded image."""

    label: str
    box: Box
    image: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """One conversation about any number of images, and what is known about it.

    Turns alternate user and assistant after an optional system turn; user turns hold one ``<image>`` an image, in order.
    ``kind`` groups records in training reports, ``domain`` and ``instruction_type`` say what a record is about and asks for,
    ``options`` are the answers to choose from, ``provenance`` (JSON values) says where it came from.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()
    kind: str | None = None
    domain: str | None = None
    instruction_type: str | None = None
    options: tuple[str, ...] = ()
    regions: tuple[Region, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash((self.id, self.turns, self.images, self.kind))


def check(record: Record) -> None:
    """DataError naming the field unless the record can be trained on: turns, placeholders, image paths, boxes."""
    try:
        check_conversation([turn.role for turn in record.turns], [turn.text for turn in record.turns], record.images)
        _regions(_meta_of(record), len(record.images))
    except BadRecord as bad:
        raise DataError(f'record "{record.id}": {bad}') from bad


def to_json(record: Record) -> dict[str, Any]:
    """LLaVA's object of a record; optional fields are keys only where they are set."""
    held: dict[str, Any] = {"id": record.id}
    if len(record.images) == 1:
        held["image"] = record.images[0]
    elif record.images:
        held["images"] = list(record.images)
    held["conversations"] = [{"from": SPEAKERS[turn.role], "value": turn.text} for turn in record.turns]
    if record.kind is not None:
        held["kind"] = record.kind
    return held | _meta_of(record)


def from_json(value: Any) -> Record:
    """The record of a canonical object.

    Raises:
        DataError: names the field that is missing, unknown or of the wrong kind.
    """
    try:
        return _from_json(value)
    except BadRecord as bad:
        identity = value.get("id") if isinstance(value, dict) else None
        place = "record" if identity is None else f"record {identity!r}"
        raise DataError(f"{place}: {bad}") from bad


def read_records(path: Path) -> Iterator[Record]:
    """Records of a canonical file (JSONL, or one JSON array), one at a time.

    Raises:
        DataError: names file, record and field.
    """
    for number, raw in enumerate(iter_json_records(path)):
        try:
            yield _from_json(orjson.loads(raw))
        except orjson.JSONDecodeError as error:
            raise DataError(f"{path.name}#{number}: the record is not valid JSON ({error}).") from error
        except BadRecord as bad:
            raise DataError(f"{path.name}#{number}: {bad}. Fix the record.") from bad


def write_records(path: Path, records: Iterable[Record]) -> int:
    """Write a canonical JSONL file in one step: complete, or as it was before. Returns the number of records.

    Raises:
        DataError: a record could not be trained on (see :func:`check`); nothing is written.
    """
    count = 0

    def lines() -> Iterator[bytes]:
        nonlocal count
        for record in records:
            check(record)
            count += 1
            yield orjson.dumps(to_json(record)) + b"\n"

    replace_file(path, lines())
    return count


def meta_of(value: dict[str, Any], num_images: int) -> dict[str, Any] | None:
    """The optional fields of a JSON object, checked and as they stand there; None without any.

    Raises:
        BadRecord: names the field.
    """
    if _META.isdisjoint(value):  # nearly all records of published files
        return None
    for key in ("domain", "instruction_type"):
        text_field(value, key)
    _options(value)
    _regions(value, num_images)
    _provenance(value)
    held = {key: value[key] for key in META_KEYS if value.get(key) not in (None, [], {})}
    return held or None


def meta_fields(meta: dict[str, Any] | None) -> dict[str, Any]:
    """Keyword arguments of :class:`Record` from checked optional fields."""
    held = dict(meta or {})
    if "options" in held:
        held["options"] = tuple(held["options"])
    if "regions" in held:
        held["regions"] = tuple(
            Region(region["label"], tuple(region["box"]), region.get("image", 0)) for region in held["regions"]
        )
    return held


def _meta_of(record: Record) -> dict[str, Any]:
    held: dict[str, Any] = {}
    if record.domain is not None:
        held["domain"] = record.domain
    if record.instruction_type is not None:
        held["instruction_type"] = record.instruction_type
    if record.options:
        held["options"] = list(record.options)
    if record.regions:
        held["regions"] = [
            {"label": region.label, "box": list(region.box)} | ({"image": region.image} if region.image else {})
            for region in record.regions
        ]
    if record.provenance:
        held["provenance"] = record.provenance
    return held


def _from_json(value: Any) -> Record:
    if not isinstance(value, dict):
        raise BadRecord(f"the record is {kind_of(value)}, expected an object with conversations")
    if unknown := [key for key in value if key not in KEYS]:
        raise BadRecord(
            f"{unknown[0]}: unknown key in a canonical record. {did_you_mean(unknown[0], KEYS)} Files of other origin are "
            "read with vlit convert",
            "fields",
        )
    if value.get("id") is None:
        raise BadRecord("id is missing, expected a string", "fields")
    roles, texts = read_turns(value)
    images = read_images(value)
    check_placeholders(roles, texts, images)
    turns = tuple(Turn(role, text) for role, text in zip(roles, texts, strict=True))
    optional = meta_fields(meta_of(value, len(images)))
    return Record(identity_of(value, 0), turns, tuple(images), text_field(value, "kind"), **optional)


def _options(value: dict[str, Any]) -> None:
    options = value.get("options")
    if options is None:
        return
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise BadRecord(f"options is {shown(options)}, expected a list of strings", "fields")


def _regions(value: dict[str, Any], num_images: int) -> None:
    regions = value.get("regions")
    if regions is None:
        return
    if not isinstance(regions, list):
        raise BadRecord(f"regions is {kind_of(regions)}, expected a list", "fields")
    for number, region in enumerate(regions):
        where = f"regions[{number}]"
        if not isinstance(region, dict) or not isinstance(region.get("label"), str):
            raise BadRecord(f"{where} is {shown(region)}, expected an object with label, box and image", "fields")
        box, image = region.get("box"), region.get("image", 0)
        if not isinstance(box, list) or len(box) != 4 or not all(_is_share(edge) for edge in box):
            raise BadRecord(f"{where}.box is {shown(box)}, expected four numbers from 0 to 1", "fields")
        if box[0] > box[2] or box[1] > box[3]:
            raise BadRecord(f"{where}.box is {shown(box)}, expected x0 <= x1 and y0 <= y1", "fields")
        if not isinstance(image, int) or isinstance(image, bool) or not 0 <= image < num_images:
            raise BadRecord(f"{where}.image is {shown(image)}, the record has {num_images} images", "fields")


def _is_share(edge: Any) -> bool:
    return isinstance(edge, (int, float)) and not isinstance(edge, bool) and math.isfinite(edge) and 0 <= edge <= 1


def _provenance(value: dict[str, Any]) -> None:
    held = value.get("provenance")
    if held is not None and not isinstance(held, dict):
        raise BadRecord(f"provenance is {kind_of(held)}, expected an object", "fields")
