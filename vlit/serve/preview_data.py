"""What a preview shows, as plain data, and how it is collected from the data floor. No weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlit.errors import DataError
from vlit.types import IGNORE_INDEX, NO_SAMPLE, PackedBatch

if TYPE_CHECKING:
    from vlit.config.schema import DataConfig, RunConfig
    from vlit.data.mixture import Mixture
    from vlit.data.source import RecordSource
    from vlit.data.tokenize import SampleTokenizer
    from vlit.types import ModelSpec


SPACE, NEWLINE, TAB = "·", "↵", "⇥"


def visible(text: str) -> str:
    """White space made visible, characters that print nothing as their code: ``"a b\\n"`` -> ``a·b↵``."""
    shown = {" ": SPACE, "\n": NEWLINE, "\t": TAB}
    return "".join(shown.get(c) or (c if c.isprintable() else f"\\u{ord(c):04x}") for c in text)


@dataclass(frozen=True, slots=True)
class PreviewToken:
    """One token, or the ``count`` tokens of one image.

    ``text`` is what it stands for; a character that takes several tokens is given to the last of them, the others are
    empty. ``supervised``: the model is trained to say it. ``label``: the id its (last) position must predict, or None.
    """

    text: str
    token_id: int
    kind: str  # text, special or image
    position: int
    supervised: bool
    label: int | None = None
    count: int = 1


@dataclass(frozen=True, slots=True)
class PreviewImage:
    """A picture as the model sees it: uint8 [H, W, 3] after the image policy."""

    name: str
    pixels: np.ndarray


@dataclass(frozen=True, slots=True)
class PreviewSample:
    """One record on its way to the model; with ``error`` it cannot be used, and the rest is empty."""

    id: str
    source: str
    place: str
    tokens: tuple[PreviewToken, ...] = ()
    images: tuple[PreviewImage, ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()
    """(role, text) of the turns that did not fit."""
    cut_tokens: int = 0
    error: str | None = None

    @property
    def num_tokens(self) -> int:
        return sum(token.count for token in self.tokens)

    @property
    def num_supervised(self) -> int:
        return sum(token.label is not None for token in self.tokens)


@dataclass(frozen=True, slots=True)
class PreviewSegment:
    """One sample in a packed row; the counts are tokens."""

    id: str
    source: str
    tokens: int
    image_tokens: int
    supervised: int


@dataclass(frozen=True, slots=True)
class PreviewRow:
    """One packed row (micro-batch) of an optimizer step, with room for ``capacity`` tokens."""

    step: int
    capacity: int
    segments: tuple[PreviewSegment, ...]
    num_samples: int

    @property
    def num_tokens(self) -> int:
        return sum(segment.tokens for segment in self.segments)


@dataclass(slots=True)
class PreviewStage:
    """The first samples and steps of a stage, and the settings that shaped them."""

    name: str
    samples: list[PreviewSample]
    rows: list[PreviewRow]
    facts: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def collect_preview(run: RunConfig, stage: str, *, samples: int = 16, steps: int = 2) -> PreviewStage:
    """The first ``samples`` records in training order and the packing of the first ``steps`` steps on one process.

    A record that cannot be used is shown with its reason instead of ending the preview.

    Raises:
        VlitError: a part, dataset or image folder of the configuration is missing.
    """
    from vlit.data.tokenize import SampleTokenizer
    from vlit.models.assemble import model_spec
    from vlit.train.identity import open_mixture

    spec = model_spec(run.model)
    data, config = run.data_for(stage), run.stages[stage]
    mixture = open_mixture(run, stage, progress=False)
    tokenizer = SampleTokenizer(spec, data)
    count = min(samples, mixture.records_per_epoch)
    collected = [_sample(*mixture.record(position), mixture, tokenizer, data) for position in range(count)]
    total = mixture.total_steps(config.epochs, global_batch=config.global_batch, max_steps=config.max_steps)
    facts = [
        ("Template", str(data.template.type)),
        ("Image policy", f"{data.image_policy}, {spec.image_size} x {spec.image_size} pixels"),
        ("Tokens an image", f"{spec.tokens_per_view:,}"),
        ("Longest sample", f"{data.max_tokens:,} tokens"),
        ("Records per epoch", f"{mixture.records_per_epoch:,}"),
        ("Steps", f"{total:,}, each of {config.global_batch:,} records"),
    ]
    preview = PreviewStage(stage, collected, [], facts)
    if written := tokenizer.written_as_text():
        tokens = ", ".join(written)
        preview.notes.append(f"The tokenizer lacks these special tokens of the template; they are text: {tokens}")
    _collect_rows(preview, run, mixture, tokenizer, steps=min(steps, total))
    return preview


def _sample(
    number: int, record: int, mixture: Mixture[RecordSource], tokenizer: SampleTokenizer, data: DataConfig
) -> PreviewSample:
    source = mixture.sources[number]
    sample = source.sample(record)
    place = source.place(record)
    try:
        tokenized = tokenizer.tokenize(sample)
        images = tuple(_image(source, name, data, tokenizer.spec) for name in tokenized.images)
        views = tokenizer.explain(sample)
    except DataError as error:
        return PreviewSample(sample.id, source.name, place, error=str(error))
    tokens: list[PreviewToken] = []
    position = 0
    for view in views:
        last = position + view.num_tokens - 1
        label = int(tokenized.labels[last])
        tokens.append(
            PreviewToken(
                text=view.text,
                token_id=int(tokenized.input_ids[position]),
                kind=view.kind,
                position=position,
                supervised=position > 0 and int(tokenized.labels[position - 1]) != IGNORE_INDEX,
                label=None if label == IGNORE_INDEX else label,
                count=view.num_tokens,
            )
        )
        position = last + 1
    dropped = sample.turns[len(sample.turns) - tokenized.dropped_turns :]
    return PreviewSample(
        id=sample.id,
        source=source.name,
        place=place,
        tokens=tuple(tokens),
        images=images,
        dropped=tuple((turn.role, turn.text) for turn in dropped),
        cut_tokens=tokenized.cut_tokens,
    )


def _image(source: RecordSource, name: str, data: DataConfig, spec: ModelSpec) -> PreviewImage:
    from vlit.data.images import load_view

    view = load_view(source.image_path(name), policy=data.image_policy, spec=spec, exact=data.exact_pixels)
    return PreviewImage(name, np.ascontiguousarray(view.transpose(1, 2, 0)))


def _collect_rows(
    preview: PreviewStage, run: RunConfig, mixture: Mixture[RecordSource], tokenizer: SampleTokenizer, *, steps: int
) -> None:
    """Packed rows of the first steps, made by the training loader itself."""
    from vlit.data.formats._base import place_of
    from vlit.data.load import StepLoader

    config = run.stages[preview.name]
    loader = StepLoader(
        mixture,
        tokenizer,
        run.data_for(preview.name),
        global_batch=config.global_batch,
        micro_batch_tokens=config.micro_batch_tokens,
        total_steps=steps,
        num_workers=0,
    )
    for step in range(steps):
        try:
            batch = loader.step(step)
        except DataError as error:
            preview.notes.append(f"Step {step + 1} cannot be packed: {error}")
            return
        preview.rows += [packed_row(row, step=step, capacity=config.micro_batch_tokens) for row in batch.micro_batches]
        for bad in batch.quarantined:
            preview.notes.append(f"Left out (quarantine): {place_of(Path(bad.file), bad.record, bad.id)}: {bad.reason}")


def packed_row(batch: PackedBatch, *, step: int, capacity: int) -> PreviewRow:
    """Counts per segment of a packed micro-batch. The room of a row that one longer record has for itself is its length."""
    is_image = batch.is_image.numpy()
    supervised = np.zeros(batch.num_tokens, bool)
    supervised[batch.supervised_positions.numpy()] = True
    segments, begin = [], 0
    for length, _, sample in batch.segments:
        shared = sample == NO_SAMPLE
        name, source = ("shared prefix", "") if shared else (batch.sample_ids[sample], batch.sources[sample])
        span = slice(begin, begin + length)
        segments.append(PreviewSegment(name, source, length, int(is_image[span].sum()), int(supervised[span].sum())))
        begin += length
    return PreviewRow(step, max(capacity, batch.num_tokens), tuple(segments), batch.num_samples)
