"""How fast files become steps on this machine: python -m benchmarks.loader [--quick] [--json FILE]

Makes its own pictures and a LLaVA-like JSON in a temporary folder (665,000 records are 0.7 GB), then measures

- ``load_view`` on one core, exact and fast, for three picture sizes and every policy: images per second of *processor*
  time, the best of its rounds, so that other programs on the machine disturb it little. It is what one core gives to a
  loader that has it for itself. Beside it the PSNR of the fast view against the exact one;
- the step loader with each number of workers: records and images per second of ordinary time, in steps of 32 records;
- the start of a mixture: building the index, opening it again, planning the first step, making it.

The pictures hold the same power in every octave of detail, as photographs do, with hard edges on top. At quality 90 one
of 640 x 480 takes about 120 kB. Decoding takes longer the more bytes a picture has.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, features
from rich.console import Console
from rich.status import Status
from rich.table import Table

from benchmarks import timing
from tests.scale.index_665k import NUM_IMAGES, write_json
from vlit.config.schema import DataConfig, DataSource
from vlit.data.images import Policy, load_view
from vlit.data.load import StepLoader
from vlit.data.mixture import Mixture
from vlit.data.source import RecordSource, open_source
from vlit.data.tokenize import SampleTokenizer
from vlit.synth.digits.bases import bases_folder
from vlit.types import ModelSpec

PICTURE_SIZES = ((640, 480), (1280, 960), (4000, 3000))
POLICIES: tuple[Policy, ...] = ("pad", "crop", "squash")
NUM_DIFFERENT = 8
GLOBAL_BATCH = 32
MICRO_BATCH_TOKENS = 8192
ROUNDS = 5
SPEC = ModelSpec(
    tokenizer_path=str(bases_folder() / "llama"),
    image_size=336,
    image_mean=(0.48145466, 0.4578275, 0.40821073),
    image_std=(0.26862954, 0.26130258, 0.27577711),
    tokens_per_view=576,
)


def shown(value: float) -> str:
    """Four digits, never as a power of ten."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}" if value >= 0.001 else f"{value:.6f}"


class Rows:
    """What was measured so far; the name of the last row is shown while the next is measured."""

    def __init__(self, status: Status) -> None:
        self.rows: list[dict[str, Any]] = []
        self._status = status

    def add(self, name: str, value: float, unit: str) -> None:
        self.rows.append({"name": name, "value": float(f"{value:.6g}"), "unit": unit})
        self._status.update(f"{name} {shown(value)} {unit} …")

    def value(self, name: str) -> float:
        return next(row["value"] for row in self.rows if row["name"] == name)

    def views_table(self) -> Table:
        """``load_view``: a line for each picture size and policy."""
        table = Table(
            "picture", "kB", "policy", "exact images/s", "fast images/s", "PSNR dB", title="load_view, one core"
        )
        for width, height in PICTURE_SIZES:
            picture = f"{width}x{height}"
            for policy in POLICIES:
                found = [self.value(f"load_view/{picture}/{policy}/{what}") for what in ("exact", "fast", "psnr")]
                size = self.value(f"picture/{picture}")
                table.add_row(picture, shown(size), policy, *(f"{value:,.1f}" for value in found))
        return table

    def others_table(self) -> Table:
        table = Table("measured", "value", "unit", title="mixture and step loader")
        for row in self.rows:
            if row["name"].startswith(("start/", "loader/")):
                table.add_row(row["name"], shown(row["value"]), row["unit"])
        return table


def make_picture(width: int, height: int, seed: int) -> Image.Image:
    """RGB with equal power in every octave from half the resolution up, and twelve discs."""
    rng = np.random.default_rng(seed)
    picture = Image.new("RGB", (2, 2), (118, 118, 118))
    for octave in range(int(math.log2(min(width, height))) - 1, 0, -1):
        columns, rows = width >> octave, height >> octave
        noise = 0.34 * rng.integers(-127, 128, (rows, columns, 1)) + 0.08 * rng.integers(-127, 128, (rows, columns, 3))
        coarse = np.asarray(picture.resize((columns, rows), Image.Resampling.BICUBIC))
        picture = Image.fromarray(np.clip(coarse + noise, 0, 255).astype(np.uint8))
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for _ in range(12):
        x, y, radius = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.01, 0.1) * width
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return picture


def best_rate(call: Callable[[], object], seconds: float) -> float:
    """Calls per second of processor time in the best of the rounds that fit into ``seconds`` (at least three)."""
    call()
    rounds, best, begin = 0, 0.0, time.process_time()
    while rounds < 3 or time.process_time() - begin < seconds:
        calls, start = 0, time.process_time()
        while (used := time.process_time() - start) < seconds / ROUNDS or calls == 0:
            call()
            calls += 1
        rounds, best = rounds + 1, max(best, calls / used)
    return best


def measure_views(folder: Path, rows: Rows, seconds: float) -> None:
    """``seconds`` are shared by the six measurements of a picture size."""
    for width, height in PICTURE_SIZES:
        path = folder / f"{width}.jpg"
        make_picture(width, height, 0).save(path, quality=90)
        rows.add(f"picture/{width}x{height}", path.stat().st_size / 1000, "kB")
        for policy in POLICIES:
            views = {}
            for mode in ("exact", "fast"):

                def call(policy: Policy = policy, exact: bool = mode == "exact", path: Path = path) -> np.ndarray:
                    return load_view(path, policy=policy, spec=SPEC, exact=exact)

                rate = best_rate(call, seconds / (2 * len(POLICIES)))
                rows.add(f"load_view/{width}x{height}/{policy}/{mode}", rate, "images/s")
                views[mode] = call().astype(np.float64)
            error = float(np.mean((views["fast"] - views["exact"]) ** 2))
            rows.add(f"load_view/{width}x{height}/{policy}/psnr", 10 * math.log10(255**2 / max(error, 1e-9)), "dB")


def write_dataset(folder: Path, num_records: int) -> Path:
    """The records and ``NUM_IMAGES`` pictures of 640 x 480 they name, ``NUM_DIFFERENT`` of them different."""
    (folder / "img").mkdir()
    for number in range(NUM_IMAGES):
        path = folder / "img" / f"{number}.jpg"
        if number < NUM_DIFFERENT:
            make_picture(640, 480, number).save(path, quality=90)
        else:
            shutil.copy(folder / "img" / f"{number % NUM_DIFFERENT}.jpg", path)
    write_json(folder / "big.json", num_records)
    return folder / "big.json"


def measure_start(folder: Path, rows: Rows, num_records: int) -> tuple[RecordSource, DataConfig, SampleTokenizer]:
    """From a file to the first step, in this process; the second opening finds the index in its cache."""
    path = write_dataset(folder, num_records)
    data = DataConfig(cache_dir=str(folder / "cache"))
    rows.add("start/records", num_records, "records")
    rows.add("start/file", path.stat().st_size / 1e6, "MB")
    for name in ("index_build", "index_cached"):
        start = time.perf_counter()
        source = open_source(DataSource(path=str(path)), data=data, seed=0, progress=False)
        rows.add(f"start/{name}", time.perf_counter() - start, "s")
    assert len(source) == num_records
    start = time.perf_counter()
    tokenizer = SampleTokenizer(SPEC, data)
    tokenizer.tokenize(source.sample(0))  # loads the tokenizer, and the library it comes from
    rows.add("start/tokenizer", time.perf_counter() - start, "s")
    start = time.perf_counter()
    mixture = Mixture([source], seed=0)
    mixture.step_records(0, GLOBAL_BATCH)
    rows.add("start/first_plan", time.perf_counter() - start, "s")
    make_loader(mixture, tokenizer, data, 0).step(0)
    rows.add("start/first_step", time.perf_counter() - start, "s")
    return source, data, tokenizer


def make_loader(
    mixture: Mixture[RecordSource], tokenizer: SampleTokenizer, data: DataConfig, num_workers: int
) -> StepLoader:
    return StepLoader(
        mixture, tokenizer, data, global_batch=GLOBAL_BATCH, micro_batch_tokens=MICRO_BATCH_TOKENS,
        total_steps=10**6, num_workers=num_workers,
    )  # fmt: skip


def measure_loader(loader: StepLoader, rows: Rows, seconds: float) -> None:
    """Counts from the moment every worker has delivered a step."""
    name, warm = f"loader/workers={loader.num_workers}", max(1, loader.num_workers)
    steps, images, start = 0, 0, time.perf_counter()
    for number, batch in enumerate(loader, start=1):
        if number == warm:
            rows.add(f"{name}/first", time.perf_counter() - start, "s")
            start = time.perf_counter()
        elif number > warm:
            steps += 1
            images += sum(micro.num_images for micro in batch.micro_batches)
            if (elapsed := time.perf_counter() - start) >= seconds:
                break
    rows.add(f"{name}/records", steps * GLOBAL_BATCH / elapsed, "records/s")
    rows.add(f"{name}/images", images / elapsed, "images/s")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, help="records of the generated dataset (default 665000; quick 2000)")
    parser.add_argument(
        "--seconds", type=float, help="for each picture size and each number of workers (default 10; quick 0.3)"
    )
    parser.add_argument("--workers", help="numbers of loader processes, by comma (default 0,1,2; quick 0,1)")
    parser.add_argument("--json", type=Path, help="write the machine and the rows to this file")
    parser.add_argument("--quick", action="store_true", help="does everything run? The figures mean little")
    arguments = parser.parse_args()
    defaults = (2000, 0.3, "0,1") if arguments.quick else (665_000, 10.0, "0,1,2")
    for name, default in zip(("records", "seconds", "workers"), defaults, strict=True):
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
    return arguments


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    console = Console()
    with tempfile.TemporaryDirectory() as name, console.status("making pictures …") as status:
        rows = Rows(status)
        folder = Path(name)
        measure_views(folder, rows, arguments.seconds)
        source, data, tokenizer = measure_start(folder, rows, arguments.records)
        for workers in arguments.workers.split(","):
            loader = make_loader(Mixture([source], seed=0), tokenizer, data, int(workers))
            measure_loader(loader, rows, arguments.seconds)
    console.print(rows.views_table(), rows.others_table())
    facts = timing.machine(torch.device("cpu"), ("torch", "pillow", "numpy", "transformers", "pyarrow"))
    facts["libjpeg_turbo"] = features.version("libjpeg_turbo")
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()), highlight=False)
    timing.write_json(arguments.json, {"machine": facts, "rows": rows.rows})


if __name__ == "__main__":
    main()
