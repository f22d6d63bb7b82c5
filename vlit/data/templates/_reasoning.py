"""Answers that hold reasoning: words between think tags."""

from __future__ import annotations

import re

from vlit.data.templates._base import PieceWriter
from vlit.types import Turn

_TAG = re.compile(r"(</?think>)")
Frame = tuple[str, ...]
"""An answer with reasoning, without its words: what stands before each of its stretches of words."""


def has_reasoning(turn: Turn) -> bool:
    """True for an answer in which a think block ends."""
    return turn.role == "assistant" and "</think>" in turn.text


def split_reasoning(text: str) -> tuple[Frame, list[str]]:
    """(what stands before each stretch of words, the stretches). Tags and the white space beside them are no words; the
    last stretch is the answer behind all tags, which may be empty.
    """
    *parts, answer = _TAG.split(text)
    frame, words, before = [], [], ""
    for part in parts:
        core = "" if _TAG.fullmatch(part) else part.strip()
        if core:
            frame.append(before + part[: part.index(core)])
            words.append(core)
        before = part[part.index(core) + len(core) :] if core else before + part
    core = answer.lstrip()
    return (*frame, before + answer[: len(answer) - len(core)]), [*words, core]


def write_reasoning(writer: PieceWriter, text: str) -> None:
    """An answer with reasoning, supervised; think tags are special tokens where the tokenizer says so."""
    pending = ""
    for part in _TAG.split(text):
        if _TAG.fullmatch(part) and writer.has(part):
            writer.text(pending, supervised=True)
            writer.special(part, supervised=True)
            pending = ""
        else:
            pending += part
    writer.text(pending, supervised=True)
