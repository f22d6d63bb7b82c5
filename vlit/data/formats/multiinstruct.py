"""MultiInstruct (arXiv:2212.10773; github.com/VT-NLP/MultiInstruct): ``train.jsonl`` after its templates have been filled
in.

Rows: ``unique_id, image_source, task_name, image_path, question | text, region, options, target_txt, prompt, target``.
Trained are ``prompt`` and ``target``. Regions are pixels of the picture, ``"x0 y0 x1 y1"``, also inside of the texts.
With ``image_folder`` the picture's size is read, regions are kept, and ``boxes`` may write them in a form that models
know. It writes every box of prompt, target and options: ``region`` lists the right option of a selection task only, and
one box in another form than the rest would give the answer away. Four numbers that are no box of the picture stay.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any, ClassVar, Self

from PIL import Image
from pydantic import model_validator

from vlit.data.boxes import FORMS, Size
from vlit.data.formats._reader import JsonRecords, WithBoxes, an_object, ask, list_of, name_of, share_box, text_of
from vlit.data.images import FORMATS as IMAGE_FORMATS
from vlit.data.images import resolve_image
from vlit.data.record import Box, Record, Region
from vlit.data.record_checks import BadRecord, shown, text_field
from vlit.registry import FORMATS

_NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
_REGION = re.compile(rf"{_NUMBER}(?: {_NUMBER}){{3}}")
_IN_TEXT = re.compile(rf"(?<![\w.-])(?<!\d ){_REGION.pattern}(?!\w|\.\d| -?\d)")


@FORMATS.register("multiinstruct")
class MultiInstructFormat(JsonRecords, WithBoxes):
    """`train.jsonl` and `test.jsonl` of MultiInstruct."""

    sizes_known: ClassVar[bool] = True
    type: str = "multiinstruct"
    image_folder: str = ""
    """Folder of `image_path`, for the pictures' sizes. Empty: regions stay pixels in the texts, and are not kept apart."""

    @model_validator(mode="after")
    def _pixels_need_sizes(self) -> Self:
        if self.boxes != "keep" and not self.image_folder:
            raise ValueError(f"boxes: {self.boxes} needs the sizes of the pictures. Set image_folder, or boxes: keep")
        return self

    def to_record(self, entry: Any, number: int, path: Path) -> Record:
        """Prompt and target; the options without the marks between them."""
        entry = an_object(entry)
        identity, task = name_of(entry, "unique_id"), name_of(entry, "task_name")
        texts = [text_of(entry, "prompt"), text_of(entry, "target")]
        image = text_field(entry, "image_path") or ""
        options = list_of(entry, "options", str) if entry.get("options") else []
        regions: tuple[Region, ...] = ()
        if entry.get("region"):
            (prompt, target, *options), regions = self._in_shares(entry, [*texts, *options], image)
            texts = [prompt, target]
        turns = ask(*texts, images=1 if image else 0)
        source = text_field(entry, "image_source")
        return Record(
            identity, turns, (image,) if image else (), kind=task, instruction_type=task, options=tuple(options),
            regions=regions, provenance={"dataset": source} if source else {},
        )  # fmt: skip

    def _in_shares(self, entry: dict[str, Any], texts: list[str], image: str) -> tuple[list[str], tuple[Region, ...]]:
        """The texts with their boxes in the wanted form, and the regions of the record."""
        listed = [region.strip() for region in list_of(entry, "region", str)]
        for region in listed:
            if not _REGION.fullmatch(region):
                raise BadRecord(f'region is {shown(region)}, expected "x0 y0 x1 y1" in pixels', "fields")
        if not self.image_folder or not image:
            return texts, ()
        size = _size(image, self.image_folder)
        regions = tuple(Region("", _shares(region, size)) for region in dict.fromkeys(listed))
        if self.boxes != "keep":
            texts = [_IN_TEXT.sub(lambda found: self._written(found[0], size), text) for text in texts]
        return texts, regions

    def _written(self, pixels: str, size: Size) -> str:
        try:
            return FORMS[self.boxes].encode([_shares(pixels, size)], size)
        except BadRecord:  # no box of this picture
            return pixels


def _shares(pixels: str, size: Size) -> Box:
    x0, y0, x1, y1 = (float(edge) for edge in pixels.split())
    return share_box(x0, y0, x1, y1, size)


@functools.lru_cache(maxsize=4096)
def _size(image: str, folder: str) -> tuple[int, int]:
    path = resolve_image(image, Path(folder).expanduser())
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as opened:
            return opened.size
    except (OSError, Image.DecompressionBombError) as error:
        raise BadRecord(f"image_path: the size of {image!r} cannot be read ({error})", "image_path") from error
