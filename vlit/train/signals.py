"""Signals that ask a run to stop: Ctrl-C, ``kill``, and the warning of a scheduler before it takes the machine away."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved. ``exit_code`` follows the shell's convention (128 + signal)."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; run the same command again to continue")
        self.exit_code = 128 + signum


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Signals that arrived; a second SIGINT interrupts at once. Handlers are put back at the end."""
    received: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        if received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signum)
        print(f"\n{signal.Signals(signum).name}: finishing this step, then saving", file=sys.stderr)

    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    held = {signum: signal.signal(signum, note) for signum in watched}
    try:
        yield received
    finally:
        for signum, handler in held.items():
            signal.signal(signum, handler)
