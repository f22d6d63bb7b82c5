"""Cost against length: step time over packed tokens, and over records an image with and without sharing.

``python -m benchmarks.scaling [--size tiny|small] [--rounds 5] [--threads N] [--json FILE]``

A step is forward and backward of one row (connector and language model trained, no optimizer). All rows take turns in every
round; medians are fitted by a straight line. Linear cost means: no term in T², although attention over a whole row would have
one, because a sample meets its own tokens and its prefix only.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import timing
from benchmarks.models import SIZES, Size, model_config, write_parts
from benchmarks.records import CASES, make_records
from vlit.config.schema import TuningConfig
from vlit.data.collate import collate
from vlit.data.share import share_prefixes, single
from vlit.models.assemble import VisionLanguageModel, build_model
from vlit.models.tuning import apply_tuning
from vlit.train.distributed import keep_freed_memory
from vlit.types import PackedBatch

ROWS = {"tiny": (1, 2, 4), "small": (2, 4, 8, 12, 16, 24)}
"""Stage-2 records in a row."""
PER_IMAGE = {"tiny": (1, 2, 3), "small": (1, 2, 4, 6, 9, 12)}
"""Records of each of ``IMAGES`` images."""
IMAGES = 4


def measure(size_name: str, rounds: int) -> dict[str, Any]:
    """Median seconds of every row, and the straight lines through them."""
    size = SIZES[size_name]
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        model = build_model(model_config(*write_parts(size, Path(folder))), dtype=torch.bfloat16)
    apply_tuning(model, TuningConfig(llm="full"))
    model.train()
    rows: dict[tuple[str, int], PackedBatch] = {}
    for count in ROWS[size_name]:
        rows["packed_tokens", count] = _row(size, "stage2", count, share=False)
    for each in PER_IMAGE[size_name]:
        rows["records_per_image", each] = _row(size, "shared_image", IMAGES * each, share=True, each=each)
        rows["separate", each] = _row(size, "shared_image", IMAGES * each, share=False, each=each)
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in rows}
    for _ in range(rounds + 1):
        for key, row in rows.items():
            seconds[key].append(_seconds(model, row))
    median = {key: float(np.median(values[1:])) for key, values in seconds.items()}
    packed = [{"x": rows[k].num_tokens, "seconds": median[k]} for k in rows if k[0] == "packed_tokens"]
    shared = [
        {
            "x": each, "seconds": median["records_per_image", each], "separate": median["separate", each],
            "tokens": rows["records_per_image", each].num_tokens, "separate_tokens": rows["separate", each].num_tokens,
        }
        for each in PER_IMAGE[size_name]
    ]  # fmt: skip
    return {
        "machine": timing.machine(torch.device("cpu")),
        "size": size_name,
        "packed_tokens": packed,
        "records_per_image": shared,
        "lines": {"packed_tokens": _line(packed), "records_per_image": _line(shared)},
    }


def _row(size: Size, case: str, count: int, *, share: bool, each: int = 1) -> PackedBatch:
    records = make_records(replace(CASES[case], records_per_image=each), size, count)
    if share:
        trees = share_prefixes(records.samples, [sample.images for sample in records.samples], 1 << 30)
    else:
        trees = [single(number, sample) for number, sample in enumerate(records.samples)]
    views = [
        records.pixels[name]
        for tree in trees
        for name in [records.samples[n].images[0] for n in (tree.members[:1] if tree.prefix else tree.members)]
    ]
    return collate(trees, records.samples, views)


def _seconds(model: VisionLanguageModel, row: PackedBatch) -> float:
    model.zero_grad(set_to_none=True)
    started = time.perf_counter()
    model(row).total.backward()
    return time.perf_counter() - started


def _line(points: list[dict[str, Any]]) -> dict[str, float]:
    """Least squares: seconds = intercept + slope · x, and the share of the variance it explains."""
    x, y = (np.array([point[key] for point in points]) for key in ("x", "seconds"))
    slope, intercept = np.polyfit(x, y, 1)
    residual = y - (intercept + slope * x)
    return {"slope": float(slope), "intercept": float(intercept), "r2": float(1 - residual.var() / y.var())}


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(ROWS), default="small")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    result = measure(options.size, options.rounds)
    for key in ("packed_tokens", "records_per_image"):
        for point in result[key]:
            separate = f"  separate {point['separate']:.3f} s" if "separate" in point else ""
            print(f"{key} {point['x']:>6}  {point['seconds']:.3f} s{separate}")
        print(f"  line: R² = {result['lines'][key]['r2']:.4f}")
    timing.write_json(options.json, result)


if __name__ == "__main__":
    main()
