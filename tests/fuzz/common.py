"""What all fuzzers share: mutations, a limit of time an example, and properties that tests and the soak run alike."""

from __future__ import annotations

import contextlib
import resource
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

SECONDS_AN_EXAMPLE = 60.0
"""Far above what an example takes (milliseconds; seconds for 179 million pixels): a run into it is a hang."""


class Hang(BaseException):
    """An example took longer than ``SECONDS_AN_EXAMPLE``. No code under test catches it."""


@dataclass(frozen=True)
class Property:
    """``check`` holds for every value of ``strategy``; ``examples`` is the share of the ordinary test run."""

    name: str
    strategy: st.SearchStrategy[Any]
    check: Callable[[Any], None]
    examples: int

    def run(self, *, examples: int | None = None, seed: int | None = None) -> int:
        """Check examples: always the same ones, or those of ``seed``. Returns how many were looked at."""
        looked_at = 0

        def one(value: Any) -> None:
            nonlocal looked_at
            looked_at += 1
            with time_limit():
                self.check(value)

        decorate = settings(
            max_examples=examples or self.examples,
            derandomize=seed is None,
            database=None,
            deadline=None,
            phases=(Phase.explicit, Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        test = decorate(given(self.strategy)(one))
        (test if seed is None else hypothesis.seed(seed)(test))()
        return looked_at


@contextlib.contextmanager
def time_limit(seconds: float = SECONDS_AN_EXAMPLE) -> Iterator[None]:
    def stop(signum: int, frame: Any) -> None:
        raise Hang(f"an example took more than {seconds} seconds")

    held = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, held)


def peak_memory() -> int:
    """Most bytes this process has held in memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@st.composite
def mutated(draw: st.DrawFn, originals: st.SearchStrategy[bytes], *, tokens: tuple[bytes, ...] = ()) -> bytes:
    """One to four damages of an original: cut off, bytes flipped, set, removed, repeated, or a token put in."""
    content = bytearray(draw(originals))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        length = draw(st.integers(1, 24))
        kind = draw(
            st.sampled_from(("cut", "flip", "set", "remove", "repeat", "zero", *(("token",) if tokens else ())))
        )
        if kind == "cut":
            del content[place:]
        elif kind == "flip" and content:
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set":
            content[place : place + length] = draw(st.binary(max_size=length))
        elif kind == "remove":
            del content[place : place + length]
        elif kind == "repeat":
            content[place:place] = content[place : place + length] * draw(st.sampled_from((1, 2, 50)))
        elif kind == "zero":
            content[place:] = bytes(len(content) - place)
        elif kind == "token":
            content[place : place + draw(st.sampled_from((0, 1, length)))] = draw(st.sampled_from(tokens))
    return bytes(content)
