"""A run that hangs says which rank stands where, and ends; one that is only slow goes on. Real processes, real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.ranks import PROGRAMS, ROOT, by_hand, environment, launched, wait_for
from vlit.train.cluster.exit_codes import EXIT_CODES, EXIT_HANG, EXIT_RANK_LOST
from vlit.train.cluster.hang_report import culprits, hang_report
from vlit.train.cluster.peers import Peer
from vlit.train.cluster.watchdog import Watchdog
from vlit.train.distributed import Ranks

STEPS = str(PROGRAMS / "steps.py")
ALONE = Ranks(state=None, device=torch.device("cpu"), rank=0, world_size=1)


def peer(rank: int, phase: str = "reduce", step: int = 7, **more: object) -> Peer:
    collective = phase == "reduce"
    base = Peer(rank, f"host{rank}", 100 + rank, phase, step, collective, seconds=9.0, left=-1.0, beat=5)
    return replace(base, **more)


def blamed(*peers: Peer) -> list[int]:
    return [who.rank for who, _ in culprits(peers)]


def test_the_rank_that_waits_for_nobody_is_to_blame() -> None:
    assert blamed(peer(0), peer(1), peer(2, "data")) == [2]
    assert blamed(peer(0, "forward", 7), peer(1, "forward", 6), peer(2)) == [1]
    assert blamed(peer(0, "validation", 6, left=None), peer(1, "forward", 7)) == [1]  # rank 0 may take its time
    assert blamed(peer(0), peer(1, silent=True), peer(2, "data")) == [1]
    assert blamed(peer(0), peer(1, ended="ValueError: x")) == [1]
    assert blamed(peer(0), peer(1, step=6)) == [1]
    assert blamed(peer(0), peer(1)) == []


def test_the_report_says_who_where_since_when_and_what_to_do() -> None:
    text = hang_report(peer(0), {1: peer(1, "data", 7), 2: peer(2, gone=True)}, 3, limit_s=8.0)
    assert "culprit: rank 2 (host host2, pid 102) does not run any more" in text
    assert 'rank 0 (host host0, pid 100) is in "reduce" of step 7 since 9.0 s, the limit is 8 s' in text
    assert "runtime.hang_timeout_s" in text
    assert "never reached training" in hang_report(peer(0), {}, 2, limit_s=8.0)
    assert "cannot be asked" in hang_report(peer(0), None, 2, limit_s=8.0)
    assert "more ranks" in hang_report(peer(0), {n: peer(n) for n in range(1, 99)}, 99, limit_s=8.0)


def test_exit_codes_are_distinct_and_the_page_lists_them_all() -> None:
    page = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|") and line.split("|")[1].strip().isdigit()]
    assert {int(row.split("|")[1]): row.split("|")[2].strip() for row in rows} == {
        code: what for code, (what, _) in EXIT_CODES.items()
    }


def test_a_phase_costs_microseconds() -> None:
    with Watchdog(ALONE, 60.0) as dog:
        started = time.perf_counter()
        for step in range(20_000):
            dog.phase("forward", step)
        each = (time.perf_counter() - started) / 20_000
    assert each < 20e-6  # about half a microsecond on an idle core


def test_no_limit_means_no_thread() -> None:
    with Watchdog(ALONE, None) as dog:
        dog.phase("forward", 1)
        dog.phase("validation", allow_s=1.0)
        assert dog._threads == []


def test_data_workers_forked_under_the_watchdog_work_and_end() -> None:
    from torch.utils.data import DataLoader

    with Watchdog(ALONE, 3.0) as dog:
        for epoch in range(2):
            dog.phase("data", epoch)
            loader: DataLoader[int] = DataLoader(range(40), num_workers=2, multiprocessing_context="fork")
            assert sum(int(x) for x in loader) == sum(range(40))


def test_one_process_that_hangs_ends_with_its_stacks(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, STEPS, str(tmp_path), "sleep", "1"],
        env=environment(),
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == EXIT_HANG
    assert 'is in "forward" of step 3' in done.stderr
    report = (tmp_path / "hang-rank-0.txt").read_text()
    assert "in meet" in report  # the function that sleeps
    assert report in done.stderr


def test_a_rank_stuck_in_its_own_work_is_named_with_its_phase(tmp_path: Path) -> None:
    with launched(tmp_path, STEPS, str(tmp_path), "sleep") as run:
        codes, stderr = run.wait(limit_s=60)
        assert codes == [EXIT_HANG]
        assert f'culprit: rank 1 (host {os.uname().nodename}, pid {run.pid(1)}) is in "forward" of step 3' in stderr
        assert "culprit: rank 0" not in stderr
        assert list(tmp_path.glob("hang-rank-*.txt"))
        run.assert_nobody_is_left()


def test_a_stopped_rank_is_named_by_its_silence(tmp_path: Path) -> None:
    with by_hand(tmp_path, STEPS, str(tmp_path), "stop") as run:
        started = time.monotonic()
        code = run.processes[0].wait(timeout=60)
        stderr = run.processes[0].communicate(timeout=5)[1]
        assert code == EXIT_HANG
        assert time.monotonic() - started < 40
        assert f"culprit: rank 1 (host {os.uname().nodename}, pid {run.pid(1)}) gives no sign of life" in stderr


@pytest.mark.slow
def test_a_stopped_rank_that_hosts_the_store_does_not_stop_the_others_from_ending(tmp_path: Path) -> None:
    with by_hand(tmp_path, STEPS, str(tmp_path), "orphan") as run:
        pid = run.pid(0)
        run.pid(1)
        time.sleep(2.0)
        os.kill(pid, signal.SIGSTOP)
        code = run.processes[1].wait(timeout=90)
        stderr = run.processes[1].communicate(timeout=5)[1]
        assert code == EXIT_HANG
        assert "the store of torchrun does not answer" in stderr
        assert "rank 1 (host" in stderr


@pytest.mark.slow
def test_a_stopped_rank_under_the_launcher_leaves_no_process(tmp_path: Path) -> None:
    """The launcher's agent gives a process thirty seconds before it kills it; a stopped one needs them."""
    with launched(tmp_path, STEPS, str(tmp_path), "stop") as run:
        codes, stderr = run.wait(limit_s=90)
        assert codes == [EXIT_HANG]
        assert "culprit: rank 1" in stderr
        run.assert_nobody_is_left()


@pytest.mark.parametrize(
    ("fault", "code", "why"),
    [("kill", 137, "does not run any more"), ("raise", 1, "left the run (ValueError: the cat sat on the keyboard)")],
)
def test_a_rank_that_is_lost_is_named_at_once(fault: str, code: int, why: str, tmp_path: Path) -> None:
    with launched(tmp_path, STEPS, str(tmp_path), fault, "30") as run:
        started = time.monotonic()
        codes, stderr = run.wait(limit_s=60)
        assert codes == [code]
        assert time.monotonic() - started < 28  # not by the watchdog's limit
        assert f"(host {os.uname().nodename}, pid {run.pid(1)}) {why}" in stderr
        assert 'cannot go on in "reduce" of step 3: rank 1' in stderr
        run.assert_nobody_is_left()


def test_without_a_launcher_the_survivor_ends_with_its_own_code(tmp_path: Path) -> None:
    with by_hand(tmp_path, STEPS, str(tmp_path), "kill", "30") as run:
        codes, stderr = run.wait(limit_s=60)
        assert codes == [EXIT_RANK_LOST, -signal.SIGKILL]
        assert "rank 1" in stderr
        assert "Traceback" not in stderr


def test_others_wait_for_a_rank_that_may_take_its_time(tmp_path: Path) -> None:
    """Rank 0 waits in a collective for three times the limit, while rank 1 validates."""
    with launched(tmp_path, STEPS, str(tmp_path), "allowed", "1.5") as run:
        codes, stderr = run.wait(limit_s=90)
        assert codes == [0], stderr
        assert "hang" not in stderr


@pytest.mark.parametrize("fault", ["allowed", "continue"])
def test_an_allowance_and_a_suspended_process_are_no_hang(fault: str, tmp_path: Path) -> None:
    """Three times the limit in a phase that may take it; two and a half times the limit under SIGSTOP, then SIGCONT."""
    done = subprocess.run(
        [sys.executable, STEPS, str(tmp_path), fault, "1"],
        env=environment(),
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_ranks_whose_launcher_was_killed_save_and_end(tmp_path: Path) -> None:
    with launched(tmp_path, STEPS, str(tmp_path), "orphan", "5") as run:
        pids = [run.pid(0), run.pid(1)]
        time.sleep(2.0)
        run.processes[0].send_signal(signal.SIGKILL)
        wait_for(lambda: (tmp_path / "saved-0").is_file(), within_s=30, what="a checkpoint")
        assert pids
        run.assert_nobody_is_left()
