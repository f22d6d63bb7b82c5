"""Metrics of one chunk of records, read once: columns a record, hashes to compare records by, tallies of the dataset.

All metrics here are ours unless said otherwise. ``complexity`` is the mean of five counts, each squashed by x / (x + h):
turns (h = 4), words of the answers (60), distinct nouns or labels (5), spatial and comparing relations (3), reasoning words
(2).
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import orjson

from vlit.data.record import KEYS, Record, from_json
from vlit.errors import DataError
from vlit.synth.quality.annotations import Annotations, region_names
from vlit.synth.quality.correctness import CHECKS, agreement_of, asked_of, leaks, yes_or_no
from vlit.synth.quality.form import forms_of, without_form
from vlit.synth.quality.ngrams import MAX_WORDS, Said, distinct_ngrams, known_sequences, word_hashes
from vlit.synth.quality.sketches import ASKED, FORM, WORD, band_keys, hash_text
from vlit.synth.quality.words import (
    COLOURS,
    POSITIONS,
    REASONING,
    RELATIONS,
    STOP,
    content,
    meaning,
    number_of,
    root_of,
    subjects,
    tokens,
)  # fmt: skip

HALF = {"turns": 4.0, "answer_words": 60.0, "objects": 5.0, "relations": 3.0, "reasoning": 2.0}
COUNTS = ("turns", "question_words", "answer_words", "objects", "relations", "reasoning", "leaks", "claims")
FIELDS = ("id", "kind", "domain", "instruction_type", "image", "licence", "source")


@dataclass
class Chunk:
    """What is known about consecutive records once their text is gone."""

    numbers: dict[str, np.ndarray] = field(default_factory=dict)
    fields: dict[str, list[str]] = field(default_factory=dict)
    exact: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    """Hash of the normalised text and images of each record."""
    keys: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.uint64))
    sets: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    """Hashed content words of each record, one record after another; ``lengths`` of them each. ``ASKED`` marks what a single
    question is about, ``FORM`` what form of answer is asked for."""
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    templates: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    answers: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    roots: Counter[tuple[str, str]] = field(default_factory=Counter)
    verdicts: Counter[str] = field(default_factory=Counter)
    claims: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    ngrams: list[int] = field(default_factory=lambda: [0, 0, 0])
    distinct: list[np.ndarray] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    """Row and reason of records that cannot be read."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Keys that are none of a record's, and how many records have them."""


@dataclass
class Context:
    """What every worker needs beside the records."""

    annotations: Annotations | None = None
    eval_ngrams: np.ndarray | None = None
    """Sorted hashes of the evaluation sets' word sequences."""
    same_image: dict[str, str] = field(default_factory=dict)
    """Picture -> the first picture that looks the same, where they differ."""
    unreadable: frozenset[str] | None = None
    """Pictures that cannot be decoded; None where pictures are not looked at."""
    contaminated: frozenset[str] | None = None
    """Pictures of evaluation sets; None where none were given."""


def template_of(question: list[str], labels: frozenset[str]) -> str:
    """A question with its values left open: "Is the * digit a *?" is one template whatever colour and digit."""
    return " ".join(
        "*" if word in COLOURS or word in POSITIONS or number_of(word) is not None or word in labels else word
        for word in question
    )


def read_record(row: int, raw: bytes) -> tuple[Record, list[str]]:
    """The record of a line as the ``llava`` format reads it, and the keys of the line that are none of a record's.

    A record without an id gets its row.

    Raises:
        DataError: not JSON, or names the field that is missing or of the wrong kind.
    """
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise DataError(f"the record is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        return from_json(value), []
    known = {key: value[key] for key in KEYS if value.get(key) is not None}
    return from_json({"id": str(row)} | known), [key for key in value if key not in KEYS]


def measure_chunk(raws: list[tuple[int, bytes]], context: Context) -> Chunk:
    """Measure raw records with their rows; a record that cannot be read is listed and has NaN in every column."""
    chunk = Chunk()
    rows: list[dict[str, float]] = []
    fields: dict[str, list[str]] = {name: [] for name in FIELDS}
    exact = array("Q")
    sets: list[np.ndarray] = []
    templates, answers = array("Q"), array("Q")
    said, plain = Said(), Said() if context.eval_ngrams is not None else None
    labels = frozenset(context.annotations.things and _label_words(context.annotations) if context.annotations else ())
    for place, (number, raw) in enumerate(raws):
        try:
            record, extra = read_record(number, raw)
        except DataError as error:
            chunk.bad.append((number, str(error)))
            rows.append({})
            exact.append(hash_text(f"bad {number}"))
            sets.append(np.array([hash_text(raw.decode(errors="replace"))], np.uint64))
            for name in FIELDS:
                fields[name].append("")
            continue
        said.owner = place
        chunk.ignored.update(extra)
        row, words = _texts(record, chunk, said, templates, answers, labels)
        if plain is not None:
            plain.owner = place
            for said_words in _without_form(record, words):
                plain.add(said_words)
        rows.append(row | _agreement(record, chunk, context) | _pictures(record, context))
        for name, value in _fields(record, context).items():
            fields[name].append(value)
        shown = [context.same_image.get(image, image) for image in record.images]
        exact.append(hash_text("\n".join([*shown, *words])))
        sets.append(_bag(record, words, shown))
    for size, (count, registers) in enumerate(distinct_ngrams(said)):
        chunk.ngrams[size] += count
        chunk.distinct.append(registers)
    if plain is not None and context.eval_ngrams is not None:
        shared = known_sequences(plain, context.eval_ngrams, records=len(rows))
        for row, held in zip(rows, shared, strict=True):
            if row:
                row["eval_text"] = held
    names = dict.fromkeys(name for row in rows for name in row)
    chunk.numbers = {name: np.array([row.get(name, np.nan) for row in rows], np.float32) for name in names}
    chunk.fields, chunk.exact = fields, np.frombuffer(exact, np.uint64)
    chunk.templates, chunk.answers = np.frombuffer(templates, np.uint64), np.frombuffer(answers, np.uint64)
    chunk.lengths = np.array([len(bag) for bag in sets], np.int64)
    chunk.sets = np.concatenate(sets) if sets else chunk.sets
    if sets:
        chunk.keys = band_keys(chunk.sets & WORD, np.r_[0, np.cumsum(chunk.lengths)])
    return chunk


def _label_words(known: Annotations) -> list[str]:
    return [name[0] for name, (kind, _) in known.names.items() if kind == "label" and len(name) == 1]


def _texts(
    record: Record, chunk: Chunk, said: Said, templates: array, answers: array, labels: frozenset[str]
) -> tuple[dict[str, float], list[str]]:
    """Numbers from the text of one record, and its normalised turns."""
    row = dict.fromkeys(COUNTS, 0.0)
    normal: list[str] = []
    nouns: set[str] = set()
    question, asked = "", [""]
    for turn in record.turns:
        words = tokens(turn.text.replace("<image>", " "))
        normal.append(" ".join(words))
        said.add(words)
        if turn.role == "user":
            question, asked = turn.text, words
            row["question_words"] += len(words)
            chunk.roots[root_of(question)] += 1
        elif turn.role == "assistant":
            row["turns"] += 1
            row["answer_words"] += len(words)
            row["relations"] += sum(word in RELATIONS for word in words)
            row["reasoning"] += sum(word in REASONING for word in words)
            row["leaks"] += leaks(question, turn.text)
            nouns.update(content([word for word in words if word not in RELATIONS and word not in REASONING]))
            templates.append(hash_text(template_of(asked, labels)))
            answers.append(hash_text(normal[-1]))
            verdict = yes_or_no(turn.text)
            if verdict:
                chunk.verdicts[verdict] += 1
    row["objects"] = len(nouns - STOP)
    row["complexity"] = sum(row[name] / (row[name] + half) for name, half in HALF.items()) / len(HALF)
    row["judged"] = judged_share(record)
    row["cost_usd"] = _number(record.provenance.get("cost_usd", record.provenance.get("cost")))
    return row, normal


def _without_form(record: Record, normal: list[str]) -> list[list[str]]:
    """Words of every normalised turn, without what asks for a form of answer."""
    found = []
    for turn, words in zip(record.turns, normal, strict=True):
        kept = without_form(turn.text) if turn.role == "user" else turn.text
        found.append(words.split() if kept == turn.text else tokens(kept.replace("<image>", " ")))
    return found


def _bag(record: Record, normal: list[str], shown: list[str]) -> np.ndarray:
    """Hashes of the content words of a record of these pictures; with the mark ``FORM``, of the forms of answer it asks for.

    Of a record with one question, the things, colours, numbers and names of the question bear the mark ``ASKED``.
    """
    words = sorted({word for turn in _without_form(record, normal) for word in meaning(turn)})[:MAX_WORDS] or [
        "(nothing)"
    ]
    questions = [turn.text for turn in record.turns if turn.role == "user"]
    forms = sorted({form for question in questions for form in forms_of(question)})
    about = subjects(tokens(asked_of(questions[0]))) if len(questions) == 1 else ()
    marks = [int(ASKED) if word in about else 0 for word in words] + [int(FORM)] * len(forms)
    hashes = word_hashes([*words, *(f"(form) {form}" for form in forms)])
    return (hashes ^ np.uint64(hash_text("|".join(shown)))) & WORD | np.array(marks, np.uint64)


def _agreement(record: Record, chunk: Chunk, context: Context) -> dict[str, float]:
    known = context.annotations
    if known is None:
        return {}
    if known.from_regions:
        known = replace(known, names={}, longest=1)
        for name in region_names(record):
            known.add_name("label", name)
    found = agreement_of(record, known)
    chunk.claims += found.claims
    chunk.wrong += found.wrong
    wrong = {f"wrong_{check}": float(found.wrong[check]) for check in CHECKS}
    told = float(known.of(record) is not None)
    return {"annotated": told, "correctness": found.share, "claims": float(sum(found.claims.values())), **wrong}


def _pictures(record: Record, context: Context) -> dict[str, float]:
    """Share of the pictures that can be decoded (NaN without any), and whether one of them is of an evaluation set."""
    found: dict[str, float] = {}
    if context.unreadable is not None:
        held = [image not in context.unreadable for image in record.images]
        found["readable"] = sum(held) / len(held) if held else float("nan")
    if context.contaminated is not None:
        found["eval_image"] = float(any(image in context.contaminated for image in record.images))
    return found


def _fields(record: Record, context: Context) -> dict[str, str]:
    image = record.images[0] if record.images else ""
    of_image = context.annotations.licences.get(image, "") if context.annotations else ""
    known: dict[str, Any] = record.provenance
    return {
        "id": record.id, "kind": record.kind or "", "domain": record.domain or "", "image": image,
        "instruction_type": record.instruction_type or "",
        "licence": str(known.get("license") or known.get("licence") or of_image),
        "source": str(known.get("source") or known.get("teacher") or ""),
    }  # fmt: skip


def judged_share(record: Record) -> float:
    """Share of answers that a second teacher agrees with (recipe ``judge``); NaN where none was asked."""
    verdict = record.provenance.get("judge")
    if not isinstance(verdict, dict):
        return float("nan")
    return _number(verdict.get("agree")) / (_number(verdict.get("of")) or float("nan"))


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else float("nan")
