"""Every request to a teacher: what it may cost, what came back, what it did cost. One journal, three kinds of lines::

    {"sent": 7, "key": ..., "reserve": 5400}      before the request leaves
    {"got": 7, "key": ..., "body": "..."}         the reply as it came, before anybody parses it
    {"settled": 7, "cost": 1210, "in": .., "out": .., "ok": true}

From these lines alone follow the budget and the cache of replies. Money is whole nano-dollars, so sums are exact.

*The cap.* A request begins only when what is spent, what is reserved and its own worst case fit into the cap together. A
request without an outcome (the process was killed, the connection broke after it left) counts with its whole
reservation for ever, because the endpoint may have charged it. So the cap holds over any number of kills, as long as the
endpoint honours the token limit it was given and charges the configured prices.

*Paid once.* A reply that was stored answers the same request ever after. Paid twice can only be a request whose reply the
endpoint sent but this process could not store: at most ``concurrency`` of them at a kill, and replies that arrived broken.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlit.errors import SynthError
from vlit.synth.engine.journal import Journal, read_rows

NANO = 1_000_000_000


class BudgetExhausted(SynthError):
    """The next request could exceed the budget."""


@dataclass
class Totals:
    """Sums over a log; money in nano-dollars."""

    spent: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    replies: int = 0
    failures: int = 0
    open: dict[int, int] = field(default_factory=dict)
    """Reservation by number of the requests without an outcome."""

    @property
    def committed(self) -> int:
        """Spent, or possibly spent."""
        return self.spent + sum(self.open.values())

    def apply(self, row: dict[str, Any]) -> None:
        """Count one line."""
        if "sent" in row:
            self.open[row["sent"]] = row["reserve"]
        elif "settled" in row:
            self.open.pop(row["settled"], None)
            self.spent += row["cost"]
            self.tokens_in += row.get("in", 0)
            self.tokens_out += row.get("out", 0)
            if row["ok"]:
                self.replies += 1
            else:
                self.failures += 1


def read_totals(path: Path) -> Totals:
    """The sums of a log that another process may be writing."""
    totals = Totals()
    if path.is_file():
        for _, row in read_rows(path):
            totals.apply(row)
    return totals


class CallLog:
    """The journal of requests with its budget; safe for many threads."""

    def __init__(self, path: Path, *, cap_nano: int | None = None) -> None:
        self.cap_nano = cap_nano
        self.totals = Totals()
        self._replies: dict[str, tuple[int, int]] = {}
        self._journal = Journal(path)
        self._last = 0
        self._unread: set[int] = set()
        for offset, row in self._journal.recover():
            self.totals.apply(row)
            number = next(row[name] for name in ("sent", "got", "settled") if name in row)
            self._last = max(self._last, number)
            if "got" in row:
                self._replies[row["key"]] = (number, offset)
                self._unread.add(number)
            elif "settled" in row:
                self._unread.discard(number)
                if not row["ok"]:
                    self._forget(number)
        self.orphans = len(self.totals.open) - len(self._unread)
        """Requests of earlier processes that have no outcome; they stay reserved."""
        self._reserved = 0
        self._flying = 0
        self._mine: set[int] = set()
        self._changed = threading.Condition()

    def _forget(self, number: int) -> None:
        for key in [key for key, (held, _) in self._replies.items() if held == number]:
            del self._replies[key]

    def find(self, key: str) -> tuple[int, str] | None:
        """(number, body) of the stored reply to a request."""
        with self._changed:
            held = self._replies.get(key)
        return (held[0], str(self._journal.read(held[1])["body"])) if held else None

    def is_settled(self, number: int) -> bool:
        """Whether the cost of a reply is known."""
        with self._changed:
            return number not in self._unread

    def reserve(self, amount: int) -> None:
        """Set an amount aside, waiting for requests in flight to settle. BudgetExhausted when it cannot fit any more."""
        with self._changed:
            while self.cap_nano is not None and self.totals.committed + self._reserved + amount > self.cap_nano:
                if self._flying == 0:
                    raise BudgetExhausted(
                        f"budget of ${self.cap_nano / NANO:,.4f}: ${self.totals.spent / NANO:,.4f} spent, "
                        f"${sum(self.totals.open.values()) / NANO:,.4f} reserved for {len(self.totals.open)} requests without "
                        f"an outcome, and the next request may cost ${amount / NANO:,.4f}. Raise budget_usd and run the same "
                        "command again to continue."
                    )
                self._changed.wait()
            self._reserved += amount
            self._flying += 1

    def release(self, amount: int) -> None:
        """Give back a reservation whose request never left."""
        with self._changed:
            self._reserved -= amount
            self._flying -= 1
            self._changed.notify_all()

    def sent(self, key: str, amount: int) -> int:
        """Note durably that a reserved request leaves now; returns its number."""
        with self._changed:
            self._last += 1
            number = self._last
            self._reserved -= amount
            self._mine.add(number)
            self.totals.open[number] = amount
        self._journal.append({"sent": number, "key": key, "reserve": amount})
        return number

    def got(self, number: int, key: str, body: str) -> None:
        """Store a reply durably, before it is parsed."""
        offset = self._journal.append({"got": number, "key": key, "body": body})
        with self._changed:
            self._replies[key] = (number, offset)
            self._unread.add(number)

    def settle(self, number: int, cost: int, *, ok: bool, tokens: tuple[int, int] = (0, 0), why: str = "") -> None:
        """The outcome of a request. ``ok`` false: its reply, if any, is no answer and must not be used again."""
        row = {"settled": number, "cost": cost, "in": tokens[0], "out": tokens[1], "ok": ok} | (
            {"why": why} if why else {}
        )
        with self._changed:
            self.totals.apply(row)
            self._unread.discard(number)
            if not ok:
                self._forget(number)
            if number in self._mine:
                self._mine.discard(number)
                self._flying -= 1
            self._changed.notify_all()
        self._journal.append(row, durable=False)

    def close(self) -> None:
        """Flush and release the file."""
        self._journal.close()
