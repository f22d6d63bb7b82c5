"""``vlit preflight``: the checks before a run, as a table of its processes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from vlit.config.load import load_config


def show_preflight(config_path: str, overrides: Sequence[str]) -> None:
    """Run the checks of ``vlit train`` on every process and print what each one is.

    Raises:
        TrainingError: on every process, with everything that has to be mended.
    """
    run = load_config(config_path, overrides)
    from vlit.train.cluster.preflight import PreflightReport, preflight
    from vlit.train.distributed import start_ranks
    from vlit.train.identity import data_identities, open_data

    ranks = start_ranks(run.runtime)
    if run.world is not None:
        if ranks.is_main:
            run.world.build()
        ranks.barrier()
    opened, problems = open_data(run, progress=ranks.is_main)
    report: PreflightReport = preflight(run, ranks, identities=data_identities(opened), problems=problems)
    if ranks.is_main:
        _print_table(report.ranks)


def _print_table(ranks: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from vlit.train.cluster.comparison import size

    table = Table(title="processes", title_justify="left")
    for column in (
        "rank",
        "host",
        "pid",
        "device",
        "memory free",
        "precision",
        "cores",
        "threads",
        "disk free",
        "torch",
    ):
        table.add_column(column, justify="left" if column in ("host", "device", "precision", "torch") else "right")
    for fact in ranks:
        free = fact["output_free"]
        table.add_row(
            str(fact["rank"]),
            fact["host"],
            str(fact["pid"]),
            fact["device"],
            f"{size(fact['memory_free'])} of {size(fact['memory_total'])}",
            fact["precision"],
            str(fact["cores"]),
            str(fact["threads"]),
            "unknown" if free is None else size(free),
            fact["versions"]["torch"],
        )
    Console(width=None if sys.stdout.isatty() else 130).print(table)
