"""Real processes for tests of several ranks: started by the launcher or by hand, with a hard time limit and no leftovers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from vlit.train.cluster.peers import is_running

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / "tests" / "programs"


def environment(**more: str) -> dict[str, str]:
    """One thread a process, no network, this checkout, and nothing of an outer torchrun."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "SLURM", "MASTER_", "RANK", "LOCAL_"))
    }
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    return kept | fixed | more


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Ranks:
    """Two running processes. ``pids`` come from the files that the programs write."""

    folder: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def pid(self, rank: int, *, within_s: float = 60.0) -> int:
        """The process id of a rank, once it has written it down."""
        path = self.folder / f"pid-{rank}"
        wait_for(lambda: path.is_file() and path.read_text().strip() != "", within_s=within_s, what=str(path))
        return int(path.read_text())

    def wait(self, *, limit_s: float) -> tuple[list[int], str]:
        """(exit codes, stderr of all) after the processes ended by themselves."""
        outputs = [process.communicate(timeout=limit_s)[1] for process in self.processes]
        return [process.returncode for process in self.processes], "".join(outputs)

    def assert_nobody_is_left(self, ranks: int = 2) -> None:
        """No process of the run exists, a few seconds after it ended."""
        pids = [self.pid(rank, within_s=0.1) for rank in range(ranks)]
        wait_for(lambda: not any(is_running(pid) for pid in pids), within_s=10.0, what=f"the end of {pids}")

    def clean(self) -> None:
        for path in self.folder.glob("pid-*"):
            if path.read_text().strip():
                kill(int(path.read_text()))
        for process in self.processes:
            process.kill()
            process.wait()


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def wait_for(condition: object, *, within_s: float, what: str) -> None:
    assert callable(condition)
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until, f"waited {within_s} s for {what}"
        time.sleep(0.02)


@contextmanager
def launched(folder: Path, *words: str, ranks: int = 2, **env: str) -> Iterator[Ranks]:
    """``words`` under scripts/launch.py, as users start them."""
    run = Ranks(folder)
    command = [sys.executable, str(ROOT / "scripts" / "launch.py"), f"--nproc-per-node={ranks}", *words]
    run.processes.append(start(command, environment(**env)))
    try:
        yield run
    finally:
        run.clean()


@contextmanager
def by_hand(folder: Path, *words: str, ranks: int = 2, **env: str) -> Iterator[Ranks]:
    """Each rank started on its own, without an agent that would stop the others: rank 0 hosts the store."""
    run, port = Ranks(folder), str(free_port())
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        whole = environment(**own, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **env)
        run.processes.append(start([sys.executable, *words], whole))
    try:
        yield run
    finally:
        run.clean()


def start(command: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
