"""Turns of chat data: speakers under any of their names, contents as text or as a list of parts."""

from __future__ import annotations

from typing import Any

from vlit.data.record_checks import BadRecord, kind_of, shown, text_field
from vlit.types import IMAGE_PLACEHOLDER

_SPEAKERS = {"chatgpt": "gpt", "bot": "gpt", "bard": "gpt", "bing": "gpt", "model": "gpt", "USER": "human"}
_PICTURES = ("image", "image_url", "path")


def plain_turns(turns: Any, *, speaker: str, text: str) -> tuple[Any, list[Any]]:
    """The turns with known speakers and plain texts, and the references of pictures that stood in parts.

    A part is ``{"type": "text", "text"}`` or ``{"type": "image" | "image_url"}``, which becomes ``<image>`` whether it holds a
    reference or the record lists the pictures elsewhere. Tables give all parts all keys, null where they have none. What is no
    list of turns is given back as it is, for the checks of turns to refuse.

    Raises:
        BadRecord: a part is of another type.
    """
    inline: list[Any] = []
    if not isinstance(turns, list):
        return turns, inline
    return [_turn(turn, speaker, text, inline) if isinstance(turn, dict) else turn for turn in turns], inline


def with_system(entry: dict[str, Any], turns: Any, *, speaker: str, text: str) -> Any:
    """The turns with the text that the record has under ``system``, beside them, in front.

    Raises:
        BadRecord: it is no text, or the first turn is the system's as well.
    """
    system = text_field(entry, "system")
    if not system or system.isspace() or not isinstance(turns, list):
        return turns
    if turns and isinstance(turns[0], dict) and turns[0].get(speaker) == "system":
        raise BadRecord("system is given twice, beside the turns and as the first of them", "turns")
    return [{speaker: "system", text: system}, *turns]


def _turn(turn: dict[str, Any], speaker: str, text: str, inline: list[Any]) -> dict[str, Any]:
    name, content = turn.get(speaker), turn.get(text)
    if isinstance(name, str):
        name = _SPEAKERS.get(name, name)
    if isinstance(content, list):
        content = "\n".join(_part(part, inline) for part in content)
    return {speaker: name, text: content}


def _part(part: Any, inline: list[Any]) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise BadRecord(f"a part of a message is {kind_of(part)}, expected an object with type", "turns")
    if part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if part.get("type") in ("image", "image_url"):
        value = next((part[key] for key in _PICTURES if part.get(key) is not None), None)
        value = value.get("url") if isinstance(value, dict) else value
        if value is not None:
            inline.append(value)
        return IMAGE_PLACEHOLDER
    if part.get("type") in ("video", "video_url"):
        raise BadRecord(f"a part of a message is a video, no picture: {shown(part)}", "video")
    raise BadRecord(f"a part of a message has the type {shown(part.get('type'))}, expected text or image", "turns")
