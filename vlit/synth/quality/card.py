"""The quality card: figures of a dataset by axis, and the files that hold them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vlit.data.json_stream import iter_json_records
from vlit.durable import replace_file, write_file
from vlit.synth.quality.filters import Rule
from vlit.synth.quality.scan import Measured, entropy
from vlit.synth.quality.text import FIELDS

TOP_VERBS, TOP_NOUNS = 20, 4
"""Root verbs and nouns of each that are listed, as in MIMIC-IT's diversity report (arXiv:2306.05425 §3.4)."""
FAULTS = ("wrong_exists", "wrong_count", "wrong_colour", "wrong_place", "wrong_box", "wrong_yes_no", "leaks", "duplicate",
          "eval_text", "eval_image")  # fmt: skip
BY_MODELS = ("loss", "loss_blind", "gain", "clip_score")
BINS = 20


def build_card(found: Measured, *, peak_bytes: int | None = None) -> dict[str, Any]:
    """What ``card.json`` holds."""
    numbers, tally = found.numbers, found.tally
    verdicts = tally.verdicts
    judged = sum(verdicts.values())
    return {
        "dataset": found.path.name,
        "records": len(found),
        "bad_records": len(tally.bad),
        "first_bad": f"{found.path.name}#{tally.bad[0][0]}: {tally.bad[0][1]}" if tally.bad else None,
        "ignored_keys": dict(tally.ignored.most_common()),
        "correctness": {
            "measured": "correctness" in numbers,
            "mean": _mean(numbers.get("correctness")),
            "annotated_records": int(np.nansum(numbers["annotated"])) if "annotated" in numbers else None,
            "records_with_claims": int(np.nan_to_num(numbers["claims"]).astype(bool).sum())
            if "claims" in numbers
            else 0,
            "claims": {
                check: {"all": count, "wrong": tally.wrong[check]} for check, count in tally.claims.most_common()
            },
            "yes_share": verdicts["yes"] / judged if judged else None,
            "judgements": judged,
            "judged": {"mean": _mean(numbers["judged"]), "records": int(np.isfinite(numbers["judged"]).sum())},
            "leaking_records": int((numbers["leaks"] > 0).sum()),
        },
        "diversity": {
            "distinct": {f"distinct_{n}": _share(d, t) for n, (d, t) in enumerate(_pairs(found), start=1)},
            "roots": _roots(tally.roots),
            "different_roots": len(tally.roots),
            "templates": found.templates,
            "balance": {name: entropy(Counter(found.fields[name])) for name in ("kind", "domain", "instruction_type")},
            "groups": {
                name: dict(Counter(found.fields[name]).most_common(30))
                for name in ("kind", "domain", "instruction_type")
            },
            "duplicates": int((found.earlier >= 0).sum()),
            "exact_duplicates": int(((found.earlier >= 0) & (numbers["duplicate"] >= 1)).sum()),
            "pictures": found.pictures,
            "first_unreadable": found.first_unreadable,
        },
        "complexity": {
            name: _summary(numbers[name])
            for name in ("complexity", "turns", "question_words", "answer_words", "objects", "relations", "reasoning")
        },
        "visual_dependence": {"mean": 1 - (_mean(numbers["blind"]) or 0.0), "guesser": "majority answer of a template"},
        "contamination": {
            name: int((numbers[name] > 0).sum()) if name in numbers else None for name in ("eval_text", "eval_image")
        },
        "models": {name: _summary(numbers[name]) for name in BY_MODELS if name in numbers}
        | ({"spread": found.spread} if found.spread else {}),
        "provenance": {
            "licences": dict(Counter(name or "unknown" for name in found.fields["licence"]).most_common(20)),
            "sources": dict(Counter(name or "unknown" for name in found.fields["source"]).most_common(20)),
            "cost_usd": float(np.nansum(numbers["cost_usd"])) if np.isfinite(numbers["cost_usd"]).any() else None,
        },
        "quality": _summary(numbers["quality"]),
        "faults": {name: int((numbers[name] > 0).sum()) for name in FAULTS if name in numbers},
        "histograms": {
            name: _histogram(numbers[name])
            for name in ("quality", "correctness", "complexity", "blind", "answer_words", *BY_MODELS)
            if name in numbers
        },
        "seconds": {name: round(value, 2) for name, value in found.seconds.items()},
        "peak_memory_bytes": peak_bytes,
    }


def _pairs(found: Measured) -> Iterator[tuple[float, int]]:
    return zip(found.distinct, found.tally.ngrams, strict=True)


def _share(distinct: float, total: int) -> float | None:
    return min(1.0, distinct / total) if total else None


def _mean(column: np.ndarray | None) -> float | None:
    return float(np.nanmean(column)) if column is not None and np.isfinite(column).any() else None


def _summary(column: np.ndarray) -> dict[str, float]:
    held = column[np.isfinite(column)]
    if not len(held):
        return {}
    low, middle, high = np.percentile(held, (5, 50, 95))
    return {"mean": float(held.mean()), "p5": float(low), "median": float(middle), "p95": float(high)}


def _histogram(column: np.ndarray) -> dict[str, list[float]]:
    held = column[np.isfinite(column)]
    top = max(1.0, float(np.percentile(held, 99)) if len(held) else 1.0)
    counts, edges = np.histogram(held.clip(0, top), BINS, (0, top))
    return {"counts": counts.tolist(), "edges": [round(float(edge), 4) for edge in edges]}


def _roots(roots: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """The most frequent verbs, each with its most frequent nouns."""
    verbs: Counter[str] = Counter()
    nouns: dict[str, Counter[str]] = {}
    for (verb, noun), count in roots.items():
        verbs[verb] += count
        nouns.setdefault(verb, Counter())[noun] += count
    return {verb: dict(nouns[verb].most_common(TOP_NOUNS)) for verb, _ in verbs.most_common(TOP_VERBS)}


def write_columns(path: Path, found: Measured, kept: np.ndarray | None = None) -> None:
    """Every metric of every record (or of those kept) as Parquet: ``row``, ``id``, text fields, numbers."""
    import pyarrow as pa
    from pyarrow import parquet

    columns: dict[str, Any] = {"row": pa.array(np.arange(len(found)))}
    columns |= {name: pa.array(found.fields[name]).dictionary_encode() for name in FIELDS if name != "id"}
    columns |= {"id": pa.array(found.fields["id"]), "earlier": pa.array(found.earlier)}
    columns |= {name: pa.array(values) for name, values in found.numbers.items()}
    aside = path.with_name(f".{path.name}.writing")
    table = pa.table(columns)
    parquet.write_table(table if kept is None else table.filter(pa.array(kept)), aside)
    aside.replace(path)


def write_card(path: Path, card: dict[str, Any]) -> None:
    """``card.json``."""
    replace_file(path, json.dumps(card, indent=2, ensure_ascii=False) + "\n")


def write_kept(source: Path, out: Path, kept: np.ndarray) -> int:
    """Copy the kept records as they are, one a line; complete or as before. Returns their number."""
    from vlit.durable import sync_folder

    aside = out.with_name(f".{out.name}.writing")
    write_file(aside, (raw.replace(b"\n", b" ") + b"\n" for raw, keep in zip(_raw(source), kept, strict=True) if keep))
    aside.replace(out)
    sync_folder(out.parent)
    return int(kept.sum())


def _raw(source: Path) -> Iterable[bytes]:
    return (raw.strip() for raw in iter_json_records(source))


def removal_report(
    out: Path, found: Measured, kept: np.ndarray, rules: dict[Rule, np.ndarray], *, selected: bool
) -> dict[str, int]:
    """Write one line a removed record (row, id, reasons); return records by reason."""
    bad = dict(found.tally.bad)
    reasons: Counter[str] = Counter()

    def lines() -> Iterator[bytes]:
        for row in np.flatnonzero(~kept).tolist():
            why = [
                (str(rule), rule.reason(found.numbers[rule.metric][row]))
                for rule, keeps in rules.items()
                if not keeps[row]
            ]
            if row in bad:
                why = [("unreadable", bad[row])]
            if not why and selected:
                why = [("not selected", "others of more quality or of rarer groups were taken")]
            reasons.update(name for name, _ in why)
            entry = {"row": row, "id": found.fields["id"][row], "reasons": [text for _, text in why]}
            if found.earlier[row] >= 0:
                entry["repeats"] = found.fields["id"][found.earlier[row]]
            yield json.dumps(entry, ensure_ascii=False).encode() + b"\n"

    write_file(out, lines())
    return dict(reasons)
