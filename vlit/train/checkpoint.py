"""Resumable checkpoints: every rank writes its share aside, the folder is renamed when all are on the disk, old ones rotate.

``<stage>/state/step-N/`` holds one safetensors file a rank with the fp32 masters and optimizer states it is responsible for
(:mod:`vlit.train.fragments`), and ``state.json`` with the position, the identity of the stage, every checksum. No
random-number states: every step seeds its own (:func:`vlit.train.distributed.seed_step`), and the order of the data is a
function of (sizes, seed, epoch). So one format serves every strategy and number of ranks, and nothing in it is pickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlit.durable import (
    file_sha256,
    plain,
    read_sealed,
    recover_folder,
    replace_file,
    replace_folder,
    sealed,
    write_file,
)
from vlit.errors import CheckpointError
from vlit.train.distributed import Ranks
from vlit.train.engine import Engine
from vlit.train.fragments import Fragment, FragmentReader, write_fragments

FORMAT = 2
"""Of ``state.json``. Version 1 (one file for all ranks, pickled optimizer state) was never released."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a stage stands: optimizer steps done and running totals."""

    step: int
    tokens: int = 0
    images: int = 0
    seconds: float = 0.0
    non_finite_steps: int = 0
    updates: int = 0
    """Steps that changed the weights: ``step`` less the discarded ones."""


def aside_folder(root: Path, step: int) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return root / f".step-{step}.writing"


def _share_name(ranks: Ranks) -> str:
    return f"rank-{ranks.rank:05d}-of-{ranks.world_size:05d}"


def write_share(aside: Path, fragments: list[Fragment], ranks: Ranks) -> None:
    """Write this rank's file, then a note of its checksum, which is the mark that the file is whole."""
    name = _share_name(ranks)
    digest = write_fragments(aside / f"{name}.safetensors", fragments)
    replace_file(aside / f"{name}.json", json.dumps({"file": f"{name}.safetensors", "sha256": digest}))


def write_failure(aside: Path, problem: str, ranks: Ranks) -> None:
    """Leave a note of why this rank's file is not there; on a full disk the file makes room for it."""
    name = _share_name(ranks)
    with contextlib.suppress(OSError):
        (aside / f"{name}.safetensors").unlink(missing_ok=True)
        replace_file(aside / f"{name}.json", json.dumps({"problem": problem}))


def read_notes(aside: Path) -> list[dict[str, Any]]:
    """What the ranks have said so far."""
    return [json.loads(path.read_bytes()) for path in sorted(aside.glob("rank-*.json"))]


def commit(
    root: Path,
    position: Position,
    identity: dict[str, Any],
    notes: list[dict[str, Any]],
    *,
    world_size: int,
    strategy: str,
    keep: int,
) -> Path:
    """Rank 0, when every rank has written its share: describe the checkpoint, give it its name, delete old ones."""
    aside = aside_folder(root, position.step)
    state = {
        "format": FORMAT,
        "position": {slot: getattr(position, slot) for slot in Position.__slots__},
        "identity": identity,
        "torch": torch.__version__,
        "world_size": world_size,
        "strategy": strategy,
        "files": {note["file"]: note["sha256"] for note in notes},
    }
    for path in aside.glob("rank-*.json"):
        path.unlink()
    write_file(aside / "state.json", [sealed(state).encode()])
    final = root / f"step-{position.step}"
    replace_folder(aside, final)
    with contextlib.suppress(OSError):  # what cannot be deleted now is tried again after the next save
        _delete_old(root, position.step, keep)
    return final


def _delete_old(root: Path, step: int, keep: int) -> None:
    """Keep the newest ``keep`` up to ``step``. Those of later steps were there, and not usable, when this run began: they do
    not count, and go when the run has come to their step."""
    for old in [folder for folder in by_step(root) if _step_of(folder) <= step][keep:]:
        aside = aside_folder(root, _step_of(old))
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(old, aside)  # first of all, so that one deleted by half is never taken for a damaged checkpoint
        shutil.rmtree(aside, ignore_errors=True)


def clear_leftovers(root: Path) -> None:
    """Rank 0, before anything is read: folders that a killed process was writing, or was replacing."""
    for old in root.glob(".step-*.old"):
        recover_folder(root / old.name.removeprefix(".").removesuffix(".old"))
    for leftover in (*root.glob(".step-*.writing"), *root.glob(".step-*.old")):
        shutil.rmtree(leftover, ignore_errors=True)


def newest_state(root: Path, ranks: Ranks) -> tuple[Path, dict[str, Any]] | None:
    """Newest intact checkpoint and its ``state.json``; damaged ones are named on stderr and passed over. None: there are none.

    The ranks share the work of checking the files, and all come to the same answer.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged. Training again from the start would delete what may still
            be mended, and waste the time, so that is left to be decided.
    """
    damaged: list[str] = []
    for folder in ranks.share(by_step(root)):
        problems = [problem for problem in ranks.gather(_problem(folder, ranks)) if problem]
        if not problems:
            return folder, read_sealed(folder / "state.json")
        damaged.append(f"{folder.name} ({problems[0]})")
        if ranks.is_main:
            print(
                f"warning: checkpoint {folder} is not usable ({problems[0]}); trying the one before it.",
                file=sys.stderr,
            )
    if damaged:
        raise CheckpointError(
            f"{root}: none of its checkpoints is usable: {', '.join(damaged)}. Put back an intact copy, or delete it to "
            "train the stage from its beginning."
        )
    return None


def state_of_stage(
    root: Path, identity: dict[str, Any], ranks: Ranks, *, allow_drift: bool
) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that a stage goes on from (None: it begins), once what killed processes left is cleared away.

    Raises:
        CheckpointError: it was written under another identity (its ``base`` is not compared: no weights are loaded yet), or
            no checkpoint is usable.
    """
    if ranks.is_main:
        clear_leftovers(root)
    ranks.barrier()
    found = newest_state(root, ranks)
    if found is not None:
        held = {key: value for key, value in found[1]["identity"].items() if key != "base"}
        check_identity(held, identity, where=found[0], allow_drift=allow_drift)
    return found


def restore_state(folder: Path, state: dict[str, Any], engine: Engine) -> Position:
    """Load a checkpoint into ``engine``. CheckpointError when it is one of other weights."""
    reader = FragmentReader([folder / name for name in state["files"]])
    expected = {
        name: tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in engine.model.named_parameters()
        if parameter.requires_grad
    }
    if reader.parameters != set(expected):
        odd = sorted(reader.parameters ^ set(expected))[:3]
        raise CheckpointError(f"{folder}: holds other trainable weights than this configuration, for example {odd}.")
    for name, shape in expected.items():
        if reader.shapes[name] != shape:
            raise CheckpointError(f"{folder}: {name} is {reader.shapes[name]} there, this configuration has {shape}.")
    position = Position(**state["position"])
    engine.restore(reader, position.updates)
    return position


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
    lines = identity_difference(held, plain(wanted))
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


def by_step(root: Path) -> list[Path]:
    """Folders of complete checkpoints, the newest first."""
    found = [p for p in root.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda p: -_step_of(p))


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _problem(folder: Path, ranks: Ranks) -> str | None:
    """What is wrong with this rank's share of the files."""
    try:
        held = json.loads((folder / "state.json").read_bytes())
        if held["format"] != FORMAT:
            return f"it has format {held['format']}, this vlit reads format {FORMAT}"
        state = read_sealed(folder / "state.json")
        for name, digest in list(state["files"].items())[ranks.rank :: ranks.world_size]:
            if "/" in name or file_sha256(folder / name) != digest:
                return f"{name} does not match its checksum"
        Position(**state["position"])
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return str(error)
    except (ValueError, KeyError, TypeError):
        return "state.json does not match its checksum"
    return None
