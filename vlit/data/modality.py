"""Steps of one modality: records with images and records without in steps of their own."""

from __future__ import annotations

import numpy as np

from vlit.data.shuffle import permutation


def by_modality(with_image: np.ndarray, *, begin: int, step: int, key: int) -> np.ndarray:
    """int64 [n]: places of an order, rearranged so that a step holds records with images or records without.

    The order of the steps is drawn. What is left of both when no whole step of one is left fills the steps that this epoch
    shares with its neighbours, and at most one step within it. LLaVA's ``group_by_modality_length`` makes one such batch an
    epoch too; it also sorts by length, which rows without padding do not need.

    Args:
        with_image: bool [n], whether the record at a place has an image.
        begin: the first place's position in the endless stream; steps begin at multiples of ``step``.
        step: records of a step.
        key: of the draw (``stream_key``).
    """
    head = min(-begin % step, len(with_image))
    whole = (len(with_image) - head) // step
    streams = [np.flatnonzero(with_image), np.flatnonzero(~with_image)]
    steps = [len(stream) // step for stream in streams]
    if sum(steps) > whole:  # the steps shared with the neighbours need one step's records more than are left over
        steps[int(np.argmax(steps))] -= 1
    taken = [number * step for number in steps]
    left = np.sort(np.concatenate([stream[end:] for stream, end in zip(streams, taken, strict=True)]))
    mixed = head + (whole - sum(steps)) * step
    blocks = np.concatenate(
        [*(stream[:end] for stream, end in zip(streams, taken, strict=True)), left[head:mixed]]
    ).reshape(-1, step)  # fmt: skip
    drawn = blocks[permutation(len(blocks), key)] if len(blocks) else blocks
    return np.concatenate([left[:head], drawn.reshape(-1), left[mixed:]])
