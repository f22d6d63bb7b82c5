"""``quarantine.jsonl``: bad records that were left out, one object a line, and the budget they are held against."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlit.durable import describe_os_error, make_folder, replace_file
from vlit.errors import DataError
from vlit.types import QuarantineEntry


def check_budget(
    name: str, num_bad: int, num_all: int, budget: float, manifest: Path | None, entries: list[QuarantineEntry]
) -> None:
    """DataError when more than the share ``budget`` of a dataset is quarantined; names the counts and two reasons."""
    if num_bad <= budget * num_all:
        return
    reasons = "; ".join(f'record {e.record} (id "{e.id}"): {e.reason}' for e in entries[:2])
    where = f" All are listed in {manifest}." if manifest else ""
    raise DataError(
        f"{name}: {num_bad} of {num_all} records are quarantined ({num_bad / num_all:.2%}), more than "
        f"data.quarantine_budget {budget:.2%} allows. First: {reasons}.{where} Fix the dataset, or raise the budget."
    )


def write_quarantine(path: Path, entries: list[QuarantineEntry], *, replace_source: str | None = None) -> None:
    """Add lines to the list, none twice. With ``replace_source`` the lines that opening that source wrote before go
    first; those found while loading stay, because the steps that met them are not repeated when a run is resumed.

    Raises:
        DataError: the list cannot be written; what was there before is intact.
    """
    held = read_quarantine(path)
    kept = [row for row in held if row["source"] != replace_source or row["found"] == "loading"]
    known = {(row["source"], row["record"]) for row in kept}
    new = [entry for entry in entries if (entry.source, entry.record) not in known]
    rewrite_quarantine(path, kept, new)


def read_quarantine(path: Path) -> list[dict[str, Any]]:
    """The lines of a list, none when there is no file. What a kill or a full disk cut short is dropped, and that is said."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    rows, torn = [], 0
    for line in filter(None, lines):
        try:
            row = json.loads(line)
            _ = row["source"], row["record"], row["found"]
        except (ValueError, TypeError, KeyError):
            torn += 1
        else:
            rows.append(row)
    if torn:
        print(f"warning: {path}: {torn} of {torn + len(rows)} lines were cut short and are dropped.", file=sys.stderr)
    return rows


def rewrite_quarantine(path: Path, rows: list[dict[str, Any]], entries: list[QuarantineEntry]) -> None:
    """Give the list these lines in one step, unless it has them. DataError when it cannot be written."""
    content = "".join([*(_as_line(row) for row in rows), *map(line_of, entries)]).encode()
    try:
        if not path.is_file() or path.read_bytes() != content:
            make_folder(path.parent)
            replace_file(path, content)
    except OSError as error:
        raise DataError(
            f"the list of bad records was not written: {describe_os_error(error, path)}. Make room (or the folder writable) "
            "and start again."
        ) from error


def line_of(entry: QuarantineEntry) -> str:
    """The entry as a line of the list."""
    row = asdict(entry)
    if entry.step is None:
        del row["step"]
    return _as_line(row)


def _as_line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
