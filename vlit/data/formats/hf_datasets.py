"""A folder that ``datasets`` wrote (``save_to_disk``: Arrow files), or a downloaded dataset repository (Parquet files).

https://huggingface.co/docs/datasets. Files are read as they lie there, in their order; nothing is downloaded unless
``streaming`` is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlit.data.formats._hf_files import files_of
from vlit.data.formats._hf_stream import save_picture, streamed_rows
from vlit.data.formats._table import TableFormat, pictures_of
from vlit.data.record_checks import BadRecord
from vlit.durable import make_folder
from vlit.errors import DataError
from vlit.registry import FORMATS


@FORMATS.register("hf_datasets")
class HfDatasetsFormat(TableFormat):
    """A folder of Arrow or Parquet files."""

    type: str = "hf_datasets"
    split: str = "train"
    """Which part: a folder of that name, or files whose names begin with it. A folder of one part only is taken whole."""
    config: str = ""
    """Which configuration, of a dataset that has several: a folder of that name, or what the Hub calls so."""
    streaming: bool = False
    """Read the rows as they arrive, of a folder or of a dataset on the Hub: for `vlit convert`, which makes files of them that
    can be trained on."""
    save_images: str = ""
    """Folder that the pictures of a streamed dataset are written to, under names that their content decides."""

    def entries(self, path: Path) -> Iterator[Any]:
        """The rows; of a streamed dataset the pictures are written down as they come."""
        if not self.streaming:
            yield from super().entries(path)
            return
        for row in streamed_rows(str(path), self.config, self.split):
            column = self.picture_column(row)
            if column is not None and not self.save_images:
                raise DataError(f"{path}: column {column} holds pictures. Set save_images=FOLDER to keep them.")
            try:
                found = [] if column is None else self._saved(row[column], column)
            except BadRecord as bad:
                yield bad
                continue
            yield self.with_references(row, column, found)

    def _saved(self, value: Any, column: str) -> list[str]:
        folder = Path(self.save_images)
        make_folder(folder)
        return pictures_of(value, column, lambda content, _: save_picture(content, folder))

    def image_root(self, path: Path) -> Path:
        """Where the pictures of a streamed dataset are written."""
        return Path(self.save_images) if self.streaming else super().image_root(path)

    def files(self, path: Path) -> list[Path]:
        """The files of the split, in order."""
        if self.streaming:
            raise DataError(
                f"{path}: a streamed dataset has no files to train on. Make some: vlit convert {path} data.jsonl --from "
                "hf_datasets streaming=true save_images=FOLDER, and name data.jsonl here."
            )
        if not path.is_dir():
            raise DataError(f"{path}: is no folder. Name the folder of the dataset, or use format: parquet.")
        return files_of(path, config=self.config, split=self.split)
