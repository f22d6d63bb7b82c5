"""Step loader: plan, then fetch.

A step is ``global_batch`` records. Whoever loads a step tokenizes all its records (that is cheap and gives exact lengths),
joins records of one image into trees, packs them by the one deterministic plan, and decodes only the images of its own
rank, a shared one once. A worker makes whole steps, so content and order are the same for every number of workers, and
resuming is ``start_step``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vlit.config.schema import DataConfig
from vlit.data.collate import collate
from vlit.data.images import load_view
from vlit.data.load_workers import Fetched, Whereabouts, cause_of, init_worker
from vlit.data.mixture import Mixture
from vlit.data.pack import pack
from vlit.data.share import Tree, share_prefixes, single
from vlit.data.source import RecordSource
from vlit.data.tokenize import SampleTokenizer
from vlit.errors import DataError, VlitError
from vlit.types import StepBatch, TokenizedSample


def resolve_num_workers(setting: int | str) -> int:
    """Worker processes for ``data.num_workers``: ``auto`` is 0 below 4 cores, else half of the cores up to 8."""
    if setting != "auto":
        return int(setting)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if cores < 4 else min(8, cores // 2)


class StepLoader:
    """Iterates over the :class:`StepBatch` of the steps ``start_step … total_steps - 1`` for one rank.

    All ranks get the same number of micro-batches in a step; one may hold no token (``num_tokens == 0``) when records
    are fewer than rows or a row's only record was quarantined.

    Args:
        global_batch: records per step over all ranks.
        micro_batch_tokens: most tokens of a packed row (a longer sample has a row of its own).
        num_workers: default ``data.num_workers``.
    """

    def __init__(
        self,
        mixture: Mixture[RecordSource],
        tokenizer: SampleTokenizer,
        data: DataConfig,
        *,
        global_batch: int,
        micro_batch_tokens: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        total_steps: int,
        num_workers: int | None = None,
    ) -> None:
        self.start_step = start_step
        self.total_steps = total_steps
        self.num_workers = resolve_num_workers(data.num_workers if num_workers is None else num_workers)
        self._mixture = mixture
        self._running: Any = None
        self._steps = _Steps(
            mixture, tokenizer, data,
            global_batch=global_batch, micro_batch_tokens=micro_batch_tokens, rank=rank, world_size=world_size,
        )  # fmt: skip

    def __len__(self) -> int:
        return max(0, self.total_steps - self.start_step)

    def step(self, step: int) -> StepBatch:
        """One step, made in this process."""
        return self._checked(self._steps[step])

    def __iter__(self) -> Iterator[StepBatch]:
        self._steps.at = Whereabouts(self.num_workers) if self.num_workers else None
        loader: DataLoader[Fetched] = DataLoader(
            self._steps,
            batch_size=None,
            sampler=range(self.start_step, self.total_steps),
            num_workers=self.num_workers,
            prefetch_factor=2 if self.num_workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=init_worker,
            generator=torch.Generator(),  # the global one decides dropout, and a resumed run must find it untouched
        )
        self._running = iter(loader)
        with self.naming_lost_workers():
            for fetched in self._running:
                yield self._checked(fetched)

    @contextmanager
    def naming_lost_workers(self) -> Iterator[None]:
        """To be held around the loop over the steps, since torch raises its error about a dead worker at any line there.

        Raises:
            DataError: a worker process died; names what it died of and the step and record it was at.
        """
        try:
            yield
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            lost = [
                f"data worker {number} (pid {process.pid}) {self._place_of(number)} {cause_of(process.exitcode)}"
                for number, process in enumerate(getattr(self._running, "_workers", ()))
                if process.exitcode
            ]
            raise DataError(f"{'; '.join(lost) or error}. Run the same command again to resume.") from error

    def _place_of(self, worker: int) -> str:
        assert self._steps.at is not None
        step, number, record = self._steps.at.of(worker)
        if step < 0:
            return "before its first step"
        where = f"at {self._mixture.sources[number].place(record)}, " if number >= 0 else ""
        return f"{where}in step {step + 1},"

    @staticmethod
    def _checked(fetched: Fetched) -> StepBatch:
        if fetched.error is not None or fetched.batch is None:
            raise DataError(fetched.error or "the loader returned no batch")
        return fetched.batch


class _Steps(Dataset[Fetched]):
    """Step number -> step. All state is in its arguments, none is kept per record."""

    def __init__(
        self, mixture: Mixture[RecordSource], tokenizer: SampleTokenizer, data: DataConfig, *,
        global_batch: int, micro_batch_tokens: int, rank: int, world_size: int,
    ) -> None:  # fmt: skip
        self.mixture = mixture
        self.tokenizer = tokenizer
        self.data = data
        self.global_batch = global_batch
        self.micro_batch_tokens = micro_batch_tokens
        self.rank = rank
        self.world_size = world_size
        self.at: Whereabouts | None = None

    def __getitem__(self, step: int) -> Fetched:
        try:
            return self._make(step)
        except VlitError as error:
            return Fetched(step, None, error=str(error))
        finally:
            self._note(step)

    def _note(self, step: int, source: int = -1, record: int = -1) -> None:
        if self.at is not None:
            self.at.note(step, source, record)

    def _make(self, step: int) -> Fetched:
        records = self.mixture.step_records(step, self.global_batch)
        result = StepBatch(step=step, micro_batches=[])
        fetched = Fetched(step, result)
        samples: dict[int, TokenizedSample] = {}
        for place, (number, record) in enumerate(records):
            source = self.mixture.sources[number]
            self._note(step, number, record)
            try:
                samples[place] = self.tokenizer.tokenize(source.sample(record))
            except DataError as error:
                self._bad(fetched, number, record, str(error), report=self.rank == 0)
        trees = self._trees(records, samples)
        spec = self.tokenizer.spec
        plan = pack(
            [tree.num_tokens for tree in trees],
            self.micro_batch_tokens,
            self.world_size,
            image_tokens=[tree.images * spec.tokens_per_view for tree in trees],
        )[self.rank]
        for row in plan:
            kept: list[Tree] = []
            pixels: list[np.ndarray] = []
            for number in row:
                tree = self._load_views(trees[number], records, samples, pixels, fetched)
                kept += [tree] if tree.members else []
            result.micro_batches.append(collate(kept, samples, pixels, image_size=spec.image_size))
            for sample in (samples[place] for tree in kept for place in tree.members):
                result.dropped_turns += sample.dropped_turns
                result.cut_tokens += sample.cut_tokens
        return fetched

    def _trees(self, records: list[tuple[int, int]], samples: dict[int, TokenizedSample]) -> list[Tree]:
        """The step's samples as trees; without sharing, each is one of its own."""
        if self.mixture.share_at_most == 1:
            return [single(place, sample) for place, sample in samples.items()]
        places = list(samples)
        files = [
            [str(self.mixture.sources[records[place][0]].image_path(image)) for image in samples[place].images]
            for place in places
        ]
        trees = share_prefixes([samples[place] for place in places], files, self.micro_batch_tokens)
        return [replace(tree, members=tuple(places[n] for n in tree.members)) for tree in trees]

    def _load_views(
        self,
        tree: Tree,
        records: list[tuple[int, int]],
        samples: dict[int, TokenizedSample],
        pixels: list[np.ndarray],
        fetched: Fetched,
    ) -> Tree:
        """Append the tree's views to ``pixels`` in reading order; returns the tree without members whose image is bad."""

        def views(place: int, images: Sequence[str]) -> list[np.ndarray]:
            source, data, spec = self.mixture.sources[records[place][0]], self.data, self.tokenizer.spec
            return [
                load_view(source.image_path(image), policy=data.image_policy, spec=spec, exact=data.exact_pixels)
                for image in images
            ]

        shared: list[np.ndarray] = []
        own: list[np.ndarray] = []
        for place in tree.members:
            images = samples[place].images
            self._note(fetched.step, *records[place])
            try:
                if tree.prefix_images and not shared:
                    shared = views(place, images[: tree.prefix_images])
                own += views(place, images[tree.prefix_images :])
            except DataError as error:
                self._bad(fetched, *records[place], str(error), report=True)
                tree = tree.without(place)
        pixels += shared + own if tree.members else []
        return tree

    def _bad(self, fetched: Fetched, number: int, record: int, reason: str, *, report: bool) -> None:
        source = self.mixture.sources[number]
        if self.data.on_bad_sample == "error":
            raise DataError(
                f"{source.place(record)}: {reason.rstrip('.')}. Fix the record, or set data.on_bad_sample: quarantine (now: "
                f"error; {source.num_quarantined} quarantined so far)."
            )
        if report and fetched.batch is not None:
            fetched.batch.quarantined.append(source.quarantine_entry(record, reason, fetched.step + 1))
