"""What a stage computes: its records, how long they are, and the rows they are packed into.

Where the data and the tokenizer are on this machine, the first samples in training order are tokenized and packed by the same
code that training uses (as ``vlit/data/check.py`` does). Elsewhere the numbers come from the published averages of the dataset.
Those given on the command line replace them, one by one; the plan says which are which.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlit.config.schema import RunConfig, StageConfig
from vlit.data.pack import pack
from vlit.data.share import Tree, share_prefixes, single
from vlit.data.source import open_source
from vlit.data.stage_order import stage_mixture
from vlit.data.tokenize import SampleTokenizer
from vlit.errors import ConfigError, DataError
from vlit.kernels.attention import make_segments
from vlit.plan.parts import published
from vlit.types import NO_PARENT, ModelSpec, PackedBatch, Segment, TokenizedSample


@dataclass(frozen=True, slots=True)
class Packed:
    """One sample, or several that share a prefix: numbers only."""

    lengths: tuple[int, ...]  # tokens of each segment; the first is the prefix when there are several
    images: int
    labels: int
    records: int = 1

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def parents(self) -> tuple[int, ...]:
        return (NO_PARENT, *(0 for _ in self.lengths[1:]))

    @property
    def pairs(self) -> int:
        return make_segments(self.lengths, self.parents).num_pairs


@dataclass(frozen=True, slots=True)
class Workload:
    """A stage's records and a sample of them, step by step."""

    source: str
    records: int  # of an epoch
    steps: int
    global_batch: int
    sampled: tuple[tuple[Packed, ...], ...]
    _rows: dict[tuple[int, int], int] = field(default_factory=dict, repr=False, compare=False)

    def mean(self, what: str) -> float:
        """Average of ``tokens``, ``images``, ``labels`` or ``pairs`` a record, shared prefixes counted once."""
        every = [item for step in self.sampled for item in step]
        return sum(getattr(item, what) for item in every) / sum(item.records for item in every)

    def rows_per_step(self, micro_batch_tokens: int, world_size: int, tokens_per_view: int) -> int:
        """Rows of a rank, averaged over the sampled steps."""
        held = self._rows.get((micro_batch_tokens, world_size))
        if held is not None:
            return held
        counts = []
        for step in self.sampled:
            images = [item.images * tokens_per_view for item in step]
            plan = pack([item.tokens for item in step], micro_batch_tokens, world_size, image_tokens=images)
            counts.append(len(plan[0]) * self.global_batch / max(1, sum(item.records for item in step)))
        rows = self._rows[micro_batch_tokens, world_size] = max(1, math.ceil(sum(counts) / len(counts) - 1e-9))
        return rows

    def largest_row(self, micro_batch_tokens: int, world_size: int) -> list[Packed]:
        """A row as full as rows get: records with images first, until ``micro_batch_tokens`` or a rank's share is reached.

        A record longer than that has a row of its own.
        """
        every = sorted((item for step in self.sampled for item in step), key=lambda item: (-item.images, item.tokens))
        longest = max(every, key=lambda item: item.tokens)
        share = math.ceil(self.global_batch / world_size)
        row: list[Packed] = []
        tokens = records = 0
        for item in every * math.ceil(share / len(every)):
            if records < share and tokens + item.tokens <= micro_batch_tokens:
                row.append(item)
                tokens, records = tokens + item.tokens, records + item.records
        return row if tokens >= longest.tokens else [longest]


def empty_row(row: Sequence[Packed], *, image_size: int) -> PackedBatch:
    """The row as tensors without contents, on the meta device."""
    segments: list[Segment] = []
    for item in row:
        first = len(segments)
        for number, length in enumerate(item.lengths):
            shared = number == 0 and len(item.lengths) > 1
            parent = first if number and len(item.lengths) > 1 else NO_PARENT
            segments.append(Segment(length, parent, -1 if shared else first + number))
    tokens, labels, images = (sum(getattr(item, what) for item in row) for what in ("tokens", "labels", "images"))

    def made(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return PackedBatch(
        input_ids=made(tokens),
        position_ids=made(tokens),
        is_image=made(tokens, dtype=torch.bool),
        supervised_positions=made(labels),
        targets=made(labels),
        sample_of_target=made(labels),
        segments=tuple(segments),
        pixels=made(images, 3, image_size, image_size, dtype=torch.uint8),
    )


@dataclass(frozen=True, slots=True)
class Assumed:
    """Numbers given on the command line; None: not given."""

    records: int | None = None
    tokens_per_record: float | None = None
    images_per_record: float | None = None

    @property
    def any(self) -> bool:
        return any(value is not None for value in (self.records, self.tokens_per_record, self.images_per_record))

    @property
    def complete(self) -> bool:
        return None not in (self.records, self.tokens_per_record, self.images_per_record)


NOT_HERE = "the data files are not here"


def workload(run: RunConfig, stage: str, spec: ModelSpec, assumed: Assumed) -> Workload:
    """The stage's workload from the data, or published averages, with the numbers of the command line in place of theirs.

    Raises:
        ConfigError: a dataset is not here and not in the table, and the command line does not say enough.
        DataError: a dataset is here and cannot be used, and the command line does not say enough.
    """
    here = all(Path(source.path).expanduser().exists() for source in run.stages[stage].data)
    reason = NOT_HERE
    if here and not assumed.complete:
        try:
            return _overridden(_sampled(run, stage, spec), run, stage, spec, assumed)
        except (DataError, OSError) as error:
            reason = str(error)
    return _assumed(run, stage, spec, assumed, reason)


def _overridden(found: Workload, run: RunConfig, stage: str, spec: ModelSpec, assumed: Assumed) -> Workload:
    """The data's numbers, but for those that were given."""
    if not assumed.any:
        return found
    config, given = run.stages[stage], assumed.records
    records = found.records if given is None else given
    steps = found.steps if given is None else _steps(config, given)
    source = f"{found.source}, and the command line"
    if assumed.tokens_per_record is None and assumed.images_per_record is None:
        return Workload(source, records, steps, config.global_batch, found.sampled)
    images = assumed.images_per_record if assumed.images_per_record is not None else found.mean("images")
    text = found.mean("tokens") - found.mean("images") * spec.tokens_per_view
    tokens = assumed.tokens_per_record
    if tokens is None:
        tokens = text + images * spec.tokens_per_view
    supervised = found.mean("labels") / max(text, 1.0)
    step = _equal_step(tokens, images, supervised, run, stage, spec)
    return Workload(source, records, steps, config.global_batch, (step,))


def _steps(config: StageConfig, records: int) -> int:
    return config.max_steps or max(1, math.ceil(round(config.epochs * records, 6) / config.global_batch))


def _equal_step(
    tokens: float, images: float, supervised: float, run: RunConfig, stage: str, spec: ModelSpec
) -> tuple[Packed, ...]:
    """A step of records of ``tokens`` each, images included. ConfigError when the images alone are more."""
    text = tokens - images * spec.tokens_per_view
    if text < 2:
        raise ConfigError(
            f"--tokens-per-record {tokens:g}: {images:g} images a record are already {images * spec.tokens_per_view:g} "
            "tokens. It counts text and images."
        )
    count, most = run.stages[stage].global_batch, run.data_for(stage).max_tokens
    return _synthetic(count, text, images, supervised, spec.tokens_per_view, most)


def _sampled(run: RunConfig, stage: str, spec: ModelSpec) -> Workload:
    config, data = run.stages[stage], run.data_for(stage)
    sources = [
        open_source(source, data=data, seed=run.seed, quarantine_path=None, progress=False) for source in config.data
    ]
    mixture = stage_mixture(run, stage, sources)
    tokenizer = SampleTokenizer(spec, data)
    count = min(run.data.check_samples, mixture.records_per_epoch)
    steps: dict[int, list[tuple[TokenizedSample, list[str]]]] = {}
    looked = 0
    for position in range(count):
        number, record = mixture.record(position)
        source = mixture.sources[number]
        try:
            sample = tokenizer.tokenize(source.sample(record))
        except DataError:
            continue  # training decides what a bad record means
        files = [str(source.image_path(image)) for image in sample.images]
        steps.setdefault(position // config.global_batch, []).append((sample, files))
        looked += 1
    sampled = []
    for step in steps.values():
        samples = [sample for sample, _ in step]
        if mixture.share_at_most > 1:
            trees = share_prefixes(samples, [files for _, files in step], config.micro_batch_tokens)
        else:
            trees = [single(number, sample) for number, sample in enumerate(samples)]
        sampled.append(tuple(_numbers(tree, samples) for tree in trees))
    if not looked:
        raise DataError(
            f"stage {stage}: none of the first {count} records can be tokenized. Run vlit preview to see why."
        )
    total = mixture.total_steps(config.epochs, global_batch=config.global_batch, max_steps=config.max_steps)
    return Workload(
        f"the first {looked} records of the data", mixture.records_per_epoch, total, config.global_batch, tuple(sampled)
    )


def _numbers(tree: Tree, samples: list[TokenizedSample]) -> Packed:
    own = tuple(len(samples[number]) - tree.prefix for number in tree.members)
    lengths = (tree.prefix, *own) if tree.prefix else own
    labels = sum(samples[number].num_label_tokens for number in tree.members)
    return Packed(lengths, tree.images, labels, len(tree.members))


def _assumed(run: RunConfig, stage: str, spec: ModelSpec, assumed: Assumed, reason: str) -> Workload:
    config = run.stages[stage]
    known: list[tuple[float, dict[str, Any]]] = []
    missing = []
    for source in config.data:
        entry = published()["datasets"].get(Path(source.path).name)
        if entry is None:
            missing.append(source.path)
        else:
            records = min(entry["records"], source.max_records or entry["records"])
            known.append((records * source.weight, entry))
    if not missing and config.data[0].share is not None:
        total = sum(records for records, _ in known)
        known = [(total * (s.share or 0.0), entry) for s, (_, entry) in zip(config.data, known, strict=True)]
    if missing and not assumed.complete:
        if reason != NOT_HERE:
            raise DataError(f"stage {stage}: {reason}")
        gone = next((path for path in missing if not Path(path).expanduser().exists()), missing[0])
        raise ConfigError(
            f'stages.{stage}.data: "{gone}" is not here and not a dataset whose size is known '
            f"({', '.join(sorted(published()['datasets']))}). Give --records, --tokens-per-record (images included) and "
            "--images-per-record."
        )

    def average(what: str) -> float:
        return sum(records * entry[what] for records, entry in known) / sum(records for records, _ in known)

    records = assumed.records if assumed.records is not None else round(sum(records for records, _ in known))
    images = assumed.images_per_record if assumed.images_per_record is not None else average("images")
    if assumed.tokens_per_record is not None:
        tokens = assumed.tokens_per_record
    else:
        tokens = average("text_tokens") + images * spec.tokens_per_view
    supervised = average("supervised") if known else 0.6
    names = ", ".join(Path(source.path).name for source in config.data)
    said = "the command line" if assumed.complete else f"published averages of {names}, because {reason.split('. ')[0]}"
    said += ", and the command line" if assumed.any and not assumed.complete else ""
    step = _equal_step(tokens, images, supervised, run, stage, spec)
    return Workload(said, records, _steps(config, records), config.global_batch, (step,))


def _synthetic(
    count: int, text: float, images: float, supervised: float, tokens_per_view: int, max_tokens: int
) -> tuple[Packed, ...]:
    """``count`` records of equal text, whose images add up to ``images`` a record."""
    totals = np.floor(images * np.arange(count + 1) + 1e-9).astype(int)
    made = []
    for number in np.diff(totals).tolist():
        length = max(2, min(round(text) + number * tokens_per_view, max_tokens))
        labels = max(1, min(length - 1, round(supervised * text)))
        made.append(Packed((length,), number, labels))
    return tuple(made)
