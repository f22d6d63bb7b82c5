"""``manifest.jsonl``: the bad records of a run, one object a line.

A line holds ``stages`` (``instruct``, or ``instruct.validation`` for held-out data), ``source``, ``file``, ``content_hash``
(of the dataset file, so that a manifest never speaks of records it has not seen), ``record`` (counted from 0), ``id``,
``check`` (the first of its findings) and ``reason`` (all of them).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vlit.config.schema import RunConfig
from vlit.errors import DataError

FILE_NAME = "manifest.jsonl"


def use_of(stage: str, *, validation: bool = False) -> str:
    """How manifest and summary name the use of a dataset: ``instruct``, or ``instruct.validation`` for held-out data."""
    return stage + ".validation" * validation


@dataclass(frozen=True)
class ManifestEntry:
    """One bad record."""

    stages: Sequence[str]
    source: str
    file: str
    content_hash: str
    record: int
    id: str | None
    check: str
    reason: str

    def line(self) -> str:
        """The entry as a line of the file."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


def doctor_folder(run: RunConfig) -> Path:
    """Where ``vlit doctor`` writes unless told otherwise."""
    return Path(run.output_dir) / "doctor"


def manifest_of(run: RunConfig) -> Path | None:
    """The manifest that training honours: ``data.manifest``, else the run's own where it exists.

    Raises:
        DataError: ``data.manifest`` names a file that does not exist.
    """
    if run.data.manifest is None:
        own = doctor_folder(run) / FILE_NAME
        return own if own.is_file() else None
    path = Path(run.data.manifest).expanduser()
    if not path.is_file():
        raise DataError(
            f"data.manifest: {path} does not exist. Run vlit doctor with this configuration, or remove the key."
        )
    return path


def entries_for(manifest: Path, *, stage: str, source: str, file: Path, content_hash: str) -> list[ManifestEntry]:
    """The bad records of one dataset of one stage, in file order, one entry a record.

    Raises:
        DataError: the manifest is damaged, or was made for another content of ``file``.
    """
    found: dict[int, ManifestEntry] = {}
    with manifest.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                entry = ManifestEntry(**json.loads(line))
                mine = entry.source == source and stage in entry.stages
            except (ValueError, TypeError) as error:
                raise DataError(
                    f"{manifest}:{number}: not a line of a manifest ({error}). Run vlit doctor again."
                ) from error
            if not mine:
                continue
            if entry.content_hash != content_hash:
                raise DataError(
                    f"{manifest} lists bad records of {source} ({file}) as the file was when vlit doctor read it (content hash "
                    f"{entry.content_hash[:12]}…, now {content_hash[:12]}…). Run vlit doctor again, or delete the manifest."
                )
            found.setdefault(entry.record, entry)
    return [found[record] for record in sorted(found)]
