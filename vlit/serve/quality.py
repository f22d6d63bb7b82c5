"""``vlit synth quality``: measure, write the card, filter, select."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from vlit.data.json_stream import iter_json_records
from vlit.data.record import Record, from_json
from vlit.errors import DataError
from vlit.synth.quality.annotations import read_annotations
from vlit.synth.quality.card import build_card, removal_report, write_card, write_columns, write_kept
from vlit.synth.quality.filters import MEANING, NAMED, apply_filters, not_measured, parse_filters
from vlit.synth.quality.scan import Measured, cores, measure
from vlit.synth.quality.select import select as choose


def measure_quality(
    dataset: Path,
    *,
    images: Path | None = None,
    annotations: list[str] | None = None,
    eval_texts: list[Path] | None = None,
    eval_images: list[Path] | None = None,
    out: Path | None = None,
    keep: list[str] | None = None,
    select: int | None = None,
    write: Path | None = None,
    workers: int | None = None,
    model: Path | None = None,
    clip: str | None = None,
) -> dict[str, Any]:
    """Write ``card.json``, ``card.html``, ``metrics.parquet``; with filters ``kept.jsonl``, its metrics, ``removed.jsonl``.

    Raises:
        ConfigError: a filter that does not exist, or whose metric this run does not measure.
        DataError: a file cannot be read.
    """
    from vlit.serve.quality_page import build_page

    missing = not_measured(
        annotations=bool(annotations), eval_texts=bool(eval_texts), eval_images=bool(eval_images),
        model=model is not None, clip=clip is not None,
    )  # fmt: skip
    rules = parse_filters(keep or [], missing=missing)
    out = out or dataset.with_name(dataset.name.removesuffix(".jsonl") + ".quality")
    root = image_folder(dataset, images)
    if eval_images and root is None:
        raise DataError(f"{dataset}: --eval-images compares pictures; give the dataset's own with --images.")
    out.mkdir(parents=True, exist_ok=True)
    found = measure(
        dataset, images=root, annotations=read_annotations(annotations or []), eval_texts=eval_texts,
        eval_images=eval_images, workers=workers or cores(),
    )  # fmt: skip
    if model is not None or clip is not None:
        ask_models(found, root, model=model, clip=clip)
    card = build_card(found, peak_bytes=peak_memory())
    if rules or select is not None or write is not None:
        card["kept"] = keep_records(found, out, rules=rules, count=select, write=write or out / "kept.jsonl")
    write_columns(out / "metrics.parquet", found)
    write_card(out / "card.json", card)
    (out / "card.html").write_text(build_page(card, found, root=root), encoding="utf-8")
    _say(card, out)
    return card


def ask_models(found: Measured, root: Path | None, *, model: Path | None, clip: str | None) -> None:
    """Add the columns that trained models give.

    Raises:
        DataError: CLIP is asked for and there is no folder of pictures.
        CheckpointError: ``model`` is no trained vlit model.
    """
    from tqdm import tqdm

    from vlit.synth.quality.models import clip_scores, losses

    records = readable_records(found)
    started = time.perf_counter()
    if clip is not None:
        if root is None:
            raise DataError(f"{found.path}: --clip compares pictures with texts; give the pictures with --images.")
        columns, found.spread = clip_scores(records, clip, root=root)
        found.numbers |= columns
    if model is not None:
        from vlit.serve.commands import load_answerer

        answerer, _ = load_answerer(model, max_new_tokens=1)
        with tqdm(total=len(records), desc="losses", unit="records", disable=not sys.stderr.isatty()) as bar:
            found.numbers |= losses(records, answerer, root=root, report=bar.update)
    found.seconds["models"] = time.perf_counter() - started


def readable_records(found: Measured) -> list[Record | None]:
    """The records of the dataset by row; None for those that cannot be read."""
    bad = {row for row, _ in found.tally.bad}
    return [
        None if row in bad else from_json(orjson.loads(raw)) for row, raw in enumerate(iter_json_records(found.path))
    ]


def keep_records(found: Measured, out: Path, *, rules: list[Any], count: int | None, write: Path) -> dict[str, Any]:
    """Apply filters, then select; write what is kept and why the rest is not."""
    kept = np.ones(len(found), bool)
    kept[[row for row, _ in found.tally.bad]] = False
    by_rule = apply_filters(rules, found.numbers)
    for keeps in by_rule.values():
        kept &= keeps
    if count is not None:
        rows = np.flatnonzero(kept)
        groups = [[found.fields[name][row] for row in rows] for name in ("image", "instruction_type", "domain", "kind")]
        chosen = rows[choose(np.nan_to_num(found.numbers["quality"][rows]), groups, count)]
        kept = np.zeros(len(found), bool)
        kept[chosen] = True
    reasons = removal_report(out / "removed.jsonl", found, kept, by_rule, selected=count is not None)
    written = write_kept(found.path, write, kept)
    write_columns(metrics_of(write), found, kept)
    return {"records": written, "removed": len(found) - written, "reasons": reasons, "filters": [str(r) for r in rules]}


def metrics_of(dataset: Path) -> Path:
    """Where the metrics of a filtered dataset lie: beside it."""
    return dataset.with_name(dataset.name.removesuffix(".jsonl") + ".metrics.parquet")


def image_folder(dataset: Path, images: Path | None) -> Path | None:
    """The folder given, or ``images`` beside the dataset, or None."""
    if images is not None:
        if not images.is_dir():
            raise DataError(f"{images}: no such folder. Give the folder that image paths are relative to.")
        return images
    beside = dataset.parent / "images"
    return beside if beside.is_dir() else None


def peak_memory() -> int:
    """Largest resident bytes so far: this process, or a worker where that is more."""
    unit = 1 if sys.platform == "darwin" else 1024
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * unit


def list_filters() -> str:
    """Named filters and metrics, one a line."""
    lines = ["filters:", *(f"  {name:16} {', '.join(rules)}" for name, rules in NAMED.items())]
    return "\n".join([*lines, "metrics:", *(f"  {name:16} {text}" for name, text in MEANING.items())])


def _say(card: dict[str, Any], out: Path) -> None:
    faults = ", ".join(f"{count:,} {name}" for name, count in card["faults"].items() if count) or "no faults found"
    print(f"{card['records']:,} records: {faults}", file=sys.stderr)
    if "kept" in card:
        print(f"kept {card['kept']['records']:,}, removed {card['kept']['removed']:,}", file=sys.stderr)
    print(f"card  {out / 'card.html'}", file=sys.stderr)
