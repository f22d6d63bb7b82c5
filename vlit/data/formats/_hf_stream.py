"""Rows of a dataset as the package ``datasets`` streams them, from a folder or from the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlit.data.record_checks import BadRecord, kind_of, shown
from vlit.errors import DataError

_BEGINNINGS = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp", b"GIF8": ".gif"}


def streamed_rows(name: str, config: str, split: str) -> Iterator[dict[str, Any]]:
    """The rows in their order, pictures as bytes or paths. Nothing but what is read is downloaded.

    Raises:
        DataError: there is no such dataset or split, or it cannot be reached.
    """
    import datasets

    try:
        rows: Any = datasets.load_dataset(name, config or None, split=split, streaming=True)
        for column, feature in (rows.features or {}).items():
            inner = getattr(feature, "feature", feature)
            if isinstance(inner, datasets.Image):
                plain = datasets.Image(decode=False)
                rows = rows.cast_column(column, plain if inner is feature else datasets.List(plain))
        yield from rows
    except (OSError, ValueError) as error:
        raise DataError(
            f"{name}: split {split} cannot be streamed ({' '.join(str(error).split())[:300]}). Check the name, config= and "
            "split=, and that the Hub can be reached."
        ) from error


def saved_pictures(value: Any, column: str, number: int, folder: Path) -> list[str]:
    """Names below ``folder`` of a row's pictures; those that came as bytes are written there."""
    found = []
    for place, one in enumerate(value if isinstance(value, list) else [value]):
        if one is None:
            continue
        content, path = (one.get("bytes"), one.get("path")) if isinstance(one, dict) else (None, one)
        if isinstance(content, bytes):
            ending = next((ending for begin, ending in _BEGINNINGS.items() if content.startswith(begin)), "")
            target = folder / f"{number:08d}{f'_{place}' if isinstance(value, list) else ''}{ending}"
            target.write_bytes(content)
            found.append(target.name)
        elif isinstance(path, str):
            found.append(path)
        else:
            raise BadRecord(f"{column} is {kind_of(one)} {shown(one)}, expected bytes or a path", "image_path")
    return found
