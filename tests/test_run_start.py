"""What a run makes sure of before it trains, at its first start and at every later one."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from tests.test_train_run import interrupt_after
from tests.tiny_run import tiny_run
from vlit.errors import CheckpointError
from vlit.models.artifact import load_model
from vlit.train.run import run_training
from vlit.train.signals import Interrupted


def test_a_frozen_connector_that_was_replaced_on_the_disk_is_refused_when_a_stage_goes_on(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, lr in (("a", "1e-3"), ("b", "2e-3")):
        words = ("stages.instruct=null", "stages.align.max_steps=1", f"stages.align.lr={lr}")
        run_training(tiny_run(tiny_dir, tmp_path / name, *words))
    start = tmp_path / "start"
    shutil.copytree(tmp_path / "a" / "align" / "model", start)
    tuning = "stages.instruct.tuning={connector: frozen, llm: full}"
    run = tiny_run(tiny_dir, tmp_path / "out", f"model.init_from={start}", "stages.align=null", tuning)
    interrupt_after(monkeypatch, "instruct", 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        run_training(run)
    shutil.rmtree(start)
    shutil.copytree(tmp_path / "b" / "align" / "model", start)
    with pytest.raises(CheckpointError, match=r"step-3 was written under another configuration: base\.connector: "):
        run_training(run)
    shutil.rmtree(start)
    shutil.copytree(tmp_path / "a" / "align" / "model", start)
    _, manifest = load_model(run_training(run), dtype=torch.float32)
    assert set(manifest["unchanged"]) == {"vision"}, "the connector is a file of the model folder"
