"""``vlit convert``: a dataset of any registered format -> LLaVA JSON or Parquet, with every bad record accounted for."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from vlit.data.formats._base import BadRow, FormatConfig, place_of, record_of
from vlit.data.images import resolve_image
from vlit.data.index import MAX_BAD_LISTED
from vlit.data.join import join_turns
from vlit.data.quarantine import check_budget, write_quarantine
from vlit.data.record import Record
from vlit.data.writers import write_llava, write_parquet
from vlit.durable import make_folder
from vlit.errors import ConfigError, DataError
from vlit.registry import FORMATS
from vlit.types import QuarantineEntry


def convert(
    path: Path,
    out: Path,
    *,
    source_format: str,
    to: str,
    options: Sequence[str] = (),
    images: Path | None = None,
    quarantine: bool = False,
    budget: float = 0.01,
    join: int | None = None,
) -> int:
    """Read ``path``, write ``out``; returns the number of records. Prints what was written, and bad records by kind.

    Args:
        options: ``key=value`` settings of the format.
        images: folder of the image references. Default: the dataset's own folder.
        quarantine: leave bad records out and list them in ``<out>.quarantine.jsonl``; otherwise any of them is an error.
        budget: largest share of bad records under ``quarantine``.
        join: join records of one picture to conversations of at most so many exchanges.

    Raises:
        DataError: the dataset cannot be read, or has (too many) bad records; nothing is written.
    """
    reader = make_format(source_format, options)
    root = images or reader.image_root(path)
    make_folder(out.parent)
    bad: list[BadRow] = []
    records = _good(reader, path, bad, quarantine=quarantine, budget=budget)
    if join is not None:
        records = join_turns(records, at_most=join)
    if to == "parquet":
        count = write_parquet(out, records, find_image=lambda name: resolve_image(name, root))
    else:
        count = write_llava(out, records)
    print(f"records  {count}  {out}", file=sys.stderr)
    for check, number in sorted(Counter(row.check for row in bad).items()):
        print(f"bad      {number}  {check}", file=sys.stderr)
    if bad:
        listed = out.with_name(f"{out.name}.quarantine.jsonl")
        listed.unlink(missing_ok=True)
        write_quarantine(listed, _entries(bad, path))
        print(f"listed   {listed}", file=sys.stderr)
    if to != "parquet":
        print(f"images   {root}  (set images: of the data source to this folder)", file=sys.stderr)
    return count


def make_format(name: str, options: Sequence[str]) -> FormatConfig:
    """The format of that name with settings from the command line.

    Raises:
        ConfigError: unknown format, unknown key, or a value of the wrong kind.
    """
    settings: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise ConfigError(f"{option}: expected key=value, a setting of format {name}.")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{option}: the value is no YAML ({error}).") from error
    try:
        return FORMATS.get(name).model_validate({"type": name, **settings})
    except ValidationError as error:
        reasons = "; ".join("".join(f".{part}" for part in one["loc"]) + f" {one['msg']}" for one in error.errors())
        raise ConfigError(f"format {name}: {reasons.strip()}") from error


def _good(reader: FormatConfig, path: Path, bad: list[BadRow], *, quarantine: bool, budget: float) -> Iterator[Record]:
    count = 0
    for row in reader.iter_rows(path):
        if isinstance(row, BadRow):
            bad.append(row)
        else:
            count += 1
            yield record_of(row)
    if not count:
        raise DataError(f"{path}: no valid record ({len(bad)} bad ones). Check path and --from.{_listed(bad, path)}")
    if bad and not quarantine:
        remedy = "Fix them, or leave them out with --on-bad-record quarantine."
        raise DataError(f"{path}: {len(bad)} of {count + len(bad)} records are bad. {remedy}{_listed(bad, path)}")
    if bad:
        check_budget(path.name, len(bad), count + len(bad), budget, None, _entries(bad, path))


def _entries(bad: list[BadRow], path: Path) -> list[QuarantineEntry]:
    return [QuarantineEntry(path.stem, str(path), row.record, row.id, row.reason, "reading") for row in bad]


def _listed(bad: list[BadRow], path: Path) -> str:
    lines = [f"\n  {place_of(path, row.record, row.id)}: {row.reason}" for row in bad[:MAX_BAD_LISTED]]
    return "".join(lines) + (f"\n  and {len(bad) - len(lines)} more" if len(bad) > len(lines) else "")
