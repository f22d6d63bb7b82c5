"""ShareGPT-style conversations: ``conversations`` of from/value, or ``messages`` of role/content.

The shape of the ShareGPT texts in LLaVA-1.5's mixture and of most chat data since. Contents may be lists of parts
(``{"type": "text" | "image" | "image_url"}``), as chat interfaces write them; picture parts become ``<image>``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlit.data.formats._chat import plain_turns, with_system
from vlit.data.formats._reader import JsonRecords, an_object, turns_of, with_pictures
from vlit.data.record import Record
from vlit.data.record_checks import identity_of, read_images, read_turns
from vlit.registry import FORMATS


@FORMATS.register("sharegpt")
class ShareGptFormat(JsonRecords):
    """Chat records: `conversations` (from, value) or `messages` (role, content), with or without pictures."""

    type: str = "sharegpt"

    def to_record(self, entry: Any, number: int, path: Path) -> Record:
        """Speakers under any of their names; pictures from the record or from the parts of its messages."""
        entry = an_object(entry)
        key = "messages" if "messages" in entry else "conversations"
        speaker, text = ("role", "content") if key == "messages" else ("from", "value")
        turns, inline = plain_turns(entry.get(key), speaker=speaker, text=text)
        turns = with_system(entry, turns, speaker=speaker, text=text)
        roles, texts = read_turns({**entry, key: turns}, key=key, speaker=speaker, text=text)
        images = read_images(entry) or inline
        identity = identity_of(entry, number)
        return Record(identity, with_pictures(turns_of(roles, texts), len(images)), tuple(images), kind="conversation")
