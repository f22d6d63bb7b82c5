"""Files whose end was never written: a download into a file of the final size, stopped, leaves zero bytes.

Decoders read on through zeros and return grey or smeared pixels without an error (only a file that simply ends is noticed).
"""

from __future__ import annotations

from pathlib import Path

_TAIL_BYTES = 64 << 10
_JPEG_SCAN, _JPEG_END = b"\xff\xda", b"\xff\xd9"
_PNG_END, _GIF_END = b"IEND", b";"


def missing_end(path: Path, format: str | None) -> str | None:
    """What is wrong when a JPEG, PNG or GIF ends with zeros in place of its end mark; None when it is whole.

    Zeros behind the end mark are harmless padding.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL_BYTES))
        tail = file.read()
    data = tail.rstrip(b"\0")
    zeros = len(tail) - len(data)
    if not zeros:
        return None
    if format in ("JPEG", "MPO"):  # compressed data holds neither mark
        whole = data.rfind(_JPEG_END) > data.rfind(_JPEG_SCAN)
    elif format == "PNG":
        whole = _PNG_END in data
    elif format == "GIF":
        whole = zeros == 1 or data.endswith(_GIF_END)  # a zero ends the last block; the mark after it is often left out
    else:
        return None
    return (
        None if whole else f"it ends with {zeros if data else f'at least {zeros}'} zero bytes instead of its end mark"
    )
