"""What is true in the digits world, told from its COCO file by rules of its own, to check what teachers say about it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from vlit.data.record import Record

Fact = tuple[str, str, str]


def facts(root: Path) -> dict[str, set[Fact]]:
    """(digit, colour, place) of every thing by picture, read here again."""
    data = json.loads((root / "annotations" / "instances_train.json").read_text())
    names = {image["id"]: f"train/{image['file_name']}" for image in data["images"]}
    found: dict[str, set[Fact]] = {name: set() for name in names.values()}
    for row in data["annotations"]:
        x, y, w, h = row["bbox"]
        place = f"{'top' if y + h / 2 < 32 else 'bottom'}-{'left' if x + w / 2 < 32 else 'right'}"
        found[names[row["image_id"]]].add((str(row["category_id"] - 1), row["attributes"]["color"], place))
    return found


def holds(statement: str, things: set[Fact]) -> bool:
    """Whether a sentence of the world is true; AssertionError for one that this test does not know."""
    rules: list[tuple[str, Any]] = [
        (r"There (?:is|are) (\d) digits?", lambda n: len(things) == int(n)),
        (r"There is no (\d)", lambda d: all(t[0] != d for t in things)),
        (r"There is an? (\d)", lambda d: any(t[0] == d for t in things)),
        (r"There is no digit at the ([\w-]+)", lambda p: all(t[2] != p for t in things)),
        (r"There is a digit at the ([\w-]+)", lambda p: any(t[2] == p for t in things)),
        (r"There is no (\w+) digit", lambda c: all(t[1] != c for t in things)),
        (r"There is a (\w+) digit", lambda c: any(t[1] == c for t in things)),
        (r"[Tt]he digit at the ([\w-]+) is an? (\w+) (\d)", lambda p, c, d: (d, c, p) in things),
        (r"[Tt]he digit at the ([\w-]+) is (\w+)", lambda p, v: any(t[2] == p and v in t[:2] for t in things)),
        (r"[Tt]he (\w+) digit is at the ([\w-]+)", lambda c, p: any(t[1:] == (c, p) for t in things)),
        (r"[Tt]he (\w+) digit is (\d)", lambda c, d: any(t[:2] == (d, c) for t in things)),
        (
            r"At the ([\w-]+) there is the digit (\d), and its color is (\w+)",
            lambda p, d, c: (d, c, p) in things,
        ),
    ]
    for pattern, rule in rules:
        if found := re.fullmatch(pattern, statement):
            return bool(rule(*found.groups()))
    raise AssertionError(f"unknown sentence {statement!r}")


def asked_truth(question: str, things: set[Fact]) -> bool:
    """The answer to a judgement of the world."""
    rules: list[tuple[str, Any]] = [
        (r"Is the digit at the ([\w-]+) (?:an? )?(\w+)\?", lambda p, v: any(t[2] == p and v in t[:2] for t in things)),
        (r"Is the (\w+) digit an? (\d)\?", lambda c, d: any(t[:2] == (d, c) for t in things)),
        (r"Is the (\w+) digit at the ([\w-]+)\?", lambda c, p: any(t[1:] == (c, p) for t in things)),
        (r"Is there a digit that is (\w+)\?", lambda c: any(t[1] == c for t in things)),
        (r"Do you see an? (\d)\?", lambda d: any(t[0] == d for t in things)),
        (r"Is the number of digits (\d)\?", lambda n: len(things) == int(n)),
        (r"Is there a digit at the ([\w-]+)\?", lambda p: any(t[2] == p for t in things)),
    ]
    for pattern, rule in rules:
        if found := re.fullmatch(pattern, question):
            return bool(rule(*found.groups()))
    raise AssertionError(f"unknown question {question!r}")


def check_record(record: Record, things: set[Fact]) -> None:
    texts = [turn.text.removeprefix("<image>\n") for turn in record.turns]
    for question, answer in zip(texts[::2], texts[1::2], strict=True):
        head, *options = question.split("\n")
        if record.kind == "judgement":
            statement, _, verdict = answer.rpartition(", so ")
            assert holds(statement, things), (question, answer)
            assert asked_truth(head, things) == (verdict == "yes."), (question, answer)
        elif record.kind == "choice":
            statement, _, letter = answer.rpartition(", so ")
            assert holds(statement, things), (question, answer)
            named = {option[0]: option[3:] for option in options[:4]}
            assert len(set(named.values())) == 4
            subject, _, said = statement.rpartition(" is ")
            value = {"There": len(things), "There are": len(things)}.get(subject, said.removeprefix("at the "))
            expected = str(len(things)) if statement.startswith("There") else str(value)
            assert named[letter[0]] == expected, (question, answer)
        elif record.kind == "short":
            assert answer in {str(len(things)), *(value for thing in things for value in thing)}
        elif record.kind in ("detail", "conversation", "long"):
            for sentence in re.split(r"(?<=\.) ", answer):
                assert holds(sentence.rstrip("."), things), (question, answer)
        else:
            assert record.kind == "reasoning"
            if total := re.fullmatch(r"([\d +]+) = (\d+)\.", answer):
                digits = sorted(total[1].split(" + "))
                assert digits == sorted(t[0] for t in things)
                assert sum(map(int, digits)) == int(total[2])
