"""What a test does to a run from inside, on every rank: stop after a step, spoil one, write down what it saw."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vlit.errors import VlitError
from vlit.train import prepare, saving, stage
from vlit.train.engine import Engine
from vlit.types import StepBatch


class Stopped(VlitError):
    """A test stopped the run."""


@dataclass(frozen=True)
class Hook:
    """Steps are counted from 1."""

    stop_after: int = 0
    """Raise on all ranks when this step is done."""
    ids: str = ""
    """Folder that every rank adds a line a step to: the records it had."""
    spoil: str = ""
    """``gradient``, ``projector`` or ``pixels`` of rank 1 become NaN in the spoilt steps; ``skip``: all ranks discard them."""
    steps: tuple[int, ...] = ()
    """The spoilt steps."""
    other_weights: str = ""
    """``llm`` or ``connector``: rank 1 loads other weights of it, as from an older copy of its folder."""
    no_disk_after: int = 0
    """Rank 1 cannot write anything to the disk from this step on, not even a note."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@contextmanager
def installed(hook: Hook) -> Iterator[None]:
    """Around one run."""
    real, real_share, real_load = stage.train_step, saving.write_share, prepare._load
    real_failure = saving.write_failure

    def step(engine: Engine, batch: StepBatch, **words: Any) -> Any:
        number, rank = batch.step + 1, words["ranks"].rank
        if hook.ids:
            ids = [sample for row in batch.micro_batches for sample in row.sample_ids]
            with (Path(hook.ids) / f"rank-{rank}.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": number, "ids": ids}) + "\n")
        if number == hook.no_disk_after and rank == 1:
            saving.write_share, saving.write_failure = _no_disk, lambda *_: None
        with ExitStack() as undo:
            if number in hook.steps and (hook.spoil == "skip" or rank == 1):
                _SPOILERS[hook.spoil](engine, undo)
            result = real(engine, batch, **words)
        if number == hook.stop_after:
            raise Stopped(f"after step {number}")
        return result

    def load(*words: Any) -> Any:
        tuned = real_load(*words)
        if torch.distributed.get_rank() == 1:
            with torch.no_grad():
                next(getattr(tuned.model, hook.other_weights).parameters()).add_(1e-3)
        return tuned

    stage.train_step = step
    if hook.other_weights:
        prepare._load = load
    try:
        yield
    finally:
        prepare._load = real_load
        stage.train_step, saving.write_share, saving.write_failure = real, real_share, real_failure


def _no_disk(*_: Any) -> None:
    raise OSError(5, "Input/output error")


def _gradient(engine: Engine, undo: ExitStack) -> None:
    parameter = dict(engine.model.connector.named_parameters())["layers.0.weight"]
    undo.callback(parameter.register_hook(lambda gradient: gradient * float("nan")).remove)


def _projector(engine: Engine, undo: ExitStack) -> None:
    """For this step only, so that what follows can be compared."""
    parameter = next(iter(engine.model.connector.parameters()))
    held = parameter.detach().clone()
    parameter.data.fill_(float("nan"))
    undo.callback(parameter.data.copy_, held)


def _projector_for_good(engine: Engine, undo: ExitStack) -> None:
    next(iter(engine.model.connector.parameters())).data.fill_(float("nan"))


def _pixels(engine: Engine, undo: ExitStack) -> None:
    def spoil(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (torch.full_like(inputs[0], float("nan")), *inputs[1:])

    undo.callback(engine.model.encoder.register_forward_pre_hook(spoil).remove)


def _skip(engine: Engine, undo: ExitStack) -> None:
    """What a run does that leaves out this step's update."""
    real = engine.step
    engine.step = lambda *_: engine.discard()
    undo.callback(setattr, engine, "step", real)


_SPOILERS: dict[str, Callable[[Any, ExitStack], None]] = {
    "gradient": _gradient,
    "projector": _projector,
    "projector for good": _projector_for_good,
    "pixels": _pixels,
    "skip": _skip,
}
