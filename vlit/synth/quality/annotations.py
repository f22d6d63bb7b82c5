"""What pictures show, held as arrays: things with label, group, box, colour; and the words that name them.

Sources: COCO instance files (https://cocodataset.org/#format-data; a colour is ``attributes.color``), or the ``regions`` of the
records themselves where these are complete.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from vlit.data.formats.coco import read_coco, region_of, size_of
from vlit.data.record import Box, Record
from vlit.errors import DataError
from vlit.synth.quality.words import COLOURS, lemma

REGIONS = "regions"
"""Given as the annotation file: the records' own regions say all that the pictures show."""


class Thing(NamedTuple):
    """One object of a picture; ``box`` is normalised, ``group`` is COCO's supercategory."""

    label: str
    group: str
    colour: str
    box: Box
    crowd: bool = False
    """Many of them at once: they are there, uncounted, of whatever colours and places."""


@dataclass
class Annotations:
    """Things by image path, and every name that can be spoken of them."""

    things: dict[str, tuple[Thing, ...]] = field(default_factory=dict)
    names: dict[tuple[str, ...], tuple[str, str]] = field(default_factory=dict)
    """Base forms of a name -> ("label" or "group", name)."""
    licences: dict[str, str] = field(default_factory=dict)
    from_regions: bool = False
    longest: int = 1
    """Words of the longest name."""

    def add_name(self, kind: str, name: str) -> None:
        """Make a label or group known; a label wins over a group of that name."""
        key = tuple(lemma(word) for word in name.lower().split())
        if key and (kind == "label" or key not in self.names):
            self.names[key] = (kind, name)
            self.longest = max(self.longest, len(key))

    def of(self, record: Record) -> tuple[Thing, ...] | None:
        """Things of the one picture of a record; None where nothing is known about it."""
        if len(record.images) != 1:
            return None
        if self.from_regions:
            return tuple(_thing(region.label, region.box) for region in record.regions) or None
        return self.things.get(record.images[0])


def _thing(label: str, box: Box) -> Thing:
    """A region "red car" is a red thing with the label car."""
    colour, _, rest = label.partition(" ")
    if rest and colour.lower() in COLOURS:
        return Thing(rest, "", colour.lower(), box)
    return Thing(label, "", "", box)


def region_names(record: Record) -> list[str]:
    """Labels of a record's regions, without their colours."""
    return [_thing(region.label, region.box).label for region in record.regions]


def read_annotations(sources: list[str]) -> Annotations | None:
    """Annotations of COCO files, each ``FILE`` or ``FOLDER/=FILE``; None without any.

    Files that speak of the same pictures are joined; a thing that an earlier file has is not added again.

    Raises:
        DataError: a file is not COCO's, or an annotation has a field that cannot be used.
    """
    if not sources:
        return None
    if REGIONS in sources:
        return Annotations(from_regions=True)
    found = Annotations()
    for source in sources:
        prefix, _, name = source.rpartition("=")
        _read_coco(Path(name), prefix, found)
    return found


def _read_coco(path: Path, prefix: str, found: Annotations) -> None:
    coco = read_coco(path)
    if coco.annotations and not coco.categories:
        raise DataError(f"{path}: not a COCO instances file, it has no categories. Give instances_*.json.")
    held: dict[Any, list[Thing]] = {identity: [] for identity in coco.pictures}
    for _, picture, thing in coco.each(partial(_instance, coco.categories)):
        held[picture].append(thing)
    licences = {identity: row.get("name", "?") for identity, row in coco.licences.items()}
    for identity, image in coco.pictures.items():
        name = prefix + image["file_name"]
        earlier = found.things.get(name, ())
        found.things[name] = (*earlier, *(thing for thing in held[identity] if thing not in earlier))
        if "license" in image:
            found.licences[name] = licences.get(image["license"], "?")
    for category in coco.categories.values():
        found.add_name("label", category["name"])
        if group := _group(category):
            found.add_name("group", group)


def _instance(categories: dict[Any, dict[str, Any]], row: dict[str, Any], picture: dict[str, Any]) -> Thing:
    region = region_of(row, categories, size_of(picture))
    attributes = row.get("attributes")
    colour = str(attributes.get("color", "")).lower() if isinstance(attributes, dict) else ""
    crowd = bool(row.get("iscrowd"))
    return Thing(region.label, _group(categories[row["category_id"]]), "" if crowd else colour, region.box, crowd)


def _group(category: dict[str, Any]) -> str:
    return str(category.get("supercategory") or "")
