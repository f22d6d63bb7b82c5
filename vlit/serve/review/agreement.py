"""How far two reviewers agree beyond chance: Cohen's kappa (Cohen 1960)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any


def cohen_kappa(pairs: Iterable[tuple[str, str]]) -> float | None:
    """``(p_o - p_e) / (1 - p_e)``: observed against expected agreement of two raters.

    None without a pair; 1 where both gave one and the same label to all (the formula is 0 / 0 there).
    """
    held = list(pairs)
    if not held:
        return None
    total = len(held)
    observed = sum(a == b for a, b in held) / total
    left, right = Counter(a for a, _ in held), Counter(b for _, b in held)
    expected = sum(left[label] * right[label] for label in left) / total**2
    return 1.0 if expected == 1 else (observed - expected) / (1 - expected)


def agreement_table(decisions: Mapping[int, Mapping[str, str]]) -> list[dict[str, Any]]:
    """For every two reviewers: records both decided on, share decided alike, kappa over accept, edit, reject.

    Args:
        decisions: for each record the action of each reviewer.
    """
    names = sorted({name for by_name in decisions.values() for name in by_name})
    rows = []
    for a, b in combinations(names, 2):
        pairs = [(by_name[a], by_name[b]) for by_name in decisions.values() if a in by_name and b in by_name]
        if pairs:
            alike = sum(x == y for x, y in pairs) / len(pairs)
            rows.append({"a": a, "b": b, "records": len(pairs), "alike": alike, "kappa": cohen_kappa(pairs)})
    return rows
