"""How the data floor behaves at the size of LLaVA-1.5's mix665k: python tests/scale/index_665k.py [--records N]

Writes a LLaVA-like JSON of 665,298 records (about 0.7 GB) to a temporary folder, then measures in fresh processes: the
first opening (builds the index), the second, the first step, and the private memory of two workers over 300 steps. Prints
one JSON object and exits with 1 when a limit is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NUM_IMAGES = 64
LIMITS = {"first_open_s": 60.0, "first_step_s": 10.0, "second_open_s": 3.0, "worker_growth_mb": 30.0}
SENTENCE = (
    "the a man red dog cat on in table with two people standing near large window tree street sign holding plate of food "
    "what is color how many there image shows left right side small blue green white umbrella playing field"
)


def write_json(path: Path, count: int) -> None:
    """Records with one to six exchanges, one in sixteen without an image, half of them pretty-printed."""
    rng = random.Random(0)
    words = SENTENCE.split()
    pool = [" ".join(rng.choices(words, k=rng.randint(4, 30))) for _ in range(20_000)]
    with path.open("w") as file:
        file.write("[")
        for number in range(count):
            turns = []
            for turn in range(rng.choice([1, 1, 3, 4, 5, 6])):
                image = "<image>\n" if turn == 0 and number % 16 else ""
                turns.append({"from": "human", "value": f'{image}{rng.choice(pool)}? "quoted"\n'})
                turns.append({"from": "gpt", "value": f"{rng.choice(pool)}."})
            record: dict[str, Any] = {"id": f"{number:012d}", "conversations": turns}
            if number % 16:
                record["image"] = f"img/{number % NUM_IMAGES}.jpg"
            separator = ",\n" if number else ""
            file.write(separator + json.dumps(record, indent=2 if number % 2 else None))
        file.write("]")


def write_images(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    folder.mkdir()
    for number in range(NUM_IMAGES):
        pixels = np.random.default_rng(number).integers(0, 256, (120, 160, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")


def anonymous_mb(pid: int) -> float:
    """Private memory of a process; pages of the memory-mapped index belong to the page cache and do not count."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {pid} has no RssAnon")


def measure_open(folder: Path) -> dict[str, float]:
    from vlit.config.schema import DataConfig, DataSource
    from vlit.data.source import open_source

    data = DataConfig(cache_dir=str(folder / "cache"))
    start = time.perf_counter()
    source = open_source(DataSource(path=str(folder / "big.json")), data=data, seed=0, progress=True)
    return {"seconds": time.perf_counter() - start, "records": len(source)}


def measure_steps(folder: Path, steps: int) -> dict[str, Any]:
    import torch

    from tests.data_fixtures import build_spm, make_spec
    from vlit.config.schema import DataConfig, DataSource
    from vlit.data.load import StepLoader
    from vlit.data.mixture import Mixture
    from vlit.data.source import open_source
    from vlit.data.tokenize import SampleTokenizer

    torch.set_num_threads(1)
    (folder / "spm").mkdir()
    build_spm(folder / "spm")
    data = DataConfig(cache_dir=str(folder / "cache"))
    source = open_source(DataSource(path=str(folder / "big.json")), data=data, seed=0, progress=False)
    mixture = Mixture([source], seed=0)
    tokenizer = SampleTokenizer(make_spec(str(folder / "spm"), image_size=224, tokens_per_view=256), data)
    loader = StepLoader(
        mixture, tokenizer, data, global_batch=32, micro_batch_tokens=8192, total_steps=steps, num_workers=2
    )
    start = time.perf_counter()
    first, memory, tokens = 0.0, [], 0
    for step in loader:
        first = first or time.perf_counter() - start
        tokens += sum(micro.num_tokens for micro in step.micro_batches)
        if step.step % (steps // 10) == steps // 10 - 1:
            children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
            memory.append(max(anonymous_mb(int(pid)) for pid in children))
    seconds = time.perf_counter() - start
    return {"first": first, "memory": memory, "records_per_second": steps * 32 / seconds, "tokens": tokens}


def run(what: str, folder: Path, *, steps: int = 0) -> dict[str, Any]:
    """Run one measurement in a fresh process."""
    command = [sys.executable, __file__, "--measure", what, "--folder", str(folder), "--steps", str(steps)]
    output = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    return json.loads(output.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=665_298)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--measure", choices=["open", "steps"])
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.measure:
        measured = (
            measure_open(arguments.folder)
            if arguments.measure == "open"
            else measure_steps(arguments.folder, arguments.steps)
        )
        print(json.dumps(measured))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "img")
        write_json(folder / "big.json", arguments.records)
        size = (folder / "big.json").stat().st_size / 1e6
        first, second, steps = run("open", folder), run("open", folder), run("steps", folder, steps=arguments.steps)
    settled = steps["memory"][2:]  # the first tenths fill allocator pools and caches
    result = {
        "records": first["records"],
        "megabytes": round(size),
        "first_open_s": round(first["seconds"], 1),
        "second_open_s": round(second["seconds"], 2),
        "first_step_s": round(steps["first"], 2),
        "records_per_second": round(steps["records_per_second"]),
        "worker_private_mb": [round(value) for value in steps["memory"]],
        "worker_growth_mb": round(settled[-1] - settled[0], 1),
    }
    broken = [f"{key} {result[key]} > {limit}" for key, limit in LIMITS.items() if float(result[key]) > limit]
    print(json.dumps(result, indent=2))
    print("; ".join(broken) if broken else "within all limits", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
