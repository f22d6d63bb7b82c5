"""``report.html`` of a run: one file to read, keep and send. What was trained, on what, how it went, what came out."""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import Any

from vlit.errors import DataError
from vlit.serve.markup import Markup, duration, measure, page, percent, short, tag
from vlit.serve.report_evaluation import evaluation_sections
from vlit.serve.report_training import curves_section, data_section, parts_section, samples_section
from vlit.serve.run_folder import RunFolder, is_number, read_run


def write_report(run_dir: Path) -> Path:
    """Write ``<run_dir>/report.html`` from whatever the folder holds (atomically) and return its path.

    Reads ``config.yaml, metrics.jsonl, validation.jsonl, parts.json, data_plan.json, summary.json`` and
    ``evaluations/*/{results.json,predictions.jsonl}``; sections without data are left out. DataError without a folder.
    """
    if not Path(run_dir).is_dir():
        raise DataError(f"{run_dir}: is no folder. Give the output_dir of a run.")
    run = read_run(Path(run_dir))
    target = run.path / "report.html"
    aside = run.path / f".report.html.{os.getpid()}.tmp"
    aside.write_text(render_report(run), encoding="utf-8")
    aside.replace(target)
    return target


def render_report(run: RunFolder) -> str:
    """The report's HTML."""
    sections = [
        ("evaluation", "Evaluation", evaluation_sections(run)),
        ("training", "Training", curves_section(run)),
        ("answers", "Answers during training", samples_section(run)),
        ("parts", "What was trained", parts_section(run)),
        ("data", "Data", data_section(run)),
        ("config", "Configuration", _config_section(run)),
    ]
    sections = [(key, title, body) for key, title, body in sections if body]
    name = _run_name(run)
    links = tag("nav", *(tag("a", title, href=f"#{key}") for key, title, _ in sections))
    notes = tag("div", *(tag("p", note) for note in run.notes), cls="note", role="note") if run.notes else None
    body = [tag("section", tag("h2", title), content, id=key) for key, title, content in sections]
    if not body:
        body = [tag("p", "This folder holds no results yet.", cls="soft")]
    return page(f"{name} · vlit report", tag("h1", name), _subtitle(run), links, notes, _headline(run), *body)


def _run_name(run: RunFolder) -> str:
    for line in run.config_text.splitlines():
        if line.startswith("name:"):
            return line.removeprefix("name:").strip().strip("'\"") or run.path.resolve().name
    return run.path.resolve().name


def _subtitle(run: RunFolder) -> Markup:
    rows = [row for stage in run.metrics.values() for row in stage]
    words = (
        [f"{len(run.metrics)} stage{'s' if len(run.metrics) != 1 else ''}: {', '.join(run.metrics)}"] if rows else []
    )
    if rows:
        words.append(f"{len(rows):,} steps")
    return tag("p", " · ".join(words), cls="soft") if words else Markup("")


def _tile(label: str, value: str, under: str = "", *, lead: bool = False) -> Markup:
    return tag(
        "div",
        tag("div", label, cls="label"),
        tag("div", value, cls="value"),
        tag("div", under, cls="under") if under else None,
        cls="tile lead" if lead else "tile",
    )


def _headline(run: RunFolder) -> Markup | None:
    """Tiles: what the model can do, what it can do without looking, and what that cost."""
    tiles: list[Markup] = []
    summary = run.summary
    best = headline_results(run)
    if best is not None:
        under = f"{percent(best['ci_low'])} to {percent(best['ci_high'])} · {best['n']:,} questions"
        tiles.append(_tile("Held-out accuracy", percent(best["accuracy"]), under, lead=True))
    elif is_number(summary.get("accuracy")):
        tiles.append(_tile("Held-out accuracy", percent(summary["accuracy"]), lead=True))
    rows = best.get("rows", {}) if best else {}
    for key, row, label in (
        ("blind_accuracy", "blind", "Without the picture"),
        ("shuffled_image_accuracy", "shuffled", "With another picture"),
        ("stage1_only_accuracy", "", "After stage 1 only"),
    ):
        value = summary.get(key, rows.get(row, {}).get("accuracy"))
        if is_number(value):
            tiles.append(_tile(label, percent(value)))
    for stage, metrics in list(run.metrics.items())[-1:]:
        held_out = [row["loss"] for row in run.validation.get(stage, []) if is_number(row.get("loss"))]
        train = [row["loss"] for row in metrics[-max(1, len(metrics) // 20) :] if is_number(row.get("loss"))]
        if train or held_out:
            under = f"{stage}, held out {measure(held_out[-1])}" if held_out else stage
            tiles.append(_tile("Final loss", measure(statistics.fmean(train or held_out[-1:])), under))
    trainable, total = trained_parameters(run)
    if total:
        tiles.append(_tile("Trained parameters", short(trainable), f"of {short(total)} in all"))
    tokens, images, seconds = (run_total(run, key) for key in ("tokens", "images", "seconds"))
    if tokens:
        tiles.append(_tile("Tokens seen", short(tokens), f"{short(images)} pictures" if images else ""))
    if is_number(summary.get("seconds")):
        tiles.append(_tile("Time", duration(summary["seconds"]), f"{duration(seconds)} of training" if seconds else ""))
    elif seconds:
        tiles.append(_tile("Training time", duration(seconds)))
    return tag("div", *tiles, cls="tiles") if tiles else None


def headline_results(run: RunFolder) -> dict[str, Any] | None:
    """The evaluation the summary speaks of; without a summary the last one."""
    for evaluation in reversed(run.evaluations):
        results = evaluation.results
        wanted = run.summary.get("accuracy")
        same = not is_number(wanted) or abs(results.get("accuracy", -1) - wanted) < 1e-9
        if same and all(is_number(results.get(key)) for key in ("accuracy", "ci_low", "ci_high", "n")):
            return results
    return None


def trained_parameters(run: RunFolder) -> tuple[int, int]:
    """Most parameters trained in any stage, and all parameters of the model."""
    stages = run.parts.values()
    trainable = max((sum(int(row.get("trainable", 0)) for row in rows) for rows in stages), default=0)
    return trainable, max((sum(int(row.get("parameters", 0)) for row in rows) for rows in stages), default=0)


def run_total(run: RunFolder, key: str) -> float:
    """Sum of a per-step metric over all stages."""
    return sum(row[key] for rows in run.metrics.values() for row in rows if is_number(row.get(key)))


def _config_section(run: RunFolder) -> Markup | None:
    blocks = []
    commands = run.summary.get("commands")
    if isinstance(commands, list) and commands:
        blocks.append(tag("p", "Commands that made this run:"))
        blocks.append(tag("pre", "\n".join(str(command) for command in commands), cls="card"))
    if run.config_text:
        text = tag("pre", run.config_text, cls="card")
        blocks.append(tag("details", tag("summary", "config.yaml, resolved: every value this run used"), text))
    return tag("div", *blocks) if blocks else None
