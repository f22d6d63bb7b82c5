"""The embedded world on disk: built once, cached by a hash of its settings and code, safe to interrupt.

root/images/{train,validation,test}/000001.png
root/annotations/{instances,captions}_{split}.json     COCO
root/{align,instruct}_{split}.json                     LLaVA
root/questions_{validation,test}.jsonl                 held-out benchmark
root/manifest.json                                     settings, hash, counts, chance levels
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlit.errors import DataError
from vlit.synth.digits import instructions
from vlit.synth.digits.annotations import write_split as write_pictures
from vlit.synth.digits.questions import FAMILIES

CODE_FILES = ("scenes.py", "annotations.py", "questions.py", "instructions.py", "world.py")


@dataclass(frozen=True)
class WorldPaths:
    """Where the parts of a built world lie."""

    root: Path

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def images(self) -> Path:
        """Folder that the ``image`` fields of all files are relative to."""
        return self.root / "images"

    def align(self, split: str) -> Path:
        return self.root / f"align_{split}.json"

    def instruct(self, split: str) -> Path:
        return self.root / f"instruct_{split}.json"

    def questions(self, split: str) -> Path:
        return self.root / f"questions_{split}.jsonl"

    def read_manifest(self) -> dict[str, Any]:
        return dict(json.loads(self.manifest.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class WorldSettings:
    """All that a world depends on, beside its code."""

    seed: int
    train_images: int
    validation_images: int
    test_images: int
    questions_per_kind: int

    def content_hash(self) -> str:
        """SHA-256 over the settings and the source files that make the world."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode())
        for name in CODE_FILES:
            digest.update(Path(__file__).with_name(name).read_bytes())
        return digest.hexdigest()


def ensure_world(
    root: str | Path,
    *,
    seed: int = 0,
    train_images: int = 8000,
    validation_images: int = 300,
    test_images: int = 400,
    questions_per_kind: int = 100,
    progress: bool = True,
) -> WorldPaths:
    """Build the world at ``root`` unless the same one (settings and code) is there; about 10 s for 8,700 pictures.

    The world is written beside ``root`` and renamed, under a file lock: an interrupted build leaves nothing that a
    later call could take for finished, and two processes build it once. A folder at ``root`` that holds something else
    than a world is never touched (``DataError``).
    """
    target = Path(root)
    settings = WorldSettings(seed, train_images, validation_images, test_images, questions_per_kind)
    for name, value in asdict(settings).items():
        if name != "seed" and value < 1:
            raise DataError(f"world {target}: {name} is {value}, must be at least 1.")
    wanted, paths = settings.content_hash(), WorldPaths(target)
    if _built_hash(paths) == wanted:
        return paths
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"world {target}: its folder cannot be made ({error.strerror}). Choose another place."
        ) from error
    if target.exists() and not target.is_dir():
        raise DataError(f"world {target}: this is a file. Choose a folder.")
    with _locked(target.parent / f".{target.name}.lock"):
        if _built_hash(paths) == wanted:
            return paths
        if target.exists() and not paths.manifest.is_file() and any(target.iterdir()):
            raise DataError(f"world {target}: the folder holds other files. Choose another folder or empty this one.")
        building, old = (target.parent / f".{target.name}.{word}" for word in ("building", "old"))
        for leftover in (building, old):
            shutil.rmtree(leftover, ignore_errors=True)
        building.mkdir()
        _build(building, settings, wanted, progress=progress)
        if target.exists():
            target.rename(old)
        building.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    return paths


def _build(root: Path, settings: WorldSettings, content_hash: str, *, progress: bool) -> None:
    counts = {
        "train": settings.train_images,
        "validation": settings.validation_images,
        "test": settings.test_images,
    }
    with _bar(sum(counts.values()), enabled=progress) as advance:
        for split, count in counts.items():
            write_pictures(root, split, count, seed=settings.seed, advance=advance)
    turns = {
        split: instructions.write_split(
            root, split, seed=settings.seed, per_kind=None if split == "train" else settings.questions_per_kind
        )
        for split in counts
    }
    lines = (root / "questions_validation.jsonl").read_text(encoding="utf-8").splitlines()
    manifest = {
        "content_hash": content_hash,
        "settings": asdict(settings),
        "images": counts,
        "turns": {split: sum(len(turn) for turn in conversations) for split, conversations in turns.items()},
        "families": FAMILIES,
        "chance": instructions.chance_levels(turns["train"], [json.loads(line) for line in lines]),
    }
    text = json.dumps(manifest, indent=2)
    with open(root / "manifest.json", "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _built_hash(paths: WorldPaths) -> str | None:
    try:
        return str(paths.read_manifest().get("content_hash"))
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; the system releases it when the process ends in whatever way."""
    with open(path, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _bar(total: int, *, enabled: bool) -> Iterator[Callable[[int], object]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not enabled, transient=False) as bar:
        task = bar.add_task("world: pictures", total=total)
        yield lambda number: bar.advance(task, number)
