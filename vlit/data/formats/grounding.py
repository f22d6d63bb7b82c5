"""Referring expressions and regions: RefCOCO, RefCOCO+, RefCOCOg (github.com/lichengunc/refer) and Visual Genome.

Both directions are trained as in LLaVA-1.5's mixture (arXiv:2310.03744): from words to the box, from the box to words.
Wording is ours, boxes are in any form of :mod:`vlit.data.boxes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from vlit.data.boxes import FORMS, KnownForm, Size
from vlit.data.formats._image_name import pattern_of
from vlit.data.formats._reader import (
    SHORT_ANSWER,
    RecordFormat,
    an_object,
    by_key,
    list_of,
    load_json,
    look_up,
    member,
    name_of,
    number_of,
    parse,
    share_box,
    text_of,
    with_pictures,
)
from vlit.data.formats.coco import box_of
from vlit.data.json_stream import iter_json_records
from vlit.data.plain_pickle import load_plain
from vlit.data.record import Record, Region
from vlit.data.record_checks import BadRecord, Unusable, shown
from vlit.errors import DataError
from vlit.registry import FORMATS
from vlit.types import Turn

_LOCATE = "Give the bounding box of the region that this describes: {label}"
_DESCRIBE = "Describe the region {box} in a few words."


class _Regions(RecordFormat):
    """Boxes and the words for them."""

    task: Literal["locate", "describe"] = "locate"
    """`locate`: from words to the box; `describe`: from the box to words."""
    boxes: KnownForm = "llava"
    """How boxes are written: `llava`, `minigpt_v2`, `qwen_vl`, `cogvlm`, `ofa` or `shikra`."""

    def about(self, identity: str, image: str, regions: list[Region], size: Size) -> Record:
        """One exchange a region of a picture of that size in pixels."""
        turns: list[Turn] = []
        for region in regions:
            box = FORMS[self.boxes].encode([region.box], size)
            question, answer = (
                (_LOCATE.format(label=region.label), box)
                if self.task == "locate"
                else (_DESCRIBE.format(box=box), region.label)
            )
            turns += [Turn("user", question), Turn("assistant", answer)]
        kind = "grounding" if self.task == "locate" else "region"
        return Record(
            identity, with_pictures(turns, 1), (image,), kind=kind, instruction_type=kind, regions=tuple(regions)
        )


@FORMATS.register("refcoco")
class RefCocoFormat(_Regions):
    """`refs(unc).p` (or the same as JSON) of RefCOCO, RefCOCO+ or RefCOCOg, with `instances.json` beside it."""

    type: str = "refcoco"
    split: str = "train"
    """`train`, `val`, `testA`, `testB` or `test`; references of other splits are not counted. `all`: every one."""
    instances: str = "instances.json"
    """Name of the file of boxes."""

    def files(self, path: Path) -> list[Path]:
        """References and boxes."""
        return [path, path.with_name(self.instances)]

    def entries(self, path: Path) -> Iterator[Any]:
        """The references of the split, each with its picture and box."""
        refs = load_json(path, expected=list) if path.suffix == ".json" else load_plain(path)
        if not isinstance(refs, list):
            raise DataError(f"{path}: holds no list of references. Check data path and format.")
        content = load_json(path.with_name(self.instances))
        images = by_key(member(content, "images", path.with_name(self.instances)), "id")
        boxes = by_key(member(content, "annotations", path.with_name(self.instances)), "id")
        for ref in refs:
            if not isinstance(ref, dict):
                yield ref
            elif self.split in ("all", ref.get("split")):
                known = {"id": ref.get("ref_id"), "picture": look_up(images, ref.get("image_id"))}
                yield {**ref, **known, "box": look_up(boxes, ref.get("ann_id"))}

    def to_record(self, entry: Any, number: int, path: Path) -> Record:
        """All sentences about one object."""
        entry = an_object(entry)
        identity, picture, box = name_of(entry, "ref_id"), entry["picture"], entry["box"]
        if not isinstance(picture, dict):
            raise BadRecord(
                f"image_id is {shown(entry.get('image_id'))}, which is no picture of {self.instances}", "fields"
            )
        if not isinstance(box, dict):
            raise BadRecord(
                f"ann_id is {shown(entry.get('ann_id'))}, which is no annotation of {self.instances}", "fields"
            )
        size = number_of(picture, "width"), number_of(picture, "height")
        where = box_of(box, "bbox", size)
        sentences = self.usable("sentences", list_of(entry, "sentences", dict), lambda one: text_of(one, "sent"))
        if not sentences:
            raise BadRecord("sentences is empty, expected what people said", "fields")
        return self.about(identity, text_of(picture, "file_name"), [Region(words, where) for words in sentences], size)


@FORMATS.register("visual_genome")
class VisualGenomeFormat(_Regions):
    """`region_descriptions.json` (with `image_data.json` beside it) or `question_answers.json` of Visual Genome."""

    type: str = "visual_genome"
    max_per_image: Annotated[int, Field(ge=1)] = 10
    """Regions or questions of one picture, at most: the first ones. LLaVA-1.5 takes 10."""
    image_name: Annotated[str, pattern_of(id="1")] = "VG_100K/{id}.jpg"
    """Where a picture lies that `image_data.json` does not place."""
    image_data: str = "image_data.json"
    """Name of the file of sizes."""

    def files(self, path: Path) -> list[Path]:
        """Descriptions, and sizes where they are there."""
        sizes = path.with_name(self.image_data)
        return [path, sizes] if sizes.is_file() else [path]

    def raw_records(self, path: Path) -> Iterator[bytes]:
        """The bytes of each picture's entry."""
        return iter_json_records(path)

    def entries(self, path: Path) -> Iterator[Any]:
        """The pictures, each with its size where it is known."""
        sizes = path.with_name(self.image_data)
        listed = load_json(sizes, expected=list) if sizes.is_file() else []
        data = by_key(listed, "image_id", "id")
        for raw in iter_json_records(path):
            entry = parse(raw)
            if isinstance(entry, dict):
                identity = entry.get("id", entry.get("image_id"))
                entry = {**entry, "id": identity, "picture": look_up(data, identity)}
            yield entry

    def to_record(self, entry: Any, number: int, path: Path) -> Record:
        """Regions of a picture, or questions about it."""
        entry = an_object(entry)
        identity, picture = name_of(entry, "id"), entry["picture"]
        image = self._image(identity, picture)
        if "qas" in entry:
            asked = self.usable("questions", list_of(entry, "qas", dict), _exchange, at_most=self.max_per_image)
            turns = [turn for exchange in asked for turn in exchange]
            return Record(
                identity, with_pictures(turns, 1), (image,), kind="short_answer", instruction_type="short_answer"
            )
        if not isinstance(picture, dict):
            raise BadRecord(f"id {identity} has no size: it is no picture of {self.image_data}", "fields")
        size = number_of(picture, "width"), number_of(picture, "height")
        listed = list_of(entry, "regions", dict)
        regions = self.usable("regions", listed, lambda one: _region(one, size), at_most=self.max_per_image)
        if not regions:
            raise BadRecord("regions is empty, expected descriptions", "fields")
        return self.about(identity, image, regions, size)

    def _image(self, identity: str, picture: Any) -> str:
        url = picture.get("url") if isinstance(picture, dict) else None
        if isinstance(url, str) and len(parts := url.split("/")) > 1 and parts[-2].startswith("VG_100K"):
            return "/".join(parts[-2:])
        return self.image_name.format(id=identity)


def _exchange(one: dict[str, Any]) -> tuple[Turn, Turn]:
    return Turn("user", f"{text_of(one, 'question')}\n{SHORT_ANSWER}"), Turn("assistant", text_of(one, "answer"))


def _region(one: dict[str, Any], size: Size) -> Region:
    """What Visual Genome says of a part of a picture. Thousands of its boxes reach over the edge; they are cut off there."""
    x, y, width, height = (number_of(one, key) for key in ("x", "y", "width", "height"))
    left, top, right, bottom = max(0, x), max(0, y), min(size[0], x + width), min(size[1], y + height)
    if left > right or top > bottom or (left == right and width) or (top == bottom and height):
        raise Unusable(
            f"box ({x}, {y}, {x + width}, {y + height}) lies beside the picture of {size[0]} x {size[1]}", "fields"
        )
    return Region(" ".join(text_of(one, "phrase").split()), share_box(left, top, right, bottom, size))
