"""A whole two-stage run on tiny parts and self-made pictures: seconds on one core, the same code as a real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.tiny import build_encoder, build_llm
from vlit.config.load import apply_override, validate_config
from vlit.config.schema import RunConfig

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "grey": (128, 128, 128)}


def write_dataset(folder: Path, *, records: int = 24) -> Path:
    """LLaVA JSON with one image, two images, text only and several turns; pictures 20 x 28 px of one colour + noise."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "data.json"
    if path.is_file():
        return path
    generator = np.random.default_rng(0)
    names = list(COLOURS)
    rows: list[dict[str, Any]] = []
    for number in range(records):
        colours = [names[generator.integers(len(names))] for _ in range(2)]
        files = []
        for place, colour in enumerate(colours):
            noise = generator.integers(-20, 20, (28, 20, 3))
            pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
            files.append(f"{number:03d}_{place}.png")
            Image.fromarray(pixels).save(folder / files[-1])
        if number % 4 == 3:
            turns, images = [("What is two and two?", "It is four."), ("Sure?", "Yes.")], []
        elif number % 4 == 2:
            turns, images = [("<image>\n<image>\nTwo colours?", f"{colours[0]} and {colours[1]}")], files
        else:
            turns, images = [("<image>\nWhich colour?", colours[0]), ("Are you sure?", "Yes, I am.")], files[:1]
        conversation = [
            {"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)
        ]
        row: dict[str, Any] = {"id": f"r{number}", "conversations": conversation}
        if images:
            row["image"] = images if len(images) > 1 else images[0]
        rows.append(row)
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def write_captions(folder: Path) -> Path:
    """One question and one answer a record, on the pictures of :func:`write_dataset` (stage 1's kind of data)."""
    rows = json.loads(write_dataset(folder).read_text(encoding="utf-8"))
    captions = [row | {"conversations": row["conversations"][:2]} for row in rows if isinstance(row.get("image"), str)]
    path = folder / "captions.json"
    path.write_text(json.dumps(captions), encoding="utf-8")
    return path


def tiny_run(tiny_dir: Path, output: Path, *overrides: str, llm: str = "llama", encoder: str = "clip") -> RunConfig:
    """Two stages of six steps: alignment of an MLP, then connector and language model."""
    data = write_dataset(tiny_dir / "dataset")
    source = [{"path": str(data), "name": "colours"}]
    raw: dict[str, Any] = {
        "name": "tiny",
        "output_dir": str(output),
        "model": {
            "encoder": {"type": "hf", "path": str(build_encoder(encoder, tiny_dir / encoder))},
            "connector": {"type": "mlp"},
            "llm": {"type": "hf", "path": str(build_llm(llm, tiny_dir / llm))},
        },
        "data": {
            "template": "v1",
            "max_tokens": 1024,
            "num_workers": 0,
            "cache_dir": str(tiny_dir / "cache"),
            "check_samples": 8,
        },
        "stages": {
            "align": {
                "data": source,
                "lr": 2e-3,
                "global_batch": 6,
                "max_steps": 6,
                "checkpoint": {"every_steps": 2},
            },
            "instruct": {
                "data": source,
                "lr": 1e-3,
                "global_batch": 4,
                "max_steps": 6,
                "tuning": {"connector": "full", "llm": "full"},
                "checkpoint": {"every_steps": 2},
            },
        },
        "runtime": {"device": "cpu", "precision": "fp32", "num_threads": 1},
    }
    for override in overrides:
        apply_override(raw, override)
    return validate_config(raw, name="tiny")


def metrics_of(run: RunConfig) -> list[dict[str, Any]]:
    """Rows of ``metrics.jsonl``."""
    text = (Path(run.output_dir) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def losses_of(run: RunConfig) -> list[tuple[str, int, float]]:
    """(stage, step, loss) of every step."""
    return [(row["stage"], row["step"], row["loss"]) for row in metrics_of(run)]
