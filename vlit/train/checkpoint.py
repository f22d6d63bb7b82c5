"""Resumable checkpoints: written aside, checksummed, renamed, rotated; the newest intact one is used.

``<stage>/state/step-N/`` holds fp32 master weights, optimizer state, random-number states and the position, which is one
integer because the order of the data is a pure function of (sizes, seed, epoch).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from vlit.errors import CheckpointError
from vlit.models.artifact import file_sha256
from vlit.train.optimizer import TrainedWeights

FILES = ("weights.safetensors", "optimizer.pt", "random.pt")


@dataclass(frozen=True, slots=True)
class Position:
    """Where a stage stands: optimizer steps done and running totals."""

    step: int
    tokens: int = 0
    images: int = 0
    seconds: float = 0.0
    non_finite_steps: int = 0


def save_state(root: Path, weights: TrainedWeights, position: Position, identity: dict[str, Any], *, keep: int) -> Path:
    """Write ``root/step-N`` atomically and delete all but the ``keep`` newest. A failed write leaves the old ones alone."""
    final, aside = root / f"step-{position.step}", root / f".step-{position.step}.writing"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in weights.tensors().items()}
    save_file(tensors, aside / "weights.safetensors")
    torch.save(weights.optimizer_state(), aside / "optimizer.pt")
    torch.save(_random_states(), aside / "random.pt")
    state = {
        "position": {slot: getattr(position, slot) for slot in Position.__slots__},
        "identity": identity,
        "torch": torch.__version__,
        "files": {name: file_sha256(aside / name) for name in FILES},
    }
    (aside / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    for path in aside.iterdir():
        _fsync(path)
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    _fsync(root)
    for old in _by_step(root)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def newest_state(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """Newest intact checkpoint and its ``state.json``; damaged ones are named on stderr and passed over."""
    for leftover in root.glob(".step-*.writing"):
        shutil.rmtree(leftover, ignore_errors=True)
    for folder in _by_step(root):
        problem = _problem(folder)
        if problem is None:
            return folder, json.loads((folder / "state.json").read_text(encoding="utf-8"))
        print(f"warning: checkpoint {folder} is not usable ({problem}); trying the one before it.", file=sys.stderr)
    return None


def restore_state(folder: Path, state: dict[str, Any], weights: TrainedWeights) -> Position:
    """Load a checkpoint into ``weights`` and the random-number generators."""
    tensors = load_file(folder / "weights.safetensors")
    if set(tensors) != set(weights.masters):
        odd = sorted(set(tensors) ^ set(weights.masters))[:3]
        raise CheckpointError(f"{folder}: holds other trainable weights than this configuration, for example {odd}.")
    optimizer_state = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
    weights.restore(tensors, optimizer_state)
    _set_random_states(torch.load(folder / "random.pt", weights_only=True, map_location="cpu"))
    return Position(**state["position"])


def identity_difference(held: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Human-readable lines ``key: old -> new`` for every leaf in which two identities differ."""
    old, new = _leaves(held), _leaves(wanted)
    missing = "(absent)"
    return [
        f"{key}: {old.get(key, missing)!r} -> {new.get(key, missing)!r}"
        for key in sorted(set(old) | set(new))
        if old.get(key, missing) != new.get(key, missing)
    ]


def check_identity(held: dict[str, Any], wanted: dict[str, Any], *, where: Path, allow_drift: bool) -> None:
    """CheckpointError when the configuration changed since ``where`` was written (a warning with ``allow_drift``)."""
    lines = identity_difference(held, json.loads(json.dumps(wanted)))
    if not lines:
        return
    shown = "; ".join(lines[:8]) + (f"; and {len(lines) - 8} more" if len(lines) > 8 else "")
    if allow_drift:
        print(
            f"warning: {where} was written under another configuration ({shown}); going on as asked.", file=sys.stderr
        )
        return
    raise CheckpointError(
        f"{where} was written under another configuration: {shown}. Use another output_dir, delete that folder, or set "
        "allow_config_drift=true."
    )


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        found: dict[str, Any] = {}
        for key, item in value.items():
            found |= _leaves(item, f"{prefix}.{key}" if prefix else str(key))
        return found
    return {prefix: value}


def _by_step(root: Path) -> list[Path]:
    found = [p for p in root.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda p: -int(p.name.removeprefix("step-")))


def _problem(folder: Path) -> str | None:
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        for name in FILES:
            if file_sha256(folder / name) != state["files"][name]:
                return f"{name} does not match its checksum"
        Position(**state["position"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _random_states() -> dict[str, Any]:
    version, keys, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(keys), gauss],
        "numpy": [numpy_state[0], torch.from_numpy(numpy_state[1].astype(np.int64)), *map(float, numpy_state[2:])],
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), int(position), int(has_gauss), cached))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
