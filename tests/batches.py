"""Hand-made packed batches, so that model tests need nothing of the data floor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlit.types import NO_PARENT, PackedBatch, Segment


@dataclass(frozen=True)
class Example:
    """One sample: ids with -1 for each image position, and which positions take loss."""

    ids: Tensor
    labels: Tensor
    pixels: Tensor


def random_example(
    *, tokens: int, images: int, tokens_per_view: int, image_size: int, vocabulary: int, seed: int
) -> Example:
    """Text of ``tokens`` ids with ``images`` image spans inside; about half of the text takes loss."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, vocabulary, (tokens,), generator=generator)
    ids = text
    for number in range(images):
        span = torch.full((tokens_per_view,), -1)
        ids = torch.cat([ids[: number + 1], span, ids[number + 1 :]])
    labels = torch.full_like(ids, -100)
    following = ids.roll(-1)
    chosen = (torch.rand(len(ids), generator=generator) < 0.5) & (following >= 0)
    chosen[-1] = False
    chosen[-2] = True
    labels[chosen] = following[chosen]
    pixels = torch.randint(0, 256, (images, 3, image_size, image_size), generator=generator, dtype=torch.uint8)
    return Example(ids, labels, pixels)


def packed(examples: Sequence[Example], source: str = "test") -> PackedBatch:
    """Examples end to end in one row."""
    ids = torch.cat([e.ids for e in examples])
    labels = torch.cat([e.labels for e in examples])
    positions = (labels != -100).nonzero()[:, 0]
    return PackedBatch(
        input_ids=ids.clamp(min=0),
        position_ids=torch.cat([torch.arange(len(e.ids)) for e in examples]),
        is_image=ids < 0,
        supervised_positions=positions,
        targets=labels[positions],
        sample_of_target=torch.repeat_interleave(
            torch.arange(len(examples)), torch.tensor([int((e.labels != -100).sum()) for e in examples])
        ),
        segments=tuple(Segment(len(e.ids), NO_PARENT, n) for n, e in enumerate(examples)),
        pixels=torch.cat([e.pixels for e in examples]),
        sample_ids=tuple(str(i) for i in range(len(examples))),
        sources=(source,) * len(examples),
        sample_lengths=tuple(len(e.ids) for e in examples),
    )
