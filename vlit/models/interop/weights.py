"""One view of weight files on disk: safetensors or torch ``.bin``, single or sharded, read one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from vlit.errors import ModelError
from vlit.models.foreign import library_errors
from vlit.models.trusted import shards_of

_SINGLE = ("model.safetensors", "pytorch_model.bin", "mm_projector.bin", "adapter_model.safetensors")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


class WeightFiles:
    """Tensors of a file or of a model folder by name; nothing is held in memory but what ``get`` returns.

    Only names that start with one of ``prefixes`` are seen, and only shards that hold such are needed. A folder is
    read by its index, else by its one weights file. Pickles are memory-mapped ``weights_only``.

    Raises:
        ModelError: no weights there, an unreadable file, or an index that lists a missing shard.
    """

    def __init__(self, path: str | Path, *, prefixes: tuple[str, ...] = ("",)) -> None:
        self.path = Path(path)
        self.prefixes = prefixes
        self._file_of: dict[str, Path] = {}
        self._pickles: dict[Path, dict[str, Tensor]] = {}
        for file in self._files():
            self._file_of |= {name: file for name in self._names(file) if name.startswith(prefixes)}

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def get(self, name: str) -> Tensor:
        """One tensor on the CPU, in its stored dtype."""
        file = self._file_of[name]
        if file.suffix != ".safetensors":
            return self._pickle(file)[name]
        from safetensors import safe_open

        with library_errors(f"{file}: {name}"), safe_open(file, "pt") as opened:
            return opened.get_tensor(name)

    def items(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """(name without ``prefix``, tensor) of every tensor under ``prefix``, one at a time."""
        for name in self.names():
            if name.startswith(prefix):
                yield name[len(prefix) :], self.get(name)

    def _files(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        if not self.path.is_dir():
            raise ModelError(f'"{self.path}": no such file or folder. Check the path.')
        for name in _INDEXES:
            index = self.path / name
            if index.is_file():
                shards = shards_of(index, self.prefixes)
                for shard in shards:
                    if not _is_there(self.path / shard):
                        raise ModelError(f"{index}: lists {shard}, which is not there. The download is incomplete.")
                return [self.path / shard for shard in shards]
        for name in _SINGLE:
            if (self.path / name).is_file():
                return [self.path / name]
        found = sorted(p for p in self.path.iterdir() if p.suffix in (".safetensors", ".bin", ".pth", ".pt"))
        if len(found) != 1:
            raise ModelError(
                f'"{self.path}": expected {", ".join((*_INDEXES, *_SINGLE))} or one weights file, found '
                f"{', '.join(p.name for p in found) or 'none'}."
            )
        return found

    def _names(self, file: Path) -> list[str]:
        if file.suffix != ".safetensors":
            return list(self._pickle(file))
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "pt") as opened:
                return list(opened.keys())
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(f"{file}: not a readable safetensors file ({error}). Fetch it again.") from error

    def _pickle(self, file: Path) -> dict[str, Tensor]:
        if file not in self._pickles:
            try:
                held = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
            except Exception as error:  # a damaged pickle makes torch raise nearly anything
                reason = str(error).split("\n")[0][:160] or type(error).__name__
                raise ModelError(
                    f"{file}: not a file of plain tensors ({reason}). Convert it to safetensors."
                ) from error
            if not isinstance(held, dict) or not all(isinstance(t, Tensor) for t in held.values()):
                raise ModelError(f"{file}: expected a mapping of names to tensors. Convert it to safetensors.")
            self._pickles[file] = held
        return self._pickles[file]


def _is_there(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # a name no file system takes
        return False


def _is_zip(file: Path) -> bool:
    """Only torch's zip format (since 1.6) can be memory-mapped."""
    with file.open("rb") as opened:
        return opened.read(2) == b"PK"


def fetch_folder(path: str, *, key: str, prefixes: tuple[str, ...]) -> Path:
    """``path`` when it is a folder, else the local copy of that hub model: its config.json and the shards with
    ``prefixes``.

    Raises:
        ModelError: neither a folder nor a model that can be fetched from here; names the configuration ``key``.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(hf_hub_download(path, "config.json")).parent
        for name in (*_INDEXES, *_SINGLE[:2]):
            try:
                file = Path(hf_hub_download(path, name))
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                continue
            for shard in shards_of(file, prefixes) if name in _INDEXES else ():
                hf_hub_download(path, shard)
            return folder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ModelError(
            f'{key}: "{path}" is neither a folder nor a hub model that can be fetched from here. Check the name, or '
            f"download it first. Cause: {reason}"
        ) from error
    raise ModelError(f'{key}: hub model "{path}" has no weights under a known name.')
