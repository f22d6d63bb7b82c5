"""Counts of findings, and a few examples of each check; bounded, however many findings there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vlit.data.doctor.checks import CHECKS, Finding, severity_of

MAX_EXAMPLES = 12


@dataclass
class Example:
    """One finding as the page shows it."""

    source: str
    place: str
    reason: str
    image: str = ""
    """The picture to show: a path, or empty when there is none that is known to decode."""
    excerpt: str = ""
    thumbnail: bytes | None = None


@dataclass
class SourceTally:
    """What was found in one dataset."""

    source: str
    file: str
    content_hash: str
    stages: list[str]
    records: int
    bad_records: int = 0
    checks: Counter[str] = field(default_factory=Counter)
    """Records by check; a record with several findings counts once in each check."""

    def as_dict(self) -> dict[str, Any]:
        """For ``summary.json``."""
        return {**self.__dict__, "checks": dict(_in_order(self.checks))}


@dataclass
class Tally:
    """What was found in all datasets."""

    sources: list[SourceTally] = field(default_factory=list)
    images: Counter[str] = field(default_factory=Counter)
    """Distinct images by check."""
    examples: dict[str, list[Example]] = field(default_factory=dict)
    records: Counter[str] = field(default_factory=Counter)
    """Records by check, over all datasets."""

    def count_record(self, tally: SourceTally, findings: Iterable[Finding]) -> bool:
        """Count one record; True when it is bad."""
        checks = {finding.check for finding in findings}
        tally.checks.update(checks)
        self.records.update(checks)
        bad = any(severity_of(check) == "error" for check in checks)
        tally.bad_records += bad
        return bad

    def wants_example(self, check: str) -> bool:
        return len(self.examples.get(check, ())) < MAX_EXAMPLES

    def add_example(self, check: str, example: Example) -> None:
        self.examples.setdefault(check, []).append(example)

    def by_check(self) -> dict[str, dict[str, Any]]:
        """Severity, records and distinct images of every check that found something, errors first."""
        found = _in_order(self.records | self.images)
        return {
            check: {
                "severity": severity_of(check),
                "records": self.records[check],
                **({"images": self.images[check]} if self.images[check] else {}),
            }
            for check, _ in found
        }


def _in_order(counts: Counter[str]) -> list[tuple[str, int]]:
    order = list(CHECKS)
    return sorted(
        ((check, count) for check, count in counts.items() if count),
        key=lambda item: (severity_of(item[0]) == "note", order.index(item[0]) if item[0] in order else -1, item[0]),
    )
