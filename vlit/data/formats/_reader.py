"""What the readers share: entry by entry into canonical records, every entry accounted for, words for what is wrong."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import orjson
from pydantic import PrivateAttr, field_validator

from vlit.data.boxes import FORMS, box_form
from vlit.data.formats._base import BadRow, FormatConfig, Row, row_of
from vlit.data.json_stream import iter_json_records, read_json_bytes
from vlit.data.record import Record, Region, meta_of
from vlit.data.record_checks import BadRecord, Unusable, check_conversation, kind_of, shown
from vlit.errors import DataError
from vlit.types import IMAGE_PLACEHOLDER, Role, Turn

T = TypeVar("T")
SHORT_ANSWER = "Answer the question using a single word or phrase."
OPTION_LETTER = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DESCRIBE = (
    "What does this picture show? Describe it.",
    "Tell me about this image in your own words.",
    "Give an account of what can be seen here.",
    "Please describe the picture.",
)
"""Questions for captions that come without one; ours."""
_IDS = ("id", "unique_id", "question_id", "questionId", "image_id", "image", "image_path")


class RecordFormat(FormatConfig):
    """A format that turns each entry of its files into one canonical record or a reason why not."""

    _left_out: Counter[str] = PrivateAttr(default_factory=Counter)
    _left_out_of: Counter[str] = PrivateAttr(default_factory=Counter)

    def entries(self, path: Path) -> Iterator[Any]:
        """Everything a record could be made of, in file order; a :class:`BadRecord` where the file itself is damaged."""
        raise NotImplementedError(f"{type(self).__name__} must implement entries")

    def to_record(self, entry: Any, number: int, path: Path) -> Record:
        """The record of an entry; BadRecord when there is none in it."""
        raise NotImplementedError(f"{type(self).__name__} must implement to_record")

    def usable(
        self, what: str, parts: Iterable[Any], read: Callable[[Any], T], *, at_most: int | None = None
    ) -> list[T]:
        """What ``read`` makes of the parts of a record, of the first ``at_most`` usable ones. Those in front of them that are
        :class:`Unusable` are left out and counted.

        Raises:
            BadRecord: there are parts, and none is usable; or ``read`` raises it.
        """
        found: list[T] = []
        refused: list[Unusable] = []
        for part in parts:
            if len(found) == at_most:
                break
            try:
                found.append(read(part))
            except Unusable as bad:
                refused.append(bad)
        if refused and not found:
            raise refused[0]
        if refused:
            self._left_out[what] += len(refused)
            self._left_out_of[what] += 1
        return found

    def iter_rows(self, path: Path) -> Iterator[Row | BadRow]:
        """A row or a bad row for every entry; in the end a line about parts of records that were left out."""
        self._left_out.clear()
        self._left_out_of.clear()
        yield from self._rows(path)
        for what, count in sorted(self._left_out.items()):
            of = self._left_out_of[what]
            line = f"note: {path.name}: {what} left out (empty, or beside the picture): {count:,}, of {of:,} record(s)"
            print(line, file=sys.stderr)

    def _rows(self, path: Path) -> Iterator[Row | BadRow]:
        for number, entry in enumerate(self.entries(path)):
            try:
                if isinstance(entry, BadRecord):
                    raise entry
                record = self.to_record(entry, number, path)
                roles, texts = [turn.role for turn in record.turns], [turn.text for turn in record.turns]
                check_conversation(roles, texts, record.images)
                row = row_of(number, record)
                meta_of(row.meta or {}, len(row.images))
                yield row
            except BadRecord as bad:
                yield BadRow(number, _identity(entry), str(bad), bad.check)
            except DataError as error:  # a box that is none
                yield BadRow(number, _identity(entry), str(error), "fields")


class JsonRecords(RecordFormat):
    """A format whose entries are the objects of a JSON array or of JSONL."""

    def entries(self, path: Path) -> Iterator[Any]:
        """The parsed objects."""
        return (parse(raw) for raw in self.raw_records(path))

    def raw_records(self, path: Path) -> Iterator[bytes]:
        """The bytes of each object."""
        return iter_json_records(path)


class WithBoxes(RecordFormat):
    """A format whose texts hold boxes."""

    sizes_known: ClassVar[bool] = False
    """Whether the reader learns the size of a picture, which some forms need."""
    boxes: str = "keep"
    """How boxes are written: `keep` them as they are, or `llava`, `minigpt_v2`, `qwen_vl`, `cogvlm`, `shikra`; `ofa` where the
    reader knows the size of a picture (`multiinstruct`)."""

    @field_validator("boxes")
    @classmethod
    def _known(cls, value: str) -> str:
        if value != "keep" and value not in FORMS:
            raise ValueError(f'unknown box form "{value}". Known: keep, {", ".join(FORMS)}')
        if value != "keep" and FORMS[value].longer_side and not cls.sizes_known:
            raise ValueError(
                f'box form "{value}" counts in shares of the longer side, and these files do not say how large a picture '
                f"is. Choose one of: keep, {', '.join(name for name, form in FORMS.items() if not form.longer_side)}"
            )
        return value

    def with_boxes(self, texts: Sequence[str], form: str, *, num_images: int) -> tuple[list[str], tuple[Region, ...]]:
        """The texts in the wanted form, and the regions that they name. Which picture is meant is known when there is one."""
        written = box_form(form)
        regions = [region for text in texts for region in written.regions(text)] if num_images == 1 else []
        if self.boxes == "keep":
            return list(texts), tuple(regions)
        return [written.rewrite(text, box_form(self.boxes)) for text in texts], tuple(regions)


def parse(raw: bytes) -> Any:
    """A JSON value, or the BadRecord that says why not."""
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        start = raw[:60].decode("utf-8", "replace")
        return BadRecord(f"the record is not valid JSON ({error}): {start!r}", "json")


def load_json(path: Path, *, expected: type = dict) -> Any:
    """A JSON file that is read whole (annotation files whose parts refer to each other).

    Raises:
        DataError: it cannot be read, or is not what is expected.
    """
    try:
        value = orjson.loads(read_json_bytes(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check the data path.") from error
    except orjson.JSONDecodeError as error:
        raise DataError(f"{path}: not valid JSON ({error}). Copy or download it again.") from error
    if not isinstance(value, expected):
        wanted = "an object" if expected is dict else "a list"
        raise DataError(f"{path}: holds {kind_of(value)}, expected {wanted}. Check data path and format.")
    return value


def member(value: dict[str, Any], key: str, path: Path, *, expected: type = list) -> Any:
    """A part that a file as a whole cannot do without."""
    held = value.get(key)
    if not isinstance(held, expected):
        raise DataError(f"{path}: {key} is {kind_of(held)}. This file is of another format; check format: and path.")
    return held


def by_key(entries: Sequence[Any], *keys: str) -> dict[Any, dict[str, Any]]:
    """Objects by their id (the first of ``keys`` that they have). What is no object, or has no usable id, is in no table;
    records that ask for it say so.
    """
    table = {}
    for entry in entries:
        identity = next((entry[key] for key in keys if key in entry), None) if isinstance(entry, dict) else None
        if is_name(identity):
            table[identity] = entry
    return table


def look_up(table: dict[Any, dict[str, Any]], identity: Any) -> dict[str, Any] | None:
    """The object of an id, which may be any JSON value."""
    return table.get(identity) if is_name(identity) else None


def is_name(value: Any) -> bool:
    """Whether a JSON value can be an id."""
    return isinstance(value, (str, int)) and not isinstance(value, bool)


def an_object(entry: Any) -> dict[str, Any]:
    """The entry as an object."""
    if not isinstance(entry, dict):
        raise BadRecord(f"the record is {kind_of(entry)}, expected an object")
    return entry


def text_of(entry: dict[str, Any], key: str) -> str:
    """A field that must be a text with something in it."""
    value = entry.get(key)
    if value is None:
        raise BadRecord(f"{key} is missing, expected a text", "fields")
    if not isinstance(value, str):
        raise BadRecord(f"{key} is {kind_of(value)} {shown(value)}, expected a text", "fields")
    if not value.strip():
        raise Unusable(f"{key} is empty", "fields")
    return value


def name_of(entry: dict[str, Any], key: str) -> str:
    """A field that is a name or a number, as text."""
    value = entry.get(key)
    if not is_name(value) or value == "":
        has = "is missing" if value is None else f"is {kind_of(value)} {shown(value)}"
        raise BadRecord(f"{key} {has}, expected a name or a whole number", "fields")
    return str(value)


def list_of(entry: dict[str, Any], key: str, kind: type | tuple[type, ...]) -> list[Any]:
    """A field that must be a list of one kind."""
    value = entry.get(key)
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        what = "texts" if kind is str else "objects" if kind is dict else "numbers"
        has = "is missing" if value is None else f"is {shown(value)}"
        raise BadRecord(f"{key} {has}, expected a list of {what}", "fields")
    return value


def number_of(entry: dict[str, Any], key: str) -> float:
    """A field that must be a finite number."""
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        has = "is missing" if value is None else f"is {shown(value)}"
        raise BadRecord(f"{key} {has}, expected a number", "fields")
    return value


def ask(question: str, answer: str, *, images: int = 1) -> tuple[Turn, ...]:
    """One exchange; the pictures come first unless the question says where they stand."""
    return with_pictures((Turn("user", question), Turn("assistant", answer)), images)


def with_pictures(turns: Sequence[Turn], images: int) -> tuple[Turn, ...]:
    """The turns with ``<image>`` lines in front of the first question, where no human turn has a placeholder yet."""
    if not images or any(IMAGE_PLACEHOLDER in turn.text for turn in turns if turn.role == "user"):
        return tuple(turns)
    first = next((place for place, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        return tuple(turns)
    shown_first = Turn("user", f"{IMAGE_PLACEHOLDER}\n" * images + turns[first].text)
    return (*turns[:first], shown_first, *turns[first + 1 :])


def turns_of(roles: Sequence[Role], texts: Sequence[str]) -> tuple[Turn, ...]:
    """Turns from two lists."""
    return tuple(Turn(role, text) for role, text in zip(roles, texts, strict=True))


def pick(choices: Sequence[str], identity: str) -> str:
    """One of the choices, always the same for the same id: reading a file twice gives the same records."""
    digest = hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return choices[int.from_bytes(digest) % len(choices)]


def share_box(
    x0: float, y0: float, x1: float, y1: float, size: tuple[float, float]
) -> tuple[float, float, float, float]:
    """A box in pixels as shares of the picture. Annotations reach over the edge by rounding, so a hundredth over is cut off."""
    width, height = size
    if width <= 0 or height <= 0:
        raise BadRecord(f"the picture's size is {width} x {height}, expected numbers above 0", "fields")
    shares = (x0 / width, y0 / height, x1 / width, y1 / height)
    if not all(-0.01 <= share <= 1.01 for share in shares) or x0 > x1 or y0 > y1:
        raise BadRecord(f"box ({x0}, {y0}, {x1}, {y1}) does not lie in the picture of {width} x {height}", "fields")
    left, top, right, bottom = (min(1.0, max(0.0, share)) for share in shares)
    return left, top, right, bottom


def _identity(entry: Any) -> str | None:
    if isinstance(entry, dict):
        for key in _IDS:
            if is_name(value := entry.get(key)):
                return str(value)
    return None
