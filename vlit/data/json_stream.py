"""The records of a JSON array or JSONL file as raw bytes, one at a time: memory stays at one chunk for any file size.

A JSON array is cut at its top-level commas by whole-chunk array operations (strings, escapes and nesting respected), so
a damaged record is one damaged slice and not the end of the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from vlit.errors import DataError

CHUNK_BYTES = 16 << 20
MAX_RECORD_BYTES = 256 << 20
"""A longer record is refused: a file without line ends or with a lost quote would otherwise be held in memory whole."""
_MAX_KEY_BYTES = 4096
_WHITESPACE = b" \t\r\n"
_MARK = b"\xef\xbb\xbf"  # UTF-8's byte order mark
_GZIP = b"\x1f\x8b"
_OTHER_ENCODINGS = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")  # their byte order marks
_QUOTE, _BACKSLASH, _COMMA = 34, 92, 44
_STEP = np.zeros(256, np.int8)  # change of nesting depth
_STEP[[ord("{"), ord("[")]] = 1
_STEP[[ord("}"), ord("]")]] = -1
_STRUCTURAL = _STEP != 0
_STRUCTURAL[_COMMA] = True


def iter_json_records(path: Path, *, advance: Callable[[int], object] | None = None) -> Iterator[bytes]:
    """Bytes of every record of ``path`` in order. ``advance(number of bytes)`` is called as the file is read.

    A file whose first character is ``[`` is one JSON array; anything else is read as JSONL (blank lines ignored).

    Raises:
        DataError: the file is missing, empty, or its array is cut off or followed by something else.
    """
    try:
        with path.open("rb") as file:
            start, first = _beginning(file, path)
            file.seek(start)
            advance = advance or (lambda _: None)
            if first == b"[":
                yield from (element for _, element in _elements(file, path, advance))
            else:
                yield from _lines(file, path, advance)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error


def iter_json_members(path: Path) -> Iterator[tuple[str, int, bytes]]:
    """Key, place of the first byte and bytes of every value of a file that is one JSON object, one at a time.

    Raises:
        DataError: the file is missing, empty, no JSON object, or cut off.
    """
    try:
        with path.open("rb") as file:
            start, first = _beginning(file, path)
            if first != b"{":
                raise DataError(f"{path}: the file begins with {first!r}, expected one JSON object.")
            file.seek(start)
            for number, (offset, element) in enumerate(_elements(file, path, lambda _: None, closing=b"}")):
                quotes = _unescaped_quotes(np.frombuffer(element[:_MAX_KEY_BYTES], np.uint8))
                if len(quotes) < 2 or quotes[0] != 0:
                    raise DataError(f"{path}: member {number} has no key, at byte {offset}. Mend the file there.")
                after = element[quotes[1] + 1 :]
                value = after.lstrip(_WHITESPACE)[1:].lstrip(_WHITESPACE)
                yield json.loads(element[: quotes[1] + 1]), offset + len(element) - len(value), value
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error


def read_json_bytes(path: Path) -> bytes:
    """A JSON file that is read whole, without its byte order mark.

    Raises:
        DataError: it is compressed.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    _refuse_compressed(content, path)
    return content.removeprefix(_MARK)


def _refuse_compressed(head: bytes, path: Path) -> None:
    if head.startswith(_GZIP):
        raise DataError(
            f"{path}: the file is compressed (gzip). Uncompress it (gunzip -k {path.name}) and name the result."
        )


def _beginning(file: IO[bytes], path: Path) -> tuple[int, bytes]:
    """Where the text begins, past a byte order mark and white space, and its first character."""
    head = file.read(4096)
    _refuse_compressed(head, path)
    if head.startswith(_OTHER_ENCODINGS) or b"\0" in head[:4]:
        raise DataError(f"{path}: the file is not UTF-8 text (it starts with {head[:8]!r}). Save it as UTF-8 JSON.")
    start = len(_MARK) if head.startswith(_MARK) else 0
    head = head[start:]
    while head and not head.strip(_WHITESPACE):
        start += len(head)
        head = file.read(CHUNK_BYTES)
    if not head:
        raise DataError(f"{path}: the file is empty. Expected a JSON array of records or one record a line.")
    text = head.lstrip(_WHITESPACE)
    return start + len(head) - len(text), text[:1]


def _lines(file: IO[bytes], path: Path, advance: Callable[[int], object]) -> Iterator[bytes]:
    read, number = 0, 0
    while line := file.readline(MAX_RECORD_BYTES + 1):
        read += len(line)
        if read >= 1 << 20:
            advance(read)
            read = 0
        _check_size(len(line), number, path)
        line = line.strip()
        if line == b"{" or (number == 0 and line[:1] == b"{" and line[-1:] in (b"[", b"{", b",")):
            raise DataError(
                f"{path}: the file is one JSON object over several lines. Expected a JSON array of records, or one record "
                "a line."
            )
        if line:
            yield line
            number += 1
    advance(read)


def _check_size(size: int, number: int, path: Path) -> None:
    if size > MAX_RECORD_BYTES:
        raise DataError(
            f"{path}: record {number} is longer than {MAX_RECORD_BYTES >> 20} MiB, so this is no file of records, or a quote "
            "is missing. Check the file there."
        )


def _elements(
    file: IO[bytes], path: Path, advance: Callable[[int], object], *, closing: bytes = b"]"
) -> Iterator[tuple[int, bytes]]:
    """Place and bytes of each element of the array (or member of the object) that the file is."""
    what = "array" if closing == b"]" else "object"
    rest, opened, closed, number, offset = b"", False, False, 0, file.tell()
    while chunk := file.read(max(CHUNK_BYTES, len(rest))):  # doubling keeps one giant record linear
        advance(len(chunk))
        _check_size(len(rest), number, path)
        buffer = rest + chunk
        if not opened:
            stripped = buffer.lstrip(_WHITESPACE)
            if not stripped:
                offset, rest = offset + len(buffer), b""
                continue
            offset += len(buffer) - len(stripped) + 1
            buffer, opened = stripped[1:], True
        if closed:
            rest = buffer
        else:
            begin = 0
            ends, closed = _element_ends(buffer)
            if closed and (found := buffer[ends[-1] : ends[-1] + 1]) != closing:
                raise DataError(
                    f"{path}: the {what} is closed by {found.decode()} at byte {offset + ends[-1]}, in record "
                    f"{number + len(ends) - 1}. Put in the bracket that is missing there."
                )
            for end in ends:
                piece = buffer[begin:end].lstrip(_WHITESPACE)
                element = piece.rstrip(_WHITESPACE)
                last = closed and end == ends[-1]
                if not element and not (last and number == 0):
                    raise DataError(
                        f"{path}: record {number} is empty (two commas in a row, or one before the closing bracket), "
                        f"at byte {offset + begin}. Remove the comma."
                    )
                if element:
                    yield offset + end - len(piece), element
                    number += 1
                begin = end + 1
            offset, rest = offset + begin, buffer[begin:]
        if closed and rest.strip(_WHITESPACE):
            raise DataError(
                f"{path}: the {what} ends after {number} records, but more text follows at byte {offset}. "
                "Make it one JSON array, or one record a line (.jsonl)."
            )
        if closed:
            rest = b""
    if not closed:
        raise DataError(
            f"{path}: the file ends inside record {number} (record starts at byte {offset}); the {what} is not closed. "
            "The file is cut off: copy or download it again."
        )


def _element_ends(buffer: bytes) -> tuple[list[int], bool]:
    """Positions of the commas (and of the closing bracket, if there) that end the elements starting at byte 0."""
    data = np.frombuffer(buffer, np.uint8)
    quotes = _unescaped_quotes(data)
    structural = np.flatnonzero(_STRUCTURAL[data])
    structural = structural[
        np.searchsorted(quotes, structural) % 2 == 0
    ]  # an odd number of quotes before = in a string
    kinds = data[structural]
    depth = np.cumsum(_STEP[kinds], dtype=np.int64)
    closing = np.flatnonzero(depth < 0)[:1]
    top = np.flatnonzero((depth == 0) & (kinds == _COMMA))
    if len(closing):
        top = np.append(top[top < closing[0]], closing[0])
    return structural[top].tolist(), bool(len(closing))


def _unescaped_quotes(data: np.ndarray) -> np.ndarray:
    quotes = np.flatnonzero(data == _QUOTE)
    if not len(quotes):
        return quotes
    after_backslash = (quotes > 0) & (data[quotes - 1] == _BACKSLASH)
    if not after_backslash.any():
        return quotes
    backslashes = np.flatnonzero(data == _BACKSLASH)
    run_starts = backslashes[np.concatenate(([True], np.diff(backslashes) != 1))]
    doubtful = quotes[after_backslash]
    run_length = doubtful - run_starts[np.searchsorted(run_starts, doubtful) - 1]
    keep = np.ones(len(quotes), bool)
    keep[after_backslash] = run_length % 2 == 0
    return quotes[keep]
