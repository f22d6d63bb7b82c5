"""One training stage: plan, resume, step, validate, checkpoint, hand over a model folder."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from vlit.config.schema import RunConfig, StageConfig
from vlit.data.load import StepLoader
from vlit.data.mixture import Mixture
from vlit.data.source import RecordSource, open_source
from vlit.data.tokenize import SampleTokenizer
from vlit.errors import TrainingError
from vlit.models.assemble import VisionLanguageModel
from vlit.models.flops import UsefulFlops
from vlit.train.checkpoint import Position, check_identity, newest_state, restore_state, save_state
from vlit.train.distributed import Ranks
from vlit.train.metrics import MetricsFile, Progress, log_line, memory_used
from vlit.train.optimizer import TrainedWeights, learning_rate_factor
from vlit.train.sharing import share_at_most
from vlit.train.step import StepResult, train_step
from vlit.train.validate import Validator
from vlit.types import StepBatch


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved. ``exit_code`` follows the shell's convention (128 + signal)."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; run the same command again to continue")
        self.exit_code = 128 + signum


@dataclass(slots=True)
class StageRun:
    """Everything the loop of one stage works with; built by :func:`prepare`."""

    name: str
    config: StageConfig
    folder: Path
    mixture: Mixture[RecordSource]
    tokenizer: SampleTokenizer
    total_steps: int
    identity: dict[str, Any]


def open_mixture(run: RunConfig, stage: str, *, progress: bool) -> Mixture[RecordSource]:
    """The stage's datasets, opened, validated and mixed."""
    data, folder = run.data_for(stage), Path(run.output_dir) / stage
    sources = [
        open_source(source, data=data, seed=run.seed, quarantine_path=folder / "quarantine.jsonl", progress=progress)
        for source in run.stages[stage].data
    ]
    return Mixture(sources, seed=run.seed, share_at_most=share_at_most(run, stage)[0])


def stage_identity(
    run: RunConfig, stage: str, mixture: Mixture[RecordSource], dtype: torch.dtype, previous: Any
) -> dict[str, Any]:
    """All that decides what the stage's result is: a checkpoint or finished stage of another identity is refused."""
    config = run.stages[stage].model_dump(mode="json")
    for free in ("validation", "checkpoint", "max_non_finite_steps"):
        config.pop(free)
    config["data"] = [{k: s[k] for k in ("weight", "max_records", "format")} for s in config["data"]]
    data = run.data_for(stage).model_dump(mode="json")
    return {
        "model": run.model.model_dump(mode="json"),
        "share_at_most": mixture.share_at_most,
        "data": {k: data[k] for k in ("template", "image_policy", "exact_pixels", "max_tokens", "on_bad_sample")},
        "stage": config,
        "seed": run.seed,
        "precision": str(dtype).removeprefix("torch."),
        "sources": {source.name: source.content_hash for source in mixture.sources},
        "previous": previous,
    }


def train_stage(
    stage: StageRun, model: VisionLanguageModel, run: RunConfig, ranks: Ranks, trackers: list[Any], peak: float
) -> Position:
    """Run the stage's remaining steps and leave the trained weights in ``model``.

    Raises:
        Interrupted: SIGINT, SIGTERM or SIGUSR1 arrived; a checkpoint was written first.
        TrainingError: too many non-finite steps.
    """
    config, data = stage.config, run.data_for(stage.name)
    torch.manual_seed(run.seed)
    weights = TrainedWeights(model, tuning=config.tuning, lr=config.lr, config=config.optimizer)
    position = _resume(stage, weights, run, ranks)
    model.set_gradient_checkpointing(config.gradient_checkpointing)
    model.attention_backend, model.z_loss = run.runtime.attention, config.z_loss
    if run.runtime.compile:
        model.compile_blocks()
    model.train()
    validator = None
    if config.validation.data and ranks.is_main:
        held_out = Mixture([_open_validation(run, s) for s in config.validation.data], seed=run.seed)
        validator = Validator(
            held_out, stage.tokenizer, data, config.validation, micro_batch_tokens=config.micro_batch_tokens
        )
    metrics = MetricsFile(Path(run.output_dir) / "metrics.jsonl")
    validations = MetricsFile(Path(run.output_dir) / "validation.jsonl")
    if ranks.is_main:
        metrics.keep_until(stage.name, position.step)
        validations.keep_until(stage.name, position.step)
    flops = UsefulFlops(model)
    sources = [source.name for source in stage.mixture.sources]
    progress = Progress(stage.name, done=position.step, total=stage.total_steps)
    loader = StepLoader(
        stage.mixture,
        stage.tokenizer,
        data,
        global_batch=config.global_batch,
        micro_batch_tokens=config.micro_batch_tokens,
        rank=ranks.rank,
        world_size=ranks.world_size,
        start_step=position.step,
        total_steps=stage.total_steps,
        quarantine_path=stage.folder / "quarantine.jsonl",
    )
    started, saved_at, state_root = time.perf_counter(), time.monotonic(), stage.folder / "state"
    with _stop_requests() as stop:
        clock = time.perf_counter()
        for batch in loader:
            waited = time.perf_counter() - clock
            factor = learning_rate_factor(batch.step, stage.total_steps, config.schedule)
            result = train_step(
                model,
                weights,
                batch,
                ranks=ranks,
                lr_factor=factor,
                clip=config.clip_grad_norm,
                flops=flops,
                sources=sources,
            )
            seconds = time.perf_counter() - clock
            position = replace(
                position,
                step=batch.step + 1,
                tokens=position.tokens + result.tokens,
                images=position.images + result.images,
                seconds=position.seconds + seconds,
                non_finite_steps=position.non_finite_steps + (not result.finite),
            )
            last = position.step == stage.total_steps
            if ranks.is_main:
                row = _row(stage, result, weights, factor, position, seconds, waited, peak, ranks.world_size, batch)
                metrics.append(row)
                for tracker in trackers:
                    tracker.log(row)
                progress.advance(result.loss)
                if progress.due(last_step=last):
                    done = position.step - (stage.total_steps - len(loader))
                    eta = (time.perf_counter() - started) / max(done, 1) * (stage.total_steps - position.step)
                    memory = memory_used(ranks.device)
                    progress.write(log_line(row, total_steps=stage.total_steps, eta_seconds=eta, memory=memory))
            if not result.finite:
                _report_non_finite(stage, batch, result, position)
            if validator and (last or position.step % config.validation.every_steps == 0):
                held = validator.run(model)
                validations.append({"stage": stage.name, "step": position.step, **held})
                progress.write(
                    f"{stage.name:<9} {position.step:>5}/{stage.total_steps}  validation loss {held['loss']:.3f}"
                )
                for tracker in trackers:
                    tracker.log({"stage": stage.name, "step": position.step, "validation_loss": held["loss"]})
            stop_now = _agreed(stop, ranks)
            minutes = (time.monotonic() - saved_at) / 60
            timed = config.checkpoint.every_minutes is not None and minutes >= config.checkpoint.every_minutes
            if not last and (stop_now or timed or position.step % config.checkpoint.every_steps == 0):
                if ranks.is_main:
                    save_state(state_root, weights, position, stage.identity, keep=config.checkpoint.keep)
                ranks.barrier()
                saved_at = time.monotonic()
            if stop_now and not last:
                progress.close()
                raise Interrupted(stop_now)
            clock = time.perf_counter()
    progress.close()
    weights.copy_to_model()
    return position


def _open_validation(run: RunConfig, source: Any) -> Any:
    return open_source(source, data=run.data, seed=run.seed, quarantine_path=None, progress=False)


def _resume(stage: StageRun, weights: TrainedWeights, run: RunConfig, ranks: Ranks) -> Position:
    found = newest_state(stage.folder / "state")
    if found is None:
        return Position(step=0)
    folder, state = found
    check_identity(state["identity"], stage.identity, where=folder, allow_drift=run.allow_config_drift)
    position = restore_state(folder, state, weights)
    if ranks.is_main:
        print(f"{stage.name}: resuming after step {position.step}/{stage.total_steps} from {folder}", file=sys.stderr)
    return position


def _row(
    stage: StageRun,
    result: StepResult,
    weights: TrainedWeights,
    factor: float,
    position: Position,
    seconds: float,
    waited: float,
    peak: float,
    world_size: int,
    batch: StepBatch,
) -> dict[str, Any]:
    capacity = max(1, len(batch.micro_batches)) * stage.config.micro_batch_tokens
    return {
        "stage": stage.name,
        "step": position.step,
        "loss": result.loss,
        "lr": {part: peak_lr * factor for part, peak_lr in sorted(weights.peak_lr.items())},
        "grad_norm": result.grad_norms["total"],
        "grad_norms": result.grad_norms,
        "loss_by_source": result.loss_by_source,
        "label_tokens": result.label_tokens,
        "tokens": result.tokens,
        "images": result.images,
        "samples": result.samples,
        "shared_tokens_saved": result.sample_tokens - result.tokens,
        "seconds": seconds,
        "data_wait_share": waited / max(seconds, 1e-9),
        "tokens_per_second": result.tokens / max(seconds, 1e-9),
        "peak_fraction": result.flops / max(seconds, 1e-9) / (peak * world_size),
        "fill": sum(row.num_tokens for row in batch.micro_batches) / capacity,
        "dropped_turns": batch.dropped_turns,
        "cut_tokens": batch.cut_tokens,
        "quarantined": len(batch.quarantined),
    }


def _report_non_finite(stage: StageRun, batch: StepBatch, result: StepResult, position: Position) -> None:
    record = {
        "stage": stage.name,
        "step": position.step,
        "loss": repr(result.loss),
        "grad_norms": {part: repr(norm) for part, norm in result.grad_norms.items()},
        "sample_ids": [sample for row in batch.micro_batches for sample in row.sample_ids],
    }
    path = stage.folder / "non_finite.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    limit = stage.config.max_non_finite_steps
    print(f"warning: step {position.step} is not finite and was not applied; see {path}", file=sys.stderr)
    if position.non_finite_steps > limit:
        raise TrainingError(
            f"stage {stage.name}: {position.non_finite_steps} steps had a non-finite loss or gradient, "
            f"max_non_finite_steps is {limit}. {path} names their records and gradient norms by part; lower the "
            "learning rate of the part whose norm exploded, or remove the records."
        )


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Signals that arrived; a second SIGINT interrupts at once. Handlers are put back at the end."""
    received: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        if received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signum)
        print(f"\n{signal.Signals(signum).name}: finishing this step, then saving", file=sys.stderr)

    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    held = {signum: signal.signal(signum, note) for signum in watched}
    try:
        yield received
    finally:
        for signum, handler in held.items():
            signal.signal(signum, handler)


def _agreed(stop: list[int], ranks: Ranks) -> int:
    """The signal any rank received, or 0."""
    flag = torch.tensor([stop[0] if stop else 0], device=ranks.device)
    if ranks.world_size > 1:
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return int(flag)
