"""What every record must be, whatever format it came in: the checks behind readers and canonical files.

A failed check raises :class:`BadRecord`, whose text names the field and both values; readers turn it into a bad row, the
canonical reader into a DataError with file and record number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlit.data.image_paths import refusal
from vlit.types import IMAGE_PLACEHOLDER, Role

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
SPEAKERS: dict[Role, str] = {"user": "human", "assistant": "gpt", "system": "system"}
"""How LLaVA's files name the roles."""
_OTHER_MEDIA = {"video": "video", "videos": "video", "pcl": "point_cloud"}
_NAMES = {"video": "video", "point_cloud": "point cloud"}
_OTHER_KEYS = frozenset(_OTHER_MEDIA)
_VIDEO = "<video>"
_MAX_SHOWN = 80


class BadRecord(Exception):
    """Why a record cannot be used; ``check`` is the kind of mistake, a name of ``vlit.data.doctor.checks``."""

    def __init__(self, reason: str, check: str = "record") -> None:
        super().__init__(reason)
        self.check = check


class Unusable(BadRecord):
    """Why a part of a record cannot be used, though nothing is wrong with the file: an empty text, a box beside the picture. A
    record of several parts does without it.
    """


def identity_of(record: dict[str, Any], number: int, key: str = "id") -> str:
    """The record's id as text; its number when it has none."""
    value = record.get(key)
    if value is None:
        return str(number)
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        return str(value)
    raise BadRecord(f"{key} is {kind_of(value)} {shown(value)}, expected a string or a whole number", "fields")


def text_field(record: dict[str, Any], key: str) -> str | None:
    """An optional field that is a string."""
    value = record.get(key)
    if value is None or isinstance(value, str):
        return value
    raise BadRecord(f"{key} is {kind_of(value)} {shown(value)}, expected a string", "fields")


def read_turns(
    record: dict[str, Any], *, key: str = "conversations", speaker: str = "from", text: str = "value"
) -> tuple[list[Role], list[str]]:
    """Roles and texts of a list of turns under ``key``; they alternate, human first, gpt last."""
    turns = record.get(key)
    if not isinstance(turns, list) or not turns:
        has = "is missing" if turns is None else f"is {kind_of(turns)}"
        raise BadRecord(f"{key} {has}, expected a list of turns (the record has the keys {_keys(record)})", "turns")
    roles: list[Role] = []
    texts: list[str] = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise BadRecord(f"turn {index} is {kind_of(turn)}, expected an object with {speaker} and {text}", "turns")
        name, words = turn.get(speaker), turn.get(text)
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise BadRecord(
                f'turn {index} is from {shown(name)}, expected "human" or "gpt" (or a first "system")', "turns"
            )
        if not isinstance(words, str):
            raise BadRecord(f"turn {index} ({name}) has the {text} {kind_of(words)}, expected a string", "turns")
        if not words or words.isspace():
            raise BadRecord(f"turn {index} ({name}) is empty", "turns")
        roles.append(role)
        texts.append(words)
    check_order(roles)
    return roles, texts


def check_order(roles: Sequence[Role]) -> None:
    """BadRecord unless turns alternate, a human's first (after an optional system turn), an answer last."""
    if not roles:
        raise BadRecord("the record has no turns", "turns")
    first = 1 if roles[0] == "system" else 0
    for index in range(first, len(roles)):
        expected: Role = "user" if (index - first) % 2 == 0 else "assistant"
        if roles[index] != expected:
            raise BadRecord(
                f"turn {index} is from {SPEAKERS[roles[index]]}, expected {SPEAKERS[expected]} (turns alternate, human "
                "first)",
                "turns",
            )
    if roles[-1] != "assistant":
        raise BadRecord(f"the last of {len(roles)} turns is not from gpt, so it has no answer to learn", "turns")


def refuse_other_media(record: dict[str, Any]) -> None:
    """BadRecord for a record about a video or a point cloud: without it, its text would be trained on nothing."""
    if _OTHER_KEYS.isdisjoint(record):  # nearly all records of published files
        return
    for key, check in _OTHER_MEDIA.items():
        if record.get(key) not in (None, "", []):
            raise BadRecord(f"{key}: the record shows the {_NAMES[check]} {shown(record[key])}, no picture", check)


def read_images(record: dict[str, Any]) -> list[str]:
    """Image references under ``image`` or ``images``: one path or a list. A record about a video or a point cloud is bad."""
    refuse_other_media(record)
    if record.get("image") is not None and record.get("images") is not None:
        raise BadRecord("the record has both image and images, expected one of them", "image_path")
    value = record.get("image")
    if value is None:
        value = record.get("images")
    if value is None:
        return []
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list):
        raise BadRecord(f"image is {kind_of(value)}, expected a path or a list of paths", "image_path")
    check_images(paths)
    return paths


def check_images(paths: Sequence[Any]) -> None:
    """BadRecord unless every reference can name a file of an image folder."""
    for path in paths:
        if not isinstance(path, str):
            raise BadRecord(f"image path is {kind_of(path)} {shown(path)}, expected a non-empty string", "image_path")
        if reason := refusal(path):
            raise BadRecord(reason, "image_path")


def check_placeholders(roles: Sequence[Role], texts: Sequence[str], images: Sequence[str]) -> None:
    """BadRecord unless human turns hold one placeholder an image, and other turns none."""
    found = 0
    for index, (role, text) in enumerate(zip(roles, texts, strict=True)):
        here = text.count(IMAGE_PLACEHOLDER)
        if here and role != "user":
            raise BadRecord(
                f"turn {index} ({role}) holds {IMAGE_PLACEHOLDER}, which belongs into human turns only", "placeholders"
            )
        found += here
        if not images and role == "user" and _VIDEO in text and _is_video_placeholder(text):
            raise BadRecord(f"turn {index} ({role}) holds {_VIDEO}, and the record lists no image", "video")
    if found != len(images):
        raise BadRecord(
            f"the text has {found} {IMAGE_PLACEHOLDER} placeholder{'s' * (found != 1)}, "
            f"the record lists {len(images)} image{'s' * (len(images) != 1)}",
            "placeholders",
        )


def _is_video_placeholder(text: str) -> bool:
    """On a line of its own at the beginning or the end; anywhere else it may be talk about HTML."""
    text = text.strip()
    return text.startswith(f"{_VIDEO}\n") or text.endswith(f"\n{_VIDEO}") or text == _VIDEO


def check_conversation(roles: Sequence[Role], texts: Sequence[str], images: Sequence[str]) -> None:
    """All checks of a conversation that is at hand in parts."""
    check_order(roles)
    for index, (role, text) in enumerate(zip(roles, texts, strict=True)):
        if not text or text.isspace():
            raise BadRecord(f"turn {index} ({SPEAKERS[role]}) is empty", "turns")
    check_images(images)
    check_placeholders(roles, texts, images)


def shown(value: Any) -> str:
    """A value for an error message: whole if short."""
    text = value if isinstance(value, str) else repr(value)
    return repr(value) if len(text) <= _MAX_SHOWN else repr(text[:_MAX_SHOWN]) + "…"


def kind_of(value: Any) -> str:
    """What JSON calls a value."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _keys(record: dict[str, Any]) -> str:
    text = repr(", ".join(record))[1:-1]  # line breaks escaped
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"
