"""Predicted against measured memory: python -m benchmarks.memory [--threads 1] [--only NAME ...] [--json FILE]

The prediction executes a step of the model on the meta device (:mod:`vlit.plan.execute`). The measurement trains the same
model, with random weights, in a fresh process: two steps of vlit's own ``train_step``, the highest resident memory
(VmHWM) less what was resident before the model was built. A step of the same case comes before and its model is dropped,
so what the process itself takes once, imports and the kernels that oneDNN compiles and keeps for each shape, is no part of
it and stands in a column of its own.

glibc's settings decide how much freed memory stays resident, so there are two measurements:

| column     | freed memory                                                                                               |
|------------|------------------------------------------------------------------------------------------------------------|
| measured   | goes back at once (a block of 128 KiB or more is mapped by itself, in small pages): what the step holds       |
| kept       | stays (training's own settings, with huge pages): the same plus the gaps between blocks; with ``--kept``      |
| once       | memory of the process that the first step of this case left for good; weights and rows do not change it       |

Exit status 1 when a prediction is more than 10 % away from ``measured``.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import timing
from benchmarks.models import Size, model_config, text_config, vision_config
from benchmarks.systems.worker import forget_peak, peak_memory_mb, resident_mb
from vlit.config.schema import ModelConfig, OptimizerConfig, RuntimeConfig, TuningConfig
from vlit.data.collate import collate_samples
from vlit.kernels.planning import Kind
from vlit.models.assemble import build_empty_model, build_model
from vlit.plan.execute import Executed, execute, tune
from vlit.plan.workload import Packed, empty_row
from vlit.types import IGNORE_INDEX, PackedBatch, TokenizedSample

TOLERANCE = 0.10
STEPS = 2
SMALL = Size(112, 14, 256, 4, 4, 512, 6, 8, 1376, 8192)
WIDE = Size(224, 14, 512, 6, 8, 1024, 6, 16, 2752, 32_000)
BIG_VOCABULARY = Size(112, 14, 256, 4, 4, 512, 4, 8, 1376, 96_000)
ALIGN: dict[str, Any] = {"connector": "full"}
INSTRUCT: dict[str, Any] = {"connector": "full", "llm": "full"}
LORA: dict[str, Any] = {"connector": "full", "llm": {"mode": "lora", "rank": 32, "alpha": 64}}
WHOLE: dict[str, Any] = {"vision": "full", "connector": "full", "llm": "full"}


@dataclass(frozen=True)
class MemoryCase:
    """A model, what is trained, and the rows of a step: (records, text tokens each, images each) for every row."""

    name: str
    size: Size
    tuning: dict[str, Any]
    recompute: str = "none"
    dtype: str = "bfloat16"
    rows: tuple[tuple[int, int, int], ...] = ((8, 200, 1), (8, 200, 1))
    quantize: str = "none"

    def model(self, folder: Path) -> ModelConfig:
        """The assembled model whose parts are in ``folder``."""
        return model_config(folder / "clip", folder / "llama", quantize=self.quantize)


CASES = (
    MemoryCase("align", WIDE, ALIGN, rows=((14, 40, 1), (14, 40, 1))),
    MemoryCase("align, full recomputation, many images", WIDE, ALIGN, "full", rows=((20, 24, 2), (20, 24, 2))),
    MemoryCase("instruct", WIDE, INSTRUCT),
    MemoryCase("instruct, selective recomputation", WIDE, INSTRUCT, "selective"),
    MemoryCase(
        "instruct, full recomputation, one long record", WIDE, INSTRUCT, "full", rows=((1, 7000, 1), (1, 7000, 1))
    ),
    MemoryCase("instruct, fp32", SMALL, INSTRUCT, dtype="float32", rows=((16, 200, 1), (16, 200, 1))),
    MemoryCase("align, fp32", SMALL, ALIGN, dtype="float32", rows=((24, 80, 1), (24, 80, 1))),
    MemoryCase("LoRA", WIDE, LORA),
    MemoryCase("LoRA, selective recomputation", WIDE, LORA, "selective"),
    MemoryCase("LoRA on 4 bits", WIDE, LORA, quantize="4bit"),
    MemoryCase("LoRA on 4 bits, full recomputation", WIDE, LORA, "full", quantize="4bit"),
    MemoryCase("LoRA on 8 bits, selective recomputation", WIDE, LORA, "selective", quantize="8bit"),
    MemoryCase("vision too, selective recomputation", WIDE, WHOLE, "selective"),
    MemoryCase("vocabulary 96,000", BIG_VOCABULARY, INSTRUCT, "full", rows=((12, 200, 1), (12, 200, 1))),
    MemoryCase("one row a step", WIDE, INSTRUCT, rows=((8, 200, 1),)),
)


def write_model(case: MemoryCase, folder: Path) -> None:
    """The case's CLIP and LLaMA with random weights, in the other dtype: loading then copies every weight into memory of
    the process, where a checkpoint of the same dtype would stay a mapped file.
    """
    from transformers import CLIPImageProcessor, CLIPVisionModel, LlamaForCausalLM

    other = torch.float32 if case.dtype == "bfloat16" else torch.bfloat16
    torch.manual_seed(0)
    CLIPVisionModel(vision_config(case.size)).to(other).save_pretrained(folder / "clip")
    CLIPImageProcessor(
        size={"shortest_edge": case.size.image_size},
        crop_size={"height": case.size.image_size, "width": case.size.image_size},
    ).save_pretrained(folder / "clip")
    LlamaForCausalLM(text_config(case.size)).to(other).save_pretrained(folder / "llama")


def write_shape(case: MemoryCase, folder: Path) -> None:
    """Configurations without weights: all that the prediction reads."""
    vision_config(case.size).save_pretrained(folder / "clip")
    preprocessor = {"image_processor_type": "CLIPImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "clip" / "preprocessor_config.json").write_text(json.dumps(preprocessor), encoding="utf-8")
    config = text_config(case.size)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder / "llama")


def predict(case: MemoryCase, *, kind: Kind = "cpu") -> Executed:
    """What the planner says of the case's largest row."""
    tokens = case.size.image_tokens
    with tempfile.TemporaryDirectory() as root:
        write_shape(case, Path(root))
        model = build_empty_model(case.model(Path(root)), dtype=getattr(torch, case.dtype))
    tune(model, TuningConfig.model_validate(case.tuning))
    records, text, images = max(case.rows, key=lambda row: row[0] * (row[1] + row[2] * tokens))
    row = [Packed((text + images * tokens,), images, text // 2)] * records
    return execute(
        model, empty_row(row, image_size=case.size.image_size), kind=kind, optimizer=OptimizerConfig(),
        recompute=case.recompute, sums=len(case.rows) > 1,
    )  # fmt: skip


def make_row(size: Size, records: int, text: int, images: int, seed: int) -> PackedBatch:
    """A packed row of random records: images first, then text whose second half is supervised."""
    rng = np.random.default_rng(seed)
    span = images * size.image_tokens
    samples = []
    for number in range(records):
        ids = np.concatenate([np.zeros(span, np.int64), rng.integers(3, size.vocabulary, text)])
        labels = np.full(len(ids), IGNORE_INDEX, np.int64)
        labels[-1 - text // 2 : -1] = ids[-(text // 2) :]
        names = tuple(f"{number}-{image}" for image in range(images))
        samples.append(TokenizedSample(str(number), "memory", ids, labels, np.arange(len(ids)) < span, names))
    pixels = rng.integers(0, 256, (records * images, 3, size.image_size, size.image_size), np.uint8)
    return collate_samples(samples, list(pixels), image_size=size.image_size)


def train(case: MemoryCase, folder: Path, *, threads: int, steps: int) -> dict[str, float]:
    """Build, train ``steps`` steps, and report MiB: resident before the model, after it was built, and at the peak."""
    from vlit.models.flops import UsefulFlops
    from vlit.models.tuning import apply_tuning
    from vlit.train.distributed import start_ranks
    from vlit.train.replicated import ReplicatedEngine
    from vlit.train.step import train_step
    from vlit.types import StepBatch

    ranks = start_ranks(RuntimeConfig(device="cpu", num_threads=threads))
    rows = [make_row(case.size, *row, seed=number) for number, row in enumerate(case.rows)]
    before = _settled()
    model = build_model(case.model(folder), dtype=getattr(torch, case.dtype))
    tuning = TuningConfig.model_validate(case.tuning)
    apply_tuning(model, tuning)
    engine = ReplicatedEngine(model, tuning=tuning, lr=1e-4, config=OptimizerConfig(), ranks=ranks)
    model.set_gradient_checkpointing(case.recompute)
    model.train()
    built = _settled()
    forget_peak("cpu")
    flops = UsefulFlops(model)
    for step in range(steps):
        train_step(engine, StepBatch(step, rows), ranks=ranks, lr_factor=1.0, clip=1.0, flops=flops, sources=["memory"])
    return {"before_mb": before, "built_mb": built, "peak_mb": peak_memory_mb("cpu")}


def _settled() -> float:
    """Resident MiB once everything freed has gone back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return resident_mb()


def worker(job: dict[str, Any]) -> None:
    """Run in a process of its own: a step of the case that is not counted, then those that are; prints JSON."""
    if not job["kept"]:
        from vlit.train import distributed

        distributed.keep_freed_memory = lambda: True
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 1 << 17)  # M_MMAP_THRESHOLD
        mallopt(-1, 1 << 17)  # M_TRIM_THRESHOLD
    case = MemoryCase(**job["case"] | {"size": Size(**job["case"]["size"])})
    folder, threads = Path(job["folder"]), job["threads"]
    first = train(case, folder, threads=threads, steps=1)
    found = train(case, folder, threads=threads, steps=STEPS)
    print(json.dumps({"step": found["peak_mb"] - found["before_mb"], "once": found["before_mb"] - first["before_mb"]}))


def measure(case: MemoryCase, folder: Path, *, threads: int = 1, kept: bool = False) -> dict[str, float]:
    """MiB of a process: ``step``, what the case's training takes, and ``once``, what the process keeps for its shapes."""
    job = {"case": asdict(case), "folder": str(folder), "threads": threads, "kept": kept}
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "GLIBC_TUNABLES": f"glibc.malloc.hugetlb={int(kept)}"}
    command = [sys.executable, "-m", "benchmarks.memory", "--worker", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{case.name}: {done.stderr.strip().splitlines()[-1]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def compare(case: MemoryCase, *, threads: int = 1, kept: bool = False) -> dict[str, Any]:
    """One row of the table."""
    executed = predict(case)
    with tempfile.TemporaryDirectory() as root:
        write_model(case, Path(root))
        found = measure(case, Path(root), threads=threads)
        with_gaps = measure(case, Path(root), threads=threads, kept=True)["step"] if kept else None
    measured = found["step"]
    predicted = executed.peak.total / 2**20
    return {
        "case": case.name,
        "dtype": case.dtype,
        "predicted_mb": round(predicted, 1),
        "measured_mb": round(measured, 1),
        "ratio": round(predicted / measured, 3),
        "once_mb": round(found["once"], 1),
        "kept_mb": None if with_gaps is None else round(with_gaps, 1),
        "where": f"{executed.peak.phase}, {executed.peak.operator}",
        "components_mb": {name: round(size / 2**20, 1) for name, size in executed.peak.bytes.items() if size},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], help="names of cases")
    parser.add_argument("--kept", action="store_true", help="also measure with freed memory kept, as training does")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(json.loads(args.worker))
        return 0
    result: dict[str, Any] = {
        "machine": timing.machine(torch.device("cpu")),
        "command": "python -m benchmarks.memory --kept",
        "rows": [],
    }
    for case in CASES:
        if not args.only or case.name in args.only:
            result["rows"].append(compare(case, threads=args.threads, kept=args.kept))
            print(result["rows"][-1], file=sys.stderr)
    columns = [
        ("case", "case", ""), ("dtype", "dtype", ""), ("predicted MiB", "predicted_mb", ",.0f"),
        ("measured MiB", "measured_mb", ",.0f"), ("ratio", "ratio", ".3f"), ("once MiB", "once_mb", ",.0f"),
        ("kept MiB", "kept_mb", ",.0f"),
    ]  # fmt: skip
    print(timing.table(result["rows"], columns))
    timing.write_json(args.json, result)
    return int(any(abs(row["ratio"] - 1) > TOLERANCE for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())
