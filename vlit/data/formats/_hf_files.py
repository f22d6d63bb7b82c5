"""Which files of a dataset's folder hold the wanted part of the wanted configuration, by the layouts that are in use.

| layout | part | configuration |
|---|---|---|
| ``data/train-00000-of-00002.parquet`` (a dataset's repository) | beginning of the name | none |
| ``ai2d/train-00000-of-00002.parquet`` (a repository with configurations) | beginning of the name | folder |
| ``default/train/0000.parquet`` (the Hub's ``refs/convert/parquet``) | folder | folder above |
| ``train/state.json`` (``DatasetDict.save_to_disk``) | folder | none |
| ``state.json`` (``Dataset.save_to_disk``) | none | none |

Parts and configurations are never mixed: where more than one would do, a DataError names them.
"""

from __future__ import annotations

import re
from pathlib import Path

from vlit.data.formats._reader import load_json
from vlit.errors import DataError

_PART = re.compile(
    r"(?:partial-)?((?:train(?:ing)?|valid(?:ation)?|val|dev|test(?:ing)?|eval(?:uation)?)(?:[A-Z]\w*|_[A-Za-z]\w*)?)(?![a-z])"
)
_SHARD = re.compile(r"(.+)-\d+-of-\d+")
_MAX_NAMED = 20


def files_of(path: Path, *, config: str, split: str) -> list[Path]:
    """The Parquet or Arrow files of a split, in order. A folder of one part only is taken whole.

    Raises:
        DataError: there are none, or several parts or configurations and none of them is the wanted one.
    """
    found = _tables(path)
    if not found:
        raise DataError(f"{path}: holds no .parquet or .arrow file (nor one that a state.json lists). Check data path.")
    if config:
        chosen = [file for file in found if config in _folders(file, path, split)]
        if not chosen:
            held = _listed({"/".join(_folders(file, path, split)) for file in found})
            raise DataError(f"{path}: holds no configuration {config}, but {held}. Set config to one that is there.")
        found = chosen
    parts = {file: _part(file, path, split) for file in found}
    names = {part for part in parts.values() if part}
    if split in names:
        found = [file for file in found if parts[file] == split]
    elif len(names) > 1:
        raise DataError(f"{path}: holds no split {split}, but {_listed(names)}. Set split to one that is there.")
    configs = {"/".join(_folders(file, path, split)) for file in found}
    if len(configs) > 1 and not config:
        raise DataError(f"{path}: holds several configurations: {_listed(configs)}. Set config to one of them.")
    return found


def _tables(path: Path) -> list[Path]:
    found = {state.parent: _listed_in(state) for state in sorted(path.rglob("state.json"))}
    saved = {folder: files for folder, files in found.items() if files is not None}
    loose = [file for kind in ("parquet", "arrow") for file in path.rglob(f"*.{kind}") if file.parent not in saved]
    return sorted(loose) + [file for files in saved.values() for file in files]


def _listed_in(state: Path) -> list[Path] | None:
    """What ``save_to_disk`` wrote; other Arrow files beside it are caches of ``datasets``. None: the file is something else."""
    listed = load_json(state).get("_data_files")
    if not isinstance(listed, list):
        return None
    names = [one.get("filename") for one in listed if isinstance(one, dict)]
    return [state.parent / Path(str(name)).name for name in names]


def _part(file: Path, root: Path, split: str) -> str | None:
    """``train`` of ``a/train-0.parquet`` or ``train/0.parquet``; ``split`` may have any name. None: nothing says."""
    if file.suffix == ".arrow" and file.with_name("state.json").is_file():
        return None if file.parent == root else file.parent.name
    if named := _PART.match(file.name):
        return named[1]
    shard = _SHARD.fullmatch(file.stem)
    if shard and shard[1] == split:
        return split
    for folder in reversed(file.relative_to(root).parts[:-1]):
        if folder == split:
            return split
        if named := _PART.fullmatch(folder):
            return named[1]
    return shard[1] if shard else None


def _folders(file: Path, root: Path, split: str) -> list[str]:
    """The folders above a file that can name its configuration."""
    above = file.relative_to(root).parts[:-1]
    return [folder for folder in above if folder not in ("data", split) and not _PART.fullmatch(folder)]


def _listed(names: set[str]) -> str:
    ordered = sorted(name or "the folder itself" for name in names)
    more = f" and {len(ordered) - _MAX_NAMED} more" if len(ordered) > _MAX_NAMED else ""
    return ", ".join(ordered[:_MAX_NAMED]) + more
