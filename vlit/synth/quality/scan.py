"""The passes of ``vlit synth quality``: pictures, text, comparison of records, columns. Memory does not grow with the text.

Records go by in chunks; what stays of one is about 25 numbers, its id and picture name. Hashes wait on the disk.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from vlit.data.json_stream import iter_json_records
from vlit.errors import DataError
from vlit.synth.quality.annotations import Annotations
from vlit.synth.quality.blind import guessed_by_majority
from vlit.synth.quality.pictures import join, look_at, pictures_below, same_across, same_within
from vlit.synth.quality.sketches import Distinct, earlier_of, near_duplicates, ngram_hashes
from vlit.synth.quality.spool import Spool, batches, in_order
from vlit.synth.quality.text import CONTAMINATION_WORDS, FIELDS, HALF, Chunk, Context, measure_chunk, word_hashes
from vlit.synth.quality.words import tokens

RECORDS_AT_ONCE, PICTURES_AT_ONCE = 512, 256
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
        DataError: a file cannot be read, or holds no record.
    """
    out, context = Measured(path), Context(annotations)
    seen = np.zeros(0, np.uint64)
    clock = time.perf_counter()
    contaminated: dict[str, str] = {}
    if images is not None:
        contaminated = _look(path, images, eval_images or [], context, out, workers=workers)
    out.seconds["pictures"] = time.perf_counter() - clock
    clock = time.perf_counter()
    if eval_texts:
        context.eval_ngrams = np.unique(np.concatenate([seen, *(_eval_ngrams(file) for file in eval_texts)]))
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
        tasks = batches(iter_json_records(path), RECORDS_AT_ONCE)
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
            _add(out.tally, chunk, number - size)
        out.seconds["text"] = time.perf_counter() - clock
        clock = time.perf_counter()
        out.numbers = {wanted: np.concatenate(held) for wanted, held in parts.items()}
        out.distinct = [counter.count() for counter in counters]
        _compare(out, {wanted: spool.array() for wanted, spool in spools.items()}, near=near)
    if images is not None and eval_images:
        out.numbers["eval_image"] = np.array([image in contaminated for image in out.fields["image"]], np.float32)
    out.numbers["quality"] = quality_of(out.numbers)
    out.seconds["comparison"] = time.perf_counter() - clock
    return out


def quality_of(numbers: dict[str, np.ndarray]) -> np.ndarray:
    """*Ours*: mean of correctness (where measured), complexity and 1 - blind; 0 for a leak, duplicate or evaluation data."""
    columns = [numbers["complexity"], 1 - numbers["blind"]]
    if "correctness" in numbers:
        columns.append(numbers["correctness"])
    stacked = np.stack(columns)
    known = ~np.isnan(stacked)
    mean = np.where(known, stacked, 0).sum(axis=0) / known.sum(axis=0).clip(1)
    for fault in ("leaks", "duplicate", "eval_text", "eval_image"):
        if fault in numbers:
            mean = np.where(numbers[fault] > 0, 0, mean)
    return mean.astype(np.float32)


def _add(tally: Chunk, chunk: Chunk, start: int) -> None:
    for name in ("roots", "verdicts", "claims", "wrong"):
        getattr(tally, name).update(getattr(chunk, name))
    tally.ngrams = [a + b for a, b in zip(tally.ngrams, chunk.ngrams, strict=True)]
    tally.bad += [(start + place, reason) for place, reason in chunk.bad]


def _compare(out: Measured, held: dict[str, np.ndarray], *, near: float) -> None:
    """Duplicates, exact and near, and what can be guessed blind."""
    number = len(held["exact"])
    if not number:
        raise DataError(f"{out.path}: no records.")
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


def _look(
    path: Path, root: Path, eval_folders: list[Path], context: Context, out: Measured, *, workers: int
) -> dict[str, str]:
    """Hash every distinct picture; fill ``context.same_image``; return pictures of evaluation sets."""
    names = list(dict.fromkeys(_image_names(path)))
    looks = join(in_order(look_at, ((part, root) for part in batches(names, PICTURES_AT_ONCE)), workers=workers))
    first = earlier_of(len(names), same_within(looks))
    context.same_image = {names[row]: names[first[row]] for row in np.flatnonzero(first >= 0).tolist()}
    found: dict[str, str] = {}
    for folder in eval_folders:
        theirs = pictures_below(folder)
        parts = ((part, folder) for part in batches(theirs, PICTURES_AT_ONCE))
        hits = same_across(looks, join(in_order(look_at, parts, workers=workers)))
        found |= {names[row]: theirs[hits[row]] for row in np.flatnonzero(hits >= 0).tolist()}
    out.pictures = {
        "distinct": len(names),
        "unreadable": int((~looks.known).sum()),
        "near_duplicates": len(context.same_image),
        "of_evaluation_sets": len(found),
    }
    return found


def _image_names(path: Path) -> Iterator[str]:
    for raw in iter_json_records(path):
        try:
            value = orjson.loads(raw)
        except orjson.JSONDecodeError:
            continue
        if isinstance(value, dict):
            shown = value.get("image") or value.get("images") or []
            yield from (name for name in ([shown] if isinstance(shown, str) else shown) if isinstance(name, str))


def _eval_ngrams(path: Path) -> np.ndarray:
    """Hashes of all word sequences in the texts of an evaluation file, whatever its keys."""
    held = []
    for raw in iter_json_records(path):
        try:
            texts = list(_strings(orjson.loads(raw)))
        except orjson.JSONDecodeError as error:
            raise DataError(f"{path}: not JSON ({error}). Give evaluation questions as JSON or JSONL.") from error
        held += [ngram_hashes(word_hashes(tokens(text)), CONTAMINATION_WORDS) for text in texts]
    return np.unique(np.concatenate(held)) if held else np.zeros(0, np.uint64)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


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
