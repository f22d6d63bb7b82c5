"""What is believed of a model that somebody else wrote: its numbers, never its code, and no path out of its folder.

A model folder or a base model is data. Names in it stay inside it, weights are safetensors or tensors-only pickles, and code
runs only where the person at the keyboard said so (``trust_remote_code``). docs/security.md is the page about this.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from vlit.errors import CheckpointError, ModelError, VlitError

_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_OWN_FOLDERS = ("llm", "tokenizer")


def plain_name(name: Any, *, listed_in: Path, error: type[VlitError] = ModelError) -> str:
    """``name`` when it names a file at or below the folder of ``listed_in``, the file it was read from.

    Names are data: absolute ones, ``..`` and other systems' separators are refused before anything is opened.
    """
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if not parts or parts[0] == "/" or ".." in parts or any(mark in name for mark in ("\\", "\0")):
        raise error(
            f"{listed_in}: lists {name!r}, which is not the name of a file in its own folder. Nothing was loaded. The file "
            "was tampered with or is damaged: fetch the model again from somebody you trust."
        )
    return str(name)


def shards_of(index: Path, prefixes: tuple[str, ...] = ("",)) -> list[str]:
    """Names of the shards that hold a tensor under one of ``prefixes``, by a ``*.index.json``.

    Raises:
        ModelError: the index cannot be read, or names a file outside its folder.
    """
    try:
        names: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{index}: not a readable index of shards ({error!r}). Fetch it again.") from error
    shards = {plain_name(shard, listed_in=index) for name, shard in names.items() if name.startswith(prefixes)}
    return sorted(shards)


def check_model_folder(folder: Path, files: Iterable[str]) -> None:
    """Everything a manifest lists lies in ``folder``, and what libraries will read there is listed (so its hash is checked).

    A link to a *file* is followed, since what it shows must have the hash of the manifest; a link to a folder is not.

    Raises:
        CheckpointError: a name leaves the folder, a folder is a link, a file of ``llm/`` or ``tokenizer/`` is not listed, or
            a pickle is among the files.
    """
    manifest = folder / "manifest.json"
    listed = {plain_name(name, listed_in=manifest, error=CheckpointError) for name in files}
    for name in sorted(listed):
        if PurePosixPath(name).suffix in _PICKLES:
            raise CheckpointError(
                f"{folder / name}: a pickle; a model folder holds safetensors only. Get the model from where it was trained."
            )
    for name in _OWN_FOLDERS:
        for at, folders, found in os.walk(folder / name):
            links = [Path(at), *(Path(at) / child for child in folders)]
            if link := next((path for path in links if path.is_symlink()), None):
                raise CheckpointError(
                    f"{link}: a link to {link.resolve()}, outside what the manifest vouches for. Copy that folder here if it "
                    "is meant to be part of the model."
                )
            for file in found:
                inside = (Path(at) / file).relative_to(folder).as_posix()
                if inside not in listed:
                    raise CheckpointError(
                        f"{folder / inside}: not listed in manifest.json, so nobody knows where it comes from. Remove it."
                    )


def refuse_remote_code(model: Mapping[str, Any], *, folder: Path, trusted: bool) -> None:
    """ModelError when a manifest asks for code of a base model to be run and nobody said that it may."""
    for part in ("encoder", "llm"):
        held = model.get(part)
        if isinstance(held, Mapping) and held.get("trust_remote_code") and not trusted:
            raise ModelError(
                f"{folder}: its {part} runs program code that comes with {held.get('path')!r}. Read that code; if you trust "
                "it, give --trust-remote-code (trust_remote_code=True in Python)."
            )


def asks_for_remote_code(config: Any) -> bool:
    """Whether a model configuration says that code of one of its base models may run."""
    return any(getattr(getattr(config, part, None), "trust_remote_code", False) for part in ("encoder", "llm"))


def load_pretrained(cls: Any, path: str, *, key: str, **options: Any) -> Any:
    """``cls.from_pretrained(path, ...)``: safetensors where there are any, else a pickle read as plain tensors, with a note.

    Args:
        key: the configuration key that named ``path``, for messages.

    Raises:
        ModelError: the folder's index lists a file outside it, or its pickle holds more than tensors.
        OSError, ValueError: what transformers raises.
    """
    try:
        return _load_pretrained(cls, path, key=key, **options)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f'{key} "{path}": its pickle holds more than tensors ({str(error).splitlines()[0][:120]}). Nothing of it was run. '
            "Use a checkpoint in safetensors."
        ) from error


def _load_pretrained(cls: Any, path: str, *, key: str, **options: Any) -> Any:
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # transformers would ask a bot on the hub to convert
    folder = Path(path)
    options["weights_only"] = True
    if not folder.is_dir():
        try:
            return cls.from_pretrained(path, use_safetensors=True, **options)
        except OSError as first:
            try:
                loaded = cls.from_pretrained(path, use_safetensors=False, **options)
            except OSError:
                raise first from None
            _note_pickle(key, path)
            return loaded
    for index in sorted(folder.glob("*.index.json")):
        shards_of(index)
    safe = any(folder.glob("*.safetensors"))
    if not safe and any(folder.glob("pytorch_model*.bin")):
        _note_pickle(key, path)
    return cls.from_pretrained(path, use_safetensors=safe, **options)


@lru_cache(maxsize=64)
def _note_pickle(key: str, path: str) -> None:
    print(
        f'note: {key} "{path}" has no safetensors; its pickle is read as plain tensors, nothing in it is run.',
        file=sys.stderr,
    )
