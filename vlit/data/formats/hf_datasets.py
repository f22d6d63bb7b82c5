"""A folder that ``datasets`` wrote (``save_to_disk``: Arrow files), or a downloaded dataset repository (Parquet files).

https://huggingface.co/docs/datasets. Files are read as they lie there, in their order; nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path

from vlit.data.formats._reader import load_json
from vlit.data.formats._table import TableFormat
from vlit.errors import DataError
from vlit.registry import FORMATS


@FORMATS.register("hf_datasets")
class HfDatasetsFormat(TableFormat):
    """A folder of Arrow or Parquet files."""

    type: str = "hf_datasets"
    split: str = "train"
    """Which part: a folder of that name, or files whose names begin with it. A folder of one part only is taken whole."""

    def files(self, path: Path) -> list[Path]:
        """The files of the split, in order."""
        if not path.is_dir():
            raise DataError(f"{path}: is no folder. Name the folder of the dataset, or use format: parquet.")
        own = path / self.split if (path / self.split).is_dir() else path
        state = own / "state.json"
        if state.is_file():
            listed = load_json(state).get("_data_files")
            names = [one.get("filename") for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
            return [own / Path(str(name)).name for name in names]
        found = sorted([*own.rglob("*.parquet"), *own.rglob("*.arrow")])
        named = [file for file in found if file.name.split(".")[0].split("-")[0] == self.split]
        return named or found
