"""A realistic run folder, made without training: two stages, two evaluations, and texts that try to break HTML."""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image, ImageDraw

EVIL = '</script><img src=x onerror="alert(1)">&amp; <b>'
COLOURS = {"red": "#f0322d", "green": "#32cd3c", "blue": "#466eff", "yellow": "#f5e132"}
KINDS = {
    "digit": (0.97, 0.10), "color": (0.995, 0.17), "count": (1.0, 0.25), "digit_of_color": (0.93, 0.11),
    "place_of_color": (0.96, 0.25), "description": (0.86, 0.0), "compare": (0.90, 0.01), "sum": (0.72, 0.0),
    "yes_no": (0.95, 0.5), "choice": (0.91, 0.26),
}  # fmt: skip
PER_KIND = 100


def make_run(root: Path, *, seed: int = 0) -> Path:
    """Write every file a report reads."""
    rng = Random(seed)
    root.mkdir(parents=True, exist_ok=True)
    names = _pictures(root / "images", rng)
    (root / "config.yaml").write_text(
        f"name: digits-two-stage\nseed: {seed}\n# {EVIL}\nmodel:\n  connector: {{type: mlp}}\n"
    )
    _write_lines(
        root / "metrics.jsonl", [*_metrics("align", 200, 4.9, 1.6, rng), *_metrics("instruct", 900, 2.4, 0.09, rng)]
    )
    _write_lines(
        root / "validation.jsonl", [*_validation("align", 200, 50, names), *_validation("instruct", 900, 100, names)]
    )
    _write(root / "parts.json", {"align": _parts(stage2=False), "instruct": _parts(stage2=True)})
    _write(root / "data_plan.json", {"align": _plan(1), "instruct": _plan(2)})
    best = _evaluate(root / "evaluations" / "digits-test", names, rng, KINDS, "instruct")
    weak = {kind: (chance + 0.08, chance) for kind, (_, chance) in KINDS.items()}
    first = _evaluate(root / "evaluations" / "digits-test-align", names, rng, weak, "align")
    summary = {
        "accuracy": best["accuracy"],
        "blind_accuracy": best["rows"]["blind"]["accuracy"],
        "shuffled_image_accuracy": best["rows"]["shuffled"]["accuracy"],
        "stage1_only_accuracy": first["accuracy"],
        "per_kind": {kind: row["accuracy"] for kind, row in best["per_kind"].items()},
        "seconds": 412.7,
        "commands": [
            "torchrun scripts/train.py --config configs/stage2.yaml",
            "python scripts/eval.py --benchmark digits",
        ],
    }
    _write(root / "summary.json", summary)
    return root


def _pictures(folder: Path, rng: Random) -> list[str]:
    folder.mkdir(exist_ok=True)
    for n in range(12):
        image = Image.new("RGB", (64, 64), (rng.randrange(50), rng.randrange(50), rng.randrange(50)))
        draw = ImageDraw.Draw(image)
        for quadrant in rng.sample(range(4), rng.randint(1, 4)):
            place = (32 * (quadrant % 2) + 6, 32 * (quadrant // 2) + 2)
            draw.text(place, str(rng.randrange(10)), fill=rng.choice(list(COLOURS.values())), font_size=24)
        image.save(folder / f"{n:03d}.png")
    return [f"images/{n:03d}.png" for n in range(12)]


def _metrics(stage: str, steps: int, start: float, end: float, rng: Random) -> list[dict[str, Any]]:
    rows = []
    for step in range(1, steps + 1):
        loss = (end + (start - end) * math.exp(-6 * step / steps)) * math.exp(rng.gauss(0, 0.12))
        tokens, seconds = rng.randint(3800, 4200), rng.uniform(0.18, 0.24)
        row = {
            "stage": stage, "step": step, "loss": loss, "grad_norm": 1.4 * loss * rng.uniform(0.7, 1.4) + 0.2,
            "lr": 4e-3 * min(1, step / (0.05 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps)),
            "label_tokens": tokens // 4, "tokens": tokens, "images": 32, "seconds": seconds,
            "tokens_per_second": tokens / seconds, "peak_fraction": 0.31 * rng.uniform(0.9, 1.1),
        }  # fmt: skip
        if stage == "instruct":
            row["loss_by_source"] = {"conversation": loss * 0.9, "detail": loss * 0.6, "reasoning": loss * 1.5}
        rows.append(row)
    return rows


def _validation(stage: str, steps: int, every: int, names: list[str]) -> list[dict[str, Any]]:
    rows = []
    for step in range(every, steps + 1, every):
        done = step / steps
        samples = [
            {"id": f"v{n}", "image": names[n], "question": "Which digit is at the top-left?", "answer": f"It is a {n}.",
             "prediction": f"It is a {n if done > 0.3 * (n + 1) else 7}." if done > 0.2 else "the the the"}
            for n in range(3)
        ]  # fmt: skip
        rows.append(
            {
                "stage": stage,
                "step": step,
                "loss": (2.0 if stage == "align" else 0.12) + 2 * math.exp(-6 * done),
                "samples": samples,
            }
        )
    return rows


def _parts(*, stage2: bool) -> list[dict[str, Any]]:
    def part(name: str, module: str, mode: str, parameters: int) -> dict[str, Any]:
        trained = mode != "frozen"
        return {
            "part": name, "module": module, "mode": mode, "parameters": parameters, "trainable": parameters * trained,
            "lr": 4e-3 if trained else None, "dtype": "float32", "sha256": "" if trained else "9f86d081884c7d659a2fea",
        }  # fmt: skip

    llm = "full" if stage2 else "frozen"
    return [
        part("vision", "CLIPVisionModel", "frozen", 842_368),
        part("connector", "Sequential", "full", 33_024),
        part("llm", "LlamaModel", llm, 852_224),
        part("embeddings", "Embedding, Linear", llm, 28_672),
    ]


def _plan(sources: int) -> dict[str, Any]:
    listed = [
        {"name": "captions", "records": 8000, "weight": 1.0, "per_epoch": 8000, "images": 8000, "quarantined": 0},
        {"name": EVIL, "records": 24000, "weight": 0.5, "per_epoch": 12000, "images": 8000, "quarantined": 3},
    ][:sources]
    return {
        "sources": listed, "records_per_epoch": 8000 * sources, "steps": 200, "tokens_mean": 121.4, "tokens_p50": 118,
        "tokens_p99": 241, "tokens_max": 310, "truncated_share": 0.0012, "supervised_share": 0.243,
    }  # fmt: skip


def _evaluate(
    folder: Path, names: list[str], rng: Random, kinds: dict[str, tuple[float, float]], checkpoint: str
) -> dict[str, Any]:
    """Drawn answers, scored and tabulated by the project's own functions."""
    from vlit.eval.scoring import Accuracy, per_kind_table

    folder.mkdir(parents=True)
    lines, rows = [], {}
    for row in ("image", "blind", "shuffled"):
        scored = []
        for kind, (level, chance) in kinds.items():
            for n in range(PER_KIND):
                correct = float(rng.random() < (level if row == "image" else chance))
                scored.append((kind, correct))
                question = f"Which digit is number {n}?" + (f" {EVIL}" if n == 1 else "")
                line = {
                    "question_id": f"{kind}-{n:04d}", "kind": kind, "question": question, "answer": "It is a 4.",
                    "image": [] if row == "blind" else names[n % len(names)], "row": row,
                    "prediction": "It is a 4." if correct else f"It is a 9. {EVIL}", "correct": correct,
                }  # fmt: skip
                lines.append(line)
        table = per_kind_table(scored, chance={kind: chance for kind, (_, chance) in kinds.items()})
        overall = Accuracy.of([score for _, score in scored], chance=0.2).to_dict()
        rows[row] = overall | {"per_kind": {kind: value.to_dict() for kind, value in table.items()}}
    results = rows["image"] | {
        "benchmark": "digits-test", "checkpoint": f"outputs/demo/{checkpoint}/model", "rows": rows,
        "settings": {"max_new_tokens": 64}, "macro_accuracy": rows["image"]["accuracy"],
    }  # fmt: skip
    _write(folder / "results.json", results)
    _write(folder / "timing.json", {"seconds": 28.5, "seconds_per_row": dict.fromkeys(rows, 9.5)})
    _write_lines(folder / "predictions.jsonl", lines)
    return results


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
