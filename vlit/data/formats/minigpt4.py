"""MiniGPT-4's second stage: ``filter_cap.json`` with 3,439 curated descriptions, and ``image/<image_id>.jpg`` beside it.

Shape: ``{"annotations": [{"image_id": str, "caption": str}]}`` (github.com/Vision-CAIR/MiniGPT-4, ``cc_sbu_align``). The
instruction is one of a few, drawn by the id.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from vlit.data.formats._image_name import pattern_of
from vlit.data.formats._reader import (
    DESCRIBE,
    RecordFormat,
    an_object,
    ask,
    load_json,
    member,
    name_of,
    pick,
    text_of,
)
from vlit.data.record import Record
from vlit.registry import FORMATS


@FORMATS.register("minigpt4")
class MiniGpt4Format(RecordFormat):
    """`filter_cap.json` of MiniGPT-4; pictures lie in `image/` beside it."""

    type: str = "minigpt4"
    image_name: Annotated[str, pattern_of(id="1")] = "image/{id}.jpg"
    """Where the picture of an id lies, below the image folder."""
    instructions: tuple[str, ...] = DESCRIBE
    """One of these stands in front of a description; which one is decided by its id."""

    def entries(self, path: Path) -> Iterator[Any]:
        """The annotations."""
        return iter(member(load_json(path), "annotations", path))

    def to_record(self, entry: Any, number: int, path: Path) -> Record:
        """A description as the answer to an instruction."""
        entry = an_object(entry)
        identity = name_of(entry, "image_id")
        turns = ask(pick(self.instructions, identity), text_of(entry, "caption"))
        image = self.image_name.format(id=identity)
        return Record(identity, turns, (image,), kind="description", instruction_type="description")
