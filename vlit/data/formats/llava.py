"""LLaVA's conversation format: ``{"id", "image", "conversations": [{"from": "human"|"gpt", "value"}, ...]}``.

One JSON array or JSONL (https://github.com/haotian-liu/LLaVA/blob/main/docs/Finetune_Custom_Data.md). Beyond it:
``<image>`` may stand anywhere in a human turn, ``image`` (or ``images``) may be a list, ``system`` may be the first
turn, ``user``/``assistant`` are accepted for ``human``/``gpt``, and ``kind`` names the question kind for reports.

Stricter than LLaVA: LLaVA drops a first turn that is not from a human and adds images whose placeholder is missing;
here both are bad records, because the text that is trained should be the text that is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from vlit.data.formats._base import BadRow, FormatConfig, Row
from vlit.data.images import refusal
from vlit.data.json_stream import iter_json_records
from vlit.registry import FORMATS
from vlit.types import IMAGE_PLACEHOLDER, Role

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


_MAX_SHOWN = 80


class _Bad(Exception):
    """Carries the reason of one record out of the checks below."""


@FORMATS.register("llava")
class LlavaFormat(FormatConfig):
    """LLaVA JSON or JSONL."""

    type: str = "llava"
    image_first: bool = False
    """Move a turn's only `<image>` to its front, followed by a line break, as LLaVA-1.5 does; otherwise it stays."""

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
        identity, check = None, "record"
        try:
            if not isinstance(record, dict):
                raise _Bad(f"the record is {_kind_of(record)}, expected an object with conversations")
            check = "fields"
            identity, kind = _identity(record, number), _kind(record)
            check = "turns"
            roles, texts = _turns(record)
            check = "image_path"
            images = _images(record)
            check = "placeholders"
            _check_placeholders(roles, texts, images)
            if self.image_first:
                texts = [_image_to_front(text) for text in texts]
            return Row(number, identity, kind, roles, texts, images)
        except _Bad as bad:
            return BadRow(number, identity, str(bad), check)


def _identity(record: dict[str, Any], number: int) -> str:
    value = record.get("id")
    if value is None:
        return str(number)
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        return str(value)
    raise _Bad(f"id is {_kind_of(value)} {_shown(value)}, expected a string or a whole number")


def _kind(record: dict[str, Any]) -> str | None:
    value = record.get("kind")
    if value is None or isinstance(value, str):
        return value
    raise _Bad(f"kind is {_kind_of(value)} {_shown(value)}, expected a string")


def _turns(record: dict[str, Any]) -> tuple[list[Role], list[str]]:
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        has = "is missing" if turns is None else f"is {_kind_of(turns)}"
        raise _Bad(f"conversations {has}, expected a list of turns (the record has the keys {_keys(record)})")
    roles: list[Role] = []
    texts: list[str] = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise _Bad(f"turn {index} is {_kind_of(turn)}, expected an object with from and value")
        name, text = turn.get("from"), turn.get("value")
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise _Bad(f'turn {index} is from {_shown(name)}, expected "human" or "gpt" (or a first "system")')
        if not isinstance(text, str):
            raise _Bad(f"turn {index} ({name}) has the value {_kind_of(text)}, expected a string")
        if not text or text.isspace():
            raise _Bad(f"turn {index} ({name}) is empty")
        roles.append(role)
        texts.append(text)
    _check_order(roles)
    return roles, texts


def _check_order(roles: list[Role]) -> None:
    first = 1 if roles[0] == "system" else 0
    for index in range(first, len(roles)):
        expected = "user" if (index - first) % 2 == 0 else "assistant"
        if roles[index] != expected:
            shown = {"user": "human", "assistant": "gpt", "system": "system"}
            raise _Bad(
                f"turn {index} is from {shown[roles[index]]}, expected {shown[expected]} (turns alternate, human first)"
            )
    if roles[-1] != "assistant":
        raise _Bad(f"the last of {len(roles)} turns is not from gpt, so it has no answer to learn")


def _images(record: dict[str, Any]) -> list[str]:
    if record.get("image") is not None and record.get("images") is not None:
        raise _Bad("the record has both image and images, expected one of them")
    value = record.get("image")
    if value is None:
        value = record.get("images")
    if value is None:
        return []
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list):
        raise _Bad(f"image is {_kind_of(value)}, expected a path or a list of paths")
    for path in paths:
        if not isinstance(path, str):
            raise _Bad(f"image path is {_kind_of(path)} {_shown(path)}, expected a non-empty string")
        if reason := refusal(path):
            raise _Bad(reason)
    return paths


def _check_placeholders(roles: list[Role], texts: list[str], images: list[str]) -> None:
    found = 0
    for index, (role, text) in enumerate(zip(roles, texts, strict=True)):
        here = text.count(IMAGE_PLACEHOLDER)
        if here and role != "user":
            raise _Bad(f"turn {index} ({role}) holds {IMAGE_PLACEHOLDER}, which belongs into human turns only")
        found += here
    if found != len(images):
        raise _Bad(
            f"the text has {found} {IMAGE_PLACEHOLDER} placeholder{'s' * (found != 1)}, "
            f"the record lists {len(images)} image{'s' * (len(images) != 1)}"
        )


def _image_to_front(text: str) -> str:
    if text.count(IMAGE_PLACEHOLDER) != 1:
        return text
    return f"{IMAGE_PLACEHOLDER}\n{text.replace(IMAGE_PLACEHOLDER, '').strip()}".strip()


def _keys(record: dict[str, Any]) -> str:
    text = repr(", ".join(record))[1:-1]  # line breaks escaped
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def _shown(value: Any) -> str:
    """A value for an error message: whole if short."""
    text = value if isinstance(value, str) else repr(value)
    return repr(value) if len(text) <= _MAX_SHOWN else repr(text[:_MAX_SHOWN]) + "…"


def _kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
