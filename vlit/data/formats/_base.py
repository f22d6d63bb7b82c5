"""What a dataset format offers: a stream of canonical rows, with the bad ones marked instead of raised."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vlit.config.component import ComponentConfig
from vlit.data.record import Record, meta_fields, to_json
from vlit.errors import DataError
from vlit.types import Role, Sample, Turn


class Row(NamedTuple):
    """A valid record in canonical form: ``roles`` and ``texts`` have one entry a turn, ``images`` one a placeholder."""

    record: int  # counted from 0, as `jq '.[n]'` does
    id: str
    kind: str | None
    roles: list[Role]
    texts: list[str]
    images: list[str]
    meta: dict[str, Any] | None = None
    """Optional fields of the canonical record that training does not read, as JSON has them (:mod:`vlit.data.record`)."""


class BadRow(NamedTuple):
    """A record that cannot be used; ``reason`` is a sentence with both values, without file or record number."""

    record: int
    id: str | None
    reason: str
    check: str = "record"
    """Which kind of mistake, for the counts of ``vlit doctor``: a name of ``vlit.data.doctor.checks``."""


class FormatConfig(ComponentConfig):
    """Config of a format. A format never decides what happens to a bad record: the caller's policy does."""

    def iter_rows(self, path: Path) -> Iterator[Row | BadRow]:
        """All records of ``path`` in file order. DataError when the file as a whole cannot be read."""
        raise NotImplementedError(f"{type(self).__name__} must implement iter_rows")

    def files(self, path: Path) -> list[Path]:
        """Every file that the records of ``path`` depend on, images apart: an index holds for their content alone."""
        return [path]

    def image_root(self, path: Path) -> Path:
        """The folder that image references are relative to, unless the user names one."""
        return path if path.is_dir() else path.parent

    def raw_records(self, path: Path) -> Iterator[bytes]:
        """Each record as it stands in the file, for showing bad ones. Formats whose records are no text have none."""
        return iter(())

    def iter_samples(self, path: Path, source: str) -> Iterator[Sample]:
        """All records as samples; the first bad one is a DataError that names file, record and id."""
        for row in self.iter_rows(path):
            if isinstance(row, BadRow):
                raise DataError(f"{place_of(path, row.record, row.id)}: {row.reason}. Fix the record.")
            yield sample_of(row, source)


def sample_of(row: Row, source: str) -> Sample:
    """The :class:`Sample` of a row."""
    turns = tuple(Turn(role, text) for role, text in zip(row.roles, row.texts, strict=True))
    return Sample(id=row.id, source=source, turns=turns, images=tuple(row.images), kind=row.kind)


def record_of(row: Row) -> Record:
    """The canonical :class:`Record` of a row."""
    turns = tuple(Turn(role, text) for role, text in zip(row.roles, row.texts, strict=True))
    return Record(row.id, turns, tuple(row.images), row.kind, **meta_fields(row.meta))


def row_of(number: int, record: Record) -> Row:
    """The row of a canonical record; nothing is checked."""
    held = to_json(record)
    meta = {key: held[key] for key in held if key not in ("id", "image", "images", "conversations", "kind")}
    roles, texts = [turn.role for turn in record.turns], [turn.text for turn in record.turns]
    return Row(number, record.id, record.kind, roles, texts, list(record.images), meta or None)


def place_of(path: Path, record: int, sample_id: str | None) -> str:
    """How errors name a record: ``mix665k.json#21357 (id "000000033471")``."""
    shown = f' (id "{sample_id}")' if sample_id is not None else ""
    return f"{path.name}#{record}{shown}"
