"""What training asks of whatever holds the weights: one process, many that each hold all, or many that share them.

The step is the same for all of them: ``loss`` and ``backward`` for every row, then ``norms`` (gradients are now those of the
global batch), then ``step`` or ``discard``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from vlit.kernels.cross_entropy import CrossEntropy
from vlit.models.assemble import VisionLanguageModel
from vlit.train.fragments import Fragment, FragmentReader
from vlit.types import PackedBatch


class Engine(Protocol):
    """Holds the model's weights, their fp32 masters and the optimizer."""

    model: VisionLanguageModel
    peak_lr: dict[str, float]
    """Peak learning rate of every trained part."""
    updates: int
    """Optimizer steps applied so far (a discarded step is none)."""
    lockstep: bool
    """Every rank must run every row, because weights are gathered while a row is computed."""

    def loss(self, row: PackedBatch) -> CrossEntropy:
        """Cross-entropy of one row, with a graph when gradients are enabled."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of ``loss`` (this rank's share of the global loss); ``last`` is true on the step's last row."""
        ...

    def norms(self) -> dict[str, Tensor]:
        """Sum the gradients over ranks and give their 2-norm by part and in ``total``."""
        ...

    def step(self, lr_factor: float, clip: float | None, norm: Tensor) -> None:
        """Clip to ``clip`` given the total norm, apply one optimizer step, drop the gradients."""
        ...

    def discard(self) -> None:
        """Drop the gradients of this step."""
        ...

    def fragments(self) -> Iterator[Fragment]:
        """This rank's share of masters and optimizer states; every value is some rank's."""
        ...

    def restore(self, reader: FragmentReader, updates: int) -> None:
        """Take masters and optimizer states from a checkpoint, bit for bit, whoever wrote it."""
        ...

    def whole_weights(self) -> dict[str, Tensor]:
        """Every weight of the model by its ``state_dict`` name, in host memory on rank 0 (others may get an empty dict)."""
        ...

    def close(self) -> None:
        """Give back what the engine holds besides the model."""
        ...
