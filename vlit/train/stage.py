"""One training stage: plan, resume, step, validate, checkpoint, hand over a model folder."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from vlit.config.schema import RunConfig, StageConfig
from vlit.data.load import StepLoader
from vlit.data.mixture import Mixture
from vlit.data.source import RecordSource
from vlit.data.tokenize import SampleTokenizer
from vlit.errors import TrainingError
from vlit.models.flops import UsefulFlops
from vlit.train.checkpoint import Position, restore_state
from vlit.train.cluster.watchdog import Watchdog
from vlit.train.distributed import Ranks, seed_step
from vlit.train.engine import Engine
from vlit.train.metrics import MetricsFile, Progress, log_line, memory_used
from vlit.train.optimizer import learning_rate_factor
from vlit.train.quarantine import Quarantine
from vlit.train.saving import FAILED, WRITING, StateSaver
from vlit.train.signals import Interrupted
from vlit.train.step import StepResult, train_step
from vlit.train.validate import Validator
from vlit.types import StepBatch


@dataclass(slots=True)
class StageRun:
    """Everything the loop of one stage works with."""

    name: str
    config: StageConfig
    folder: Path
    mixture: Mixture[RecordSource]
    tokenizer: SampleTokenizer
    total_steps: int
    identity: dict[str, Any]
    strategy: str
    held_out: Sequence[RecordSource] = ()
    state: tuple[Path, dict[str, Any]] | None = None
    """The checkpoint to go on from, and its ``state.json``."""


@dataclass(slots=True)
class Tools:
    """What a run brings to each of its stages."""

    ranks: Ranks
    watchdog: Watchdog
    trackers: list[Any]
    stop: list[int]  # the signal that asked to stop, once one has
    peak: float  # matmul FLOP/s of one rank

    def stop_if_asked(self) -> None:
        """Between steps, where nothing has to be saved. Interrupted on every rank when one of them was asked to stop."""
        signum = self.ranks.max([self.stop[0] if self.stop else 0])[0]
        if signum:
            self.ranks.barrier()  # the first rank that ends makes torchrun signal the others
            raise Interrupted(signum)


def train_stage(stage: StageRun, engine: Engine, flops: UsefulFlops, run: RunConfig, tools: Tools) -> Position:
    """Run the stage's remaining steps and leave the trained weights in the engine.

    Raises:
        Interrupted: SIGINT, SIGTERM or SIGUSR1 arrived; what was trained is in a checkpoint.
        TrainingError: too many non-finite steps.
        DataError: more records were left out than ``data.quarantine_budget`` allows.
        CheckpointError: too many failed saves, or a checkpoint of other trainable weights.
    """
    config, data, ranks, watchdog = stage.config, run.data_for(stage.name), tools.ranks, tools.watchdog
    model, out = engine.model, Path(run.output_dir)
    watchdog.phase("resume", step=0, allow_s=WITHOUT_LIMIT)
    position = _resume(stage, engine, ranks)
    model.set_gradient_checkpointing(config.gradient_checkpointing)
    model.attention_backend, model.z_loss = run.runtime.attention, config.z_loss
    if run.runtime.compile:
        model.compile_blocks()
    model.train()
    validator = _validator(stage, run, ranks)
    metrics, validations = MetricsFile(out / "metrics.jsonl"), MetricsFile(out / "validation.jsonl")
    if ranks.is_main:
        metrics.keep_until(stage.name, position.step)
        validations.keep_until(stage.name, position.step)
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
    )
    quarantine = Quarantine(
        stage.folder / "quarantine.jsonl", stage.mixture.sources, data.quarantine_budget, ranks, step=position.step
    )
    saver = StateSaver(stage.folder / "state", stage.identity, config.checkpoint, ranks, stage.strategy)
    tools.stop_if_asked()
    started = saved_at = time.monotonic()
    with saver, loader.naming_lost_workers():
        clock = time.perf_counter()
        patience = max(run.runtime.hang_timeout_s or 0.0, FIRST_STEP_S)
        watchdog.phase("data", step=position.step + 1, allow_s=patience)
        phase = partial(watchdog.phase, allow_s=patience) if run.runtime.compile else watchdog.phase
        for batch in loader:
            waited = time.perf_counter() - clock
            factor = learning_rate_factor(batch.step, stage.total_steps, config.schedule)
            seed_step(run.seed, stage.name, batch.step, ranks.rank)
            result = train_step(
                engine,
                batch,
                ranks=ranks,
                lr_factor=factor,
                clip=config.clip_grad_norm,
                flops=flops,
                sources=sources,
                phase=phase,
            )
            phase = watchdog.phase  # what the first step compiled stays
            if result.quarantined:
                quarantine.add(batch.quarantined)
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
            memory = memory_used(ranks.device)
            if ranks.is_main:
                row = _row(stage, result, engine, factor, position, seconds, waited, tools, batch, memory[0])
                metrics.append(row)
                for tracker in tools.trackers:
                    tracker.log(row)
                progress.advance(result.loss)
                if progress.due(last_step=last):
                    done = position.step - (stage.total_steps - len(loader))
                    eta = (time.monotonic() - started) / max(done, 1) * (stage.total_steps - position.step)
                    progress.write(log_line(row, total_steps=stage.total_steps, eta_seconds=eta, memory=memory))
            if position.step == 1 and ranks.is_main:
                _compare_with_guessing(stage, engine, result)
            if not result.finite:
                _report_non_finite(stage, batch, result, position, ranks)
            if validator and (last or position.step % config.validation.every_steps == 0):
                watchdog.phase("validation", collective=engine.lockstep, allow_s=WITHOUT_LIMIT)
                held = validator.run(engine)
                if ranks.is_main:
                    validations.append({"stage": stage.name, "step": position.step, **held})
                    progress.write(
                        f"{stage.name:<9} {position.step:>5}/{stage.total_steps}  validation loss {held['loss']:.3f}"
                    )
                    for tracker in tools.trackers:
                        tracker.log({"stage": stage.name, "step": position.step, "validation_loss": held["loss"]})
            watchdog.phase("agree", collective=True)
            minutes = (time.monotonic() - saved_at) / 60
            timed = config.checkpoint.every_minutes is not None and minutes >= config.checkpoint.every_minutes
            status = saver.status()
            signum, timed_anywhere, writing, failed = ranks.max(
                [tools.stop[0] if tools.stop else 0, int(timed), int(status == WRITING), int(status == FAILED)]
            )
            saver.settle(writing=bool(writing), failed=bool(failed))
            if not last and (signum or timed_anywhere or position.step % config.checkpoint.every_steps == 0):
                watchdog.phase("save", allow_s=WITHOUT_LIMIT)
                saver.begin(engine, position)
                saved_at = time.monotonic()
            if signum and not last:
                saver.finish()
                progress.close()
                ranks.barrier()  # the first rank that ends makes torchrun signal the others
                raise Interrupted(signum)
            clock = time.perf_counter()
            watchdog.phase("data", step=position.step + 1)
    watchdog.phase("save", allow_s=WITHOUT_LIMIT)
    saver.finish()
    progress.close()
    return replace(position, updates=engine.updates)


WITHOUT_LIMIT = float("inf")
"""For phases whose length depends on disks and models; the other ranks wait as long."""
FIRST_STEP_S = 3600.0
"""The first batch starts the data workers and, with ``runtime.compile``, the first step compiles."""


def _validator(stage: StageRun, run: RunConfig, ranks: Ranks) -> Validator | None:
    if not stage.held_out:
        return None
    return Validator(
        Mixture(stage.held_out, seed=run.seed),
        stage.tokenizer,
        run.data_for(stage.name),
        stage.config.validation,
        micro_batch_tokens=stage.config.micro_batch_tokens,
        ranks=ranks,
    )


def _resume(stage: StageRun, engine: Engine, ranks: Ranks) -> Position:
    if stage.state is None:
        return Position(step=0)
    folder, state = stage.state
    position = restore_state(folder, state, engine)
    if ranks.is_main:
        before = f", written by {state['world_size']} ranks" if state["world_size"] != ranks.world_size else ""
        print(
            f"{stage.name}: resuming after step {position.step}/{stage.total_steps} from {folder}{before}",
            file=sys.stderr,
        )
    return position


def _row(
    stage: StageRun,
    result: StepResult,
    engine: Engine,
    factor: float,
    position: Position,
    seconds: float,
    waited: float,
    tools: Tools,
    batch: StepBatch,
    memory: float,
) -> dict[str, Any]:
    room = stage.config.micro_batch_tokens
    capacity = (
        sum(max(room, row.num_tokens) for row in batch.micro_batches) or room
    )  # a longer record has a row of its own
    return {
        "stage": stage.name,
        "step": position.step,
        "loss": result.loss,
        "lr": {part: peak_lr * factor for part, peak_lr in sorted(engine.peak_lr.items())},
        "grad_norm": result.grad_norms["total"],
        "grad_norms": result.grad_norms,
        "loss_by_source": result.loss_by_source,
        "label_tokens": result.label_tokens,
        "tokens": result.tokens,
        "images": result.images,
        "samples": result.samples,
        "shared_tokens_saved": result.sample_tokens - result.tokens,
        "seconds": seconds,
        "rank_balance": result.rank_balance,
        "data_wait_share": waited / max(seconds, 1e-9),
        "tokens_per_second": result.tokens / max(seconds, 1e-9),
        "peak_fraction": result.flops / max(seconds, 1e-9) / (tools.peak * tools.ranks.world_size),
        "memory_gib": memory,
        "fill": sum(row.num_tokens for row in batch.micro_batches) / capacity,
        "dropped_turns": batch.dropped_turns,
        "cut_tokens": batch.cut_tokens,
        "quarantined": result.quarantined,
    }


def _compare_with_guessing(stage: StageRun, engine: Engine, result: StepResult) -> None:
    """A first loss as bad as guessing among all tokens means parts that do not belong together (pains A-14): say so at once."""
    guessing = math.log(engine.model.llm.vocabulary)
    if result.finite and result.label_tokens and result.loss > 0.9 * guessing:
        print(
            f"warning: {stage.name}: the first loss is {result.loss:.2f}, guessing among {engine.model.llm.vocabulary:,} "
            f"tokens gives {guessing:.2f}. A trained language model on its own template starts far below: check "
            "model.llm.path, the template, and that model.init_from belongs to this language model.",
            file=sys.stderr,
        )


def _report_non_finite(stage: StageRun, batch: StepBatch, result: StepResult, position: Position, ranks: Ranks) -> None:
    """Every rank adds the records it had; all of them raise alike, since loss and norms are those of all ranks."""
    record = {
        "rank": ranks.rank,
        "stage": stage.name,
        "step": position.step,
        "loss": repr(result.loss),
        "grad_norms": {part: repr(norm) for part, norm in result.grad_norms.items()},
        "sample_ids": [sample for row in batch.micro_batches for sample in row.sample_ids],
    }
    path = stage.folder / "non_finite.jsonl"
    MetricsFile(path).append(record)
    limit = stage.config.max_non_finite_steps
    if ranks.is_main:
        print(f"warning: step {position.step} is not finite and was not applied; see {path}", file=sys.stderr)
    if position.non_finite_steps > limit:
        raise TrainingError(
            f"stage {stage.name}: {position.non_finite_steps} steps had a non-finite loss or gradient, "
            f"max_non_finite_steps is {limit}. {path} names their records and gradient norms by part; lower the "
            "learning rate of the part whose norm exploded, or remove the records."
        )
