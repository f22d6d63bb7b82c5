"""Report sections about training: curves, answers while it learned, the table of parts, the data plan."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from vlit.serve.charts import Point, Series, line_chart, smooth
from vlit.serve.markup import Markup, duration, join, measure, number, percent, picture, short, table, tag
from vlit.serve.run_folder import Row, RunFolder, curve, is_number, nested_curves
from vlit.types import IMAGE_PLACEHOLDER

MOST_SOURCES = 6
STEPS_SHOWN = 6
SMALL, SMALL_HEIGHT = 260, 150


def curves_section(run: RunFolder) -> Markup:
    """One block per stage: loss (train raw and smoothed, validation), loss by source, rate, gradient, speed."""
    return join(_stage_curves(run, stage) for stage in run.metrics)


def _stage_curves(run: RunFolder, stage: str) -> Markup:
    rows = run.metrics[stage]
    loss, held_out = curve(rows, "loss"), curve(run.validation.get(stage, []), "loss")
    sigma = max(1.5, len(loss) / 60)
    series = [
        Series("train, every step", loss, 1, "raw"),
        Series("train, smoothed", smooth(loss, sigma=sigma), 1),
    ]
    series.append(Series("held out", held_out, 2, "dots"))
    blocks = [tag("div", line_chart("Loss", series, subtitle="per supervised token", may_log=True), cls="card")]
    by_source = list(nested_curves(rows, "loss_by_source").items())
    if len(by_source) > 1:
        lines = [
            Series(name, smooth(points, sigma=max(1.5, len(points) / 50)), colour)
            for colour, (name, points) in enumerate(by_source[:MOST_SOURCES], start=1)
        ]
        more = f", {MOST_SOURCES} of {len(by_source)} sources" if len(by_source) > MOST_SOURCES else ""
        chart = line_chart("Loss by source", lines, subtitle=f"smoothed{more}", height=240, may_log=True)
        blocks.append(tag("div", chart, cls="card"))
    small = [_rate_chart(rows)]
    small.append(_small("Gradient norm", "before clipping", curve(rows, "grad_norm"), colour=4))
    small.append(
        _small("Speed", "tokens per second", curve(rows, "tokens_per_second"), colour=3, show=short, ticks=short)
    )
    peak = curve(rows, "peak_fraction")
    small.append(_small("Compute", "share of peak", peak, colour=5, show=percent, ticks=lambda y: percent(y, digits=0)))
    blocks.append(tag("div", *(tag("div", chart, cls="card") for chart in small if chart), cls="charts"))
    return join([tag("h3", f"Stage {stage}"), _stage_facts(rows, held_out), *blocks])


def _rate_chart(rows: list[Row]) -> Markup:
    """Learning rate; parts that share a curve share a line."""
    per_part = nested_curves([row for row in rows if isinstance(row.get("lr"), dict)], "lr")
    curves: dict[tuple[Point, ...], list[str]] = {}
    for part, points in per_part.items():
        curves.setdefault(tuple(points), []).append(part)
    lines = [
        Series(", ".join(parts), points, colour)
        for colour, (points, parts) in zip((2, 1, 3, 4, 5, 6), curves.items(), strict=False)
    ]
    if not lines:
        lines = [Series("learning rate", curve(rows, "lr"), 2)]
    return line_chart("Learning rate", lines, width=SMALL, height=SMALL_HEIGHT, show=number)


def _small(
    title: str, subtitle: str, points: list[Point], *, colour: int, show: Any = measure, ticks: Any = number
) -> Markup:
    lines = [
        Series(title, points, colour, "raw"),
        Series("smoothed", smooth(points, sigma=max(1.5, len(points) / 50)), colour),
    ]
    may_log = title == "Gradient norm"
    return line_chart(
        title, lines, subtitle=subtitle, width=SMALL, height=SMALL_HEIGHT, show=show, ticks=ticks, may_log=may_log
    )


def _stage_facts(rows: list[Row], held_out: Sequence[Point]) -> Markup:
    """Numbers a reader looks for first; the speed is the median step's."""
    tail = [row["loss"] for row in rows[-max(1, len(rows) // 20) :] if is_number(row.get("loss"))]
    speeds = [row["tokens_per_second"] for row in rows if is_number(row.get("tokens_per_second"))]
    totals = {
        key: sum(row[key] for row in rows if is_number(row.get(key)))
        for key in ("tokens", "label_tokens", "images", "seconds")
    }
    facts = [("Steps", f"{len(rows):,}")]
    if tail:
        facts.append(("Loss, last 5 % of steps", measure(statistics.fmean(tail))))
    if held_out:
        best = min(held_out, key=lambda point: point[1])
        facts.append(
            ("Held-out loss", f"{measure(held_out[-1][1])} (best {measure(best[1])} at step {number(best[0])})")
        )
    if totals["tokens"]:
        shown = f"{short(totals['tokens'])}, {percent(totals['label_tokens'] / totals['tokens'])} supervised"
        facts.append(("Tokens", shown))
    if totals["images"]:
        facts.append(("Pictures", short(totals["images"])))
    if totals["seconds"]:
        facts.append(("Time", duration(totals["seconds"])))
    for key, name in (("fill", "Fill of packed rows"), ("data_wait_share", "Waiting for data")):
        shares = [row[key] for row in rows if is_number(row.get(key))]
        if shares:
            facts.append((name, percent(statistics.fmean(shares))))
    if speeds:
        facts.append(("Speed", f"{short(statistics.median(speeds))} tokens/s"))
    return _facts(facts)


def _facts(facts: Sequence[tuple[str, Any]]) -> Markup:
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in facts), cls="facts")


def samples_section(run: RunFolder) -> Markup:
    """The fixed held-out records: what the model answered as training went on."""
    return join(_stage_samples(run, stage, rows) for stage, rows in run.validation.items())


def _stage_samples(run: RunFolder, stage: str, rows: list[Row]) -> Markup | None:
    with_samples = [row for row in rows if row.get("samples")]
    if not with_samples:
        return None
    every = (len(with_samples) - 1) / (STEPS_SHOWN - 1)
    shown = with_samples if every <= 1 else [with_samples[round(every * at)] for at in range(STEPS_SHOWN)]
    cards = []
    for sample in with_samples[-1]["samples"]:
        answers = []
        for row in shown:
            said = next((s.get("prediction") for s in row["samples"] if s.get("id") == sample.get("id")), None)
            if said is not None:
                answers.append((number(row["step"]), tag("div", said, cls="qa")))
        text = [
            _labelled("Question", str(sample.get("question", "")).replace(IMAGE_PLACEHOLDER, "").strip()),
            _labelled("Reference", sample.get("answer")),
            table(("Step", "Answer"), answers, cls="narrow-first"),
        ]
        cards.append(tag("div", pictures(run, sample.get("image")), tag("div", *text), cls="sample wide"))
    return join([tag("h3", f"Stage {stage}"), tag("div", *cards, cls="samples wide")])


def pictures(run: RunFolder, names: Any) -> Markup | None:
    """The pictures of a sample; ``names`` is a path, a list of paths, or empty."""
    listed = [names] if isinstance(names, str) and names else list(names or [])
    return tag("div", *(picture(run.image_path(str(name))) for name in listed), cls="pictures") if listed else None


def _labelled(label: str, text: Any) -> Markup:
    return tag("div", tag("b", label), text, cls="qa")


def parts_section(run: RunFolder) -> Markup:
    """Table of parts per stage: what was trained, how, and hashes of what was not."""
    return join(_stage_parts(stage, rows) for stage, rows in run.parts.items())


def _stage_parts(stage: str, rows: list[Row]) -> Markup:
    trainable = sum(int(row.get("trainable", 0)) for row in rows)
    total = sum(int(row.get("parameters", 0)) for row in rows)
    share = f"{short(trainable)} of {short(total)} parameters trained ({percent(trainable / total)})" if total else ""
    body = []
    for row in rows:
        mode = str(row.get("mode", ""))
        digest = str(row.get("sha256") or "")
        body.append(
            (
                row.get("part", ""),
                tag("code", row.get("module", "")),
                tag("span", mode, cls="badge" if mode == "frozen" else "badge good"),
                number(row.get("parameters", 0)),
                number(row.get("trainable", 0)),
                number(row["lr"]) if is_number(row.get("lr")) else "–",
                row.get("dtype", ""),
                tag("code", digest[:12], title=digest) if digest else "–",
            )
        )
    header = ("Part", "Module", "Mode", "Parameters", "Trained", "Learning rate", "Type", "SHA-256")
    return join(
        [
            tag("h3", f"Stage {stage}"),
            tag("div", tag("p", share, cls="soft small"), table(header, body, numeric=(3, 4, 5)), cls="card"),
        ]
    )


FACT_NAMES = {
    "records_per_epoch": "Records per epoch",
    "global_batch": "Records per step",
    "samples": "Samples looked at",
    "unsupervised": "of them without a supervised token",
    "images_mean": "Pictures per record",
    "steps": "Steps",
    "tokens_mean": "Tokens per record, mean",
    "tokens_p50": "median",
    "tokens_p99": "99th percentile",
    "tokens_max": "longest",
    "truncated_share": "Shortened records",
    "supervised_share": "Supervised tokens",
}


def data_section(run: RunFolder) -> Markup:
    """Sources of each stage with their share, and the lengths of its records."""
    return join(_stage_data(stage, plan) for stage, plan in run.data_plan.items())


def _stage_data(stage: str, plan: Row) -> Markup:
    sources = plan.get("sources") or []
    seen = [float(s.get("per_epoch", 0)) for s in sources]
    body = []
    for source, amount in zip(sources, seen, strict=True):
        share = amount / sum(seen) if sum(seen) else 0.0
        bar = tag("span", cls="share", style=f"width:{max(2, round(100 * share))}px")
        body.append(
            (
                source.get("name", ""),
                number(source.get("records", 0)),
                number(source.get("weight", 1.0)) if source.get("share") is None else "–",
                tag("span", bar, f" {percent(share)}"),
                number(source.get("images", "–")),
                tag(
                    "span", number(source.get("quarantined", 0)), cls="badge bad" if source.get("quarantined") else None
                ),
            )
        )
    header = ("Source", "Records", "Weight", "Share of the mixture", "Pictures", "Quarantined")
    facts = []
    for key, value in plan.items():
        if key != "sources" and not isinstance(value, (dict, list)):
            shown = percent(value) if key.endswith("_share") and is_number(value) else number(value)
            facts.append((FACT_NAMES.get(key, key.replace("_", " ")), shown))
    return join(
        [tag("h3", f"Stage {stage}"), tag("div", table(header, body, numeric=(1, 2, 4, 5)), _facts(facts), cls="card")]
    )
