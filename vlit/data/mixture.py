"""Which record comes when: a pure function of (sizes, weights, seed, epoch).

Ranks, workers and packing do not enter, so a run is resumed by one integer, on any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np

from vlit.data.modality import by_modality
from vlit.data.shuffle import permutation, stream_key
from vlit.errors import DataError

_RECORD_BITS = 40


class Sized(Protocol):
    """What the order needs of a source."""

    name: str
    weight: float
    share: float | None

    def __len__(self) -> int: ...

    def image_groups(self) -> np.ndarray:
        """int64 [len]: equal for records whose first image is the same file, negative for records without an image.
        Asked only when images are shared or steps have one modality.
        """
        ...


S = TypeVar("S", bound=Sized)


class Mixture(Generic[S]):
    """A shuffled, endless stream of records of several sources, cut into epochs.

    An epoch holds every record of a source ``floor(weight)`` times, and ``weight - floor(weight)`` of its records once
    more; that share moves through the source from epoch to epoch, so every record is seen equally often. All sources
    are shuffled together.

    Args:
        sources: with ``name``, ``weight`` or ``share``, and ``len``; names must differ.
        seed: the run's seed.
        share_at_most: bring up to this many records of one image together, so that they can share it (1: none). The
            records of an image with more are spread over the epoch in several such groups.
        modality_step: records of a step, to give every step records with images or records without (None: as they come).
    """

    def __init__(
        self, sources: Sequence[S], seed: int, *, share_at_most: int = 1, modality_step: int | None = None
    ) -> None:
        if not sources:
            raise DataError("the mixture has no source. List at least one under data:.")
        names = [source.name for source in sources]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise DataError(f'two data sources are named "{doubled[0]}". Give one of them another name:.')
        self.sources = list(sources)
        self.seed = seed
        self.share_at_most = share_at_most
        self.modality_step = modality_step
        total = sum(len(source) for source in sources)
        self.counts = [
            max(1, round(source.weight * len(source) if source.share is None else source.share * total))
            for source in sources
        ]
        """Records of each source per epoch; with shares an epoch has as many records as all sources together."""
        self._epochs: dict[int, np.ndarray] = {}

    @property
    def records_per_epoch(self) -> int:
        """Records of all sources in one epoch."""
        return sum(self.counts)

    def epoch(self, epoch: int) -> np.ndarray:
        """int64 [records_per_epoch]: the order of an epoch as ``source << 40 | record``. Keeps the last two."""
        order = self._epochs.get(epoch)
        if order is None:
            parts = [self._chosen(number, epoch) | (number << _RECORD_BITS) for number in range(len(self.sources))]
            entries = np.concatenate(parts)
            order = entries[permutation(len(entries), stream_key(self.seed, "order", epoch))]
            if self.share_at_most > 1:
                order = order[self._together(order)]
            if self.modality_step is not None:
                begin, key = epoch * len(order), stream_key(self.seed, "modality", epoch)
                places = by_modality(self._images(order) >= 0, begin=begin, step=self.modality_step, key=key)
                order = order[places]
            self._epochs = {held: self._epochs[held] for held in sorted(self._epochs)[-1:]}
            self._epochs[epoch] = order
        return order

    def _together(self, order: np.ndarray) -> np.ndarray:
        """int64 [n]: places of a shuffled order, rearranged so that records of one image stand together.

        The occurrences of an image are numbered along the order and cut into runs of ``share_at_most``. A run moves to
        where its smallest entry stands, which the shuffle decides alike for long and short runs. Copies of a record (weight
        above 1) go to different runs.
        """
        image = self._images(order)
        alone = image < 0
        image[alone] = -1 - np.flatnonzero(alone)
        copy = _occurrence(order)
        group = np.unique(image, return_inverse=True)[1].reshape(-1) * (int(copy.max()) + 1) + copy
        run = group * (len(order) + 1) + _occurrence(group) // self.share_at_most
        by_run = np.lexsort((order, run))
        starts = np.flatnonzero(np.r_[True, np.diff(run[by_run]) != 0])
        leader = np.repeat(by_run[starts], np.diff(np.r_[starts, len(order)]))
        target = np.empty(len(order), np.int64)
        target[by_run] = leader
        return np.argsort(target, kind="stable")

    def _images(self, order: np.ndarray) -> np.ndarray:
        """int64 [n]: the first image of each record of an order, negative where it has none."""
        sources, records = order >> _RECORD_BITS, order & ((1 << _RECORD_BITS) - 1)
        image = np.full(len(order), -1, np.int64)
        for number, source in enumerate(self.sources):
            own = sources == number
            groups = source.image_groups()[records[own]]
            image[own] = np.where(groups < 0, -1, groups | (number << _RECORD_BITS))
        return image

    def _chosen(self, number: int, epoch: int) -> np.ndarray:
        source, count = self.sources[number], self.counts[number]
        copies, extra = divmod(count, len(source))
        whole = np.tile(np.arange(len(source), dtype=np.int64), copies)
        if not extra:
            return whole
        order = permutation(len(source), stream_key(self.seed, "share", source.name))
        window = (epoch * extra + np.arange(extra, dtype=np.int64)) % len(source)
        return np.concatenate([whole, order[window]])

    def record(self, position: int) -> tuple[int, int]:
        """(source, record) at a position of the endless stream."""
        epoch, offset = divmod(position, self.records_per_epoch)
        entry = int(self.epoch(epoch)[offset])
        return entry >> _RECORD_BITS, entry & ((1 << _RECORD_BITS) - 1)

    def step_records(self, step: int, global_batch: int) -> list[tuple[int, int]]:
        """The records of an optimizer step. The last step of an epoch is filled from the next epoch's order."""
        return [self.record(step * global_batch + number) for number in range(global_batch)]

    def total_steps(self, epochs: float, *, global_batch: int, max_steps: int | None = None) -> int:
        """Steps of a run: ``max_steps`` if given, else as many as show every record of ``epochs`` epochs."""
        if max_steps is not None:
            return max_steps
        return max(1, math.ceil(round(epochs * self.records_per_epoch, 6) / global_batch))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_epochs": {}}


def _occurrence(values: np.ndarray) -> np.ndarray:
    """int64 [n]: how often each value has stood before."""
    by_value = np.argsort(values, kind="stable")
    ordered = values[by_value]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    begin = np.repeat(starts, np.diff(np.r_[starts, len(values)]))
    result = np.empty(len(values), np.int64)
    result[by_value] = np.arange(len(values)) - begin
    return result
