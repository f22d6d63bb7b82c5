"""A trained model folder to tamper with, a pickle that acts, and the command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_run import tiny_run
from vlit.models.artifact import load_model

ROOT = Path(__file__).resolve().parent.parent


class Bomb:
    """A pickle of this runs code when it is read carelessly."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


@pytest.fixture(scope="module")
def trained(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of one step a stage; the second model folder holds ``llm/``."""
    from vlit.train.run import run_training

    out = tmp_path_factory.mktemp("trained") / "out"
    run_training(tiny_run(tiny_dir, out, "stages.align.max_steps=1", "stages.instruct.max_steps=1"))
    return out


@pytest.fixture
def model(trained: Path, tmp_path: Path) -> Path:
    """A copy of a model folder, to be tampered with."""
    return Path(shutil.copytree(trained / "instruct" / "model", tmp_path / "model"))


def change_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for key, value in changes.items():
        manifest[key] = manifest[key] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(manifest))


def load(folder: Path, **options: Any) -> Any:
    return load_model(folder, dtype=torch.float32, **options)[0]


def cli(*words: str, check: bool = True, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more
    command = [sys.executable, "-m", "vlit.cli", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done
