"""Replies become questions and answers, or a reason why not. A reason begins with a code that reports count by.

Three forms are read, since prompts and structured output differ: JSON, numbered tags as in MMInstruct (``<Q1>..</Q1>
<C1>..</C1> <A1>..</A1>``), and blocks ``Question:`` / ``Answer:`` set apart by ``===`` as in LLaVA.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from vlit.synth.engine.teacher import Reply, mended

LETTERS = "ABCDEFGH"
MAX_CHARACTERS = 8_000
GIVE_AWAY = re.compile(
    r"\b(captions?|bounding boxes|coordinates|annotations?|the description (says|mentions|states)|"
    r"(the )?(given|provided) (text|information|context|description)|as an ai|language model)\b",
    flags=re.IGNORECASE,
)
"""An answer about its source instead of the picture: the student sees the picture only (LLaVA's rule, arXiv:2304.08485 App)."""
UNSURE = re.compile(
    r"\b(not (mentioned|specified|stated|provided|possible to (tell|determine|say))|cannot be determined|can't tell|"
    r"unknown from|it is unclear|i('m| am) (sorry|not sure|unable)|i (cannot|can't))\b",
    flags=re.IGNORECASE,
)
BOX = re.compile(r"\[\s*[01]?\.\d+\s*(,\s*[01]?\.\d+\s*){3}\]")


class Rejected(Exception):
    """This reply makes no record. ``code`` groups, the message is the detail."""

    def __init__(self, code: str, detail: str = "") -> None:
        super().__init__(f"{code}: {detail}" if detail else code)
        self.code = code


class Pair(NamedTuple):
    """One question with its answer; ``options`` of a multiple choice."""

    question: str
    answer: str
    options: tuple[str, ...] = ()


def text_of(reply: Reply) -> str:
    """The text of a reply; Rejected when it was refused, cut, or is empty."""
    if reply.refused:
        raise Rejected("refused", shorten(reply.refused))
    if reply.cut:
        raise Rejected("cut", "the answer ended at its token limit")
    text = reply.text.strip()
    if not text:
        raise Rejected("empty")
    return text


def read_pairs(reply: Reply) -> list[Pair]:
    """All question-answer pairs of a reply, in order. Rejected when there is none or one is incomplete."""
    text = text_of(reply)
    stripped = re.sub(r"^```\w*\n|\n```$", "", text)
    if stripped[:1] in "{[":
        pairs = _from_json(stripped)
    elif re.search(r"<Q\d+>", text):
        pairs = _from_tags(text)
    else:
        pairs = _from_blocks(text)
    for pair in pairs:
        if not pair.question or not pair.answer:
            raise Rejected(
                "format", f"a pair without {'answer' if pair.question else 'question'}: {shorten(str(pair))}"
            )
    return pairs


def _from_json(text: str) -> list[Pair]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Rejected("format", f"JSON: {error}") from error
    rows = next((v for v in data.values() if isinstance(v, list)), None) if isinstance(data, dict) else data
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise Rejected("format", "JSON without a list of pairs")
    return [
        Pair(_text(row.get("question")), _text(row.get("answer")), tuple(map(_text, _list(row.get("options")))))
        for row in rows
    ]


def _text(value: Any) -> str:
    return mended(value).strip() if isinstance(value, str) else "" if value is None else str(value)


def _list(value: Any) -> list[Any]:
    if value is not None and not isinstance(value, list):
        raise Rejected("format", f"options are {type(value).__name__}, expected a list")
    return value or []


def _from_tags(text: str) -> list[Pair]:
    pairs = []
    for number in dict.fromkeys(re.findall(r"<Q(\d+)>", text)):
        found = {
            tag: re.search(rf"<{tag}{number}>(.*?)</{tag}{number}>", text, flags=re.DOTALL) for tag in ("Q", "C", "A")
        }
        question, choices, answer = (match[1].strip() if match else "" for match in found.values())
        if not question or not answer:
            raise Rejected("format", f"tag {'A' if question else 'Q'}{number} is missing, empty or not closed")
        pairs.append(Pair(question, answer, read_options(choices)))
    return pairs


def read_options(text: str) -> tuple[str, ...]:
    """``A. red  B. blue`` on one or several lines -> the options; letters must run from A."""
    parts = re.split(r"(?:^|\s)\(?([A-H])[.):]\s+", f" {text.strip()}")
    letters, options = parts[1::2], [part.strip().rstrip(";,") for part in parts[2::2]]
    if "".join(letters) != LETTERS[: len(letters)]:
        raise Rejected("options", f"letters {' '.join(letters)} are not in order")
    return tuple(options)


def _from_blocks(text: str) -> list[Pair]:
    pieces = re.split(r"^\s*(Question|Answer)\s*:[ \t]*", text, flags=re.MULTILINE | re.IGNORECASE)
    if len(pieces) < 2:
        raise Rejected("format", f'no "Question:" in {shorten(text)}')
    words = [word.lower() for word in pieces[1::2]]
    texts = [re.sub(r"^\s*={3,}\s*$", "", piece, flags=re.MULTILINE).strip() for piece in pieces[2::2]]
    if words != ["question", "answer"] * (len(words) // 2) or len(words) % 2:
        raise Rejected("format", "questions and answers do not alternate")
    return [Pair(q, a) for q, a in zip(texts[::2], texts[1::2], strict=True)]


def check_answer(answer: str, *, boxes_allowed: bool = False) -> str:
    """The answer, or Rejected: about its source, unsure, coordinates, an image mark, or too long."""
    for code, pattern in (("source", GIVE_AWAY), ("unsure", UNSURE)):
        if found := pattern.search(answer):
            raise Rejected(code, f"{found[0]!r} in {shorten(answer)}")
    if not boxes_allowed and BOX.search(answer):
        raise Rejected("coordinates", shorten(answer))
    if "<image>" in answer:
        raise Rejected("image_mark", shorten(answer))
    if len(answer) > MAX_CHARACTERS:
        raise Rejected("long", f"{len(answer)} characters, at most {MAX_CHARACTERS}")
    return answer


def shorten(text: str, characters: int = 80) -> str:
    """For messages: one line, cut."""
    flat = " ".join(text.split())
    return repr(flat if len(flat) <= characters else flat[: characters - 1] + "…")
