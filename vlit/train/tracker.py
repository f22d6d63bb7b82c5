"""Where metrics go besides ``metrics.jsonl``: what a tracker is, and how nested rows become flat names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """Receives the rows that the training loop also writes to JSONL. Used by the main process only."""

    def start(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        """Open the tracker for a run folder; called again with the same folder when the run resumes."""
        ...

    def log(self, row: Mapping[str, Any]) -> None:
        """One row of metrics. ``stage`` (text) and ``step`` (count within the stage) place it; numbers are recorded."""
        ...

    def finish(self) -> None:
        """Flush and close. Calling it twice, or without ``start``, does nothing."""
        ...


def flatten(row: Mapping[str, Any], *, prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> one level with ``/`` between the names: ``{"a": {"b": 1}}`` -> ``{"a/b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, prefix=f"{name}/")
        else:
            flat[name] = value
    return flat


def scalars(row: Mapping[str, Any]) -> tuple[dict[str, float], int]:
    """Numbers of a row under ``<stage>/<name>`` and the row's step (0 without one).

    Steps start again in every stage, hence the stage in the name. Texts and lists stay in the JSONL files.
    """
    stage = f"{row['stage']}/" if row.get("stage") else ""
    step = int(row.get("step") or 0)
    rest = {key: value for key, value in row.items() if key not in ("stage", "step")}
    numbers = {
        f"{stage}{name}": float(value) for name, value in flatten(rest).items() if isinstance(value, (int, float))
    }
    return numbers, step
