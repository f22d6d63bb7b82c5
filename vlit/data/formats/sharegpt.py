"""ShareGPT-style conversations: ``conversations`` of from/value, or ``messages`` of role/content.

The shape of the ShareGPT texts in LLaVA-1.5's mixture and of most chat data since. Contents may be lists of parts
(``{"type": "text" | "image" | "image_url"}``), as chat interfaces write them; picture parts become ``<image>``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlit.data.formats._reader import JsonRecords, an_object, turns_of, with_pictures
from vlit.data.record import Record
from vlit.data.record_checks import BadRecord, identity_of, kind_of, read_images, read_turns, shown
from vlit.registry import FORMATS
from vlit.types import IMAGE_PLACEHOLDER

_SPEAKERS = {"chatgpt": "gpt", "bot": "gpt", "bard": "gpt", "bing": "gpt", "model": "gpt", "USER": "human"}


@FORMATS.register("sharegpt")
class ShareGptFormat(JsonRecords):
    """Chat records: `conversations` (from, value) or `messages` (role, content), with or without pictures."""

    type: str = "sharegpt"

    def to_record(self, entry: Any, number: int, path: Path) -> Record:
        """Speakers under any of their names; pictures from the record or from the parts of its messages."""
        entry = an_object(entry)
        key = "messages" if "messages" in entry else "conversations"
        speaker, text = ("role", "content") if key == "messages" else ("from", "value")
        turns = entry.get(key)
        inline: list[str] = []
        if isinstance(turns, list):
            turns = [self._turn(turn, speaker, text, inline) if isinstance(turn, dict) else turn for turn in turns]
        roles, texts = read_turns({**entry, key: turns}, key=key, speaker=speaker, text=text)
        images = read_images(entry) or inline
        identity = identity_of(entry, number)
        return Record(identity, with_pictures(turns_of(roles, texts), len(images)), tuple(images), kind="conversation")

    def _turn(self, turn: dict[str, Any], speaker: str, text: str, inline: list[str]) -> dict[str, Any]:
        name, content = turn.get(speaker), turn.get(text)
        if isinstance(name, str):
            name = _SPEAKERS.get(name, name)
        if isinstance(content, list):
            content = "\n".join(self._part(part, inline) for part in content)
        return {speaker: name, text: content}

    def _part(self, part: Any, inline: list[str]) -> str:
        if isinstance(part, str):
            return part
        if not isinstance(part, dict):
            raise BadRecord(f"a part of a message is {kind_of(part)}, expected an object with type", "turns")
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            return part["text"]
        if part.get("type") in ("image", "image_url"):
            value = part.get("image", part.get("image_url", part.get("path")))
            value = value.get("url") if isinstance(value, dict) else value
            if value is not None:
                inline.append(value)
            return IMAGE_PLACEHOLDER
        raise BadRecord(f"a part of a message has the type {shown(part.get('type'))}, expected text or image", "turns")
