"""One run per output folder: a second one is refused by name, a dead one's folder is taken over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.ranks import PROGRAMS, ROOT, environment
from vlit.errors import CheckpointError
from vlit.train.cluster.lock import OutputLock
from vlit.train.distributed import Ranks

HOLD = str(PROGRAMS / "hold.py")
ALONE = Ranks(state=None, device=torch.device("cpu"), rank=0, world_size=1)


@contextmanager
def holder(folder: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, HOLD, str(folder), "60", *words],
        cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert "holds" in process.stdout.readline()
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_second_run_is_refused_with_process_host_and_start_time(tmp_path: Path) -> None:
    with holder(tmp_path / "out") as first:
        with pytest.raises(CheckpointError) as refused, OutputLock(tmp_path / "out", ALONE):
            pass
        held = json.loads((tmp_path / "out" / ".lock").read_text())
    assert f"is in use by the run of pid {first.pid} on host {os.uname().nodename}, started {held['started']}" in str(
        refused.value
    )
    assert held["command"].endswith("out 60")


def test_the_folder_of_a_killed_run_is_taken_over_although_its_children_live(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with holder(tmp_path, "fork") as first:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        with OutputLock(tmp_path, ALONE):
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert f"the run of pid {first.pid}" in capsys.readouterr().err


def test_a_folder_that_was_left_in_order_is_taken_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        with OutputLock(tmp_path / "new" / "out", ALONE):
            pass
    assert (tmp_path / "new" / "out" / ".lock").read_text() == ""
    assert capsys.readouterr().err == ""


def test_the_same_process_cannot_take_a_folder_twice(tmp_path: Path) -> None:
    with OutputLock(tmp_path, ALONE):
        with (
            pytest.raises(CheckpointError, match="this very process"),
            OutputLock(tmp_path / ".." / tmp_path.name, ALONE),
        ):
            pass
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    with OutputLock(tmp_path, ALONE):
        pass


@pytest.mark.parametrize("alive", [True, False])
def test_a_run_on_another_host_is_judged_by_its_heartbeat(alive: bool, tmp_path: Path) -> None:
    """As on a shared file system that carries no locks between hosts."""
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps({"pid": 1, "host": "node17", "started": "yesterday", "command": "train.py"}))
    over = threading.Event()

    def touch() -> None:
        while alive and not over.wait(0.2):
            os.utime(lock)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        if alive:
            with pytest.raises(CheckpointError, match="pid 1 on host node17, started yesterday"):
                OutputLock(tmp_path, ALONE, heartbeat_s=0.4).__enter__()
        else:
            started = time.monotonic()
            with OutputLock(tmp_path, ALONE, heartbeat_s=0.4):
                assert time.monotonic() - started >= 1.0  # two and a half heartbeats were waited for
    finally:
        over.set()
        thread.join()


def test_the_holder_touches_its_file(tmp_path: Path) -> None:
    with OutputLock(tmp_path, ALONE, heartbeat_s=0.1):
        before = (tmp_path / ".lock").stat().st_mtime_ns
        time.sleep(0.5)
        assert (tmp_path / ".lock").stat().st_mtime_ns > before


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"output_dir .*file/out: cannot be written .*Not a directory"):
        OutputLock(tmp_path / "file" / "out", ALONE).__enter__()
    if os.getuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(CheckpointError, match="Permission denied"):
            OutputLock(tmp_path / "closed", ALONE).__enter__()


def test_a_damaged_lock_file_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("{half")
    with OutputLock(tmp_path, ALONE, heartbeat_s=0.1):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_both_ranks_are_refused_when_rank_0_is(tmp_path: Path) -> None:
    with holder(tmp_path / "out") as first:
        launch = [sys.executable, "scripts/launch.py", "--nproc-per-node=2", HOLD, str(tmp_path / "out"), "0"]
        done = subprocess.run(launch, cwd=ROOT, env=environment(), text=True, capture_output=True, timeout=60)
    assert done.returncode == 2
    refused = [line for line in done.stdout.splitlines() if "refused" in line]
    assert sorted(line.split(" refused")[0] for line in refused) == ["rank 0", "rank 1"]
    assert all(f"pid {first.pid}" in line for line in refused)
