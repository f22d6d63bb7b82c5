"""kill -9 at random moments, again and again, until the run is through; the end must be the end of an undisturbed run.

    python -m tests.scale.kill_soak --rounds 24 --ways alone,ddp,zero2

Every round starts the command that users start, lets it train for a random while, and kills all of its processes (or, with two
ranks, every other time only one of them). A checkpoint is written at every step, and every second kill is aimed at one. Prints
a row for each round; ends with an error if a weight or a loss differs.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.ranks import ROOT, environment
from tests.tiny_run import tiny_run

WAYS = {"alone": (1, "none"), "ddp": (2, "ddp"), "zero1": (2, "zero1"), "zero2": (2, "zero2"), "zero3": (2, "zero3")}
STEPS_A_ROUND = 4
"""A round trains about two steps before it is killed, so there is something left to do in every round."""
START_S = 180.0
TORCHRUN_GRACE_S = 29.0
"""One second less than torchrun waits before it kills the ranks that are left."""


@dataclass
class Round:
    """One start of the command and its end."""

    number: int
    stage: str = ""
    step: int = 0  # the last one in metrics.jsonl
    killed: str = "finished"  # what was killed
    saving: bool = False  # a checkpoint was being written
    leftover: str = ""  # what the next start finds
    seconds: float = 0.0


class Soak:
    """One way to train: the undisturbed run, and the disturbed one."""

    def __init__(self, way: str, rounds: int, folder: Path, seed: int) -> None:
        self.ranks, strategy = WAYS[way]
        self.way, self.rounds, self.folder, self.random = way, rounds, folder / way, random.Random(f"{seed}/{way}")
        steps = max(4, STEPS_A_ROUND * rounds // 2)
        self.words = (
            *(f"stages.{stage}.max_steps={steps}" for stage in ("align", "instruct")),
            *(f"stages.{stage}.checkpoint.every_steps=1" for stage in ("align", "instruct")),
            f"runtime.strategy={strategy}",
            "data.num_workers=1",
            "runtime.hang_timeout_s=60",
        )
        self.tiny = folder / "tiny"

    def command(self, name: str) -> list[str]:
        """The command line of the run called ``name``."""
        run = tiny_run(self.tiny, self.folder / name, *self.words)
        config = self.folder / f"{name}.yaml"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
        launcher = ["scripts/launch.py", f"--nproc-per-node={self.ranks}"] if self.ranks > 1 else []
        return [sys.executable, *launcher, "scripts/train.py", "--config", str(config)]

    def disturb(self) -> Iterator[Round]:
        """Start, kill, start again; at last let it finish."""
        command, out = self.command("killed"), self.folder / "killed"
        for number in range(1, self.rounds + 1):
            yield self._round(number, command, out)
        started = time.monotonic()
        subprocess.run(command, cwd=ROOT, env=environment(), check=True, capture_output=True)
        yield Round(self.rounds + 1, *_where(out), seconds=time.monotonic() - started)

    def _round(self, number: int, command: list[str], out: Path) -> Round:
        before, started = _rows(out), time.monotonic()
        log = (self.folder / f"round-{number}.log").open("wb")
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log, start_new_session=True)
        result = Round(number)
        try:
            self._wait(lambda: _trains(out, before), process)
            time.sleep(self.random.uniform(0.0, 0.3))
            if number % 2 == 0:
                self._wait(lambda: bool(_writing(out)), process, within_s=5.0)
                time.sleep(self.random.uniform(0.0, 0.02))
            if process.poll() is None:
                result.saving = bool(_writing(out))
                result.killed = self._kill(process, only_one=self.ranks > 1 and number % 4 >= 2)
        finally:
            _kill_family(process)
            log.close()
        result.stage, result.step = _where(out)
        result.saving |= bool(_writing(out))
        state = out / result.stage / "state"
        result.leftover = " ".join(sorted(path.name for path in state.glob("*"))) if state.is_dir() else ""
        result.seconds = time.monotonic() - started
        return result

    def _wait(self, condition: Any, process: subprocess.Popen[bytes], within_s: float = START_S) -> None:
        until = time.monotonic() + within_s
        while process.poll() is None and not condition() and time.monotonic() < until:
            time.sleep(0.002)

    def _kill(self, process: subprocess.Popen[bytes], *, only_one: bool) -> str:
        """Kill; with ``only_one`` a random rank, and torchrun has to end the rest."""
        if not only_one:
            _kill_family(process)
            return "all processes"
        children = [p for p in psutil.Process(process.pid).children() if "RANK" in p.environ()]
        ranks = {int(p.environ()["RANK"]): p for p in children}
        number = self.random.choice(sorted(ranks))
        ranks[number].send_signal(signal.SIGKILL)
        try:
            code = process.wait(TORCHRUN_GRACE_S)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"rank {number} was killed and the others did not end by themselves") from error
        assert code != 0
        return f"rank {number}"

    def differences(self) -> list[str]:
        """Files and losses in which the disturbed run differs from the undisturbed one."""
        straight, killed = self.folder / "straight", self.folder / "killed"
        files = sorted(path.relative_to(straight) for path in straight.glob("*/model/**/*.safetensors"))
        assert len(files) >= 3
        different = [str(name) for name in files if (straight / name).read_bytes() != (killed / name).read_bytes()]
        left, right = ([(r["stage"], r["step"], r["loss"]) for r in _rows(out)] for out in (straight, killed))
        return different + ([] if left == right else ["metrics.jsonl"])


def _kill_family(process: subprocess.Popen[bytes]) -> None:
    try:
        parent = psutil.Process(process.pid)
        family = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        family = []
    for one in family:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(family, timeout=10)


def _rows(out: Path) -> list[dict[str, Any]]:
    path = out / "metrics.jsonl"
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue  # a line that a kill has cut
    return rows


def _trains(out: Path, before: list[dict[str, Any]]) -> bool:
    """Whether a step was done since the start: on resuming, rows past the checkpoint are dropped and come again."""
    found = _rows(out)
    return bool(found) and (found[-1] != before[-1] if before else True) and len(found) >= max(1, len(before) - 1)


def _where(out: Path) -> tuple[str, int]:
    rows = _rows(out)
    return (rows[-1]["stage"], rows[-1]["step"]) if rows else ("align", 0)


def _writing(out: Path) -> list[Path]:
    return list(out.glob("*/state/.step-*")) + list(out.glob("*/.model.*"))


def soak(way: str, rounds: int, folder: Path, seed: int = 0) -> tuple[list[Round], list[str]]:
    """All rounds of one way, printed as they come, and the differences at the end."""
    work = Soak(way, rounds, folder, seed)
    subprocess.run(work.command("straight"), cwd=ROOT, env=environment(), check=True, capture_output=True)
    rounds_done = []
    for result in work.disturb():
        rounds_done.append(result)
        print(
            f"{way:<6} {result.number:>5} {result.stage:<9} {result.step:>5}  {result.killed:<14} "
            f"{'yes' if result.saving else 'no':<7} {result.seconds:>6.1f} s  {result.leftover}",
            flush=True,
        )
    return rounds_done, work.differences()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--ways", default="alone,ddp,zero2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    folder = args.out or Path(tempfile.mkdtemp())
    print("way    round stage      step  killed         saving  seconds  left in the folder of states")
    failed = False
    for way in args.ways.split(","):
        rounds, different = soak(way, args.rounds, folder, args.seed)
        kills = [r for r in rounds if r.killed != "finished"]
        print(
            f"{way}: {len(kills)} kills in {len(rounds)} starts, {sum(r.saving for r in kills)} of them while a checkpoint or "
            f"model was being written; {'DIFFERENT: ' + ', '.join(different) if different else 'the end is bit-equal'}"
        )
        failed |= bool(different)
    sys.exit(failed)


if __name__ == "__main__":
    main()
