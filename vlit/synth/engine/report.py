"""What a run did: counts of every stage, costs, and why items are missing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from vlit.synth.engine.calls import NANO, Totals


@dataclass
class StageCount:
    """What one stage did."""

    name: str
    items_in: int = 0
    items_out: int = 0
    reused: int = 0
    unanswered: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """Of each kind of rejection, the first in full."""
    failures: Counter[str] = field(default_factory=Counter)
    """Why requests were not answered."""

    def to_json(self) -> dict[str, Any]:
        return {
            "stage": self.name, "in": self.items_in, "out": self.items_out, "reused": self.reused,
            "unanswered": self.unanswered, "unanswered_because": dict(self.failures.most_common(3)),
            "rejected": dict(self.rejected.most_common()),
        }  # fmt: skip


@dataclass
class Report:
    """What a run did; ``records`` is None while some items are unanswered (unless ``write_partial``)."""

    stages: list[StageCount]
    totals: Totals
    records: int | None = None

    @property
    def unanswered(self) -> int:
        return sum(stage.unanswered for stage in self.stages)

    @property
    def failure(self) -> str:
        """Why most requests were not answered; empty when all were."""
        found = sum((stage.failures for stage in self.stages), Counter[str]())
        return found.most_common(1)[0][0] if found else ""

    @property
    def emptied(self) -> str:
        """Where the last items were lost and why, of a run that made no record."""
        last = next((stage for stage in self.stages if not stage.items_out), None)
        if last is None or not last.items_in:
            return "there was nothing to begin with"
        kind = last.rejected.most_common(1)
        why = f", most often because {last.examples[kind[0][0]]}" if kind else ""
        return f"stage {last.name} left out all of its {last.items_in} items{why}"

    def to_json(self) -> dict[str, Any]:
        return {
            "records": self.records, "unanswered": self.unanswered, "stages": [s.to_json() for s in self.stages],
            "cost_usd": self.totals.spent / NANO, "possibly_spent_usd": self.totals.committed / NANO,
            "tokens_in": self.totals.tokens_in, "tokens_out": self.totals.tokens_out,
            "replies": self.totals.replies, "failed_requests": self.totals.failures,
            "requests_without_outcome": len(self.totals.open),
        }  # fmt: skip
