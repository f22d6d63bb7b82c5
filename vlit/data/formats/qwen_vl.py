"""Qwen-VL's fine-tuning files (github.com/QwenLM/Qwen-VL): pictures, phrases and boxes inside of the text.

JSON lists of ``{"id", "conversations": [{"from": "user" | "assistant", "value"}]}``. A picture is ``Picture 1:
<img>path</img>``, a grounded phrase ``<ref>the cat</ref><box>(x0,y0),(x1,y1)</box>`` in thousandths.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vlit.data.formats._reader import JsonRecords, WithBoxes, an_object, turns_of
from vlit.data.record import Record
from vlit.data.record_checks import BadRecord, identity_of, read_turns
from vlit.registry import FORMATS
from vlit.types import IMAGE_PLACEHOLDER

_PICTURE = re.compile(r"(?P<name>Picture \d+: ?)?<img>(?P<path>.*?)</img>", re.DOTALL)


@FORMATS.register("qwen_vl")
class QwenVlFormat(JsonRecords, WithBoxes):
    """Qwen-VL's conversations, with `<img>`, `<ref>` and `<box>` in the text."""

    type: str = "qwen_vl"
    picture_names: bool = False
    """Keep `Picture 1: ` in front of pictures, for records that speak of their pictures by number."""

    def to_record(self, entry: Any, number: int, path: Path) -> Record:
        """``<img>`` becomes ``<image>``, boxes become regions as well."""
        entry = an_object(entry)
        identity = identity_of(entry, number)
        roles, texts = read_turns(entry)
        images: list[str] = []

        def take(match: re.Match[str]) -> str:
            images.append(match["path"].strip())
            return (match["name"] or "" if self.picture_names else "") + IMAGE_PLACEHOLDER

        for turn, (role, text) in enumerate(zip(roles, texts, strict=True)):
            if "<img>" in text and role != "user":
                raise BadRecord(f"turn {turn} ({role}) holds <img>, which belongs into user turns only", "placeholders")
            texts[turn] = _PICTURE.sub(take, text)
            if "<img>" in texts[turn]:
                raise BadRecord(f"turn {turn} ({role}) holds <img> without </img>", "placeholders")
        texts, regions = self.with_boxes(texts, "qwen_vl", num_images=len(images))
        kind = (
            "grounding"
            if "<box>" in "".join(turn.get("value", "") for turn in entry["conversations"])
            else "conversation"
        )
        return Record(identity, turns_of(roles, texts), tuple(images), kind=kind, regions=regions)
