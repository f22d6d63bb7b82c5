"""Parquet files of conversations or questions, pictures as bytes or paths: what ``vlit convert --to parquet`` writes, and
most image-text sets on the Hugging Face Hub.
"""

from __future__ import annotations

from pathlib import Path

from vlit.data.formats._table import TableFormat
from vlit.registry import FORMATS


@FORMATS.register("parquet")
class ParquetFormat(TableFormat):
    """A `.parquet` file, or a folder of them."""

    type: str = "parquet"

    def files(self, path: Path) -> list[Path]:
        """The files of a folder and of the folders in it, by name."""
        return sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
