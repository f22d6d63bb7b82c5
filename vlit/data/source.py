"""A dataset of a mixture, opened: index, image folder and the policy for its bad records."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from vlit.config.schema import DataConfig, DataSource
from vlit.data.doctor.manifest import entries_for, rules_of
from vlit.data.formats._base import place_of
from vlit.data.images import resolve_image
from vlit.data.index import MAX_BAD_LISTED, ArrowRows, IndexInfo, build_or_open_index
from vlit.data.quarantine import check_budget, write_quarantine
from vlit.data.shuffle import permutation, stream_key
from vlit.errors import DataError
from vlit.types import QuarantineEntry, Sample, Turn

NUM_PROBED = 16


class RecordSource:
    """Random access to the samples of one dataset; small, picklable, and without state per record.

    ``weight`` and ``max_records`` are the mixture's. With ``max_records`` the drawn records come in file order.
    """

    def __init__(
        self,
        rows: ArrowRows,
        *,
        name: str,
        path: Path,
        image_root: Path,
        num_records: int,
        num_quarantined: int,
        weight: float = 1.0,
        share: float | None = None,
        chosen: np.ndarray | None = None,
        content_hash: str = "",
        follow_links: bool = False,
        cache_dir: str | None = None,
    ) -> None:
        self.rows = rows
        self.name = name
        self.path = path
        self.image_root = image_root
        self.num_quarantined = num_quarantined
        self.weight = weight
        self.share = share
        self.content_hash = content_hash
        """Of the dataset file, and of the records that a manifest excludes from it."""
        self._follow_links = follow_links
        self._cache_dir = cache_dir
        self._chosen = chosen  # int64 [len(self)] rows, ascending; None: all
        self._groups: np.ndarray | None = None
        self._len = num_records if chosen is None else len(chosen)

    def __len__(self) -> int:
        return self._len

    def _row(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self._len:
            raise IndexError(f"{self.name} has {self._len} records, asked for {index}")
        return self.rows[index if self._chosen is None else int(self._chosen[index])]

    def sample(self, index: int) -> Sample:
        """Sample ``index`` of ``len(self)``; its ``images`` are as written in the record (see ``image_path``)."""
        row = self._row(index)
        return Sample(
            id=row["id"],
            source=self.name,
            turns=tuple(Turn(turn["role"], turn["text"]) for turn in row["turns"]),
            images=tuple(row["images"]),
            kind=row["kind"],
        )

    def image_groups(self) -> np.ndarray:
        """int64 [len]: equal for records whose first image is the same, -1 for records without one."""
        if self._groups is None:
            groups = self.rows.first_images()
            self._groups = groups if self._chosen is None else groups[self._chosen]
        return self._groups

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_groups": None}

    def place(self, index: int) -> str:
        """How errors name the record: ``file#record (id "...")``."""
        row = self._row(index)
        return f'{self.path.name}#{row["record"]} (id "{row["id"]}")'

    def quarantine_entry(self, index: int, reason: str, step: int) -> QuarantineEntry:
        """The line of a record that was found bad while step ``step`` (counted from 1) was loaded."""
        row = self._row(index)
        return QuarantineEntry(self.name, str(self.path), row["record"], row["id"], reason, "loading", step)

    def image_path(self, image: str) -> Path:
        """The file of an image reference; DataError when it leaves the image folder."""
        return resolve_image(image, self.image_root, follow_links=self._follow_links, cache_dir=self._cache_dir)


def image_folder(source: DataSource, path: Path) -> Path:
    """The folder that image references are relative to: ``images:``, else the dataset's own."""
    if source.images:
        return Path(source.images).expanduser()
    return path if path.is_dir() else path.parent


def open_source(
    source: DataSource,
    *,
    data: DataConfig,
    seed: int,
    quarantine_path: Path | None = None,
    progress: bool = True,
    manifest: Path | None = None,
    stage: str = "",
) -> RecordSource:
    """Open one dataset, build its index if needed, apply the policy for bad records, and look at a few images.

    Args:
        seed: draws the records that ``source.max_records`` keeps, from those that are not bad.
        quarantine_path: list of bad records; the lines that opening this source wrote before are replaced.
        manifest: bad records that ``vlit doctor`` found; those of this source and ``stage`` are bad here too.
        stage: whose data this is, as a manifest names it: ``instruct``, or ``instruct.validation``.

    Raises:
        DataError: missing or unreadable file, bad record (policy ``error``), budget exceeded (``quarantine``), a manifest
            of another content of the file or of other rules, missing image folder, or images missing among the few that are
            looked at.
    """
    path = Path(source.path).expanduser()
    name = source.name or path.stem
    info = build_or_open_index(
        path,
        format=source.format,
        cache_dir=data.cache_dir,
        stop_at_first_bad=data.on_bad_sample == "error",
        progress=progress,
    )
    entries = [QuarantineEntry(name, str(path), bad["record"], bad["id"], bad["reason"], "reading") for bad in info.bad]
    rows, excluded = ArrowRows(info.path), np.empty(0, np.int64)
    if manifest is not None:
        listed, excluded = _excluded(
            manifest,
            rows,
            info,
            stage=stage,
            source=name,
            path=path,
            rules=rules_of(data, source.format, image_folder(source, path)),
        )
        if listed and data.on_bad_sample == "error":
            raise _found_by_doctor(manifest, listed, path)
        entries += listed
    num_bad = info.num_bad + len(excluded)
    if quarantine_path is not None and (entries or quarantine_path.is_file()):
        write_quarantine(quarantine_path, entries, replace_source=name)
    if num_bad:
        num_all = info.num_bad + info.num_records
        check_budget(name, num_bad, num_all, data.quarantine_budget, quarantine_path, entries)
    good = np.setdiff1d(np.arange(info.num_records), excluded, assume_unique=True) if len(excluded) else None
    num_good = info.num_records - len(excluded)
    if source.max_records is not None and source.max_records < num_good:
        order = permutation(num_good, stream_key(seed, "max_records", name))
        drawn = np.sort(order[: source.max_records])
        good = drawn if good is None else good[drawn]
    opened = RecordSource(
        rows,
        name=name,
        path=path,
        image_root=image_folder(source, path),
        num_records=info.num_records,
        num_quarantined=num_bad,
        weight=source.weight,
        share=source.share,
        content_hash=_identity_of(info.content_hash, excluded),
        chosen=good,
        follow_links=data.follow_links,
        cache_dir=data.cache_dir,
    )
    if info.num_with_images:
        _probe_images(opened, strict=data.on_bad_sample == "error")
    return opened


def _excluded(
    manifest: Path, rows: ArrowRows, info: IndexInfo, *, stage: str, source: str, path: Path, rules: dict[str, Any]
) -> tuple[list[QuarantineEntry], np.ndarray]:
    """What a manifest says of a dataset beyond what reading it said, and int64 [n]: the rows, ascending."""
    found = entries_for(manifest, stage=stage, source=source, file=path, content_hash=info.content_hash, rules=rules)
    if not found:
        return [], np.empty(0, np.int64)
    records = rows.table().column("record").to_numpy()
    places = np.searchsorted(records, [entry.record for entry in found])
    held = places < len(records)
    held[held] = records[places[held]] == [entry.record for entry, here in zip(found, held, strict=True) if here]
    entries = [
        QuarantineEntry(source, str(path), entry.record, entry.id, entry.reason, "doctor")
        for entry, here in zip(found, held, strict=True)
        if here  # the others were refused while the file was read
    ]
    if len(entries) == len(records):
        raise DataError(
            f"{path}: {manifest} lists every record as bad, so there is nothing to train on. Fix the dataset."
        )
    return entries, places[held].astype(np.int64)


def _found_by_doctor(manifest: Path, entries: list[QuarantineEntry], path: Path) -> DataError:
    """The error that a manifest's records raise under ``data.on_bad_sample: error``."""
    lines = [f"{place_of(path, e.record, e.id)}: {e.reason.rstrip('.')}" for e in entries[:MAX_BAD_LISTED]]
    if len(entries) > len(lines):
        lines.append(f"and {len(entries) - len(lines)} more")
    remedy = (
        f"Found by vlit doctor ({manifest}). Fix the dataset and run vlit doctor again, or set data.on_bad_sample: quarantine "
        "(now: error)."
    )
    if len(entries) == 1:
        return DataError(f"{lines[0]}. {remedy}")
    return DataError("\n  ".join([f"{path.name}: {len(entries)} records are bad. {remedy}", *lines]))


def _identity_of(content_hash: str, excluded: np.ndarray) -> str:
    """Hash of a dataset file and of the rows that are left out of it; that of the file when none are."""
    if not len(excluded):
        return content_hash
    return hashlib.blake2b(content_hash.encode() + excluded.astype("<i8").tobytes(), digest_size=32).hexdigest()


def _probe_images(source: RecordSource, *, strict: bool) -> None:
    """Look for the images of a few records spread over the file, before any weight is loaded."""
    root = source.image_root
    if not root.is_dir():
        raise DataError(
            f"{source.path.name}: image folder {root} does not exist (working directory {Path.cwd()}). "
            "Set images: of this data source to the folder that the records' image paths are relative to."
        )
    looked, missing = 0, []
    spread = list(dict.fromkeys(np.linspace(0, len(source) - 1, num=4 * NUM_PROBED, dtype=np.int64).tolist()))
    for index in [row for offset in range(4) for row in spread[offset::4]]:  # first pass over the whole file
        for image in source.sample(index).images[:1]:
            looked += 1
            try:
                path = source.image_path(image)
            except DataError as error:
                missing.append(f"{source.place(index)}: {error}")
                continue
            if not path.is_file():
                missing.append(f"{source.place(index)}: {path}")
        if looked >= NUM_PROBED:
            break
    if missing and (strict or len(missing) == looked):
        raise DataError(
            f"{len(missing)} of {looked} images looked for do not exist, for example {missing[0]}. Set images: of data "
            f"source {source.name} (now {root}) to the right folder, or download the images."
        )
