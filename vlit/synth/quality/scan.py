"""The passes of ``vlit synth quality``: pictures, text, comparison of records, columns. Memory does not grow with the text.

Records go by in chunks; what stays of one is about 25 numbers, its id and picture name. Hashes wait on the disk.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlit.data.json_stream import iter_json_records
from vlit.errors import DataError
from vlit.synth.quality.annotations import Annotations
from vlit.synth.quality.blind import guessed_by_majority
from vlit.synth.quality.pictures import (
    PICTURES_AT_ONCE,
    join,
    look_at,
    look_at_evaluation,
    same_across,
    same_within,
    why,
)
from vlit.synth.quality.sketches import Distinct, earlier_of, near_duplicates
from vlit.synth.quality.sources import eval_sequences, iter_shown
from vlit.synth.quality.spool import Spool, batches, in_order
from vlit.synth.quality.text import FIELDS, HALF, Chunk, Context, measure_chunk

RECORDS_AT_ONCE = 512
NEAR_DUPLICATE = 0.7
"""Jaccard similarity of content words from which two records of one picture say the same."""


@dataclass
class Measured:
    """Columns of all records and tallies of the dataset."""

    path: Path
    numbers: dict[str, np.ndarray] = field(default_factory=dict)
    fields: dict[str, list[str]] = field(default_factory=dict)
    earlier: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """The earlier record that a duplicate repeats; -1 for the others."""
    tally: Chunk = field(default_factory=Chunk)
    distinct: list[float] = field(default_factory=list)
    pictures: dict[str, Any] = field(default_factory=dict)
    first_unreadable: str | None = None
    """Why the first of the pictures that cannot be decoded cannot."""
    templates: dict[str, float] = field(default_factory=dict)
    """Question templates: how many different ones, and how many equally frequent ones would be as varied."""
    spread: dict[str, float] = field(default_factory=dict)
    """How widely CLIP's embeddings of pictures and answers are spread, where it was asked."""
    repeated_texts: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.earlier)


def measure(
    path: Path,
    *,
    images: Path | None = None,
    annotations: Annotations | None = None,
    eval_texts: list[Path] | None = None,
    eval_images: list[Path] | None = None,
    workers: int = 1,
    near: float = NEAR_DUPLICATE,
) -> Measured:
    """All metrics of a canonical file.

    Args:
        images: folder that image paths are relative to; None: pictures are not looked at.
        eval_texts, eval_images: files and folders of evaluation sets that the data must not hold.

    Raises:
        DataError: a file cannot be read, holds no record or none that is valid, or an evaluation set can find nothing.
    """
    out, context = Measured(path), Context(annotations)
    if eval_texts:
        context.eval_ngrams = np.unique(np.concatenate([eval_sequences(file) for file in eval_texts]))
    clock = time.perf_counter()
    if images is not None:
        _look(path, images, eval_images or [], context, out, workers=workers)
    out.seconds["pictures"] = time.perf_counter() - clock
    clock = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="vlit-quality-") as name:
        folder = Path(name)
        spools = {"exact": Spool(folder, np.uint64), "keys": Spool(folder, np.uint64, 32)}
        for wanted in ("sets", "templates", "answers"):
            spools[wanted] = Spool(folder, np.uint64)
        spools["lengths"] = Spool(folder, np.int64)
        parts: dict[str, list[np.ndarray]] = {}
        counters = [Distinct() for _ in range(3)]
        out.fields = {wanted: [] for wanted in FIELDS}
        number = 0
        tasks = batches(enumerate(iter_json_records(path)), RECORDS_AT_ONCE)
        for chunk in in_order(measure_chunk, tasks, context, workers=workers):
            for wanted, spool in spools.items():
                spool.add(getattr(chunk, wanted))
            size = len(chunk.lengths)
            for wanted in dict.fromkeys([*parts, *chunk.numbers]):
                earlier = parts.setdefault(wanted, [np.full(number, np.nan, np.float32)])
                earlier.append(chunk.numbers.get(wanted, np.full(size, np.nan, np.float32)))
            for wanted, values in chunk.fields.items():
                out.fields[wanted] += values
            number += size
            for counter, registers in zip(counters, chunk.distinct, strict=True):
                counter.merge(registers)
            _add(out.tally, chunk)
        out.seconds["text"] = time.perf_counter() - clock
        clock = time.perf_counter()
        out.numbers = {wanted: np.concatenate(held) for wanted, held in parts.items()}
        out.distinct = [counter.count() for counter in counters]
        _compare(out, {wanted: spool.array() for wanted, spool in spools.items()}, near=near)
    if "readable" in out.numbers:
        out.pictures["records_with_unreadable"] = int((out.numbers["readable"] < 1).sum())
    out.numbers["quality"] = quality_of(out.numbers)
    out.seconds["comparison"] = time.perf_counter() - clock
    return out


def quality_of(numbers: dict[str, np.ndarray]) -> np.ndarray:
    """*Ours*: mean of correctness (where measured), complexity and 1 - blind.

    0 for a leak, a duplicate, evaluation data or a picture that cannot be decoded.
    """
    columns = [numbers["complexity"], 1 - numbers["blind"]]
    if "correctness" in numbers:
        columns.append(numbers["correctness"])
    stacked = np.stack(columns)
    known = ~np.isnan(stacked)
    mean = np.where(known, stacked, 0).sum(axis=0) / known.sum(axis=0).clip(1)
    for fault in ("leaks", "duplicate", "eval_text", "eval_image"):
        if fault in numbers:
            mean = np.where(numbers[fault] > 0, 0, mean)
    if "readable" in numbers:
        mean = np.where(numbers["readable"] < 1, 0, mean)
    return mean.astype(np.float32)


def _add(tally: Chunk, chunk: Chunk) -> None:
    for name in ("roots", "verdicts", "claims", "wrong", "ignored"):
        getattr(tally, name).update(getattr(chunk, name))
    tally.ngrams = [a + b for a, b in zip(tally.ngrams, chunk.ngrams, strict=True)]
    tally.bad += chunk.bad


def _compare(out: Measured, held: dict[str, np.ndarray], *, near: float) -> None:
    """Duplicates, exact and near, and what can be guessed blind."""
    number = len(held["exact"])
    if not number:
        raise DataError(f"{out.path}: no records.")
    if len(out.tally.bad) == number:
        raise DataError(f"{out.path}: none of {number:,} records can be read. The first: {out.tally.bad[0][1]}")
    starts = np.r_[0, np.cumsum(held["lengths"])]
    _, first, back = np.unique(held["exact"], return_index=True, return_inverse=True)
    exact = first[back] != np.arange(number)
    out.earlier = np.where(exact, first[back], -1)
    duplicate = near_duplicates(held["keys"], held["sets"], starts, near=near, earlier=out.earlier)
    duplicate[exact] = 1.0
    out.numbers["duplicate"] = duplicate
    out.templates = _variety(np.array(held["templates"]))
    guessed = guessed_by_majority(np.array(held["templates"]), np.array(held["answers"]))
    turns = np.nan_to_num(out.numbers["turns"]).astype(np.int64)
    owner = np.repeat(np.arange(number), turns)
    out.numbers["blind"] = (np.bincount(owner, weights=guessed, minlength=number) / turns.clip(1)).astype(np.float32)


def _variety(hashes: np.ndarray) -> dict[str, float]:
    """Different values, and the exponential of their entropy (Hill number of order 1; Hill 1973, doi:10.2307/1934352)."""
    counts = np.unique(hashes, return_counts=True)[1]
    shares = counts / max(counts.sum(), 1)
    return {
        "different": len(counts),
        "effective": float(np.exp(-(shares * np.log(shares)).sum())) if len(counts) else 0.0,
    }


def _look(path: Path, root: Path, eval_folders: list[Path], context: Context, out: Measured, *, workers: int) -> None:
    """Hash every distinct picture; tell ``context`` which look the same, are unreadable, or are of evaluation sets."""
    evaluations = [look_at_evaluation(folder, workers=workers) for folder in eval_folders]
    names = list(dict.fromkeys(name for record in iter_shown(path) for name in record.pictures))
    looks = join(in_order(look_at, ((part, root) for part in batches(names, PICTURES_AT_ONCE)), workers=workers))
    first = earlier_of(len(names), same_within(looks))
    context.same_image = {names[row]: names[first[row]] for row in np.flatnonzero(first >= 0).tolist()}
    context.unreadable = frozenset(names[row] for row in np.flatnonzero(~looks.known).tolist())
    if context.unreadable:
        out.first_unreadable = why(names[int(np.argmin(looks.known))], root)
    found: set[str] = set()
    for _, shown in evaluations:
        found |= {names[row] for row in np.flatnonzero(same_across(looks, shown) >= 0).tolist()}
    context.contaminated = frozenset(found) if evaluations else None
    out.pictures = {
        "distinct": len(names),
        "unreadable": int((~looks.known).sum()),
        "near_duplicates": len(context.same_image),
        "of_evaluation_sets": len(found),
    }
    if unknown := sum(int((~shown.known).sum()) for _, shown in evaluations):
        out.pictures["unreadable_of_evaluation_sets"] = unknown


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def entropy(counts: Counter[str]) -> float:
    """Evenness of groups: entropy / log(number of groups), 1 when all are equally frequent, 0 for a single group."""
    shares = np.array([count for count in counts.values() if count], float)
    if len(shares) < 2:
        return 0.0
    shares /= shares.sum()
    return float(-(shares * np.log(shares)).sum() / np.log(len(shares)))


__all__ = ["HALF", "Measured", "cores", "entropy", "measure", "quality_of"]
