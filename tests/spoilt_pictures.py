"""Pictures that can and that cannot be decoded, records about them, and the reasons that a run gives for what it left out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from vlit.data.record import Record
from vlit.types import Turn

GREEN, SECRET = (0, 200, 0), (250, 0, 250)


def png(path: Path, colour: tuple[int, int, int] = GREEN, size: tuple[int, int] = (24, 24)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def about(name: str, identity: str, kind: str | None = None) -> Record:
    turns = (Turn("user", "<image>\nWhat colour is it?"), Turn("assistant", "It is green."))
    return Record(identity, turns, (name,), kind=kind)


def left_out(folder: Path) -> dict[str, str]:
    """Reason by item."""
    rows = [json.loads(line) for line in (folder / "out" / "rejected.jsonl").read_text().splitlines()]
    return {row["id"]: row["reason"] for row in rows}


def truncated(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:3000])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def dots(path: Path, seed: int) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)).save(path)


def bare_pictures(folder: Path, count: int) -> Path:
    """``count`` pictures of one colour each, ``0.png`` and so on."""
    for number in range(count):
        png(folder / f"{number}.png", (60 * number, 10, 10))
    return folder
