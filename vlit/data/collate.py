"""Tokenized samples and their views -> one packed micro-batch. Everything that must be counted is counted here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from vlit.data.share import Tree, single
from vlit.errors import DataError
from vlit.types import IGNORE_INDEX, NO_PARENT, NO_SAMPLE, PackedBatch, Segment, TokenizedSample


def collate(
    trees: Sequence[Tree],
    samples: Mapping[int, TokenizedSample] | Sequence[TokenizedSample],
    pixels: Sequence[np.ndarray],
    *,
    image_size: int = 0,
) -> PackedBatch:
    """Lay trees end to end: the prefix once, then what each sample has of its own.

    A label inside a prefix is counted for every sample that has it, so one position may be supervised several times.

    Args:
        trees: may be empty; the batch then has no token.
        samples: what the trees' member numbers mean.
        pixels: uint8 [3, H, W], one for each image of the row in reading order (those of a prefix once).
        image_size: H = W of the empty pixel tensor when there is no image.
    """
    expected = sum(tree.images for tree in trees)
    if expected != len(pixels):
        raise DataError(f"micro-batch: {expected} images in the text, {len(pixels)} views. Give one view an image.")
    ordered = [samples[number] for tree in trees for number in tree.members]
    segments: list[Segment] = []
    pieces: list[tuple[TokenizedSample, slice]] = []
    places: list[np.ndarray] = []
    row = 0
    for tree in trees:
        parent, prefix_row = NO_PARENT, row
        if tree.prefix:
            parent = len(segments)
            segments.append(Segment(tree.prefix, NO_PARENT, NO_SAMPLE))
            pieces.append((samples[tree.members[0]], slice(0, tree.prefix)))
            row += tree.prefix
        for number in tree.members:
            sample = samples[number]
            labelled = np.flatnonzero(sample.labels != IGNORE_INDEX)
            places.append(labelled + np.where(labelled < tree.prefix, prefix_row, row - tree.prefix))
            segments.append(Segment(len(sample) - tree.prefix, parent, len(places) - 1))
            pieces.append((sample, slice(tree.prefix, len(sample))))
            row += len(sample) - tree.prefix
    views = np.stack(pixels) if len(pixels) else np.zeros((0, 3, image_size, image_size), np.uint8)
    labels = [sample.labels[sample.labels != IGNORE_INDEX] for sample in ordered]
    return PackedBatch(
        input_ids=_joined([sample.input_ids[part] for sample, part in pieces], np.int64),
        position_ids=_joined([np.arange(part.start, part.stop) for _, part in pieces], np.int64),
        is_image=_joined([sample.is_image[part] for sample, part in pieces], bool),
        supervised_positions=_joined(places, np.int64),
        targets=_joined(labels, np.int64),
        sample_of_target=_joined([np.full(len(own), n) for n, own in enumerate(labels)], np.int64),
        segments=tuple(segments),
        pixels=torch.from_numpy(np.ascontiguousarray(views)),
        sample_ids=tuple(sample.id for sample in ordered),
        sources=tuple(sample.source for sample in ordered),
        sample_lengths=tuple(len(sample) for sample in ordered),
    )


def collate_samples(
    samples: Sequence[TokenizedSample], pixels: Sequence[np.ndarray], *, image_size: int = 0
) -> PackedBatch:
    """A row of samples of their own."""
    trees = [single(number, sample) for number, sample in enumerate(samples)]
    return collate(trees, samples, pixels, image_size=image_size)


def placeholder_row(empty: PackedBatch) -> PackedBatch:
    """A row of one token without label or image, for a rank that has no record but must compute along with the others."""
    one = torch.zeros(1, dtype=torch.int64)
    return replace(
        empty, input_ids=one, position_ids=one, is_image=one.bool(), segments=(Segment(1, NO_PARENT, NO_SAMPLE),)
    )


def _joined(arrays: list[np.ndarray], dtype: type) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype))
