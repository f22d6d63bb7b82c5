"""``vlit plan``: what a run will need, before it starts."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def plan(
    config: str, overrides: Sequence[str], *, gpus: str | None, share: float, parts: Path | None, stage: str | None,
    records: int | None, tokens_per_record: float | None, images_per_record: float | None, as_json: bool,
) -> None:  # fmt: skip
    """Print the plan of a configuration on ``gpus`` (default: this machine)."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from vlit.config.load import load_config
    from vlit.plan import report
    from vlit.plan.hardware import parse_gpus, this_machine
    from vlit.plan.stage import plan_run
    from vlit.plan.workload import Assumed

    logging.getLogger("transformers").setLevel(logging.ERROR)
    run = load_config(config, overrides)
    if run.world is not None:
        run.world.build()
    cluster = this_machine(run.runtime.device) if gpus is None else parse_gpus(gpus)
    found = plan_run(
        run, cluster, share=share, parts=parts, only=stage,
        assumed=Assumed(records, tokens_per_record, images_per_record),
    )  # fmt: skip
    sys.stdout.write((json.dumps(report.as_json(found), indent=1) if as_json else report.as_text(found)) + "\n")
