"""A training run, as a table of contents: every stage in order, finished ones skipped, interrupted ones resumed."""

from __future__ import annotations

import hashlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from vlit import __version__
from vlit.config.schema import RunConfig, StageConfig
from vlit.data.tokenize import SampleTokenizer
from vlit.data.vocabulary import fingerprint_of
from vlit.durable import (
    describe_os_error,
    free_bytes,
    plain,
    read_sealed,
    recover_folder,
    replace_file,
    sealed,
)
from vlit.errors import CheckpointError, DataError, TrainingError
from vlit.models.artifact import read_manifest, save_model
from vlit.models.assemble import model_spec
from vlit.models.flops import matmul_peak
from vlit.models.rope import check_lengths
from vlit.train.announce import look_at_data, print_parts, write_config, write_down
from vlit.train.checkpoint import Position, check_identity, state_of_stage
from vlit.train.cluster.lock import OutputLock
from vlit.train.cluster.needs import left_by_earlier_start, room_of
from vlit.train.cluster.preflight import preflight
from vlit.train.cluster.watchdog import Watchdog
from vlit.train.distributed import Ranks, compute_dtype, effective_strategy, start_ranks
from vlit.train.engine import Engine
from vlit.train.identity import data_identities, open_data, stage_identity, together
from vlit.train.metrics import format_seconds
from vlit.train.prepare import Tuned, make_engine, model_of_stage
from vlit.train.signals import stop_requests
from vlit.train.stage import WITHOUT_LIMIT, StageRun, Tools, train_stage


def run_training(run: RunConfig, *, only: str | None = None) -> Path:
    """Train all stages (or stage ``only``) and return the last model folder.

    Raises:
        TrainingError, CheckpointError, DataError, ModelError: before any training, when something does not fit.
        Interrupted: a signal asked to stop, in a step or before the first one of a stage.
    """
    ranks = start_ranks(run.runtime)
    out = Path(run.output_dir)
    if only is not None and only not in run.stages:
        raise TrainingError(f"--stage {only}: this configuration has no such stage. Known: {', '.join(run.stages)}.")
    _refuse_used(out, run, ranks)
    with (
        stop_requests() as stop,
        OutputLock(out, ranks),
        Watchdog(ranks, run.runtime.hang_timeout_s, output_dir=out) as watchdog,
    ):
        watchdog.phase("start", allow_s=WITHOUT_LIMIT)
        return _run_stages(run, Tools(ranks, watchdog, _start_trackers(run, out, ranks), stop, 0.0), only)


def _run_stages(run: RunConfig, tools: Tools, only: str | None) -> Path:
    out, ranks, watchdog = Path(run.output_dir), tools.ranks, tools.watchdog
    dtype = compute_dtype(run.runtime, ranks.device)
    strategy = effective_strategy(run.runtime, ranks.world_size)
    if strategy != run.runtime.strategy and run.runtime.strategy.startswith("zero"):
        _say(
            ranks,
            f"runtime.strategy {run.runtime.strategy}: one process has nobody to share with, so it runs without ZeRO",
        )
    spec = model_spec(run.model)  # a missing or misfit part ends the run here, before data is read
    check_lengths(run.model.llm, _longest_samples(run))
    watchdog.phase("open data", step=0, allow_s=WITHOUT_LIMIT)
    opened, problems = open_data(run, only=only, progress=ranks.is_main, listing=ranks.is_main)
    if ranks.world_size == 1 or not run.runtime.preflight:  # preflight would say the same with the name of the rank
        problems = list(dict.fromkeys(problem for held in ranks.gather(problems) for problem in held))
        if problems:
            raise DataError(together(problems))
    if run.runtime.preflight:
        watchdog.phase("preflight", allow_s=WITHOUT_LIMIT)
        preflight(run, ranks, identities=data_identities(opened), problems=problems, only=only)
    tools.stop_if_asked()
    identity: Any = None
    folder: Path | None = None
    for name in run.stages:
        watchdog.phase("look at data", step=0, allow_s=WITHOUT_LIMIT)
        mixture, data, config = opened[name].mixture, run.data_for(name), run.stages[name]
        tokenizer = SampleTokenizer(spec, data)
        fingerprint = fingerprint_of(tokenizer.tokenizer)
        identity = stage_identity(run, name, mixture, fingerprint, dtype, _digest(identity))
        previous, folder = folder, out / name
        done = folder / "done.json"
        if done.is_file():
            held = _read_done(done)
            check_identity(held["identity"], identity, where=done, allow_drift=run.allow_config_drift)
            _say(
                ranks, f"{name}: already finished ({held['steps']} steps, {format_seconds(held['seconds'])}); skipping"
            )
            if name == only:
                break
            continue
        if only is not None and name != only:
            raise TrainingError(
                f"--stage {only}: its predecessor {name} is not finished in {out}. Run without --stage to train it first."
            )
        total = mixture.total_steps(config.epochs, global_batch=config.global_batch, max_steps=config.max_steps)
        state = state_of_stage(folder / "state", identity, ranks, allow_drift=run.allow_config_drift)
        plan = look_at_data(name, mixture, tokenizer, run, total, ranks)
        watchdog.phase("load weights", allow_s=WITHOUT_LIMIT)
        tuned = model_of_stage(run, name, previous / "model" if previous else None, dtype, strategy, ranks)
        tools.stop_if_asked()
        print_parts(tuned, name, ranks)
        base = {"base": tuned.unchanged}  # one that changed on the disk must not go on from a checkpoint
        if state is not None:
            held = {"base": state[1]["identity"].get("base")}
            check_identity(held, base, where=state[0], allow_drift=run.allow_config_drift)
        ranks.on_main(partial(_check_room, folder, tuned, config))
        ranks.on_main(partial(write_down, run, name, plan, tuned))
        tools.peak = tools.peak or matmul_peak(ranks.device, dtype)
        engine = make_engine(tuned, run, name, dtype, strategy, ranks)
        stage = StageRun(
            name, config, folder, mixture, tokenizer, total, identity | base, strategy, opened[name].held_out, state
        )
        position = train_stage(stage, engine, tuned.flops, run, tools)
        watchdog.phase("write model", allow_s=WITHOUT_LIMIT)
        weights = engine.whole_weights()
        _finish(tuned, engine, weights, stage, identity, position, run, ranks)
        engine.close()
        del engine, tuned, weights
        if name == only:
            break
        if name != list(run.stages)[-1]:
            tools.stop_if_asked()
    else:
        ranks.on_main(partial(write_config, run))  # also where every stage was finished before
    for tracker in tools.trackers:
        tracker.finish()
    assert folder is not None
    return folder / "model"


def _longest_samples(run: RunConfig) -> dict[str, int]:
    """Configuration key -> ``max_tokens``, of all stages."""
    own = {name for name, stage in run.stages.items() if stage.max_tokens is not None}
    return {f"stages.{n}.max_tokens" if n in own else "data.max_tokens": run.data_for(n).max_tokens for n in run.stages}


def _read_done(path: Path) -> dict[str, Any]:
    try:
        return read_sealed(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: damaged ({error}). Delete it: the stage then makes its model again from its newest checkpoint."
        ) from error


def _refuse_used(out: Path, run: RunConfig, ranks: Ranks) -> None:
    """Refuse a used output folder under ``resume: never`` (one that only holds a lock or a doctor's report is not used)."""
    used = (
        run.resume == "never" and out.is_dir() and any((out / name).exists() for name in ("config.yaml", *run.stages))
    )
    if ranks.max([int(used)])[0]:
        raise CheckpointError(f"{out} holds a run and resume is never. Use another output_dir or resume: auto.")


def _check_room(folder: Path, tuned: Tuned, config: StageConfig) -> None:
    """CheckpointError when the disk cannot hold the stage's checkpoints (one more than are kept) and its model.

    What an earlier start of the stage left counts as room: its checkpoints are among those that are kept.
    """
    room = room_of(folder.name, config, tuned.rows, tuned.changed)
    problem = room.problem(folder, free_bytes(folder) + left_by_earlier_start(folder))
    if problem is not None:
        raise CheckpointError(problem)


def _finish(
    tuned: Tuned,
    engine: Engine,
    weights: dict[str, torch.Tensor],
    stage: StageRun,
    identity: dict[str, Any],
    position: Position,
    run: RunConfig,
    ranks: Ranks,
) -> None:
    """Write the model folder, then the mark that the stage is done (in this order, so a mark implies a model)."""
    data = run.data_for(stage.name).model_dump(mode="json")
    info = {
        "run": run.name,
        "stage": stage.name,
        "steps": position.step,
        "tokens": position.tokens,
        "images": position.images,
        "vlit": __version__,
        "torch": torch.__version__,
    }
    rules = {key: data[key] for key in ("template", "image_policy", "exact_pixels", "max_tokens")}
    done = {"identity": plain(identity), "steps": position.step, "seconds": position.seconds, **info}

    def write() -> None:
        try:
            recover_folder(stage.folder / "model")
            save_model(
                engine.model,
                stage.folder / "model",
                weights=weights,
                unchanged=tuned.unchanged,
                changed=tuned.changed,
                lora=tuned.lora,
                data_rules=rules,
                tokenizer=stage.tokenizer.tokenizer,
                info=info,
            )
            replace_file(stage.folder / "done.json", sealed(done))
        except OSError as error:
            raise CheckpointError(
                f"the model of stage {stage.name} was not written: {describe_os_error(error, stage.folder)}. Its checkpoints "
                "are intact: free some space (or fix the folder) and run the same command again."
            ) from error

    ranks.on_main(write)


def _start_trackers(run: RunConfig, out: Path, ranks: Ranks) -> list[Any]:
    if not ranks.is_main:
        return []
    trackers = [tracker.build() for tracker in run.trackers]
    for tracker in trackers:
        tracker.start(out, run.model_dump(mode="json"))
    return trackers


def _digest(identity: Any) -> str | None:
    return None if identity is None else hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _say(ranks: Ranks, line: str) -> None:
    if ranks.is_main:
        print(line, file=sys.stderr)


def model_folder(path: Path) -> Path:
    """The model folder meant by ``path``: itself, ``<stage>/model``, or the last finished stage of a run folder.

    Raises:
        CheckpointError: nothing there is a trained model.
    """
    for candidate in (path, path / "model"):
        if (candidate / "manifest.json").is_file():
            return candidate
    if (path / "config.yaml").is_file():
        stages = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")).get("stages", {})
        for stage in reversed(list(stages)):
            if (path / stage / "model" / "manifest.json").is_file():
                return path / stage / "model"
    read_manifest(path)  # raises with the explanation
    return path
