"""COCO annotations (arXiv:1405.0312; cocodataset.org): ``captions_*.json`` and ``instances_*.json`` as records, by template.

Both are ``{"images": [{"id", "file_name", "width", "height"}], "annotations": […]}``, captions with ``caption``,
instances with ``category_id`` and ``bbox`` (x, y, width, height in pixels) and ``categories``. Captions make one record
each; instances make one record a picture: every object with its box. Crowds (``iscrowd``) are regions without a countable
object and are left out of answers. The file is read whole: instances of train2017 take about 3 GB of memory while their
index is built.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from vlit.data.boxes import FORMS, KnownForm
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
from vlit.data.record import Record, Region
from vlit.data.record_checks import BadRecord, shown
from vlit.errors import DataError
from vlit.registry import FORMATS

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
    image_name: str = "{file_name}"
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
            known = entry.get("image_id", entry.get("id"))
            raise BadRecord(f"image_id is {shown(known)}, which is no picture of this file", "fields")
        image = self.image_name.format(file_name=text_of(picture, "file_name"), id=picture["id"])
        if "objects" in entry:
            return self._detection(entry, picture, image)
        identity = name_of(entry, "id")
        turns = ask(pick(DESCRIBE, identity), " ".join(text_of(entry, "caption").split()))
        return Record(identity, turns, (image,), kind="caption", instruction_type="caption")

    def _detection(self, entry: dict[str, Any], picture: dict[str, Any], image: str) -> Record:
        size = number_of(picture, "width"), number_of(picture, "height")
        regions = []
        for one in entry["objects"]:
            one = an_object(one)
            if one.get("iscrowd"):
                continue
            category = look_up(entry["names"], one.get("category_id"))
            if category is None:
                raise BadRecord(
                    f"category_id is {shown(one.get('category_id'))}, which is no category of this file", "fields"
                )
            regions.append(Region(text_of(category, "name"), box_of(one, "bbox", size)))
        if not regions:
            raise BadRecord("annotations: the picture has crowds only, no single object", "fields")
        form = FORMS[self.boxes]
        answer = "\n".join(form.name_boxes(region.label, [region.box]) for region in regions)
        identity = str(entry["id"])
        return Record(
            identity, ask(pick(_DETECT, identity), answer), (image,), kind="detection", instruction_type="detection",
            regions=tuple(regions),
        )  # fmt: skip


def box_of(entry: dict[str, Any], key: str, size: tuple[float, float]) -> tuple[float, float, float, float]:
    """A COCO box (x, y, width, height in pixels) as shares of the picture."""
    box = list_of(entry, key, (int, float))
    if len(box) != 4:
        raise BadRecord(f"{key} is {shown(box)}, expected x, y, width, height", "fields")
    x, y, width, height = box
    return share_box(x, y, x + width, y + height, size)
