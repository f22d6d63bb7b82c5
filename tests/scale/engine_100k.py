"""100,000 records through the template engine and the text metrics: seconds and memory at two sizes.

    python -m tests.scale.engine_100k [--pictures 2000 20000]

For each size the embedded world is built with so many pictures, ``vlit synth run --recipe adapt`` fills its templates (about
six records a picture), and ``vlit synth quality`` measures the result against the annotations without looking at pictures. Both
are the commands that users start; memory is the largest resident set of any of their processes, sampled every 0.1 s.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.ranks import ROOT, environment
from vlit.synth.digits.world import WorldPaths, ensure_world

MB = 1e6


def measured(words: list[str], log: Path) -> tuple[float, float]:
    """(seconds, peak bytes of its largest process) of one command."""
    started, peak = time.perf_counter(), 0.0
    with log.open("w") as file:
        process = psutil.Popen([sys.executable, "-m", "vlit.cli", *words], cwd=ROOT, env=environment(), stderr=file)
        while process.poll() is None:
            try:
                peak = max(peak, *(p.memory_info().rss for p in (process, *process.children(recursive=True))))
            except psutil.NoSuchProcess:
                continue
            time.sleep(0.1)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, words, stderr=log.read_text()[-3000:])
    return time.perf_counter() - started, peak


def run(world: WorldPaths, out: Path) -> tuple[int, list[tuple[str, float, float]]]:
    """Records, and (command, seconds, peak bytes) of both commands."""
    files = [str(world.root / "annotations" / f"{kind}_train.json") for kind in ("instances", "captions")]
    make = ["synth", "run", "--recipe", "adapt", "--out", str(out), "--images", str(world.images)]
    make += ["--annotations", *files, "recipe.max_per_task=1000000"]
    made = measured(make, out.with_suffix(".log"))
    dataset = out / "dataset.jsonl"
    look = ["synth", "quality", str(dataset), "--annotations", f"train/={files[0]}", "--out", str(out / "quality")]
    looked = measured(look, out.with_suffix(".log"))
    with dataset.open("rb") as file:
        return sum(1 for _ in file), [("synth run", *made), ("synth quality", *looked)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, nargs=2, default=[2000, 20000])
    args = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as name:
        for pictures in args.pictures:
            world = ensure_world(
                Path(name) / f"world-{pictures}", train_images=pictures, validation_images=1, test_images=1,
                questions_per_kind=1, progress=False,
            )  # fmt: skip
            found.append(run(world, Path(name) / f"out-{pictures}"))
            records, rows = found[-1]
            for command, seconds, peak in rows:
                print(f"{records:>8,} records  {command:<14}{seconds:6.1f} s  {peak / MB:6.0f} MB", flush=True)
    (few, small), (many, large) = found
    for (command, _, before), (_, _, after) in zip(small, large, strict=True):
        print(f"{command}: {(after - before) / (many - few):.0f} bytes of memory for each further record")


if __name__ == "__main__":
    main()
