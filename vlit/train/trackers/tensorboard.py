"""TensorBoard event files in ``<run_dir>/tensorboard``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from vlit.config.component import ComponentConfig
from vlit.errors import ConfigError
from vlit.registry import TRACKERS
from vlit.train.tracker import scalars


@TRACKERS.register("tensorboard")
class TensorboardConfig(ComponentConfig):
    """Writes TensorBoard event files to `<output_dir>/tensorboard`."""

    type: Literal["tensorboard"] = "tensorboard"
    flush_seconds: int = 10
    """Rows reach the disk at least this often."""

    def build(self, **kwargs: Any) -> TensorboardTracker:
        return TensorboardTracker(flush_seconds=self.flush_seconds)


class TensorboardTracker:
    """Implements :class:`vlit.train.tracker.Tracker`; a resumed run adds an event file to the same folder."""

    def __init__(self, *, flush_seconds: int = 10) -> None:
        self.flush_seconds = flush_seconds
        self._writer: Any = None

    def start(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"trackers: tensorboard is not installed ({error}). pip install vlit[tensorboard]."
            ) from error
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), flush_secs=self.flush_seconds)
        text = json.dumps(dict(config), indent=2, default=str)
        self._writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()))

    def log(self, row: Mapping[str, Any]) -> None:
        numbers, step = scalars(row)
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
