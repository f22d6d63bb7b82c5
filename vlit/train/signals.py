"""Signals that ask a run to stop: Ctrl-C, ``kill``, and the warning of a scheduler before it takes the machine away."""

from __future__ import annotations

import signal
import sys
import threading
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
    """The first signal that asked to stop, once one has; handlers are put back at the end.

    Schedulers and launchers send theirs several times, which is one request. A second SIGINT is a person who does not want
    to wait: it interrupts at once. Outside the main thread nothing is watched.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(signum: int, frame: FrameType | None) -> None:
        if received:
            if signum == signal.SIGINT == received[0]:
                raise KeyboardInterrupt
            return
        received.append(signum)
        print(f"\n{signal.Signals(signum).name}: finishing this step, then saving", file=sys.stderr)

    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    held = {signum: signal.signal(signum, note) for signum in watched}
    try:
        yield received
    finally:
        for signum, handler in held.items():
            signal.signal(signum, handler)
