"""COCO annotations (arXiv:1405.0312; cocodataset.org): ``captions_*.json`` and ``instances_*.json`` as records, by template.

Both are ``{"images": [{"id", "file_name", "width", "height"}], "annotations": […]}``, captions with ``caption``,
instances with ``category_id`` and ``bbox`` (x, y, width, height in pixels) and ``categories``. Captions make one record
each; instances make one record a picture: every object with its box. Crowds (``iscrowd``) are regions without a countable
object and are left out of answers. The file is read whole: instances of train2017 take about 3 GB of memory while their
index is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import orjson

from vlit.data.boxes import FORMS, KnownForm
from vlit.data.formats._image_name import pattern_of
from vlit.data.formats._reader import (
    DESCRIBE,
    RecordFormat,
    an_object,
    ask,
    by_key,
    is_name,
    list_of,
    load_json,
    look_up,
    member,
    name_of,
    number_of,
    pick,
    share_box,
    text_of,
)
from vlit.data.json_stream import read_json_bytes
from vlit.data.record import Record, Region
from vlit.data.record_checks import BadRecord, shown
from vlit.errors import DataError
from vlit.registry import FORMATS

T = TypeVar("T")
_DETECT = (
    "List the objects in the picture with their bounding boxes.",
    "Which objects are there, and where? Answer with boxes.",
    "Name every object and give its box.",
)


@FORMATS.register("coco")
class CocoFormat(RecordFormat):
    """COCO captions or instances; which of them is told by the annotations."""

    type: str = "coco"
    task: Literal["auto", "caption", "detection"] = "auto"
    """What records ask for. `auto`: captions where the annotations have them, else boxes."""
    boxes: KnownForm = "llava"
    """How boxes are written: `llava`, `minigpt_v2`, `qwen_vl`, `cogvlm`, `ofa` or `shikra`."""
    image_name: Annotated[str, pattern_of(file_name="1.jpg", id=1)] = "{file_name}"
    """Where a picture lies, for example `train2017/{file_name}`."""

    def entries(self, path: Path) -> Iterator[Any]:
        """Captions with their picture, or pictures with their instances."""
        content = load_json(path)
        images = by_key(member(content, "images", path), "id")
        annotations = member(content, "annotations", path)
        captions = any(isinstance(one, dict) and "caption" in one for one in annotations[:1])
        if self.task == "caption" or (self.task == "auto" and captions):
            for one in annotations:
                yield {**one, "picture": look_up(images, one.get("image_id"))} if isinstance(one, dict) else one
            return
        if captions:
            raise DataError(
                f"{path}: holds captions, no instances. Set format.task: caption, or name instances_*.json."
            )
        names = by_key(member(content, "categories", path), "id")
        by_image: dict[Any, list[Any]] = {}
        for one in annotations:
            identity = one.get("image_id") if isinstance(one, dict) else None
            by_image.setdefault(identity if is_name(identity) else repr(identity), []).append(one)
        for identity, objects in by_image.items():
            yield {"id": identity, "picture": look_up(images, identity), "objects": objects, "names": names}

    def to_record(self, entry: Any, number: int, path: Path) -> Record:
        """A caption as an answer, or a list of objects as one."""
        entry = an_object(entry)
        picture = entry.get("picture")
        if not isinstance(picture, dict):
            raise _unknown("image_id", entry.get("image_id", entry.get("id")), "picture")
        file_name = text_of(picture, "file_name")
        try:
            image = self.image_name.format(file_name=file_name, id=picture["id"])
        except ValueError as error:
            raise BadRecord(
                f"image_name {self.image_name} cannot hold id {shown(picture['id'])} ({error})", "fields"
            ) from error
        if "objects" in entry:
            return self._detection(entry, picture, image)
        identity = name_of(entry, "id")
        turns = ask(pick(DESCRIBE, identity), caption_of(entry))
        return Record(identity, turns, (image,), kind="caption", instruction_type="caption")

    def _detection(self, entry: dict[str, Any], picture: dict[str, Any], image: str) -> Record:
        objects = [an_object(one) for one in entry["objects"]]
        size = size_of(picture)
        regions = [region_of(one, entry["names"], size) for one in objects if not one.get("iscrowd")]
        if not regions:
            raise BadRecord("annotations: the picture has crowds only, no single object", "fields")
        form = FORMS[self.boxes]
        answer = "\n".join(form.name_boxes(region.label, [region.box], size) for region in regions)
        identity = str(entry["id"])
        return Record(
            identity, ask(pick(_DETECT, identity), answer), (image,), kind="detection", instruction_type="detection",
            regions=tuple(regions),
        )  # fmt: skip


@dataclass(frozen=True)
class CocoFile:
    """A COCO file read whole: pictures (with a ``file_name``), categories (with a ``name``) and licences by id, and the
    annotations as they are.
    """

    path: Path
    pictures: dict[Any, dict[str, Any]]
    annotations: list[Any]
    categories: dict[Any, dict[str, Any]]
    licences: dict[Any, dict[str, Any]]

    def each(self, read: Callable[[dict[str, Any], dict[str, Any]], T]) -> Iterator[tuple[Any, Any, T]]:
        """(id or None, id of the picture, what ``read(annotation, picture)`` makes of them) of every annotation.

        Raises:
            DataError: an annotation is not an object, is about an unknown picture, or ``read`` raises BadRecord.
        """
        for number, one in enumerate(self.annotations):
            identity = one.get("id") if isinstance(one, dict) else None
            name = f"annotation {identity}" if is_name(identity) else f"annotations[{number}]"
            try:
                picture = _known(self.pictures, an_object(one), "image_id", "picture")
                found = read(one, picture)
            except BadRecord as bad:
                raise _unusable(self.path, name, bad) from bad
            yield identity if is_name(identity) else None, picture["id"], found


def read_coco(path: Path) -> CocoFile:
    """A COCO file, with categories and licences where it has any.

    Raises:
        DataError: it cannot be read, is not COCO's, or a picture or category lacks its id or name.
    """
    try:
        data = orjson.loads(read_json_bytes(path))
        images, annotations = list(data["images"]), list(data["annotations"])
        categories, licences = list(data.get("categories") or ()), by_key(data.get("licenses") or (), "id")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check --annotations.") from error
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: not a COCO file ({type(error).__name__}: {error}); it needs images and annotations."
        ) from error
    pictures = _by_id(images, path, "images", "file_name")
    return CocoFile(path, pictures, annotations, _by_id(categories, path, "categories", "name"), licences)


def _by_id(entries: list[Any], path: Path, part: str, key: str) -> dict[Any, dict[str, Any]]:
    table = {}
    for number, entry in enumerate(entries):
        try:
            name_of(an_object(entry), "id")
            text_of(entry, key)
        except BadRecord as bad:
            known = f" (id {shown(entry['id'])})" if isinstance(entry, dict) and "id" in entry else ""
            raise _unusable(path, f"{part}[{number}]{known}", bad) from bad
        table[entry["id"]] = entry
    return table


def _unusable(path: Path, name: str, bad: BadRecord) -> DataError:
    return DataError(f"{path}: {name} cannot be used: {bad}. Remove it or complete the file.")


def _unknown(key: str, identity: Any, what: str) -> BadRecord:
    return BadRecord(f"{key} is {shown(identity)}, which is no {what} of this file", "fields")


def _known(table: dict[Any, dict[str, Any]], entry: dict[str, Any], key: str, what: str) -> dict[str, Any]:
    found = look_up(table, entry.get(key))
    if found is None:
        raise _unknown(key, entry.get(key), what)
    return found


def caption_of(entry: dict[str, Any]) -> str:
    """The caption on one line."""
    return " ".join(text_of(entry, "caption").split())


def size_of(picture: dict[str, Any]) -> tuple[float, float]:
    """Width and height of a picture in pixels."""
    try:
        return number_of(picture, "width"), number_of(picture, "height")
    except BadRecord as bad:
        raise BadRecord(f"picture {shown(picture['id'])}: {bad}", bad.check) from bad


def region_of(entry: dict[str, Any], categories: dict[Any, dict[str, Any]], size: tuple[float, float]) -> Region:
    """An instance: the name of its category, its box as shares of a picture of that size."""
    return Region(category_of(entry, categories), box_of(entry, "bbox", size))


def category_of(entry: dict[str, Any], categories: dict[Any, dict[str, Any]]) -> str:
    """The name of an instance's category."""
    return text_of(_known(categories, entry, "category_id", "category"), "name")


def box_of(entry: dict[str, Any], key: str, size: tuple[float, float]) -> tuple[float, float, float, float]:
    """A COCO box (x, y, width, height in pixels) as shares of the picture."""
    box = list_of(entry, key, (int, float))
    if len(box) != 4:
        raise BadRecord(f"{key} is {shown(box)}, expected x, y, width, height", "fields")
    x, y, width, height = box
    return share_box(x, y, x + width, y + height, size)
