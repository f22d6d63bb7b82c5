"""MultiInstruct (arXiv:2212.10773; github.com/VT-NLP/MultiInstruct): ``train.jsonl`` after its templates have been filled
in.

Rows: ``unique_id, image_source, task_name, image_path, question | text, region, options, target_txt, prompt, target``.
Trained are ``prompt`` and ``target``. Regions are pixels of the picture, ``"x0 y0 x1 y1"``, also inside of the texts.
With ``image_folder`` the picture's size is read, regions are kept, and ``boxes`` may write them in a form that models
know.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from PIL import Image

from vlit.data.boxes import FORMS
from vlit.data.formats._reader import JsonRecords, WithBoxes, an_object, ask, list_of, name_of, share_box, text_of
from vlit.data.images import FORMATS as IMAGE_FORMATS
from vlit.data.images import resolve_image
from vlit.data.record import Record, Region
from vlit.data.record_checks import BadRecord, shown, text_field
from vlit.registry import FORMATS

_NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
_REGION = re.compile(rf"{_NUMBER}(?: {_NUMBER}){{3}}")


@FORMATS.register("multiinstruct")
class MultiInstructFormat(JsonRecords, WithBoxes):
    """`train.jsonl` and `test.jsonl` of MultiInstruct."""

    type: str = "multiinstruct"
    image_folder: str = ""
    """Folder of `image_path`, for the pictures' sizes. Empty: regions stay pixels in the texts, and are not kept apart."""

    def to_record(self, entry: Any, number: int, path: Path) -> Record:
        """Prompt and target; the options without the marks between them."""
        entry = an_object(entry)
        identity, task = name_of(entry, "unique_id"), name_of(entry, "task_name")
        texts = [text_of(entry, "prompt"), text_of(entry, "target")]
        image = text_field(entry, "image_path") or ""
        options = list_of(entry, "options", str) if entry.get("options") else []
        regions: tuple[Region, ...] = ()
        if entry.get("region"):
            texts, regions = self._in_shares(entry, texts, image)
        turns = ask(*texts, images=1 if image else 0)
        source = text_field(entry, "image_source")
        return Record(
            identity, turns, (image,) if image else (), kind=task, instruction_type=task, options=tuple(options),
            regions=regions, provenance={"dataset": source} if source else {},
        )  # fmt: skip

    def _in_shares(self, entry: dict[str, Any], texts: list[str], image: str) -> tuple[list[str], tuple[Region, ...]]:
        boxes = {}
        for region in list_of(entry, "region", str):
            if not _REGION.fullmatch(region.strip()):
                raise BadRecord(f'region is {shown(region)}, expected "x0 y0 x1 y1" in pixels', "fields")
            boxes[region.strip()] = [float(edge) for edge in region.split()]
        if not self.image_folder or not image:
            return texts, ()
        size = _size(image, self.image_folder)
        shares = {text: share_box(box[0], box[1], box[2], box[3], size) for text, box in boxes.items()}
        if self.boxes != "keep":
            form = FORMS[self.boxes]
            for text, box in sorted(shares.items(), key=lambda item: -len(item[0])):
                texts = [words.replace(text, form.encode([box])) for words in texts]
        return texts, tuple(Region("", box) for box in shares.values())


@functools.lru_cache(maxsize=4096)
def _size(image: str, folder: str) -> tuple[int, int]:
    path = resolve_image(image, Path(folder).expanduser())
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as opened:
            return opened.size
    except (OSError, Image.DecompressionBombError) as error:
        raise BadRecord(f"image_path: the size of {image!r} cannot be read ({error})", "image_path") from error
