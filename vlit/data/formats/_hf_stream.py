"""Rows of a dataset as the package ``datasets`` streams them, from a folder or from the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlit.data.cache import write_atomically
from vlit.errors import DataError


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


def save_picture(content: bytes, folder: Path) -> str:
    """Write a picture below ``folder`` as it came, under a name that its content decides: a hash, and the ending that PIL
    gives it. Datasets may share a folder, and a picture that comes again is stored once.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as picture:
            ending = f".{picture.format.lower()}" if picture.format else ""
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # training says what is wrong with it
        ending = ""
    target = folder / f"{hashlib.blake2b(content, digest_size=16).hexdigest()}{ending}"
    if not target.is_file() or target.stat().st_size != len(content):
        write_atomically(target, content)
    return target.name
