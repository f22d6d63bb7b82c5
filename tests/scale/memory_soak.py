"""Does a long run grow, and does training wait for data? Thousands of steps with data workers, measured from outside.

    python -m tests.scale.memory_soak        # 7,000 steps of 32 records, about 9 minutes on two idle cores

The warm-up is long because Python keeps up to 2,000 freed tuples of each length: a worker that makes every second step has
filled that store after 4,000 steps, at 128 bytes a step, and only then stands still.

Resident memory of the training process and of its data workers is sampled every second. After the warm-up, the slope over the
steps is that of a line through the means of blocks of samples (neighbouring samples are not independent, means of blocks
nearly are), with its 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from PIL import Image

from tests.ranks import ROOT, environment
from tests.tiny_run import tiny_run

MIB = 2**20
BLOCKS = 20
STUDENT_T = 2.101
"""97.5 % quantile with BLOCKS - 2 = 18 degrees of freedom."""


@dataclass
class Slope:
    """Bytes a step, with its 95 % interval, and bytes in the middle of the line."""

    bytes_a_step: float
    low: float
    high: float
    level: float

    @property
    def is_flat(self) -> bool:
        """The interval holds zero."""
        return self.low <= 0.0 <= self.high


def slope_of(steps: Sequence[float], resident: Sequence[float]) -> Slope:
    """Least squares through the means of ``BLOCKS`` blocks of samples."""
    blocks = np.array_split(np.array([steps, resident], dtype=float), BLOCKS, axis=1)
    x, y = np.array([block.mean(axis=1) for block in blocks]).T
    centred = x - x.mean()
    slope = float((centred * y).sum() / (centred**2).sum())
    rest = y - y.mean() - slope * centred
    error = float(np.sqrt((rest**2).sum() / (BLOCKS - 2) / (centred**2).sum()))
    return Slope(slope, slope - STUDENT_T * error, slope + STUDENT_T * error, float(y.mean()))


def write_dataset(folder: Path, *, records: int = 96) -> Path:
    """Photographs in size (640 x 480 JPEG), each with a caption of some hundred tokens, as captions written by models are."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, rows = np.random.default_rng(0), []
    for number in range(records):
        coarse = generator.integers(0, 255, (12, 16, 3)).astype(np.uint8)
        Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
        turns = [
            ("human", "<image>\nWhat is in the picture?"),
            ("gpt", "A red seven and a blue three. " * (1 + number % 4)),
        ]
        conversation = [{"from": who, "value": text} for who, text in turns]
        rows.append({"id": f"m{number}", "image": f"{number}.jpg", "conversations": conversation})
    path = folder / "data.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def start(folder: Path, steps: int, workers: int, words: Sequence[str]) -> tuple[subprocess.Popen[bytes], Path]:
    """The command that users start."""
    data = write_dataset(folder / "data")
    overrides = (
        "stages.align=null",
        f"stages.instruct.data=[{{path: {data}, name: photographs}}]",
        f"stages.instruct.max_steps={steps}",
        "stages.instruct.global_batch=32",
        "stages.instruct.lr=1e-4",
        "stages.instruct.checkpoint.every_steps=100",
        f"data.num_workers={workers}",
        "data.share_images=off",
    )
    run = tiny_run(folder / "tiny", folder / "out", *overrides, *words)
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    command = [sys.executable, "scripts/train.py", "--config", str(config)]
    log = (folder / "log").open("wb")
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log, start_new_session=True)
    return process, folder / "out" / "metrics.jsonl"


def sample(process: subprocess.Popen[bytes], metrics: Path, every_s: float) -> list[tuple[int, int, int]]:
    """(step, resident bytes of the training process, of its workers together) until the end."""
    parent, samples = psutil.Process(process.pid), []
    while process.poll() is None:
        time.sleep(every_s)
        try:
            own = parent.memory_info().rss
            workers = sum(child.memory_info().rss for child in parent.children(recursive=True))
        except psutil.NoSuchProcess:
            continue
        step = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
        if step and workers:
            samples.append((step, own, workers))
    return samples


def report(samples: list[tuple[int, int, int]], rows: list[dict[str, Any]], warm_up: int) -> dict[str, Any]:
    """Figures of a run: two slopes, and how long steps waited for data."""
    late = [s for s in samples if s[0] > warm_up]
    assert len(late) >= 3 * BLOCKS, f"only {len(late)} samples after the warm-up"
    steps = [float(step) for step, _, _ in late]
    found: dict[str, Any] = {"steps": len(rows), "samples": len(late)}
    for place, name in enumerate(("training process", "data workers"), 1):
        found[name] = slope_of(steps, [float(s[place]) for s in late])
    waits = [row["data_wait_share"] for row in rows[1:]]
    seconds = [row["seconds"] for row in rows[1:]]
    waited = sum(wait * second for wait, second in zip(waits, seconds, strict=True))
    found["median wait"], found["mean wait"] = statistics.median(waits), statistics.fmean(waits)
    found["share of the time"] = waited / sum(seconds)
    found["seconds a step"] = statistics.median(seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--warm-up", type=int, default=4800)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--every", type=float, default=0.5, help="seconds between samples")
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    folder = args.out or Path(tempfile.mkdtemp())
    started = time.monotonic()
    process, metrics = start(folder, args.steps, args.workers, args.overrides)
    samples = sample(process, metrics, args.every)
    if process.returncode != 0:
        sys.exit((folder / "log").read_text(encoding="utf-8")[-3000:])
    (folder / "samples.json").write_text(json.dumps(samples), encoding="utf-8")
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    found = report(samples, rows, args.warm_up)
    print(
        f"{found['steps']} steps in {time.monotonic() - started:.0f} s, {found['samples']} samples after {args.warm_up} steps"
    )
    for name in ("training process", "data workers"):
        line = found[name]
        print(
            f"{name}: {line.level / MIB:.1f} MiB, {line.bytes_a_step:+.1f} bytes a step (95 % {line.low:+.1f} to "
            f"{line.high:+.1f}), {line.bytes_a_step * 1e6 / MIB:+.1f} MiB in a million steps; "
            f"{'flat' if line.is_flat else 'NOT FLAT'}"
        )
    print(
        f"waiting for data: median {100 * found['median wait']:.2f} %, mean {100 * found['mean wait']:.2f} % of a step "
        f"(median {1000 * found['seconds a step']:.0f} ms), {100 * found['share of the time']:.2f} % of the time"
    )


if __name__ == "__main__":
    main()
