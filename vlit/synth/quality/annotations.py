"""What pictures show, held as arrays: things with label, group, box, colour; and the words that name them.

Sources: COCO instance files (https://cocodataset.org/#format-data; a colour is ``attributes.color``), or the ``regions`` of the
records themselves where these are complete.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import orjson

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

    Raises:
        DataError: a file is not COCO's.
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
    try:
        data: Any = orjson.loads(path.read_bytes())
        images = {image["id"]: image for image in data["images"]}
        categories = {kind["id"]: (kind["name"], kind.get("supercategory", "")) for kind in data["categories"]}
        boxes = data["annotations"]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}. Give COCO's instances file with --annotations.") from error
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a COCO instances file ({error!r}); images, annotations, categories?") from error
    licences = {row.get("id"): row.get("name", "?") for row in data.get("licenses", ())}
    held: dict[Any, list[Thing]] = {identity: [] for identity in images}
    for number, box in enumerate(boxes):
        image, category = images.get(box.get("image_id")), categories.get(box.get("category_id"))
        if image is None or category is None or len(box.get("bbox", ())) != 4:
            raise DataError(f"{path}: annotations[{number}] names an unknown picture or category, or has no bbox.")
        x, y, wide, high = box["bbox"]
        w, h = max(image["width"], 1), max(image["height"], 1)
        colour = str(box.get("attributes", {}).get("color", "")).lower()
        held[box["image_id"]].append(Thing(*category, colour, (x / w, y / h, (x + wide) / w, (y + high) / h)))
    for identity, image in images.items():
        name = prefix + image["file_name"]
        found.things[name] = tuple(held[identity])
        if "license" in image:
            found.licences[name] = licences.get(image["license"], "?")
    for label, group in categories.values():
        found.add_name("label", label)
        if group:
            found.add_name("group", group)
