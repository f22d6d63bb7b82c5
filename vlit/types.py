"""The words every floor speaks: what a sample is on its way from a source record to a packed batch.

YAML -> record -> :class:`Sample` -> :class:`Piece` list -> :class:`TokenizedSample` -> :class:`PackedBatch` -> model.

Shape letters: T tokens of a packed row, N segments (samples) of a row, L supervised positions, V views (image crops),
S vision tokens a view, D width. Nothing here imports torch at run time, so the data floor stays light.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that takes no loss (PyTorch's own convention)."""

NO_PARENT = -1
"""Parent of a segment that continues no prefix."""

NO_SAMPLE = -1
"""Sample number of a segment that several samples share."""

IMAGE_PLACEHOLDER = "<image>"
"""Stands in a turn's text where an image goes. Structural: it is never looked up in a tokenizer's vocabulary."""

PARTS = ("vision", "connector", "fusion", "llm", "embeddings")
"""Every parameter of a model belongs to exactly one of these. ``embeddings`` = the LLM's input and output embeddings."""

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. ``text`` may hold ``<image>`` placeholders (user turns only)."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One validated record: turns alternate user/assistant after an optional system turn; the number of placeholders
    equals ``len(images)``; ``images`` are paths relative to the source's image root.
    """

    id: str
    source: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()
    kind: str | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """A fragment that is tokenised once and on its own, so that masks need no guessing.

    ``text``: ordinary text, special tokens inside it are text; ``special``: exactly one special token by its string;
    ``image``: the vision tokens of image number ``image`` of the sample. ``supervised`` pieces take loss.
    """

    kind: Literal["text", "special", "image"]
    text: str = ""
    supervised: bool = False
    image: int = -1


@dataclass(slots=True)
class TokenizedSample:
    """Token ids of one sample with labels aligned to the *next* token.

    ``labels[t]`` is the id that position t must predict, or -100. Image positions hold id 0 in ``input_ids`` and True in
    ``is_image``; each image takes ``ModelSpec.tokens_per_view`` consecutive positions.
    """

    id: str
    source: str
    input_ids: np.ndarray  # int64 [T]
    labels: np.ndarray  # int64 [T]
    is_image: np.ndarray  # bool [T]
    images: tuple[str, ...]
    kind: str | None = None
    dropped_turns: int = 0
    cut_tokens: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_label_tokens(self) -> int:
        return int((self.labels != IGNORE_INDEX).sum())


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """All that the data floor needs to know about a model; small and picklable, so workers never load weights.

    ``image_mean``/``image_std`` are per channel on the 0-1 scale. ``tokens_per_view`` counts what the *connector* emits.
    """

    tokenizer_path: str
    image_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    tokens_per_view: int
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    trust_remote_code: bool = False
    tokenizer_revision: str | None = None
    """Hub revision the tokenizer is taken from, so that a pinned model is pinned with all that comes with it."""
    vocab_size: int | None = None
    """Token embeddings of the language model; a tokenizer that needs more is refused. None: not known."""


class VisionTokens(NamedTuple):
    """What an encoder hands to a connector and a connector to a fusion: one row of S tokens per view."""

    tokens: Tensor  # [V, S, D]


class Segment(NamedTuple):
    """A run of tokens in a packed row: a sample, a prefix that several samples share, or what a sample adds to it."""

    length: int
    parent: int
    """Number of the segment that is its prefix; NO_PARENT without one."""
    sample: int
    """Number of its sample in the row; NO_SAMPLE for a shared prefix."""


@dataclass(slots=True)
class PackedBatch:
    """One micro-batch: N samples in one row of T tokens, without padding.

    Everything the accelerator path would have to count is counted here, in the data worker: segment bounds, the L
    supervised positions and their targets. Order of ``pixels`` equals reading order of the image spans in the row.
    Samples that share a prefix attend to it and to themselves (see :class:`vlit.kernels.attention.Segments`).
    """

    input_ids: Tensor  # int64 [T]
    position_ids: Tensor  # int64 [T], the position within the sample: 0 for its first token, shared or not
    is_image: Tensor  # bool [T]
    supervised_positions: Tensor  # int64 [L]; a position of a shared prefix may stand here once for each sample
    targets: Tensor  # int64 [L], the id each supervised position must predict
    sample_of_target: Tensor  # int64 [L], number of the sample each target belongs to
    segments: tuple[Segment, ...]  # lengths sum to T
    pixels: Tensor  # uint8 [V, 3, H, W], not normalised; V may be 0
    sample_ids: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    sample_lengths: tuple[int, ...] = ()  # tokens of each sample, shared or not

    @property
    def num_tokens(self) -> int:
        """Positions of the row."""
        return int(self.input_ids.shape[0])

    @property
    def num_sample_tokens(self) -> int:
        """Tokens of the samples, each counted with its whole prefix."""
        return sum(self.sample_lengths)

    @property
    def num_samples(self) -> int:
        return len(self.sample_ids)

    @property
    def num_label_tokens(self) -> int:
        return int(self.targets.shape[0])

    @property
    def num_images(self) -> int:
        return int(self.pixels.shape[0])

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field name."""
        return {f.name: v for f in fields(self) if hasattr(v := getattr(self, f.name), "shape")}

    def map(self, function: Callable[[Tensor], Tensor]) -> PackedBatch:
        """Copy of the batch with every tensor replaced by ``function`` of it."""
        changed: dict[str, Any] = {name: function(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **changed)

    def to(self, device: object, *, non_blocking: bool = False) -> PackedBatch:
        """Copy of the batch with its tensors on ``device``."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))  # type: ignore[call-overload]


@dataclass(frozen=True)
class QuarantineEntry:
    """A bad record that was left out: one line of ``quarantine.jsonl``."""

    source: str
    file: str
    record: int
    id: str | None
    reason: str
    found: Literal["reading", "doctor", "loading"]
    """While the dataset file was read, by ``vlit doctor``, or later, when a step was loaded."""
    step: int | None = None
    """The step that met it first, counted from 1; of those found while loading."""


@dataclass(slots=True)
class StepBatch:
    """What one optimizer step consumes on this rank: its micro-batches and what happened to its records."""

    step: int  # 0-based step of the stage
    micro_batches: list[PackedBatch]
    quarantined: list[QuarantineEntry] = field(default_factory=list)
    dropped_turns: int = 0
    cut_tokens: int = 0
