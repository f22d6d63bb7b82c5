"""``manifest.jsonl``: the bad records of a run, one object a line.

A line holds ``stages`` (``instruct``, or ``instruct.validation`` for held-out data), ``source``, ``file``, ``content_hash``
(of the dataset file, so that a manifest never speaks of records it has not seen), ``record`` (counted from 0), ``id``,
``check`` (the first of its findings), ``reason`` (all of them) and ``rules`` (what decides whether a record is bad besides the
content of its file, so that a manifest does not outlive them).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlit.config.schema import DataConfig, RunConfig
from vlit.data.formats._base import FormatConfig
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
    rules: dict[str, Any]

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


def rules_of(data: DataConfig, format: FormatConfig, image_root: Path) -> dict[str, Any]:
    """The settings under which a dataset's records are bad or good."""
    return {
        "max_tokens": data.max_tokens,
        "template": data.template.model_dump(mode="json"),
        "format": format.model_dump(mode="json"),
        "follow_links": data.follow_links,
        IMAGES: str(image_root.resolve()),
    }


IMAGES = "images"
"""The one rule that may differ with a warning: the same pictures may lie elsewhere on another machine."""


def entries_for(
    manifest: Path, *, stage: str, source: str, file: Path, content_hash: str, rules: dict[str, Any]
) -> list[ManifestEntry]:
    """The bad records of one dataset of one stage, in file order, one entry a record.

    A dataset is known by its name, and one that the manifest does not name by its content, so a new name loses nothing.

    Raises:
        DataError: the manifest is damaged, or was made for another content of ``file`` or under other ``rules``.
    """
    named: list[ManifestEntry] = []
    renamed: list[ManifestEntry] = []
    with manifest.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                entry = ManifestEntry(**json.loads(line))
                if stage not in entry.stages:
                    continue
            except (ValueError, TypeError) as error:
                raise DataError(
                    f"{manifest}:{number}: not a line of a manifest ({error}). Run vlit doctor again."
                ) from error
            if entry.source == source:
                named.append(entry)
            elif entry.content_hash == content_hash and entry.rules.get("format") == rules["format"]:
                renamed.append(entry)
    found: dict[int, ManifestEntry] = {}
    told: set[str] = set()
    for entry in named or renamed:
        if entry.content_hash != content_hash:
            raise DataError(
                f"{manifest} lists bad records of {source} ({file}) as the file was when vlit doctor read it (content hash "
                f"{entry.content_hash[:12]}…, now {content_hash[:12]}…). Run vlit doctor again, or delete the manifest."
            )
        differing = [key for key in rules if entry.rules.get(key) != rules[key]]
        words = "; ".join(f"{key} {entry.rules.get(key)!r}, now {rules[key]!r}" for key in differing)
        if set(differing) - {IMAGES}:
            raise DataError(
                f"{manifest} lists bad records of {entry.source} ({file}) under other rules ({words}). Run vlit doctor again, "
                "or delete the manifest."
            )
        if words and words not in told:
            told.add(words)
            print(
                f"warning: {manifest} was made for {entry.source} with other images ({words}); run vlit doctor again unless "
                "they are the same pictures.",
                file=sys.stderr,
            )
        found.setdefault(entry.record, entry)
    return [found[record] for record in sorted(found)]
