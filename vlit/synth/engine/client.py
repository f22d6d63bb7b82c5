"""Between recipes and a teacher: cache, budget, pace, retries. Safe for many threads.

The order of one request: look into the cache; read its pictures; reserve its worst case; wait for its turn; note durably
that it leaves; send; store the body durably; only then parse it and settle what it did cost. So a request whose picture cannot
be used is rejected before it costs anything.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from vlit.data.image_paths import resolve_image
from vlit.errors import DataError, SynthError
from vlit.synth.engine.calls import CallLog
from vlit.synth.engine.parse import Rejected
from vlit.synth.engine.teacher import Ask, BrokenReply, Declined, Reply, SendFailed, Teacher, picture_hash

PICTURE = "picture"
"""Code of rejections for which a picture is the reason: it is refused, missing or damaged."""


class Unanswered(SynthError):
    """A request that was not answered after all retries; it is asked again by the next run."""


def picture_files(names: Sequence[str], root: Path) -> tuple[list[str], str]:
    """(files, "") of image references, or ([], why) where one of them leads out of ``root`` or its container is damaged."""
    try:
        return [str(resolve_image(name, root)) for name in names], ""
    except DataError as error:
        return [], str(error)


class Pace:
    """Spreads requests evenly so that neither requests nor tokens a minute are exceeded; can be held for all."""

    def __init__(
        self,
        requests_per_minute: float | None,
        tokens_per_minute: float | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """``sleep`` waits so many seconds; where it returns something true, nobody waits any more."""
        self._per_request = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._per_token = 60.0 / tokens_per_minute if tokens_per_minute else 0.0
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._next = self._hold = -float("inf")

    def wait(self, tokens: int) -> None:
        """Return when a request of ``tokens`` may leave, or when ``sleep`` says that none will."""
        with self._lock:
            start = max(self._clock(), self._next)
            self._next = start + max(self._per_request, tokens * self._per_token)
        while True:
            with self._lock:
                left = max(start, self._hold) - self._clock()
            if left <= 0 or self._sleep(left):
                return

    def hold(self, seconds: float) -> None:
        """Let nothing leave for ``seconds``."""
        with self._lock:
            self._hold = max(self._hold, self._clock() + seconds)


class Client:
    """One teacher with its limits, and the log of its calls."""

    def __init__(self, teacher: Teacher, log: CallLog, *, seed: int = 0) -> None:
        self.teacher, self.log = teacher, log
        limits = teacher.limits
        self.stopped = threading.Event()
        """Set to let no further request leave; those in flight are stored."""
        self._pace = Pace(limits.requests_per_minute, limits.tokens_per_minute, sleep=self.stopped.wait)
        self._slots = threading.Semaphore(limits.concurrency)
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._flying: dict[str, threading.Event] = {}

    def ask(self, ask: Ask) -> Reply:
        """The reply to a request, stored or fresh.

        Raises:
            Unanswered: all retries failed.
            Declined: the endpoint does not answer this request.
            BudgetExhausted: the next request could exceed the budget.
            Rejected: a picture cannot be used; nothing was reserved.
        """
        _check_files(ask)
        key = self.teacher.key(ask)
        while True:
            with self._lock:
                twin = self._flying.get(key)
                if twin is None:
                    mine = self._flying[key] = threading.Event()
                    break
            twin.wait()  # the same request is being asked by another thread; its reply will be ours
        try:
            with self._slots:
                return self._stored(key) or self._fresh(key, ask)
        finally:
            with self._lock:
                del self._flying[key]
            mine.set()

    def _stored(self, key: str) -> Reply | None:
        held = self.log.find(key)
        if held is None:
            return None
        try:
            return self._parse(*held)
        except BrokenReply:
            return None

    def _fresh(self, key: str, ask: Ask) -> Reply:
        try:
            send = self.teacher.ready(ask)
        except DataError as error:
            raise Rejected(PICTURE, str(error)) from error
        limits, bound = self.teacher.limits, self.teacher.most_tokens_in(ask)
        worst = limits.cost(bound, ask.max_tokens)
        reason, attempt = "", 0
        for attempt in range(limits.retries + 1):
            if attempt:
                self._back_off(attempt)
            try:
                number, body = self._send(key, ask, send, worst=worst)
            except SendFailed as failed:
                reason = str(failed)
                if failed.wait_s is not None:
                    if failed.pause_all:
                        self._pace.hold(failed.wait_s)
                    elif failed.again:
                        self.stopped.wait(failed.wait_s)
                if not failed.again:
                    break
                continue
            try:
                return self._parse(number, body, worst=worst)
            except BrokenReply as broken:
                reason = f"broken reply: {broken}"
        raise Unanswered(f"no answer after {attempt + 1} attempt{'s' * (attempt > 0)}: {reason}")

    def _send(self, key: str, ask: Ask, send: Callable[[], str], *, worst: int) -> tuple[int, str]:
        """Send once; what the failure of a request costs is settled here."""
        self.log.reserve(worst)
        try:
            self._pace.wait(self.teacher.likely_tokens_in(ask) + ask.max_tokens)
            if self.stopped.is_set():
                raise Unanswered("the run is stopping")
        except BaseException:
            self.log.release(worst)
            raise
        number = self.log.sent(key, worst)
        try:
            body = send()
        except SendFailed as failed:
            self.log.settle(number, worst if failed.charged else 0, ok=False, why=str(failed))
            raise
        except Declined as declined:
            self.log.settle(number, 0, ok=False, why=str(declined))
            raise
        except BaseException:
            self.log.settle(number, worst, ok=False, why="failed on this side")
            raise
        self.log.got(number, key, body)
        return number, body

    def _parse(self, number: int, body: str, *, worst: int | None = None) -> Reply:
        known = self.log.is_settled(number)
        try:
            reply = self.teacher.read(body)
        except BrokenReply as broken:
            if not known:
                cost = worst if worst is not None else self.log.totals.open.get(number, 0)
                self.log.settle(number, cost, ok=False, why=f"broken reply: {broken}")
            raise
        if not known:
            bound = worst if worst is not None else self.log.totals.open.get(number, 0)
            tokens = (reply.tokens_in or 0, reply.tokens_out or 0)
            is_known = reply.tokens_in is not None and reply.tokens_out is not None
            cost = self.teacher.limits.cost(*tokens) if is_known else bound
            self.log.settle(number, cost, ok=True, tokens=tokens)
            if cost > bound:
                raise SynthError(
                    f"request {number} was charged {tokens[0]} + {tokens[1]} tokens (${cost / 1e9:.6f}), more than its worst "
                    f"case of ${bound / 1e9:.6f}: the endpoint does not honour its token limit, or image_tokens is too low."
                )
        return reply

    def _back_off(self, attempt: int) -> None:
        """Exponential with full jitter on its upper half, so that threads do not come back together."""
        limits = self.teacher.limits
        longest = min(limits.max_backoff_s, limits.backoff_s * 2 ** (attempt - 1))
        with self._lock:
            share = self._random.uniform(0.5, 1.0)
        self.stopped.wait(longest * share)


def _check_files(ask: Ask) -> None:
    """Rejected unless every picture is a regular file whose bytes can be read."""
    for path in (image for message in ask.messages for image in message.images):
        if not os.path.isfile(path):
            raise Rejected(PICTURE, f"{path}: no such file, or no regular one. Check images:.")
        try:
            picture_hash(path)
        except OSError as error:
            raise Rejected(PICTURE, f"{path}: cannot be read ({error.strerror}). Check its permissions.") from error
