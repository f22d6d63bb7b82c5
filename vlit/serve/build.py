"""``vlit synth build``: recipes, one dataset, its card, what is kept of it, and the review page."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import orjson

from vlit.data.record import from_json
from vlit.errors import DataError
from vlit.serve.quality import measure_quality, metrics_of
from vlit.serve.synth import confirm, show_report, why_empty
from vlit.synth.engine.build import annotation_sources, build
from vlit.synth.engine.calls import NANO
from vlit.synth.engine.settings import BuildConfig
from vlit.synth.quality.filters import not_measured, parse_filters


def synth_build(settings: BuildConfig, *, yes: bool) -> Path | None:
    """Build, measure and filter; returns ``train.jsonl``, or None when some requests are unanswered.

    Raises:
        ConfigError: a filter that does not exist or cannot be measured here; found before anything is asked.
    """
    quality, out = settings.quality, Path(settings.out)
    if settings.world is not None:
        settings.world.build()
    sources = annotation_sources(settings)
    texts, folders = ([Path(path) for path in paths] for paths in (quality.eval_texts, quality.eval_images))
    missing = not_measured(annotations=bool(sources), eval_texts=bool(texts), eval_images=bool(folders))
    parse_filters(quality.keep, missing=missing)
    confirm({name: settings.settings_of(name) for name in settings.recipes}, yes=yes)
    kept = out / "train.jsonl"
    for old in (kept, metrics_of(kept)):
        old.unlink(missing_ok=True)  # of an earlier build: it must not be taken for this one's
    built = build(settings)
    for name, report in built.reports.items():
        print(f"-- {name}", file=sys.stderr)
        show_report(report, out / name)
    if built.records is None:
        return None
    if not built.records:
        raise DataError(
            "\n".join(why_empty(settings.settings_of(name), built.reports[name]) for name in settings.recipes)
        )
    spent = max(report.totals.spent for report in built.reports.values()) / NANO  # all recipes share one log of calls
    measure_quality(
        built.dataset, images=Path(settings.images), annotations=sources, eval_texts=texts, eval_images=folders,
        out=out / "quality", keep=quality.keep, select=quality.select, write=kept, cost_usd=spent or None,
    )  # fmt: skip
    print(table_of(built.dataset, kept), file=sys.stderr)
    return kept


def table_of(dataset: Path, kept: Path) -> str:
    """Records and turns of every type: made, and kept."""
    made, held = count_types(dataset), count_types(kept)
    lines = [f"{'type':<14}{'made':>10}{'kept':>10}{'turns kept':>12}"]
    for kind, (records, _) in sorted(made.items()):
        lines.append(f"{kind:<14}{records:>10,}{held[kind][0]:>10,}{held[kind][1]:>12,}")
    records, kept_records, turns = (sum(n) for n in zip(*((made[k][0], *held[k]) for k in made), strict=True))
    return "\n".join([*lines, f"{'all':<14}{records:>10,}{kept_records:>10,}{turns:>12,}"])


def count_types(path: Path) -> defaultdict[str, tuple[int, int]]:
    """(records, answers) by instruction type."""
    found: defaultdict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    with path.open("rb") as file:
        for line in file:
            record = from_json(orjson.loads(line))
            records, turns = found[record.instruction_type or "other"]
            answers = sum(turn.role == "assistant" for turn in record.turns)
            found[record.instruction_type or "other"] = records + 1, turns + answers
    return found
