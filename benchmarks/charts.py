"""Pictures of committed measurements: ``python -m benchmarks.charts`` draws ``docs/img/`` from ``docs/measurements/``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"
CASES = {"stage1": "stage 1\n(captions)", "stage2": "stage 2\n(instructions)", "shared_image": "six records\nan image"}
COLOURS = {"vlit": "#0b6e4f", "transformers": "#b8b8b8", "trl": "#d8a25e"}


def draw_all(measurements: Path = DOCS / "measurements", pictures: Path = DOCS / "img") -> list[Path]:
    """Draw every picture whose measurement is there; returns the files written. FileNotFoundError when none is."""
    drawings = {
        "train_step.json": ("train_step.svg", train_step),
        "scaling.json": ("scaling.svg", scaling),
        "data_ablation.json": ("data_ablation.svg", data_ablation),
    }
    pictures.mkdir(parents=True, exist_ok=True)
    written = []
    for source, (name, draw) in drawings.items():
        if (measurements / source).is_file():
            draw(json.loads((measurements / source).read_text(encoding="utf-8")), pictures / name)
            written.append(pictures / name)
    if not written:
        raise FileNotFoundError(
            f"{measurements}: none of {', '.join(drawings)}; run benchmarks.train_step --json first"
        )
    return written


def train_step(result: dict[str, Any], path: Path) -> None:
    """Samples per second of each system as a multiple of transformers', one group of bars a case."""
    pyplot = _pyplot()
    rows = {(row["case"], row["system"]): row for row in result["rows"] if row["samples_s"] is not None}
    cases = [case for case in CASES if (case, "transformers") in rows]
    systems = [s for s in COLOURS if any((case, s) in rows for case in cases)]
    figure, axes = pyplot.subplots(figsize=(7, 3.2))
    width = 0.8 / len(systems)
    for place, system in enumerate(systems):
        for group, case in enumerate(cases):
            row = rows.get((case, system))
            if row is None:
                continue
            ratio = row["samples_s"] / rows[case, "transformers"]["samples_s"]
            x = group + (place - (len(systems) - 1) / 2) * width
            axes.bar(x, ratio, width * 0.92, color=COLOURS[system], label=system if group == 0 else None)
            words = f"{ratio:.1f}×\n{row['samples_s']:.1f}/s, {100 * row['peak_fraction']:.0f} %"
            axes.annotate(words, (x, ratio), (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=7)
    axes.set_xticks(range(len(cases)), [CASES[case] for case in cases], fontsize=8)
    axes.set_ylabel("samples/s, transformers = 1", fontsize=8)
    axes.margins(y=0.22)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    machine = result["machine"]
    axes.set_title(
        f"Training step, {machine['cpu']}, {machine['threads']} threads, bf16 (% = share of the matmul peak)",
        fontsize=8,
    )
    _save(figure, axes, path)


def scaling(result: dict[str, Any], path: Path) -> None:
    """Step time against packed tokens, and against records an image, with the straight line through each."""
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(1, 2, figsize=(7, 2.8))
    for axes, key, label in zip(
        panels, ("packed_tokens", "records_per_image"), ("tokens of the row", "records an image"), strict=True
    ):
        points = result[key]
        x = [point["x"] for point in points]
        axes.plot(x, [point["seconds"] for point in points], "o", color=COLOURS["vlit"], label="measured")
        line = result["lines"][key]
        ends = [0, max(x)]
        axes.plot(ends, [line["intercept"] + line["slope"] * end for end in ends], "-", color="#888888", linewidth=1,
                  label=f"line, R² = {line['r2']:.3f}")  # fmt: skip
        if "separate" in points[0]:
            axes.plot(x, [point["separate"] for point in points], "s", color="#d8a25e", label="separate records")
        axes.set_xlabel(label, fontsize=8)
        axes.set_ylabel("seconds, forward and backward", fontsize=8)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=7)
        axes.legend(frameon=False, fontsize=7)
    _save(figure, panels[0], path)


def data_ablation(rows: dict[str, Any], path: Path) -> None:
    """What the card says about each set on the axis that was tampered with, against what a model trained on it can do."""
    pyplot = _pyplot()
    clean = rows["clean"]
    panels = {
        "correctness": ("share of claims that agree", [n for n in rows if n == "clean" or n.startswith("wrong")]),
        "duplicates": ("share of duplicates", [n for n in rows if n == "clean" or n.startswith("duplicates")]),
        "templates": ("effective question templates", [n for n in rows if n == "clean" or n.startswith("one-")]),
    }
    figure, axes = pyplot.subplots(1, len(panels), figsize=(8, 2.9), sharey=True)
    for panel, (key, (label, names)) in zip(axes, panels.items(), strict=True):
        for name in names:
            row = rows[name]
            for score in row["accuracy"]:
                panel.plot(row[key], 100 * score, "o", color=COLOURS["vlit" if row is clean else "trl"], markersize=5)
            lowest = 100 * min(row["accuracy"])
            place, side = ((0, 7), "center") if row is clean else ((0, -14), "center")
            if key == "duplicates" and row is not clean:
                place, side = (-7, -3), "right"
            panel.annotate(name, (row[key], lowest), place, textcoords="offset points", ha=side, fontsize=7)
        panel.set_xlabel(label, fontsize=8)
        panel.margins(x=0.25)
        panel.tick_params(labelsize=7)
    axes[0].set_ylabel("held-out accuracy, %", fontsize=8)
    axes[0].set_ylim(0, 100)
    _save(figure, axes[0], path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "vlit"  # the same numbers give the same file
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, axes: Any, path: Path) -> None:
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    for written in draw_all():
        print(written)
