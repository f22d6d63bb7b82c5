"""Turns the COCO files of the world into LLaVA-format training data and held-out questions.

Reads ``annotations/instances_{split}.json`` and ``annotations/captions_{split}.json`` and nothing else. Writes
``align_{split}.json`` (one caption a record), ``instruct_{split}.json`` (several turns a record) and
``questions_{split}.jsonl`` (``question_id, image, question, answer, kind, choices`` one object a line).
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from vlit.errors import DataError
from vlit.synth.digits.questions import KINDS, Thing, Turn, ask_caption

TURNS_PER_RECORD = 8
CAPTION_SHARE = 0.25
"""Share of instruction records that also ask for a caption, so that the second stage does not forget the first."""
TURN_WEIGHTS = {
    kind: 2 if kind in ("yes_no", "choice", "short", "digit_of_color", "place_of_color") else 1 for kind in KINDS
}
"""How often a kind is drawn: twice for those that need a value found by its colour, or a conclusion."""
BALANCED_ENDINGS = {"yes_no": ("so yes.", "so no."), "choice": ("so A.", "so B.", "so C.", "so D.")}
ALIGN_QUESTIONS = (
    "Write a caption for the picture.",
    "Give the picture a caption.",
    "Say in short what the picture shows.",
)
IMAGE = "<image>"


def read_things(path: Path) -> dict[str, tuple[Thing, ...]]:
    """Things per picture (key ``split/file_name``) from an instances file, in reading order.

    The position is the quadrant that holds the centre of the box. Raises ``DataError`` when a box names an unknown
    picture or category, or has no ``attributes.color``.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    images = {image["id"]: image for image in data["images"]}
    names = {category["id"]: category["name"] for category in data["categories"]}
    seen: dict[int, list[tuple[str, str, float, float]]] = {image_id: [] for image_id in images}
    for box in data["annotations"]:
        image, name, colour = (
            images.get(box["image_id"]),
            names.get(box["category_id"]),
            box.get("attributes", {}).get("color"),
        )
        if image is None or name is None or colour is None:
            raise DataError(
                f"{path}: annotation {box['id']} (image_id {box['image_id']}, category_id {box['category_id']}): "
                "unknown picture, unknown category, or no attributes.color. Remove it or complete the file."
            )
        x, y, width, height = box["bbox"]
        seen[box["image_id"]].append(
            (name, colour, (x + width / 2) / image["width"], (y + height / 2) / image["height"])
        )
    split = path.stem.removeprefix("instances_")
    return {f"{split}/{images[image_id]['file_name']}": in_reading_order(rows) for image_id, rows in seen.items()}


def in_reading_order(rows: Iterable[tuple[str, str, float, float]]) -> tuple[Thing, ...]:
    """Things of (digit, colour, x, y), x and y the middle as shares of the picture; the quadrant it lies in is the position."""
    placed: list[tuple[int, Thing]] = []
    for digit, colour, x, y in rows:
        right, low = x >= 0.5, y >= 0.5
        position = f"{'bottom' if low else 'top'}-{'right' if right else 'left'}"
        placed.append((2 * low + right, Thing(digit, colour, position)))
    return tuple(thing for _, thing in sorted(placed, key=lambda row: row[0]))


def read_captions(path: Path) -> dict[str, list[str]]:
    """Captions per picture (key ``split/file_name``) from a captions file."""
    data = json.loads(path.read_text(encoding="utf-8"))
    split = path.stem.removeprefix("captions_")
    names = {image["id"]: f"{split}/{image['file_name']}" for image in data["images"]}
    captions: dict[str, list[str]] = defaultdict(list)
    for row in data["annotations"]:
        captions[names[row["image_id"]]].append(row["caption"])
    return dict(captions)


def converse(
    things: Sequence[Thing],
    rng: Random,
    *,
    turns: int = TURNS_PER_RECORD,
    turn_weights: Mapping[str, float] = TURN_WEIGHTS,
    caption_share: float = CAPTION_SHARE,
) -> list[Turn]:
    """Draw up to ``turns`` different questions, kinds by ``turn_weights``; a question is never asked twice."""
    kinds, weights = list(turn_weights), list(turn_weights.values())
    picked: dict[str, Turn] = {}
    if rng.random() < caption_share:
        turn = ask_caption(things, rng)
        picked[turn.question] = turn
    for kind in rng.choices(kinds, weights, k=3 * turns):
        if len(picked) == turns:
            break
        drawn = KINDS[kind](things, rng)
        if drawn is not None:
            picked.setdefault(drawn.question, drawn)
    conversation = list(picked.values())
    rng.shuffle(conversation)
    return conversation


def hold_out(pictures: dict[str, tuple[Thing, ...]], *, per_kind: int, rng: Random) -> list[dict[str, Any]]:
    """Draw ``per_kind`` single-turn questions of every kind, spread over the pictures; yes/no and letters in turn."""
    rows: list[dict[str, Any]] = []
    for kind, ask in KINDS.items():
        order = sorted(pictures)
        rng.shuffle(order)
        wanted = BALANCED_ENDINGS.get(kind)
        made = 0
        for attempt in range(100 * per_kind):
            if made == per_kind:
                break
            image = order[attempt % len(order)]
            turn = ask(pictures[image], rng)
            if turn is None or (wanted is not None and not turn.answer.endswith(wanted[made % len(wanted)])):
                continue
            row = {"question_id": f"{kind}-{made:04d}", "image": image, "question": turn.question}
            row |= {"answer": turn.answer, "kind": kind}
            rows.append(row | ({"choices": list(turn.choices)} if turn.choices else {}))
            made += 1
        if made < per_kind:
            raise DataError(
                f'{len(pictures)} pictures gave {made} of {per_kind} questions of kind "{kind}". '
                "Ask for more pictures or fewer questions."
            )
    return rows


def write_split(root: Path, split: str, *, seed: int, per_kind: int | None) -> list[list[Turn]]:
    """Write the LLaVA-format files of one split (and its questions unless ``per_kind`` is None); return all turns."""
    pictures = read_things(root / "annotations" / f"instances_{split}.json")
    captions = read_captions(root / "annotations" / f"captions_{split}.json")
    align, instruct, conversations = [], [], []
    for image, things in pictures.items():
        rng = Random(f"{seed}:{image}")
        name = image.replace("/", "-").removesuffix(".png")
        caption = rng.choice(captions[image])
        turns = converse(things, rng)
        conversations.append(turns)
        align.append(_record(name, image, [(rng.choice(ALIGN_QUESTIONS), caption)]))
        instruct.append(_record(name, image, [(turn.question, turn.answer) for turn in turns]))
    _dump(root / f"align_{split}.json", align)
    _dump(root / f"instruct_{split}.json", instruct)
    if per_kind is not None:
        rows = hold_out(pictures, per_kind=per_kind, rng=Random(f"{seed}:{split}:questions"))
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (root / f"questions_{split}.jsonl").write_text(lines, encoding="utf-8")
    return conversations


def chance_levels(train: Iterable[Sequence[Turn]], questions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What can be scored without looking, per kind, as fractions.

    ``majority``: share of the kind's most frequent training answer among its training answers. ``question_only``: exact
    match on ``questions`` of the most frequent training answer to the very same question (else to the kind).
    """
    by_kind: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    for turn in (turn for conversation in train for turn in conversation if turn.kind in KINDS):
        by_kind[turn.kind][turn.answer] += 1
        by_question[turn.question][turn.answer] += 1
    levels: dict[str, Any] = {}
    for kind, answers in by_kind.items():
        rows = [row for row in questions if row["kind"] == kind]
        guesses = [by_question.get(row["question"], answers).most_common(1) for row in rows]
        hits = sum(bool(guess) and guess[0][0] == row["answer"] for guess, row in zip(guesses, rows, strict=True))
        majority = answers.most_common(1)
        levels[kind] = {
            "majority": round(majority[0][1] / answers.total(), 4) if majority else 0.0,
            "majority_answer": majority[0][0] if majority else "",
            "question_only": round(hits / len(rows), 4) if rows else 0.0,
        }
    return levels


def _record(name: str, image: str, turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    conversations = []
    for number, (question, answer) in enumerate(turns):
        value = f"{IMAGE}\n{question}" if number == 0 else question
        conversations += [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": conversations}


def _dump(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
