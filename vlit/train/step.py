"""One optimizer step: the sum over its label tokens on all ranks divided by their global count, never a mean of means."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from vlit.data.collate import placeholder_row
from vlit.errors import TrainingError
from vlit.models.flops import UsefulFlops
from vlit.train.distributed import Ranks
from vlit.train.engine import Engine
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
    quarantined: int  # records left out
    sample_tokens: int  # tokens of the samples, each with its whole prefix: what separate rows would compute
    flops: float
    rank_balance: float  # mean over largest work of a rank; 1: no rank waits for another
    loss_by_source: dict[str, float]


def train_step(
    engine: Engine,
    batch: StepBatch,
    *,
    ranks: Ranks,
    lr_factor: float,
    clip: float | None,
    flops: UsefulFlops,
    sources: list[str],
    phase: Callable[..., None] = lambda name, **how: None,
) -> StepResult:
    """Forward and backward over the step's rows, then one update unless something is not finite.

    All ranks have the same number of rows; those without a token are computed only where ranks must run in lockstep. The
    host waits for the device once, when all gradients are there. ``phase`` is told what begins (for the hang watchdog).
    """
    rows = [row for row in batch.micro_batches if row.num_tokens]
    # image tokens count twice: they pass the vision encoder too
    costs = [0.0] * ranks.world_size
    costs[ranks.rank] = float(sum(row.num_tokens + int(row.is_image.sum()) for row in rows))
    counts = torch.tensor(
        [
            sum(row.num_label_tokens for row in rows),
            sum(row.num_tokens for row in rows),
            sum(row.num_images for row in rows),
            sum(row.num_samples for row in rows),
            sum(row.num_sample_tokens for row in rows),
            sum(flops.of(row) for row in rows),
            len(batch.quarantined),
            *costs,
        ],
        dtype=torch.float64,
    )
    phase("count", step=batch.step + 1, collective=True)
    counts = ranks.sum(counts.to(ranks.device, non_blocking=True))
    labels = counts[0].clamp(min=1)
    by_source = torch.zeros(len(sources), 2, dtype=torch.float64, device=ranks.device)
    if engine.lockstep:
        rows = [row if row.num_tokens else placeholder_row(row) for row in batch.micro_batches]
    for number, (row, source_of_target) in enumerate(on_device(rows, ranks.device, sources)):
        with memory_explained(row):
            phase("forward", collective=engine.lockstep)
            loss = engine.loss(row)
            phase("backward", collective=engine.lockstep)
            engine.backward(loss.total / labels, last=number == len(rows) - 1)
        by_source.index_add_(0, source_of_target, _with_count(loss.per_position))
        del loss  # with its graph, in which bitsandbytes keeps activations
    phase("reduce", collective=True)
    if batch.micro_batches:
        norms = engine.norms()
    else:  # on all ranks alike: every record of the step was left out
        norms = {part: torch.zeros((), device=ranks.device) for part in (*engine.peak_lr, "total")}
    by_source = ranks.sum(by_source)
    label_tokens, tokens, images, samples, sample_tokens, useful, quarantined, *costs = counts.tolist()
    mean_loss = float(by_source[:, 0].sum()) / max(label_tokens, 1.0)
    finite = bool(torch.isfinite(norms["total"])) and math.isfinite(mean_loss)
    phase("update", collective=engine.lockstep)
    if finite and label_tokens > 0:
        engine.step(lr_factor, clip, norms["total"])
    else:
        engine.discard()
    return StepResult(
        loss=mean_loss,
        finite=finite,
        grad_norms={part: float(norm) for part, norm in norms.items()},
        label_tokens=int(label_tokens),
        tokens=int(tokens),
        images=int(images),
        samples=int(samples),
        quarantined=int(quarantined),
        sample_tokens=int(sample_tokens),
        flops=useful,
        rank_balance=sum(costs) / (len(costs) * max(costs)) if max(costs) else 1.0,
        loss_by_source={
            name: total / count for name, (total, count) in zip(sources, by_source.tolist(), strict=True) if count
        },
    )


@contextmanager
def memory_explained(row: PackedBatch) -> Iterator[None]:
    """Turn an allocation that failed into an error that says what the row holds and which settings need less.

    Raises:
        TrainingError: instead of torch's OutOfMemoryError, or of the RuntimeError of its allocator for host memory.
    """
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise TrainingError(
            f"out of memory on a row of {row.num_tokens:,} tokens with {row.num_images} images, {row.num_samples} records and "
            f"{row.num_label_tokens:,} labels ({str(error).splitlines()[0][:200]}). Lower micro_batch_tokens, set "
            "gradient_checkpointing: full, or share the weights with runtime.strategy; `vlit plan` says what fits."
        ) from error


def on_device(
    rows: list[PackedBatch], device: torch.device, sources: list[str]
) -> Iterator[tuple[PackedBatch, Tensor]]:
    """Rows on the device, each with the source number of every target, int64 [L].

    On a GPU the next row is copied on a stream of its own while the current one is computed.
    """

    def ready(row: PackedBatch) -> tuple[PackedBatch, Tensor]:
        numbers = torch.tensor([sources.index(source) for source in row.sources], dtype=torch.long)
        source_of_target = numbers[row.sample_of_target]
        if device.type == "cuda":
            source_of_target = source_of_target.pin_memory()
        return row.to(device, non_blocking=True), source_of_target.to(device, non_blocking=True)

    if device.type != "cuda":
        yield from map(ready, rows)
        return
    stream = torch.cuda.Stream(device)
    upcoming: tuple[PackedBatch, Tensor] | None = None
    for row in [*rows, None]:
        current = upcoming
        if current is not None:
            torch.cuda.current_stream(device).wait_stream(stream)
        if row is not None:
            with torch.cuda.stream(stream):
                upcoming = ready(row)
        if current is not None:
            for tensor in (*current[0].tensors().values(), current[1]):
                tensor.record_stream(torch.cuda.current_stream(device))
            yield current


def _with_count(per_position: Tensor) -> Tensor:
    """float64 [L, 2]: each position's loss and a one."""
    return torch.stack([per_position.double(), torch.ones_like(per_position, dtype=torch.float64)], 1)
