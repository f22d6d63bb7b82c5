"""What a run folder holds, read for a report. Every file is optional; what cannot be read is noted, not fatal."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(slots=True)
class Evaluation:
    """One folder under ``evaluations/``: its results and, when there are any, its single answers."""

    name: str
    results: Row
    predictions: list[Row]


@dataclass(slots=True)
class RunFolder:
    """Contents of a run folder. ``metrics`` and ``validation`` are by stage, in the order the stages ran."""

    path: Path
    config_text: str = ""
    metrics: dict[str, list[Row]] = field(default_factory=dict)
    validation: dict[str, list[Row]] = field(default_factory=dict)
    parts: dict[str, list[Row]] = field(default_factory=dict)
    data_plan: dict[str, Row] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)
    summary: Row = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def stages(self) -> list[str]:
        """Names of all stages that any file mentions, training order first."""
        return list(dict.fromkeys([*self.metrics, *self.parts, *self.data_plan, *self.validation]))

    def image_path(self, name: str) -> Path:
        """A picture named in a file of the run: absolute, relative to the run, or to where its commands were started."""
        beside = self.path / name
        return beside if beside.is_file() else Path(name)


def read_run(path: Path) -> RunFolder:
    """Read a run folder. Problems (torn lines, non-finite losses) end up in ``notes`` for the reader of the report."""
    run = RunFolder(path)
    config = path / "config.yaml"
    run.config_text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    run.metrics = _by_stage(read_jsonl(path / "metrics.jsonl", run.notes))
    run.validation = _by_stage(read_jsonl(path / "validation.jsonl", run.notes))
    run.parts = read_json(path / "parts.json", run.notes)
    run.data_plan = read_json(path / "data_plan.json", run.notes)
    run.summary = read_json(path / "summary.json", run.notes)
    folder = path / "evaluations"
    for results in sorted(folder.glob("*/results.json")) if folder.is_dir() else []:
        loaded = read_json(results, run.notes)
        if loaded:
            loaded |= read_json(results.with_name("timing.json"), run.notes)
            answers = list(read_jsonl(results.with_name("predictions.jsonl"), run.notes))
            run.evaluations.append(Evaluation(results.parent.name, loaded, answers))
    for stage, rows in run.metrics.items():
        bad = [row["step"] for row in rows if not is_number(row.get("loss"))]
        if bad:
            run.notes.append(f"{stage}: {len(bad)} step(s) without a finite loss, first at step {bad[0]}.")
    return run


def read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    """A JSON object, or an empty one (with a note unless the file is simply absent)."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read and is left out: {error}")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{path.name} holds a {type(value).__name__} instead of an object and is left out.")
        return {}
    return value


def read_jsonl(path: Path, notes: list[str]) -> Iterator[Row]:
    """Objects of a JSONL file; damaged lines are counted in a note (the last one may be cut short by a kill)."""
    if not path.is_file():
        return
    damaged: list[int] = []
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                yield row
            else:
                damaged.append(number)
    if damaged:
        notes.append(f"{path.name}: {len(damaged)} unreadable line(s) left out, first line {damaged[0]}.")


def _by_stage(rows: Iterator[Row]) -> dict[str, list[Row]]:
    """Rows per stage in step order. Of a step that is there twice (repeated after a kill) the last counts."""
    stages: dict[str, dict[int, Row]] = {}
    for row in rows:
        step = row.get("step")
        if isinstance(step, int):
            stages.setdefault(str(row.get("stage", "train")), {})[step] = row
    return {stage: [steps[step] for step in sorted(steps)] for stage, steps in stages.items()}


def is_number(value: Any) -> bool:
    """True for finite ints and floats."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def curve(rows: list[Row], key: str) -> list[tuple[float, float]]:
    """``(step, value)`` pairs of a metric where it is a finite number."""
    return [(float(row["step"]), float(row[key])) for row in rows if is_number(row.get(key))]


def nested_curves(rows: list[Row], key: str) -> dict[str, list[tuple[float, float]]]:
    """Curves of a metric that is a mapping (``loss_by_source``), by its keys, largest number of points first."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in (row.get(key) or {}).items():
            if is_number(value):
                curves.setdefault(str(name), []).append((float(row["step"]), float(value)))
    return dict(sorted(curves.items(), key=lambda item: -len(item[1])))
