"""Tokenized samples and their views -> one packed micro-batch. Everything that must be counted is counted here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vlit.errors import DataError
from vlit.types import IGNORE_INDEX, PackedBatch, TokenizedSample


def collate(samples: Sequence[TokenizedSample], pixels: Sequence[np.ndarray], *, image_size: int = 0) -> PackedBatch:
    """Lay samples end to end.

    Args:
        samples: may be empty; the batch then has no token.
        pixels: uint8 [3, H, W], one for each image of the samples, in reading order.
        image_size: H = W of the empty pixel tensor when there is no image.
    """
    expected = sum(len(sample.images) for sample in samples)
    if expected != len(pixels):
        raise DataError(f"micro-batch: {expected} images in the text, {len(pixels)} views. Give one view an image.")
    lengths = tuple(len(sample) for sample in samples)
    labels = _joined([sample.labels for sample in samples], np.int64)
    positions = np.flatnonzero(labels != IGNORE_INDEX)
    views = np.stack(pixels) if len(pixels) else np.zeros((0, 3, image_size, image_size), np.uint8)
    return PackedBatch(
        input_ids=torch.from_numpy(_joined([sample.input_ids for sample in samples], np.int64)),
        position_ids=torch.from_numpy(_joined([np.arange(length) for length in lengths], np.int64)),
        is_image=torch.from_numpy(_joined([sample.is_image for sample in samples], bool)),
        supervised_positions=torch.from_numpy(positions.astype(np.int64)),
        targets=torch.from_numpy(labels[positions]),
        segment_lengths=lengths,
        pixels=torch.from_numpy(np.ascontiguousarray(views)),
        sample_ids=tuple(sample.id for sample in samples),
        sources=tuple(sample.source for sample in samples),
    )


def _joined(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype)
