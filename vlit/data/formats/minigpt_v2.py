"""MiniGPT-v2's own files (github.com/Vision-CAIR/MiniGPT-4, ``minigpt4/datasets``): task identifiers and boxes as text.

Four shapes in JSON lists, told apart by their keys: Flickr30k descriptions with boxes (``image_id, grounded_caption``),
captions to parse (``image_id, caption, output``), phrases to find (``image_id, phrase, bbox``), and conversations (``id,
conversations``) about COCO. A turn begins with its task: ``[grounding]``, ``[detection]``, ``[refer]``, ``[identify]``,
``[vqa]``, ``[caption]``. Boxes are ``{<x0><y0><x1><y1>}`` in hundredths, labels ``<p>…</p>``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from vlit.data.formats._image_name import pattern_of
from vlit.data.formats._reader import (
    JsonRecords,
    WithBoxes,
    an_object,
    ask,
    name_of,
    pick,
    text_of,
    turns_of,
    with_pictures,
)
from vlit.data.record import Record
from vlit.data.record_checks import BadRecord, read_turns
from vlit.registry import FORMATS
from vlit.types import Turn

_TASK = re.compile(r"\s*(?:<image>)?\s*\[(vqa|caption|grounding|refer|identify|detection)\]")
_GROUNDED = (
    "[grounding] describe the picture in full and mark what you name",
    "[grounding] say in detail what is here and where",
)


@FORMATS.register("minigpt_v2")
class MiniGptV2Format(JsonRecords, WithBoxes):
    """Grounded Flickr30k files and the mixed conversations of MiniGPT-v2."""

    type: str = "minigpt_v2"
    image_name: Annotated[str, pattern_of(id="1")] = ""
    """Where the picture of an id lies. Empty: `{id}.jpg`, for conversations `COCO_train2014_{id}.jpg`."""

    def to_record(self, entry: Any, number: int, path: Path) -> Record:
        """Texts stay as they are, task identifiers included; boxes become regions as well."""
        entry = an_object(entry)
        if "conversations" in entry:
            identity, pattern = name_of(entry, "id"), "COCO_train2014_{id}.jpg"
            roles, texts = read_turns(entry)
            turns = with_pictures(turns_of(roles, texts), 1)
        else:
            identity, pattern = name_of(entry, "image_id"), "{id}.jpg"
            turns = self._exchange(entry, identity)
        image = entry.get("image") or (self.image_name or pattern).format(id=identity)
        written, regions = self.with_boxes([turn.text for turn in turns], "minigpt_v2", num_images=1)
        turns = tuple(Turn(turn.role, text) for turn, text in zip(turns, written, strict=True))
        tasks = [found[1] for turn in turns if turn.role == "user" and (found := _TASK.match(turn.text))]
        task = tasks[0] if len(set(tasks)) == 1 else "conversation"
        return Record(identity, turns, (image,), kind=task, instruction_type=task, regions=regions)

    def _exchange(self, entry: dict[str, Any], identity: str) -> tuple[Turn, ...]:
        if "grounded_caption" in entry:
            return ask(pick(_GROUNDED, identity), text_of(entry, "grounded_caption"))
        if "phrase" in entry:
            phrase = text_of(entry, "phrase")
            return ask(f"[detection] {phrase}", f"<p>{phrase}</p> {text_of(entry, 'bbox')}")
        if "caption" in entry:
            return ask(f"[detection] {text_of(entry, 'caption')}", text_of(entry, "output"))
        raise BadRecord("grounded_caption is missing, and so are phrase, caption and conversations", "fields")
