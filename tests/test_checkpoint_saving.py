"""Saving beside training, and a disk that is full: what is on the disk stays, what could not be written is said."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.stage_fixture import ReadyStage, ready_stage, same, usable_state
from tests.test_train_run import assert_same_bits, interrupt_after
from tests.tiny_run import losses_of, metrics_of, tiny_run
from vlit import durable
from vlit.errors import CheckpointError
from vlit.train.checkpoint import Position
from vlit.train.run import run_training
from vlit.train.saving import WRITING, StateSaver
from vlit.train.signals import Interrupted
from vlit.train.validate import Validator


@pytest.fixture(scope="module")
def ready(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> ReadyStage:
    return ready_stage(tiny_dir, tmp_path_factory.mktemp("ready"))


WORDS = ("stages.align=null", "stages.instruct.checkpoint.every_steps=1")


@pytest.fixture(scope="module")
def straight(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folder of a run with room enough."""
    out = tmp_path_factory.mktemp("straight")
    run_training(tiny_run(tiny_dir, out, *WORDS))
    return out


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        time.sleep(0.1)
        real(descriptor)

    monkeypatch.setattr(durable.os, "fsync", fsync)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_checkpoint_written_beside_training_holds_the_very_bytes_of_one_that_was_waited_for(
    ready: ReadyStage, tmp_path: Path, slow_disk: None
) -> None:
    ready.save(tmp_path / "waited", 5, asynchronous=False)
    at_save = ready.values()
    with ready.saver(tmp_path / "beside") as saver:
        saver.begin(ready.engine, Position(step=5))
        ready.update()  # training goes on and changes all that is being written
        assert saver.status() == WRITING
        saver.finish()
    left, right = (bytes_of(tmp_path / name / "step-5") for name in ("waited", "beside"))
    assert left == right
    assert len(left) == 2
    assert not same(at_save, ready.values())
    assert same(usable_state(tmp_path / "beside", ready.ranks)[1], at_save)


def test_a_save_that_begins_during_another_waits_for_it_and_both_are_kept(
    ready: ReadyStage, tmp_path: Path, slow_disk: None
) -> None:
    with ready.saver(tmp_path) as saver:
        for step in (1, 2):
            saver.begin(ready.engine, Position(step=step))
        assert (tmp_path / "step-1").is_dir()
        assert saver.status() == WRITING
        saver.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2"]


def test_an_error_in_training_keeps_the_checkpoint_that_was_being_written(
    ready: ReadyStage, tmp_path: Path, slow_disk: None
) -> None:
    def train() -> None:
        with ready.saver(tmp_path) as saver:
            saver.begin(ready.engine, Position(step=3))
            assert saver.status() == WRITING
            raise RuntimeError("power")

    with pytest.raises(RuntimeError, match="power"):
        train()
    assert usable_state(tmp_path, ready.ranks)[0] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


def test_a_save_still_being_written_at_the_end_of_a_stage_is_finished(
    tiny_dir: Path, tmp_path: Path, slow_disk: None
) -> None:
    words = ("stages.instruct=null", "stages.align.max_steps=3", "stages.align.checkpoint.every_steps=2")
    run_training(tiny_run(tiny_dir, tmp_path / "out", *words))
    assert [path.name for path in (tmp_path / "out" / "align" / "state").iterdir()] == ["step-2"]


@pytest.mark.parametrize("moment", ["save", "validation"])
def test_a_signal_during_a_save_or_a_validation_saves_the_step_and_the_run_goes_on_from_it(
    moment: str, straight: Path, tiny_dir: Path, tmp_path: Path, slow_disk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*WORDS]
    if moment == "validation":
        data = f"[{{path: {tiny_dir / 'dataset' / 'data.json'}, name: held}}]"
        words += [f"stages.instruct.validation={{data: {data}, every_steps: 2, max_records: 4, sample_generations: 0}}"]
    run = tiny_run(tiny_dir, tmp_path / "out", *words)
    owner, name = (StateSaver, "begin") if moment == "save" else (Validator, "run")
    real, calls = getattr(owner, name), []

    def signalled(self: object, *words: object) -> object:
        result = real(self, *words)
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGUSR1)  # during a save: its thread is still writing
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signalled)
        with pytest.raises(Interrupted) as stopped:
            run_training(run)
    assert stopped.value.exit_code == 128 + signal.SIGUSR1
    expected = 3 if moment == "save" else 4
    assert [row["step"] for row in metrics_of(run)] == list(range(1, expected + 1))
    state = tmp_path / "out" / "instruct" / "state"
    assert sorted(path.name for path in state.iterdir()) == [f"step-{expected - 1}", f"step-{expected}"]
    run_training(run)
    assert_same_bits(straight / "instruct" / "model", tmp_path / "out" / "instruct" / "model")


class Disk:
    """A folder on a disk that can be filled and freed."""

    def __init__(self, folder: Path, fill: Callable[[], None], free: Callable[[], None]) -> None:
        self.folder, self.fill, self.free = folder, fill, free


@pytest.fixture(params=["tmpfs", "file size limit"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    """A mounted file system of 6 MB where the tests may mount one; a limit of the process on the size of a file everywhere."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param == "tmpfs":
        mount = shutil.which("mount")
        command = [str(mount), "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
        if mount is None or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("mounting a file system is not allowed here")
        ballast = folder / "ballast"

        def fill() -> None:
            with ballast.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(4096))
            assert shutil.disk_usage(folder).free == 0

        yield Disk(folder, fill, lambda: ballast.unlink(missing_ok=True))
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield Disk(
        folder,
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard)),  # more than a log, less than the weights
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)),
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_no_checkpoint_and_ends_the_run_after_three_failures_and_with_room_it_goes_on(
    disk: Disk,
    straight: Path,
    tiny_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tiny_run(tiny_dir, disk.folder / "out", *WORDS)
    with monkeypatch.context() as patch:
        interrupt_after(patch, "instruct", 3, disk.fill)
        with pytest.raises(
            CheckpointError, match=r"3 checkpoints in a row could not be written.*run the same command again"
        ):
            run_training(run)
    disk.free()
    warnings = [line for line in capfd.readouterr().err.splitlines() if "was not written" in line]
    assert [f"failure {n} in a row of 3" in line for n, line in enumerate(warnings, 1)] == [True] * 3
    assert all("GB free" in line and "GB needed" in line and "Older ones are intact" in line for line in warnings)
    state = disk.folder / "out" / "instruct" / "state"
    assert sorted(path.name for path in state.iterdir()) == ["step-1", "step-2"]
    run_training(run)
    assert_same_bits(straight / "instruct" / "model", disk.folder / "out" / "instruct" / "model")
    assert losses_of(run) == losses_of(tiny_run(tiny_dir, straight))


def test_a_disk_that_is_full_for_a_while_costs_one_checkpoint_and_no_line_of_the_metrics(
    disk: Disk, straight: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run(tiny_dir, disk.folder / "out", *WORDS, "stages.instruct.checkpoint.asynchronous=false")
    interrupt_after(monkeypatch, "instruct", 3, disk.fill)
    interrupt_after(monkeypatch, "instruct", 5, disk.free)
    run_training(run)
    error = capfd.readouterr().err
    assert error.count("was not written") == 2
    assert "failure 2 in a row" in error
    state = disk.folder / "out" / "instruct" / "state"
    assert sorted(path.name for path in state.iterdir()) == ["step-2", "step-5"]
    assert [row["step"] for row in metrics_of(run)] == [1, 2, 3, 4, 5, 6]
    assert_same_bits(straight / "instruct" / "model", disk.folder / "out" / "instruct" / "model")


def test_a_model_that_finds_no_room_is_an_error_and_the_same_command_finishes_when_there_is_room(
    disk: Disk, straight: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tiny_dir, disk.folder / "out", *WORDS)
    with monkeypatch.context() as patch:
        interrupt_after(patch, "instruct", 6, disk.fill)
        with pytest.raises(
            CheckpointError, match=r"the model of stage instruct was not written: .*GB free.*are intact"
        ):
            run_training(run)
    disk.free()
    assert sorted(path.name for path in (disk.folder / "out" / "instruct").iterdir()) == ["state"]
    run_training(run)
    assert_same_bits(straight / "instruct" / "model", disk.folder / "out" / "instruct" / "model")


def test_a_start_on_a_full_disk_is_refused_with_both_sizes(tiny_dir: Path, tmp_path: Path) -> None:
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if mount is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a file system is not allowed here")
    try:
        with pytest.raises(CheckpointError, match=r"2 checkpoints of .* need .* GB are free"):
            run_training(tiny_run(tiny_dir, tmp_path / "out", *WORDS))
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_a_checkpoint_of_other_weights_is_refused_by_name_even_where_drift_is_allowed(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> None:
        raise RuntimeError("power")

    lora = "stages.instruct.tuning={{connector: full, llm: {{mode: lora, rank: {}, alpha: 8}}}}"
    run = tiny_run(tiny_dir, tmp_path / "out", *WORDS, lora.format(4))
    with monkeypatch.context() as patch:
        interrupt_after(patch, "instruct", 3, stop)
        with pytest.raises(RuntimeError, match="power"):
            run_training(run)
    other = tiny_run(tiny_dir, tmp_path / "out", *WORDS, lora.format(8), "allow_config_drift=true")
    with pytest.raises(CheckpointError, match=r"lora_A.* is \(4, 64\) there, this configuration has \(8, 64\)"):
        run_training(other)
