"""vlit: packed rows without padding, shared prefixes once, logits at supervised positions only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from benchmarks.models import SIZES, model_config
from benchmarks.records import CASES, Case, Records, make_records
from benchmarks.systems import VARIANTS, Clock, Job
from vlit.config.schema import OptimizerConfig, RuntimeConfig, TuningConfig
from vlit.data.collate import collate
from vlit.data.pack import pack
from vlit.data.share import Tree, share_prefixes, single
from vlit.kernels.attention import Backend
from vlit.models.assemble import VisionLanguageModel, build_model
from vlit.models.flops import UsefulFlops
from vlit.models.tuning import apply_tuning
from vlit.train import distributed
from vlit.train.distributed import start_ranks
from vlit.train.replicated import ReplicatedEngine
from vlit.train.step import train_step
from vlit.types import PackedBatch, StepBatch


@dataclass(frozen=True)
class Settings:
    """What a variant may change; the defaults are vlit's."""

    compile: bool = False
    share: bool = True
    pack: bool = True
    attention: Backend = "auto"
    keep_memory: bool = True
    precision: Literal["bf16", "fp32"] = "bf16"
    checkpointing: Literal["none", "selective", "full"] = "none"


class VlitSystem:
    """A stage as :func:`vlit.train.stage.train_stage` sets it up, with one step's batch."""

    note = ""

    def __init__(self, job: Job) -> None:
        case, size = CASES[job.case], SIZES[job.size]
        settings = Settings(**VARIANTS.get(job.system.removeprefix("vlit-"), {}))
        if not settings.keep_memory:
            distributed.keep_freed_memory = lambda: False
        self.ranks = start_ranks(RuntimeConfig(device=job.device, num_threads=job.threads))
        config = model_config(job.parts / "clip", job.parts / "llama")
        self.model = build_model(config, dtype=torch.float32 if settings.precision == "fp32" else torch.bfloat16)
        self.model.to(self.ranks.device)
        tuning = tune(self.model, case)
        self.engine = ReplicatedEngine(
            self.model, tuning=tuning, lr=case.lr, config=OptimizerConfig(), ranks=self.ranks
        )
        self.model.attention_backend = settings.attention
        self.model.set_gradient_checkpointing(settings.checkpointing)
        if settings.compile:
            self.model.compile_blocks()
        self.model.train()
        self.flops = UsefulFlops(self.model)
        records = make_records(case, size, job.num_records)
        rows = packed_rows(
            records, size.image_tokens, job.micro_batch_tokens if settings.pack else 1, share=settings.share
        )
        if self.ranks.device.type == "cuda":
            rows = [row.map(torch.Tensor.pin_memory) for row in rows]
        self.batch = StepBatch(0, rows)
        self.positions = sum(row.num_tokens for row in rows)
        self.padding = self.positions - sum(segment.length for row in rows for segment in row.segments)

    def run(self, clock: Clock) -> None:
        while True:
            clock.begin()
            result = train_step(
                self.engine,
                self.batch,
                ranks=self.ranks,
                lr_factor=1.0,
                clip=1.0,
                flops=self.flops,
                sources=["benchmark"],
            )
            clock.end()
            clock.report(result.loss, result.grad_norms["total"])


def make(job: Job) -> VlitSystem:
    return VlitSystem(job)


def tune(model: VisionLanguageModel, case: Case) -> TuningConfig:
    """Freeze and unfreeze ``model`` as the case asks."""
    tuning = TuningConfig.model_validate(case.tuning)
    apply_tuning(model, tuning)
    return tuning


def packed_rows(
    records: Records, image_tokens: int, micro_batch_tokens: int, *, share: bool = True
) -> list[PackedBatch]:
    """The micro-batches :class:`vlit.data.load.StepLoader` would make of the records."""
    samples = records.samples
    if share:
        trees = share_prefixes(samples, [sample.images for sample in samples], micro_batch_tokens)
    else:
        trees = [single(number, sample) for number, sample in enumerate(samples)]
    lengths, images = [tree.num_tokens for tree in trees], [tree.images * image_tokens for tree in trees]
    plan = pack(lengths, micro_batch_tokens, 1, image_tokens=images)[0]
    return [
        collate([trees[number] for number in row], samples, [view for n in row for view in _views(trees[n], records)])
        for row in plan
    ]


def _views(tree: Tree, records: Records) -> list[np.ndarray]:
    """Pixels in reading order, those of the prefix once."""
    images = [records.samples[member].images for member in tree.members]
    names = [*images[0][: tree.prefix_images], *(name for own in images for name in own[tree.prefix_images :])]
    return [records.pixels[name] for name in names]
