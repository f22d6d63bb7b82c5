"""Many tiny runs on several real ranks in one start: torchrun, gloo, DeepSpeed on the CPU. A hang is a failure, not a wait.

Starting Python, torch and DeepSpeed takes longer than a tiny run, so the runs of a test share one process group. As a module,
this file is what every rank executes: ``torchrun -m tests.rank_cases JOB.json``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.rank_hooks import Hook, Stopped, installed
from tests.ranks import ROOT, environment
from tests.tiny_run import tiny_run
from vlit.errors import VlitError
from vlit.train.run import run_training


@dataclass(frozen=True)
class Case:
    """One run: where it writes, and what it changes of :func:`tests.tiny_run.tiny_run`."""

    output: Path
    overrides: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()  # of tiny_run: encoder, llm
    may_fail: bool = False  # with a vlit error, which is printed
    hook: Hook = field(default_factory=Hook)

    def as_json(self) -> dict[str, Any]:
        return {
            "output": str(self.output), "overrides": self.overrides, "options": dict(self.options), "may_fail": self.may_fail,
            "hook": self.hook.as_json(),
        }  # fmt: skip

    def rows(self) -> list[dict[str, Any]]:
        """Metrics of the run, a row a step."""
        lines = (self.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows()]


def torchrun(world_size: int, *words: str) -> list[str]:
    """Command line of ``world_size`` ranks on this machine."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}", *words]


def run_cases(
    world_size: int, cases: Sequence[Case], tiny_dir: Path, folder: Path, *, timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """Run the cases one after the other on ``world_size`` ranks; all output is in ``stdout``."""
    folder.mkdir(parents=True, exist_ok=True)
    job = folder / "job.json"
    job.write_text(
        json.dumps({"tiny_dir": str(tiny_dir), "cases": [case.as_json() for case in cases]}), encoding="utf-8"
    )
    return run_command(torchrun(world_size, "-m", "tests.rank_cases", str(job)), timeout_s=timeout_s)


def run_command(command: Sequence[str], *, timeout_s: float, **extra: str) -> subprocess.CompletedProcess[str]:
    """A command with the output of all its processes; they are killed, all of them, at the time limit."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment(**extra)
    )
    try:
        out, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            one.kill()  # torchrun gives its ranks process groups of their own
        out, _ = process.communicate()
        raise AssertionError(f"no end after {timeout_s} s: a hang. Output:\n{out[-4000:]}") from None
    return subprocess.CompletedProcess(list(command), process.returncode, out, "")


def main(path: str) -> None:
    """What a rank does."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    for case in job["cases"]:
        run = tiny_run(Path(job["tiny_dir"]), Path(case["output"]), *case["overrides"], **case["options"])
        hook = Hook(**{**case["hook"], "steps": tuple(case["hook"]["steps"])})
        try:
            with installed(hook):
                run_training(run)
        except Stopped:
            continue
        except VlitError as error:
            print(f"case {case['output']}: {type(error).__name__}: {error}", file=sys.stderr)
            if not case["may_fail"]:
                raise


if __name__ == "__main__":
    main(sys.argv[1])
