"""LAMM's instruction data (arXiv:2306.06687; github.com/OpenGVLab/LAMM): dialogues about pictures, and about point clouds.

JSON lists of ``{"id", "image" | "pcl", "conversations", "task_type", "src_dataset"}`` (``LAMM_instruct_186k.json`` and its
parts, where the last key is often ``src_image``; ``LAMM_3dinstruct_10k.json``). Texts hold no placeholder; the picture goes
in front. Records about point clouds are read, counted and refused: no encoder of this project sees them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlit.data.formats._reader import JsonRecords, an_object, turns_of, with_pictures
from vlit.data.record import Record
from vlit.data.record_checks import identity_of, read_images, read_turns, text_field
from vlit.registry import FORMATS


@FORMATS.register("lamm")
class LammFormat(JsonRecords):
    """LAMM's records about pictures; those about point clouds are bad records of kind `point_cloud`."""

    type: str = "lamm"

    def to_record(self, entry: Any, number: int, path: Path) -> Record:
        """A conversation with its picture in front; ``task_type`` becomes the kind."""
        entry = an_object(entry)
        identity = identity_of(entry, number)
        images = read_images(entry)
        roles, texts = read_turns(entry)
        task = text_field(entry, "task_type")
        source = text_field(entry, "src_dataset") or text_field(entry, "src_image")
        provenance = {"dataset": source} if source else {}
        turns = with_pictures(turns_of(roles, texts), len(images))
        return Record(identity, turns, tuple(images), kind=task, instruction_type=task, provenance=provenance)
