"""The dataset under review: records by number without holding their text, what to filter by, and export."""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson

from vlit.data.images import resolve_image
from vlit.data.record import Record, check, from_json, to_json, write_records
from vlit.errors import DataError
from vlit.serve.review.log import Decision, DecisionLog
from vlit.synth.quality.text import read_record
from vlit.types import Turn

MAX_RECORD_BYTES = 4 << 20
MAX_IMAGE_BYTES = 32 << 20
_KINDS = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif", b"BM": "image/bmp"}


class Reviewed:
    """Random access to a canonical JSONL file: 8 bytes and four short strings a record stay in memory."""

    def __init__(self, path: Path, *, images: Path, scores: Path | None = None) -> None:
        self.path, self.images = path, images
        self.starts: list[int] = []
        self.domains: list[str] = []
        self.types: list[str] = []
        self._lock = threading.Lock()
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
        self._index()
        self.scores = self._read_scores(scores) if scores is not None else {}

    def _index(self) -> None:
        at = 0
        for number, line in enumerate(self._file):
            if line.strip():
                try:
                    held = orjson.loads(line)
                    domain, kind = held.get("domain"), held.get("instruction_type") or held.get("kind")
                except (orjson.JSONDecodeError, AttributeError) as error:
                    raise DataError(
                        f"{self.path}: line {number + 1} is not a record. vlit convert writes one record a line."
                    ) from error
                self.starts.append(at)
                self.domains.append(sys.intern(domain if isinstance(domain, str) else ""))
                self.types.append(sys.intern(kind if isinstance(kind, str) else ""))
            at += len(line)
        if not self.starts:
            raise DataError(f"{self.path}: no records.")

    def _read_scores(self, path: Path) -> dict[str, list[float | None]]:
        from pyarrow import lib, parquet

        try:
            held = parquet.read_table(
                path, columns=["quality", "correctness", "complexity"] if _has_all(path) else ["quality"]
            )
        except (OSError, lib.ArrowException) as error:
            raise DataError(f"{path}: not a table of vlit synth quality ({error}).") from error
        if len(held) != len(self):
            raise DataError(
                f"{path}: {len(held)} rows, the dataset has {len(self)} records. Run vlit synth quality again."
            )
        return {
            name: [value if value is not None and value == value else None for value in held.column(name).to_pylist()]
            for name in held.column_names
        }

    def __len__(self) -> int:
        return len(self.starts)

    def raw(self, number: int) -> bytes:
        """The line of a record."""
        with self._lock:
            self._file.seek(self.starts[number])
            line = self._file.readline(MAX_RECORD_BYTES + 1)
        if len(line) > MAX_RECORD_BYTES:
            raise DataError(f"{self.path}: record {number} is larger than {MAX_RECORD_BYTES >> 20} MB.")
        return line.strip()

    def record(self, number: int) -> Record:
        """One record."""
        return read_record(number, self.raw(number))[0]

    def digest(self, number: int) -> str:
        """Short hash of a record's line: says whether a decision was made on this very text."""
        return hashlib.sha256(self.raw(number)).hexdigest()[:16]

    def picture(self, number: int, place: int) -> tuple[str, bytes]:
        """Media type and bytes of a record's picture.

        Raises:
            DataError: outside of the image folder, missing, too large, or not a picture a browser shows.
        """
        names = self.record(number).images
        if not 0 <= place < len(names):
            raise DataError(f"record {number} has {len(names)} pictures.")
        path = resolve_image(names[place], self.images)
        try:
            if not path.is_file() or path.stat().st_size > MAX_IMAGE_BYTES:
                raise DataError(f"{names[place]}: missing, or larger than {MAX_IMAGE_BYTES >> 20} MB.")
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{names[place]}: cannot be read.") from error
        for start, kind in _KINDS.items():
            if data.startswith(start):
                return kind, data
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return "image/webp", data
        raise DataError(f"{names[place]}: not a PNG, JPEG, GIF, BMP or WebP picture.")

    def edited(self, number: int, texts: list[str]) -> Record:
        """The record with other words; DataError unless it could still be trained on."""
        record = self.record(number)
        if len(texts) != len(record.turns):
            raise DataError(f"{len(texts)} turns were sent, the record has {len(record.turns)}.")
        turns = tuple(Turn(turn.role, text.strip()) for turn, text in zip(record.turns, texts, strict=True))
        changed = replace(record, turns=turns)
        check(changed)
        from_json(to_json(changed))
        return changed

    def accepted(self, log: DecisionLog) -> Iterator[Record]:
        """Records that someone accepted or edited and nobody rejected, in the words of the last edit.

        Raises:
            DataError: a record changed after it was decided on.
        """
        for number, by_name in sorted(log.by_record().items()):
            decisions = sorted(by_name.values(), key=lambda decision: decision.number)
            if any(decision.action == "reject" for decision in decisions):
                continue
            yield self._decided(number, decisions)

    def _decided(self, number: int, decisions: list[Decision]) -> Record:
        if number >= len(self) or any(decision.digest != self.digest(number) for decision in decisions):
            raise DataError(
                f"{self.path}: record {number} is not what was decided on; the file was changed since. Review a copy that "
                "does not change, or start with another --log."
            )
        edits = sorted((decision for decision in decisions if decision.turns), key=lambda decision: decision.edit)
        record = self.edited(number, list(edits[-1].turns)) if edits else self.record(number)
        note: dict[str, Any] = {"reviewers": [decision.reviewer for decision in decisions], "edited": bool(edits)}
        return replace(record, provenance={**record.provenance, "review": note})


def _has_all(path: Path) -> bool:
    from pyarrow import parquet

    return {"quality", "correctness", "complexity"} <= set(parquet.read_schema(path).names)


def export(data: Reviewed, log: DecisionLog, out: Path) -> int:
    """Write the accepted records; returns their number."""
    return write_records(out, data.accepted(log))
