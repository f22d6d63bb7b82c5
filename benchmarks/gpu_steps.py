"""Training steps of vlit without a checkpoint: a model of random weights is made on the device and trained there.

``python -m benchmarks.gpu_steps [--size 7b] [--device cuda] [--cases CASES] [--steps 3] [--seconds S] [--json FILE]``

Cases and records are those of :mod:`benchmarks.records`, packed into rows of at most ``--micro-batch-tokens``. The systems of a
case take turns step by step: vlit's kernels against the dense path (PyTorch's attention on gathered segments), each recompute
policy, and for the shared images also every record with an image of its own ("unshared").

Stage 2 and the shared images train all of the language model with fp32 masters: 16 bytes a parameter, and 2 more for the
gradients of a row. Where that runs with no policy, LoRA adapters of rank 128 are trained instead; every row names its tuning.

| figure   | meaning                                                                                             |
|----------|-----------------------------------------------------------------------------------------------------|
| s/step   | median, from an idle device to an idle device                                                       |
| tokens/s | positions computed, images included; "record tokens" counts a shared prefix in every record         |
| peak     | useful FLOPs (:mod:`vlit.models.flops`: no recomputation) / seconds / bf16 matmul peak of this run   |
| GiB      | most memory PyTorch allocated on the GPU, weights and optimizer included                            |
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks import timing
from benchmarks.models import SIZES, Size, text_config, vision_config
from benchmarks.records import CASES, Case, Records, make_records
from benchmarks.systems.vlit_system import packed_rows
from vlit.config.schema import ModelConfig, OptimizerConfig, RuntimeConfig, TuningConfig
from vlit.models.assemble import VisionLanguageModel
from vlit.models.attention import register
from vlit.models.encoders._hf_model import PassThrough, find_structure
from vlit.models.encoders.hf import HfVisionEncoder
from vlit.models.flops import UsefulFlops
from vlit.models.interfaces import EncoderSpec
from vlit.models.llms.hf import HFLanguageModel
from vlit.models.tuning import apply_tuning
from vlit.train.distributed import Ranks, start_ranks
from vlit.train.replicated import ReplicatedEngine
from vlit.train.step import StepResult, train_step
from vlit.types import ModelSpec, StepBatch

BATCH = {"7b": {"stage1": 26, "stage2": 24, "shared_image": 48}}
"""Records of a step; other sizes take those of :mod:`benchmarks.records`."""
FIGURES = (
    "seconds", "samples_s", "tokens_s", "record_tokens_s", "tflops", "share", "memory_gib", "loss", "samples", "positions",
    "micro_batches",
)  # fmt: skip
COLUMNS = (
    ("case", "case", ""), ("tuning", "tuning", ""), ("attention", "attention", ""), ("recompute", "recompute", ""),
    ("records", "packing", ""), ("s/step", "seconds", ".3f"), ("samples/s", "samples_s", ".2f"),
    ("tokens/s", "tokens_s", ",.0f"), ("record tokens/s", "record_tokens_s", ",.0f"), ("peak", "share", ".1%"),
    ("GiB", "memory_gib", ".1f"), ("note", "note", ""),
)  # fmt: skip
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def make_model(size: Size, device: torch.device) -> VisionLanguageModel:
    """CLIP cut at its last block but one, two-layer MLP, LLaMA: random bf16 weights, made on ``device``."""
    from transformers import AutoModel, AutoModelForCausalLM, CLIPVisionModel

    config = ModelConfig.model_validate(
        {
            "encoder": {"type": "hf", "path": "random"},
            "connector": {"type": "mlp"},
            "llm": {"type": "hf", "path": "random"},
        }
    )
    torch.manual_seed(0)
    vision = vision_config(size)
    structure = find_structure(
        CLIPVisionModel, vision, feature_layer=-2, image_size=size.image_size, path="a random CLIP"
    )
    vision.num_hidden_layers = structure.kept_layers
    with device:
        tower = AutoModel.from_config(vision, dtype=torch.bfloat16)
        llm = AutoModelForCausalLM.from_config(text_config(size), dtype=torch.bfloat16, attn_implementation=register())
    for name in structure.after_blocks:
        tower.set_submodule(name, PassThrough())
    for name in structure.unused_parameters:
        owner, _, leaf = name.rpartition(".")
        tower.get_submodule(owner)._parameters[leaf] = None
    llm.config.use_cache = False
    tokens = size.image_tokens
    spec = EncoderSpec(size.image_size, MEAN, STD, tokens, size.vision_width)
    encoder = HfVisionEncoder(
        tower,
        blocks=structure.blocks,
        norm=None,
        num_prefix=structure.num_prefix,
        patch_size=size.patch_size,
        spec=spec,
    )
    connector = config.connector.build(in_width=size.vision_width, out_width=size.width, tokens_in=tokens)
    model = VisionLanguageModel(
        config,
        ModelSpec("", size.image_size, MEAN, STD, tokens),
        encoder,
        connector.to(torch.bfloat16),
        config.fusion.build(),
        HFLanguageModel(llm),
    )
    return model.to(device).requires_grad_(False)


def unshared(records: Records) -> Records:
    """The same records, each with a copy of its image."""
    samples = [replace(sample, images=(f"{number}.jpg",)) for number, sample in enumerate(records.samples)]
    pixels = {f"{number}.jpg": records.pixels[sample.images[0]] for number, sample in enumerate(records.samples)}
    return Records(samples, pixels)


class Way(NamedTuple):
    """How a step is made."""

    packing: str
    attention: str
    recompute: str


def ways(case: Case, device: torch.device) -> list[Way]:
    """What is compared in a case."""
    own = "triton" if device.type == "cuda" else "auto"
    if case.records_per_image > 1:
        return [Way(packing, own, recompute) for recompute in ("none", "full") for packing in ("shared", "unshared")]
    found = [Way("", own, recompute) for recompute in ("none", "selective", "full")]
    return [*found, Way("", "dense", "none"), Way("", "dense", "full")]


def tunings(case: Case, device: torch.device) -> dict[str, dict[str, Any]]:
    """Ways to train the case, the largest first; the next is for when nothing of it fits."""
    if "llm" not in case.tuning:
        return {"connector": dict(case.tuning)}
    found: dict[str, dict[str, Any]] = {"full": dict(case.tuning)}
    if device.type == "cuda":
        found["LoRA r=128"] = case.tuning | {"llm": {"mode": "lora", "rank": 128, "alpha": 256}}
    return found


class Stage:
    """A model under one tuning with a case's records, ready to make steps in any of the ways that are compared."""

    def __init__(
        self,
        model: VisionLanguageModel,
        case: Case,
        tuning: dict[str, Any],
        ranks: Ranks,
        arguments: argparse.Namespace,
    ) -> None:
        self.model, self.ranks = model, ranks
        size, count = SIZES[arguments.size], BATCH.get(arguments.size, {}).get(case.name)
        records = make_records(case, size, count or case.default_batch(arguments.size))
        packings = {"": records} if case.records_per_image == 1 else {"shared": records, "unshared": unshared(records)}
        self.rows = {p: packed_rows(r, size.image_tokens, arguments.micro_batch_tokens) for p, r in packings.items()}
        if ranks.device.type == "cuda":
            self.rows = {p: [row.map(torch.Tensor.pin_memory) for row in rows] for p, rows in self.rows.items()}
        config = TuningConfig.model_validate(tuning)
        apply_tuning(model, config)
        self.engine = ReplicatedEngine(model, tuning=config, lr=case.lr, config=OptimizerConfig(), ranks=ranks)
        self.flops = UsefulFlops(model)
        self.last: dict[Way, tuple[StepResult, float | None]] = {}
        """Result of the newest step of each way, and the most memory allocated in it (GiB)."""

    def step(self, way: Way) -> None:
        """One optimizer step."""
        device = self.ranks.device
        self.engine.discard()  # a step that ran out of memory left some
        self.model.attention_backend = way.attention
        self.model.set_gradient_checkpointing(way.recompute)
        self.model.train()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        result = train_step(
            self.engine, StepBatch(0, self.rows[way.packing]), ranks=self.ranks, lr_factor=1.0, clip=1.0,
            flops=self.flops, sources=["benchmark"],
        )  # fmt: skip
        memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
        self.last[way] = result, memory

    def figures(self, way: Way, seconds: float) -> dict[str, Any]:
        """A row's figures."""
        result, memory = self.last[way]
        finite = math.isfinite(result.loss)
        return {
            "seconds": seconds,
            "samples_s": result.samples / seconds,
            "tokens_s": result.tokens / seconds,
            "record_tokens_s": result.sample_tokens / seconds,
            "tflops": result.flops / seconds / 1e12,
            "memory_gib": memory,
            "loss": result.loss if finite else None,
            "samples": result.samples,
            "positions": result.tokens,
            "micro_batches": len(self.rows[way.packing]),
            "note": "" if finite else "the loss was not finite",
        }


def measure_case(
    model: VisionLanguageModel,
    case: Case,
    label: str,
    tuning: dict[str, Any],
    ranks: Ranks,
    arguments: argparse.Namespace,
    deadline: float,
) -> list[dict[str, Any]]:
    """A row for each way under one tuning; all with the same note when its weights alone do not fit."""
    wanted = ways(case, ranks.device)
    rows = [
        {"case": case.name, "tuning": label, **way._asdict(), **dict.fromkeys(FIGURES), "note": ""} for way in wanted
    ]
    try:
        stage = Stage(model, case, tuning, ranks, arguments)
        calls = {str(number): partial(stage.step, way) for number, way in enumerate(wanted)}
        found = timing.interleaved(calls, ranks.device, rounds=arguments.steps, deadline=deadline)
        for row, way, timed in zip(rows, wanted, found.values(), strict=True):
            row |= {"note": timed} if isinstance(timed, str) else stage.figures(way, timed.seconds)
        stage.engine.discard()
    except Exception as error:
        rows = [{**row, "note": timing.reason(error)} for row in rows]
    return rows


def measure(arguments: argparse.Namespace, start: float) -> dict[str, Any]:
    """Everything the command reports; also what it has written when it is stopped."""
    deadline = start + (arguments.seconds or math.inf)
    ranks = start_ranks(RuntimeConfig(device=arguments.device, num_threads=arguments.threads))
    result: dict[str, Any] = {
        "command": timing.command("benchmarks.gpu_steps"), "machine": timing.machine(ranks.device), "size": arguments.size,
        "micro_batch_tokens": arguments.micro_batch_tokens, "matmul_tflops": [], "rows": [],
    }  # fmt: skip
    timing.note_peak(result, ranks.device)
    model = make_model(SIZES[arguments.size], ranks.device)
    result["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    failed: set[str] = set()
    for name in arguments.cases:
        case = CASES[name]
        for label, tuning in tunings(case, ranks.device).items():
            if label in failed:
                continue
            if time.perf_counter() > deadline:
                note = f"not run: {arguments.seconds:.0f} s were over"
                rows = [{"case": name, "tuning": label, **dict.fromkeys(FIGURES), "note": note}]
            else:
                rows = measure_case(model, case, label, tuning, ranks, arguments, deadline)
            gc.collect()  # masters and optimizer of this tuning make room for the next
            if ranks.device.type == "cuda":
                torch.cuda.empty_cache()
            result["rows"] += rows
            timing.note_peak(result, ranks.device)
            timing.write_json(arguments.json, result)
            print(table_of(rows), flush=True)
            if any(row["seconds"] for row in rows) or time.perf_counter() > deadline:
                break
            failed.add(label)
    return result


def table_of(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    return timing.table(rows, COLUMNS)


def main() -> None:
    start = time.perf_counter()
    parser = timing.parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--cases", default=",".join(CASES), help="by comma (default: all)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each system, after one of warm-up")
    parser.add_argument("--micro-batch-tokens", type=int, default=8192, help="most tokens of a packed row")
    parser.add_argument("--seconds", type=float, help="begin nothing new after this time (default: no limit)")
    arguments = parser.parse_args()
    arguments.cases = arguments.cases.split(",")
    if unknown := [name for name in arguments.cases if name not in CASES]:
        parser.error(f"--cases: unknown {', '.join(unknown)}. Known: {', '.join(CASES)}.")
    measure(arguments, start)


if __name__ == "__main__":
    main()
