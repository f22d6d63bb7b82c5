"""``vlit synth quality``: measure, write the card, filter, select."""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from vlit.data.json_stream import iter_json_records
from vlit.data.record import Record
from vlit.errors import ConfigError, DataError
from vlit.synth.quality.annotations import REGIONS
from vlit.synth.quality.card import build_card, removal_report, write_card, write_columns, write_kept
from vlit.synth.quality.filters import MEANING, NAMED, apply_filters, not_checked, not_measured, parse_filters
from vlit.synth.quality.scan import Measured, cores, measure
from vlit.synth.quality.select import select as choose
from vlit.synth.quality.sources import match_annotations
from vlit.synth.quality.text import read_record


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
    cost_usd: float | None = None,
) -> dict[str, Any]:
    """Write ``card.json``, ``card.html``, ``metrics.parquet``; with filters ``kept.jsonl``, its metrics, ``removed.jsonl``.

    Args:
        cost_usd: what the whole dataset cost, where its records do not say.

    Raises:
        ConfigError: a filter that does not exist, or whose metric this run does not measure; a selection of nothing.
        DataError: a file cannot be read or written, or something to compare with can find nothing in the dataset.
    """
    from vlit.serve.quality_page import build_page

    if select is not None and select < 1:
        raise ConfigError(f"--select {select}: keeps no record. Give the number of records to keep, 1 or more.")
    root = image_folder(dataset, images)
    missing = not_measured(
        annotations=bool(annotations), eval_texts=bool(eval_texts), eval_images=bool(eval_images),
        images=root is not None, model=model is not None, clip=clip is not None,
    )  # fmt: skip
    rules = parse_filters(keep or [], missing=missing)
    if clip is not None and not Path(clip).is_dir():
        raise ConfigError(f"--clip {clip} is not a folder. Give a transformers CLIP folder on this machine.")
    out = out or dataset.with_name(dataset.name.removesuffix(".jsonl") + ".quality")
    if eval_images and root is None:
        raise DataError(f"{dataset}: --eval-images compares pictures; give the dataset's own with --images.")
    known, matched = match_annotations(dataset, annotations or [], images=root)
    make_writable(out, "--out")
    if write is not None:
        make_writable(write.parent, f"--write {write}")
    is_filtered = bool(rules) or select is not None or write is not None
    if is_filtered:
        for path, option in ((write or out / "kept.jsonl", "--write"), (out / "removed.jsonl", "--out")):
            refuse_to_replace(path, option, dataset, *(eval_texts or []))
    found = measure(
        dataset, images=root, annotations=known, eval_texts=eval_texts, eval_images=eval_images,
        workers=workers or cores(),
    )  # fmt: skip
    if model is not None or clip is not None:
        ask_models(found, root, model=model, clip=clip)
    card = build_card(found, peak_bytes=peak_memory())
    card["correctness"]["pictures_of_annotations"] = matched
    if cost_usd is not None:
        card["cost_usd"] = cost_usd
    card["not_checked"] = not_checked(keep or [], missing=missing)
    if is_filtered:
        card["kept"] = keep_records(found, out, rules=rules, count=select, write=write or out / "kept.jsonl")
    write_columns(out / "metrics.parquet", found)
    write_card(out / "card.json", card)
    (out / "card.html").write_text(build_page(card, found, root=root), encoding="utf-8")
    print("\n".join([*summary(card), f"card  {out / 'card.html'}"]), file=sys.stderr)
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
    return [None if row in bad else read_record(row, raw)[0] for row, raw in enumerate(iter_json_records(found.path))]


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


def refuse_to_replace(out: Path, option: str, *others: Path) -> None:
    """DataError when a file to write is a folder, or is one of other files under another spelling, name or link."""
    if out.is_dir():
        raise DataError(f"{option} {out}: a folder. Give a file.")
    for path in others:
        if out.resolve() == path.resolve() or (out.exists() and path.exists() and out.samefile(path)):
            raise DataError(f"{option} {out}: this is {path}, which must not be overwritten. Give another file.")


def make_writable(folder: Path, option: str) -> None:
    """Make a folder that files are written to later.

    Raises:
        DataError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{option}: {folder} cannot be made ({error.strerror}). Give another place.") from error
    if not os.access(folder, os.W_OK):
        raise DataError(f"{option}: {folder} cannot be written to. Give another place.")


def peak_memory() -> int:
    """Largest resident bytes so far: this process, or a worker where that is more."""
    unit = 1 if sys.platform == "darwin" else 1024
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * unit


def list_filters() -> str:
    """Named filters and metrics, one a line."""
    lines = ["filters:", *(f"  {name:16} {', '.join(rules)}" for name, rules in NAMED.items())]
    return "\n".join([*lines, "metrics:", *(f"  {name:16} {text}" for name, text in MEANING.items())])


def summary(card: dict[str, Any]) -> list[str]:
    """What was found, what could not be read or compared, and what was kept; a line each."""
    faults = ", ".join(f"{count:,} {name}" for name, count in card["faults"].items() if count) or "no faults found"
    lines = [f"{card['records']:,} records: {faults}", *_unread(card), *_compared(card)]
    if "kept" in card:
        reasons = ", ".join(f"{name} {count:,}" for name, count in card["kept"]["reasons"].items())
        lines.append(
            f"kept {card['kept']['records']:,}, removed {card['kept']['removed']:,}"
            + (f" ({reasons})" if reasons else "")
        )
    return lines


def _unread(card: dict[str, Any]) -> list[str]:
    pictures, lines = card["diversity"]["pictures"], []
    if card["bad_records"]:
        lines.append(f"unreadable  {card['bad_records']:,} records, left out; the first: {card['first_bad']}")
    if card["ignored_keys"]:
        keys = ", ".join(f"{name} ({count:,})" for name, count in card["ignored_keys"].items())
        lines.append(f"ignored     keys that are none of a record's: {keys}")
    if pictures.get("unreadable"):
        lines.append(
            f"unreadable  {pictures['unreadable']:,} of {pictures['distinct']:,} pictures, of "
            f"{pictures['records_with_unreadable']:,} records; the first: {card['diversity']['first_unreadable']}"
        )
    if unknown := pictures.get("unreadable_of_evaluation_sets"):
        lines.append(f"unreadable  {unknown:,} evaluation pictures, compared with nothing")
    return lines


def _compared(card: dict[str, Any]) -> list[str]:
    correct = card["correctness"]
    lines = [
        f"annotations {source}: {count:,} {'records' if source == REGIONS else 'pictures'} of the dataset"
        for source, count in correct["pictures_of_annotations"].items()
    ]
    if correct["measured"]:
        lines.append(
            f"annotations tell of {correct['annotated_records']:,} of {card['records']:,} records, "
            f"{correct['records_with_claims']:,} make claims"
        )
    if card["not_checked"]:
        lines.append(f"not checked {', '.join(card['not_checked'])}: nothing was given to measure them with")
    return lines
