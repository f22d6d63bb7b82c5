"""A data worker that dies ends the run with one line that says what it died of and which record it was at; nothing hangs."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.tiny_run import tiny_run
from vlit.data import load
from vlit.data.tokenize import SampleTokenizer
from vlit.errors import DataError
from vlit.models.assemble import model_spec
from vlit.train import stage as stage_module
from vlit.train.identity import open_mixture
from vlit.train.run import run_training

WORDS = ("stages.instruct=null", "stages.align.checkpoint.every_steps=1", "data.num_workers=1")
VICTIM = "005_0.png"


def crash(how: int) -> Callable[..., object]:
    """What a picture library does that dies of one file."""
    real = load.load_view

    def load_view(path: Path, **settings: object) -> object:
        if Path(path).name == VICTIM:
            faulthandler.disable()  # pytest's, whose pages of stacks are not what a user sees
            os.kill(os.getpid(), how)
        return real(path, **settings)

    return load_view


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (signal.SIGKILL, r"was killed \(SIGKILL\), mostly by the kernel because memory was short.*num_workers"),
        (signal.SIGSEGV, r"died of SIGSEGV; `vlit doctor` finds files that crash a decoder"),
        (signal.SIGBUS, r"died of SIGBUS, mostly because /dev/shm is full"),
        (signal.SIGABRT, r"died of SIGABRT; `vlit doctor`"),
    ],
)
def test_a_worker_that_dies_of_a_picture_is_named_with_the_record_and_the_step(
    how: int, words: str, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tiny_dir, tmp_path / "out", *WORDS)
    started = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(load, "load_view", crash(how))
        with pytest.raises(
            DataError, match=rf"data worker 0 \(pid \d+\) at .*data\.json#5 .*r5.*, in step \d, {words}"
        ) as error:
            run_training(run)
    assert time.monotonic() - started < 60
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("Run the same command again to resume.")
    run_training(run)  # with the picture mended, the same command goes on
    assert (tmp_path / "out" / "align" / "model" / "manifest.json").is_file()


def test_a_worker_killed_while_the_step_is_computed_is_an_error_of_the_data_not_of_the_step(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch raises its error wherever the training process is when the worker dies."""
    real, made = stage_module.train_step, []

    def step(engine: object, batch: object, **settings: object) -> object:
        result = real(engine, batch, **settings)
        loader = made[0]
        if batch.step == 2:
            os.kill(loader._running._workers[0].pid, signal.SIGKILL)
            time.sleep(2.0)
        return result

    class Noted(load.StepLoader):
        def __init__(self, *words: object, **settings: object) -> None:
            super().__init__(*words, **settings)
            made.append(self)

    monkeypatch.setattr(stage_module, "train_step", step)
    monkeypatch.setattr(stage_module, "StepLoader", Noted)
    run = tiny_run(tiny_dir, tmp_path / "out", *WORDS, "stages.align.max_steps=30")
    with pytest.raises(DataError, match=r"data worker 0 \(pid \d+\) .*in step \d+, was killed \(SIGKILL\)"):
        run_training(run)
    assert (tmp_path / "out" / "align" / "state" / "step-2").is_dir()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_step_crosses_from_its_worker_in_one_piece_and_unchanged(
    num_workers: int, tiny_dir: Path, tmp_path: Path
) -> None:
    run = tiny_run(tiny_dir, tmp_path)
    loaders = [
        load.StepLoader(
            open_mixture(run, "align", progress=False), SampleTokenizer(model_spec(run.model), run.data), run.data,
            global_batch=6, micro_batch_tokens=150, total_steps=4, num_workers=workers,
        )
        for workers in (0, num_workers)
    ]  # fmt: skip
    compared = 0
    for here, there in zip(*loaders, strict=True):
        pieces = set()
        for left, right in zip(here.micro_batches, there.micro_batches, strict=True):
            assert left.sample_ids == right.sample_ids
            assert left.segments == right.segments
            for name, tensor in right.tensors().items():
                assert tensor.dtype == left.tensors()[name].dtype
                assert torch.equal(tensor, left.tensors()[name]), name
                pieces.add(tensor.untyped_storage().data_ptr())
                compared += 1
        assert len(here.micro_batches) > 1
        assert len(pieces) == 1
    assert compared > 4 * 7
