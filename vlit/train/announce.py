"""What a run says before a stage begins: its data and its parts, on the terminal and in the output folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from vlit.config.schema import RunConfig
from vlit.data.check import check_supervision
from vlit.data.stage_order import share_at_most
from vlit.data.tokenize import SampleTokenizer
from vlit.durable import replace_file
from vlit.models.tuning import rows_as_dicts
from vlit.train.distributed import Ranks
from vlit.train.prepare import Tuned


def look_at_data(
    name: str, mixture: Any, tokenizer: SampleTokenizer, run: RunConfig, total: int, ranks: Ranks
) -> dict[str, Any]:
    """Look at samples before compute is spent; print what the stage will see, and give it for ``data_plan.json``.

    Raises:
        DataError: too many samples have nothing to learn.
    """
    stage = run.stages[name]
    report = check_supervision(
        mixture, tokenizer, run.data_for(name), run.data.check_samples, global_batch=stage.global_batch,
        max_tokens=stage.micro_batch_tokens,
    )  # fmt: skip
    plan = {
        "sources": [
            {
                "name": s.name,
                "records": len(s),
                "weight": s.weight,
                "share": s.share,
                "per_epoch": count,
                "quarantined": s.num_quarantined,
            }
            for s, count in zip(mixture.sources, mixture.counts, strict=True)
        ],
        "records_per_epoch": mixture.records_per_epoch,
        "global_batch": stage.global_batch,
        "steps": total,
        **report.as_dict(),
    }
    if not ranks.is_main:
        return plan
    sources = ", ".join(f"{s.name} {len(s):,}" for s in mixture.sources)
    print(
        f"{name}: {sources} records; {total:,} steps of {stage.global_batch}; "
        f"tokens a sample mean {report.tokens_mean:.0f}, p99 {report.tokens_p99:.0f}, "
        f"{100 * report.supervised_share:.0f}% supervised",
        file=sys.stderr,
    )
    against = share_at_most(run, name)[1]
    if against:
        print(f"{name}: {against}", file=sys.stderr)
    elif report.records_per_image > 1:
        print(
            f"{name}: {report.records_per_image:.1f} records share an image; computing it once saves "
            f"{100 * report.shared_share:.0f}% of the tokens and {100 * report.shared_images:.0f}% of the image encodings",
            file=sys.stderr,
        )
    return plan


def write_down(run: RunConfig, name: str, plan: dict[str, Any], tuned: Tuned) -> None:
    """Configuration, data and parts of a stage into the output folder, once it is accepted: a refused start changes nothing."""
    out = Path(run.output_dir)
    write_config(run)
    _merge_json(out / "data_plan.json", name, plan)
    _merge_json(out / "parts.json", name, rows_as_dicts(tuned.rows))


def write_config(run: RunConfig) -> None:
    """``config.yaml``, the resolved configuration."""
    replace_file(Path(run.output_dir) / "config.yaml", yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False))


def print_parts(tuned: Tuned, name: str, ranks: Ranks) -> None:
    from rich.console import Console
    from rich.table import Table

    if not ranks.is_main:
        return
    table = Table(title=f"stage {name}", title_justify="left")
    for column in ("part", "module", "mode", "parameters", "trained", "peak lr", "dtype"):
        table.add_column(column, justify="right" if column in ("parameters", "trained", "peak lr") else "left")
    for row in tuned.rows:
        lr = f"{row.lr:.1e}" if row.lr else "-"
        table.add_row(row.part, row.module, row.mode, f"{row.parameters:,}", f"{row.trainable:,}", lr, row.dtype)
    Console(stderr=True, width=None if sys.stderr.isatty() else 110).print(table)


def _merge_json(path: Path, key: str, value: Any) -> None:
    held: Any = {}
    if path.is_file():
        try:
            held = json.loads(path.read_bytes())
        except ValueError as error:
            print(f"warning: {path}: cannot be read ({error}); it is begun anew.", file=sys.stderr)
    replace_file(path, json.dumps({**(held if isinstance(held, dict) else {}), key: value}, indent=2))
