"""One optimizer step: the sum over its label tokens on all ranks divided by their global count, never a mean of means."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlit.models.assemble import VisionLanguageModel
from vlit.train.distributed import Ranks
from vlit.train.flops import UsefulFlops
from vlit.train.optimizer import TrainedWeights
from vlit.types import PackedBatch, StepBatch


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step did, over all ranks."""

    loss: float  # mean per label token
    finite: bool
    grad_norms: dict[str, float]
    label_tokens: int
    tokens: int  # positions computed
    images: int
    samples: int
    sample_tokens: int  # tokens of the samples, each with its whole prefix: what separate rows would compute
    flops: float
    loss_by_source: dict[str, float]


def train_step(
    model: VisionLanguageModel,
    weights: TrainedWeights,
    batch: StepBatch,
    *,
    ranks: Ranks,
    lr_factor: float,
    clip: float | None,
    flops: UsefulFlops,
    sources: list[str],
) -> StepResult:
    """Forward and backward over the step's micro-batches, then one update unless something is not finite."""
    rows = [row for row in batch.micro_batches if row.num_tokens]
    counts = torch.tensor(
        [
            sum(row.num_label_tokens for row in rows),
            sum(row.num_tokens for row in rows),
            sum(row.num_images for row in rows),
            sum(row.num_samples for row in rows),
            sum(row.num_sample_tokens for row in rows),
            sum(flops.of(row) for row in rows),
        ],
        dtype=torch.float64,
    )
    label_tokens, tokens, images, samples, sample_tokens, useful = ranks.sum(counts.to(ranks.device)).tolist()
    by_source = torch.zeros(len(sources), 2, dtype=torch.float64, device=ranks.device)
    for row in rows:
        row = row.to(ranks.device, non_blocking=True)
        loss = model(row)
        (loss.total / max(label_tokens, 1.0)).backward()
        weights.accumulate()
        _add_by_source(by_source, row, loss.per_position, sources)
    ranks.sum_all(list(weights.gradients().values()))
    norms = weights.norms()
    by_source = ranks.sum(by_source)
    mean_loss = float(by_source[:, 0].sum()) / max(label_tokens, 1.0)
    finite = bool(torch.isfinite(norms["total"])) and mean_loss == mean_loss and abs(mean_loss) != float("inf")
    if finite and label_tokens > 0:
        weights.step(lr_factor, clip, norms["total"])
    else:
        weights.zero_grad()
    return StepResult(
        loss=mean_loss,
        finite=finite,
        grad_norms={part: float(norm) for part, norm in norms.items()},
        label_tokens=int(label_tokens),
        tokens=int(tokens),
        images=int(images),
        samples=int(samples),
        sample_tokens=int(sample_tokens),
        flops=useful,
        loss_by_source={
            name: total / count for name, (total, count) in zip(sources, by_source.tolist(), strict=True) if count
        },
    )


def _add_by_source(totals: Tensor, row: PackedBatch, per_position: Tensor, sources: list[str]) -> None:
    """Add each supervised position's loss to its sample's source."""
    source_of_sample = torch.tensor([sources.index(s) for s in row.sources], device=per_position.device)
    pairs = torch.stack([per_position.double(), torch.ones_like(per_position, dtype=torch.float64)], 1)
    totals.index_add_(0, source_of_sample[row.sample_of_target], pairs)
