"""Where the description of every model part comes from, and the model made of it without weights.

A part is described by its ``config.json``. It is looked for in this order: the local folder of the configuration, the folder
given with ``--parts``, the Hugging Face cache, the built-in table of published shapes (``published.json``). Nothing is
downloaded and no weights are read.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vlit.config.schema import ModelConfig
from vlit.errors import ModelError

KEYS = {"encoder": ("path",), "connector": ("from_blip2",), "llm": ("path",)}
"""Keys that name a model folder or hub id whose ``config.json`` is needed."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx")
_PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
}
"""Stands in for a missing one: means and deviations change no shape."""


@dataclass(frozen=True, slots=True)
class PartSource:
    """Where the description of one part was found."""

    key: str
    name: str
    found: str


@lru_cache(maxsize=1)
def published() -> dict[str, Any]:
    """The table of published shapes and dataset sizes."""
    table: dict[str, Any] = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    return table


@contextmanager
def described(config: ModelConfig, parts: Path | None = None) -> Iterator[tuple[ModelConfig, list[PartSource]]]:
    """The model configuration with every part's path replaced by a folder of descriptions, for as long as the block runs.

    Raises:
        ModelError: a part is described nowhere; names the key and all places that were looked at.
    """
    sources: list[PartSource] = []
    with tempfile.TemporaryDirectory(prefix="vlit-plan-") as root:
        changed: dict[str, Any] = {"init_from": None}
        for part, keys in KEYS.items():
            held = getattr(config, part)
            new: dict[str, str | None] = {}
            for key in keys:
                name = getattr(held, key, None)
                if name is None:
                    continue
                folder = Path(root) / f"{part}-{key}"
                found = _describe(
                    name, folder, parts, revision=getattr(held, "revision", None), key=f"model.{part}.{key}"
                )
                sources.append(PartSource(f"model.{part}.{key}", name, found))
                new[key] = str(folder)
            if part == "llm" and new:
                new |= {"tokenizer": None, "revision": None}
            if part == "encoder" and new and hasattr(held, "revision"):
                new["revision"] = None
            changed[part] = held.model_copy(update=new)
        yield config.model_copy(update=changed), sources


def _describe(name: str, folder: Path, parts: Path | None, *, revision: str | None, key: str) -> str:
    """Fill ``folder`` with the description of ``name``; returns where it was found."""
    folder.mkdir()
    here = [(place, how) for place, how in _places(name, parts, revision) if (place / "config.json").is_file()]
    if here:
        place, found = here[0]
        for file in place.iterdir():
            if file.is_file() and file.suffix not in _WEIGHTS:
                (folder / file.name).symlink_to(file.resolve())
    else:
        shape = published()["models"].get(name)
        if shape is None:
            looked = (
                f"a local folder, {'' if parts is None else f'{parts}, '}the Hugging Face cache and the built-in shapes"
            )
            raise ModelError(
                f'{key} "{name}": its config.json is not here (looked at {looked}: '
                f"{', '.join(sorted(published()['models']))}). Put it into FOLDER/{name}/config.json and give --parts "
                "FOLDER, or download the model; the planner downloads nothing."
            )
        (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
        found = "built-in published shape"
    if not (folder / "preprocessor_config.json").exists():
        (folder / "preprocessor_config.json").write_text(json.dumps(_PREPROCESSOR), encoding="utf-8")
    return found


def _places(name: str, parts: Path | None, revision: str | None) -> Iterator[tuple[Path, str]]:
    local = Path(name).expanduser()
    yield local, "local folder"
    if parts is not None:
        for folder in (parts / name, parts / local.name, parts):
            if folder != parts or (parts / "config.json").is_file():
                yield folder, f"--parts ({folder})"
    from huggingface_hub import try_to_load_from_cache

    if name.count("/") == 1 and not local.is_absolute():
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        if isinstance(cached, str):
            yield Path(cached).parent, "Hugging Face cache"
