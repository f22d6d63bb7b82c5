"""What a step measured: one JSON object a step, one readable line now and then, a bar for those who watch."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch

from vlit.durable import describe_os_error


def format_count(value: float) -> str:
    """41,234 -> ``41.2k``."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}"


def format_seconds(seconds: float) -> str:
    """4,321 -> ``1h12m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def memory_used(device: torch.device) -> tuple[float, float]:
    """(used, available in all) in GiB: peak GPU memory, or this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30, torch.cuda.mem_get_info(device)[1] / 2**30
    import psutil

    return psutil.Process().memory_info().rss / 2**30, psutil.virtual_memory().total / 2**30


def log_line(row: dict[str, Any], *, total_steps: int, eta_seconds: float, memory: tuple[float, float]) -> str:
    """The human line of a metrics row."""
    fields = [
        f"{row['stage']:<9} {row['step']:>5}/{total_steps}",
        f"loss {row['loss']:.3f}",
        f"|g| {row['grad_norm']:.2f}",
        f"lr {max(row['lr'].values()):.1e}",
        f"{format_count(row['tokens_per_second'])} tok/s",
        f"{row['images'] / max(row['seconds'], 1e-9):.0f} img/s",
        f"{100 * row['peak_fraction']:.0f}% of matmul peak",
        f"fill {100 * row['fill']:.1f}%",
        f"mem {memory[0]:.1f}/{memory[1]:.0f} GiB",
        f"eta {format_seconds(eta_seconds)}",
    ]
    return "  ".join(fields)


class LinesFile:
    """A file that grows by lines. On a full disk they wait for the next ones: training does not end for want of a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting, self._told = "", False
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, lines: str) -> None:
        """Whole lines, flushed."""
        self._waiting += lines
        size = self.path.stat().st_size if self.path.is_file() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._waiting)
        except OSError as error:
            if not self._told:
                print(f"warning: {describe_os_error(error, self.path)}; its lines are kept for later.", file=sys.stderr)
            self._told = True
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)  # no half line
            return
        self._waiting, self._told = "", False


class MetricsFile(LinesFile):
    """``metrics.jsonl``: appended row by row. On resume, rows past the checkpoint are taken back first."""

    def keep_until(self, stage: str, step: int) -> None:
        """Drop this stage's rows after ``step``, atomically, so that a resumed run has each step once."""
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").split("\n"):
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the end of the file, or a line cut short by a kill belongs to a step that will be done again
            if row.get("stage") != stage or row.get("step", 0) <= step:
                kept.append(line)
        aside = self.path.with_suffix(".writing")
        aside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(aside, self.path)

    def append(self, row: dict[str, Any]) -> None:
        """One row."""
        self.add(json.dumps(row) + "\n")


class Progress:
    """A bar on a terminal, plain lines elsewhere; a log line every ``every_seconds``."""

    def __init__(
        self, stage: str, *, done: int, total: int, stream: TextIO | None = None, every_seconds: float = 10.0
    ) -> None:
        from tqdm import tqdm

        self.stream = stream or sys.stderr
        self.bar = tqdm(
            total=total,
            initial=done,
            desc=stage,
            unit="step",
            file=self.stream,
            disable=not self.stream.isatty(),
            leave=False,
        )
        self.every_seconds = every_seconds
        self._last = 0.0

    def due(self, *, last_step: bool) -> bool:
        """Whether a log line is due now."""
        now = time.monotonic()
        if last_step or now - self._last >= self.every_seconds:
            self._last = now
            return True
        return False

    def advance(self, loss: float) -> None:
        self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self.bar.update()

    def write(self, line: str) -> None:
        """A line above the bar."""
        self.bar.write(line, file=self.stream)
        self.stream.flush()

    def close(self) -> None:
        self.bar.close()
