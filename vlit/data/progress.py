"""One clear line a start-up phase, on stderr: a moving bar on a terminal, a single finished line elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def phase(name: str, *, total: float | None, unit: str, show: bool = True) -> Iterator[Callable[[float], None]]:
    """Times a phase. Yields ``report(amount done since the last call)``; amounts are in ``unit`` (``bytes`` are shown
    as MB). Phases under a second leave no line where there is no terminal.
    """
    done = 0.0
    started = time.perf_counter()
    bar = _bar(name, total, unit) if show and sys.stderr.isatty() else None

    def report(amount: float) -> None:
        nonlocal done
        done += amount
        if bar is not None:
            bar.update(amount)

    try:
        yield report
    finally:
        if bar is not None:
            bar.close()
    seconds = time.perf_counter() - started
    if show and (bar is not None or seconds >= 1.0):
        amount, shown = (done / 1e6, "MB") if unit == "bytes" else (done, unit)
        print(f"{name}: {amount:,.0f} {shown} in {seconds:.1f} s", file=sys.stderr, flush=True)


class _bar:
    """A rich progress bar with an ``update(amount)`` of plain numbers."""

    def __init__(self, name: str, total: float | None, unit: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        scale, shown = (1e-6, "MB") if unit == "bytes" else (1.0, unit)
        self._scale = scale
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.completed:,.0f} " + shown),
            TimeElapsedColumn(),
            console=Console(file=sys.stderr),
            transient=True,
        )
        self._task = self._progress.add_task(name, total=None if total is None else total * scale)
        self._progress.start()

    def update(self, amount: float) -> None:
        self._progress.update(self._task, advance=amount * self._scale)

    def close(self) -> None:
        self._progress.stop()
