"""LLaVA's conversation format: ``{"id", "image", "conversations": [{"from": "human"|"gpt", "value"}, ...]}``.

One JSON array or JSONL (https://github.com/haotian-liu/LLaVA/blob/main/docs/Finetune_Custom_Data.md): CC3M-595K's
``chat.json``, LCS-558K, LLaVA-Instruct-158K and mix665k are such files. Beyond it: ``<image>`` may stand anywhere in a human
turn, ``image`` (or ``images``) may be a list, ``system`` may be the first turn, ``user``/``assistant`` are accepted for
``human``/``gpt``, ``kind`` names the question kind for reports, and the optional fields of canonical records
(:mod:`vlit.data.record`) are kept.

Stricter than LLaVA: LLaVA drops a first turn that is not from a human and adds images whose placeholder is missing;
here both are bad records, because the text that is trained should be the text that is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import orjson

from vlit.data.formats._base import BadRow, FormatConfig, Row
from vlit.data.json_stream import iter_json_records
from vlit.data.record import meta_of
from vlit.data.record_checks import (
    BadRecord,
    check_placeholders,
    identity_of,
    kind_of,
    read_images,
    read_turns,
    text_field,
)
from vlit.registry import FORMATS
from vlit.types import IMAGE_PLACEHOLDER


@FORMATS.register("llava")
class LlavaFormat(FormatConfig):
    """LLaVA JSON or JSONL."""

    type: str = "llava"
    image_first: bool = False
    """Move a turn's only `<image>` to its front, followed by a line break, as LLaVA-1.5 does; otherwise it stays."""

    def raw_records(self, path: Path) -> Iterator[bytes]:
        """The bytes of each record."""
        return iter_json_records(path)

    def iter_rows(self, path: Path) -> Iterator[Row | BadRow]:
        """Rows in file order; a record that is not valid JSON is a bad row too."""
        for number, raw in enumerate(iter_json_records(path)):
            yield self.parse(number, raw)

    def parse(self, number: int, raw: bytes) -> Row | BadRow:
        """One record from its bytes."""
        try:
            record = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            shown = raw[:60].decode("utf-8", "replace")
            return BadRow(number, None, f"the record is not valid JSON ({error}): {shown!r}", "json")
        identity = None
        try:
            if not isinstance(record, dict):
                raise BadRecord(f"the record is {kind_of(record)}, expected an object with conversations")
            identity, kind = identity_of(record, number), text_field(record, "kind")
            roles, texts = read_turns(record)
            images = read_images(record)
            check_placeholders(roles, texts, images)
            if self.image_first:
                texts = [_image_to_front(text) for text in texts]
            return Row(number, identity, kind, roles, texts, images, meta_of(record, len(images)))
        except BadRecord as bad:
            return BadRow(number, identity, str(bad), bad.check)


def _image_to_front(text: str) -> str:
    if text.count(IMAGE_PLACEHOLDER) != 1:
        return text
    return f"{IMAGE_PLACEHOLDER}\n{text.replace(IMAGE_PLACEHOLDER, '').strip()}".strip()
