"""What each ingredient of the demo is worth: every row of the table is a run of its own, scored on the validation split.

Each run resumes or is skipped when it is finished, so the command can be stopped and started again. The test split is left
alone: ablations choose between designs, and it may be looked at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlit.config.load import load_config
from vlit.errors import ConfigError, did_you_mean
from vlit.serve.demo import evaluation_command, run_command, training_command

CONFIG = "configs/stage2.yaml"
SMALL_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Variant:
    """One row: what is changed against the demo, as command-line overrides."""

    name: str
    what: str
    overrides: tuple[str, ...]


def variants(output_dir: Path, *, instruct_steps: int, equal_time_steps: int, small_records: int) -> list[Variant]:
    """All rows. ``equal_time_steps`` is the number of stage-2 steps that take as long as both stages of the demo."""
    no_stage1 = "stages.align=null"
    small = f"stages.instruct.data.0.max_records={small_records}"
    random_encoder = f"model.encoder.path={output_dir / 'random_clip'}"
    return [
        Variant("demo", "both stages, MLP connector", ()),
        Variant("random-encoder", "encoder with random weights", (random_encoder,)),
        Variant("no-stage1-equal-steps", f"no stage 1, {instruct_steps} steps of stage 2", (no_stage1,)),
        Variant(
            "no-stage1-equal-time",
            f"no stage 1, {equal_time_steps} steps of stage 2 (the time of both stages)",
            (no_stage1, f"stages.instruct.max_steps={equal_time_steps}"),
        ),
        Variant("small-data", f"both stages, {small_records} stage-2 records (5 %)", (small,)),
        Variant("small-data-no-stage1", f"no stage 1, {small_records} stage-2 records (5 %)", (no_stage1, small)),
        Variant("linear", "linear connector", ("model.connector={type: linear}",)),
        Variant(
            "qformer",
            "Q-Former connector: 16 queries, 2 layers",
            (
                "model.connector={type: qformer, num_queries: 16, width: 128, layers: 2, heads: 4, cross_attention_every: 1}",
            ),
        ),
    ]


def run_ablation(output_dir: Path, overrides: Sequence[str], *, only: str | None = None) -> dict[str, Any]:
    """Train and score every variant; writes ``ablation.json`` and ``ablation.md`` after each one."""
    base = load_config(CONFIG, overrides)
    world = str(getattr(base.world, "root", "outputs/world/digits"))
    if base.world is not None:
        base.world.build()
    _random_encoder(str(getattr(base.model.encoder, "path", "")), output_dir / "random_clip", seed=base.seed)
    steps = base.stages["instruct"].max_steps or 1
    records = len(json.loads(Path(base.stages["instruct"].data[0].path).read_text(encoding="utf-8")))
    rows: dict[str, Any] = {}
    names = None if only is None else only.split(",")
    equal_time = steps
    small = max(1, round(SMALL_SHARE * records))
    plan = variants(output_dir, instruct_steps=steps, equal_time_steps=equal_time, small_records=small)
    unknown = set(names or ()) - {v.name for v in plan}
    if unknown:
        name = sorted(unknown)[0]
        raise ConfigError(f'--only: no run is called "{name}". {did_you_mean(name, [v.name for v in plan])}')
    for number in range(len(plan)):
        variant = plan[number]
        if names is not None and variant.name not in names:
            continue
        rows[variant.name] = _run(variant, output_dir, overrides, world)
        if variant.name == "demo":
            align, instruct = (rows["demo"]["stages"][s] for s in ("align", "instruct"))
            equal_time = round(steps * (align["seconds"] + instruct["seconds"]) / instruct["seconds"])
            plan = variants(output_dir, instruct_steps=steps, equal_time_steps=equal_time, small_records=small)
        _write(output_dir, rows)
    return rows


def _run(variant: Variant, output_dir: Path, overrides: Sequence[str], world: str) -> dict[str, Any]:
    folder = output_dir / variant.name
    run_command(training_command(CONFIG, [f"output_dir={folder}", *overrides, *variant.overrides]), [])
    out = folder / "evaluations" / "instruct-validation"
    run_command(
        evaluation_command(folder / "instruct" / "model", out, rows="image", split="validation", world=world), []
    )
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    stages = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/done.json"))
    }
    return {
        "what": variant.what,
        "accuracy": results["accuracy"],
        "ci": [results["ci_low"], results["ci_high"]],
        "n": results["n"],
        "per_kind": {kind: row["accuracy"] for kind, row in results["per_kind"].items()},
        "stages": {name: {key: done[key] for key in ("steps", "seconds", "tokens")} for name, done in stages.items()},
    }


def _random_encoder(source: str, folder: Path, *, seed: int) -> None:
    """A CLIP of the same shape as ``source`` whose weights were never trained."""
    if (folder / "config.json").is_file():
        return
    import torch
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(AutoConfig.from_pretrained(source))
    aside = folder.with_name(f".{folder.name}.writing")
    model.save_pretrained(aside)
    AutoImageProcessor.from_pretrained(source).save_pretrained(aside)
    aside.rename(folder)


def _write(output_dir: Path, rows: dict[str, Any]) -> None:
    for name, text in {"ablation.json": json.dumps(rows, indent=2), "ablation.md": table(rows)}.items():
        aside = output_dir / f".{name}.writing"
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, output_dir / name)
    print(table(rows))


def table(rows: dict[str, Any]) -> str:
    """Markdown: accuracy with its 95 % interval, training time, and each kind's accuracy."""
    if not rows:
        return ""
    kinds = list(next(iter(rows.values()))["per_kind"])
    lines = [
        "| run | what | all | 95 % interval | training s | " + " | ".join(kinds) + " |",
        "|---|---|---|---|---|" + "---|" * len(kinds),
    ]
    for name, row in rows.items():
        seconds = sum(stage["seconds"] for stage in row["stages"].values())
        low, high = row["ci"]
        cells = " | ".join(f"{100 * row['per_kind'][kind]:.0f}" for kind in kinds)
        interval = f"{100 * low:.1f}-{100 * high:.1f}"
        lines.append(f"| {name} | {row['what']} | {100 * row['accuracy']:.1f} | {interval} | {seconds:.0f} | {cells} |")
    return "\n".join(lines) + "\n"
