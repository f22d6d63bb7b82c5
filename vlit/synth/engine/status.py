"""How far a run is, from its files alone; the run itself may be going on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from vlit.synth.engine.calls import NANO, read_totals
from vlit.synth.engine.journal import read_rows


def read_status(out: Path) -> dict[str, Any]:
    """Finished items by stage, rejections by reason, requests and costs, and the records of a complete dataset.

    A stage's journal also holds items of earlier settings; they count too.
    """
    settings = json.loads((out / "run.json").read_text(encoding="utf-8"))
    stages = []
    for path in sorted((out / "stages").glob("*.jsonl")) if (out / "stages").is_dir() else []:
        done, why = 0, Counter[str]()
        for _, row in read_rows(path):
            done += 1
            if row.get("rejected"):
                why[row["rejected"].split(":")[0]] += 1
        stages.append({"stage": path.stem, "done": done, "rejected": dict(why.most_common())})
    totals = read_totals(Path(settings["calls"]) if settings.get("calls") else out / "calls.jsonl")
    dataset = out / "dataset.jsonl"
    return {
        "stages": stages, "replies": totals.replies, "failed_requests": totals.failures, "open": len(totals.open),
        "cost_usd": totals.spent / NANO, "possibly_spent_usd": totals.committed / NANO,
        "records": dataset.read_bytes().count(b"\n") if dataset.is_file() else None,
    }  # fmt: skip
