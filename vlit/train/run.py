"""A training run, as a table of contents: every stage in order, finished ones skipped, interrupted ones resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from vlit import __version__
from vlit.config.schema import PartTuning, RunConfig
from vlit.data.check import check_supervision
from vlit.data.tokenize import SampleTokenizer
from vlit.errors import CheckpointError, TrainingError
from vlit.models.artifact import check_same_parts, load_model, model_config, read_manifest, save_model
from vlit.models.assemble import VisionLanguageModel, build_model, model_spec
from vlit.models.flops import matmul_peak
from vlit.models.interop import initialise
from vlit.models.tuning import apply_tuning, has_lora, merge_lora, rows_as_dicts, table_of_parts
from vlit.train.checkpoint import Position, check_identity
from vlit.train.distributed import Ranks, compute_dtype, start_ranks
from vlit.train.metrics import format_seconds
from vlit.train.sharing import share_at_most
from vlit.train.stage import StageRun, open_mixture, stage_identity, train_stage


@dataclasses.dataclass(slots=True)
class Tuned:
    """A model and what has been done to it since its base weights were loaded."""

    model: VisionLanguageModel
    changed: set[str]
    lora: dict[str, PartTuning]


def run_training(run: RunConfig, *, only: str | None = None) -> Path:
    """Train all stages (or stage ``only``) and return the last model folder.

    Raises:
        TrainingError, CheckpointError, DataError, ModelError: before any training, when something does not fit.
    """
    ranks = start_ranks(run.runtime)
    out = Path(run.output_dir)
    _claim(out, run, ranks)
    dtype = compute_dtype(run.runtime, ranks.device)
    stages = list(run.stages)
    if only is not None and only not in stages:
        raise TrainingError(f"--stage {only}: this configuration has no such stage. Known: {', '.join(stages)}.")
    spec = model_spec(run.model)  # a missing or misfit part ends the run here, before data is read
    peak, trackers = 0.0, _start_trackers(run, out, ranks)
    identity: Any = None
    folder: Path | None = None
    for name in stages:
        mixture = open_mixture(run, name, progress=ranks.is_main)
        identity = stage_identity(run, name, mixture, dtype, _digest(identity))
        previous, folder = folder, out / name
        done = folder / "done.json"
        if done.is_file():
            held = json.loads(done.read_text(encoding="utf-8"))
            check_identity(held["identity"], identity, where=done, allow_drift=run.allow_config_drift)
            _say(
                ranks, f"{name}: already finished ({held['steps']} steps, {format_seconds(held['seconds'])}); skipping"
            )
            continue
        if only is not None and name != only:
            raise TrainingError(
                f"--stage {only}: its predecessor {name} is not finished in {out}. Run without --stage to train it first."
            )
        data, config = run.data_for(name), run.stages[name]
        tokenizer = SampleTokenizer(spec, data)
        total = mixture.total_steps(config.epochs, global_batch=config.global_batch, max_steps=config.max_steps)
        _write_plan(out, name, mixture, tokenizer, run, total, ranks)
        tuned = _load(run, previous / "model" if previous else None, dtype, ranks)
        _prepare_parts(tuned, name, run)
        _print_parts(tuned, name, run, out, ranks)
        peak = peak or matmul_peak(ranks.device, dtype)
        stage = StageRun(name, config, folder, mixture, tokenizer, total, identity)
        position = train_stage(stage, tuned.model, run, ranks, trackers, peak)
        if ranks.is_main:
            _finish(tuned, stage, position, run)
        ranks.barrier()
        if name == only:
            break
    for tracker in trackers:
        tracker.finish()
    assert folder is not None
    return folder / "model"


def _claim(out: Path, run: RunConfig, ranks: Ranks) -> None:
    """Take the output folder: refuse a used one under ``resume: never``, save the resolved configuration."""
    if run.resume == "never" and out.is_dir() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty and resume is never. Use another output_dir or resume: auto.")
    if ranks.is_main:
        out.mkdir(parents=True, exist_ok=True)
        aside = out / ".config.yaml.writing"
        aside.write_text(yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
        os.replace(aside, out / "config.yaml")


def _load(run: RunConfig, previous: Path | None, dtype: torch.dtype, ranks: Ranks) -> Tuned:
    """The predecessor's model, or the base parts (optionally initialised from other weights)."""
    started = time.perf_counter()
    if previous is not None:
        model, manifest = load_model(previous, dtype=dtype, seed=run.seed)
        lora = {part: PartTuning.model_validate(raw) for part, raw in manifest["lora"].items()}
        tuned = Tuned(model, set(manifest["changed"]), lora)
    elif run.model.init_from is not None and (Path(run.model.init_from) / "manifest.json").is_file():
        source = Path(run.model.init_from)
        check_same_parts(run.model, model_config(source, read_manifest(source)), source=source)
        model, manifest = load_model(source, dtype=dtype, seed=run.seed)
        lora = {part: PartTuning.model_validate(raw) for part, raw in manifest["lora"].items()}
        tuned = Tuned(model, set(manifest["changed"]), lora)
    else:
        model = build_model(run.model, dtype=dtype, seed=run.seed)
        tuned = Tuned(model, set(), {})
        if run.model.init_from is not None:
            tuned.changed |= initialise(model, run.model.init_from)
    tuned.model.to(ranks.device)
    _say(ranks, f"model loaded in {time.perf_counter() - started:.1f}s")
    return tuned


def _prepare_parts(tuned: Tuned, name: str, run: RunConfig) -> None:
    """Apply the stage's tuning and note what it will change. Adapters are merged when their part is now trained whole."""
    tuning = run.stages[name].tuning
    for part in list(tuned.lora):
        wanted = tuning.of(part)
        if wanted.mode == "full" or (wanted.mode == "lora" and wanted != tuned.lora[part]):
            merge_lora(tuned.model)
            tuned.changed |= set(tuned.lora)
            tuned.lora = {}
            break
    apply_tuning(tuned.model, tuning, seed=run.seed)
    for part in ("vision", "connector", "fusion", "llm", "embeddings"):
        mode = tuning.of(part).mode
        if mode == "full":
            tuned.changed.add(part)
        elif mode == "lora":
            tuned.lora[part] = tuning.of(part)
    for part, module in {"vision": tuned.model.encoder, "llm": tuned.model.llm.hf}.items():
        assert (part in tuned.lora) == has_lora(module)


def _finish(tuned: Tuned, stage: StageRun, position: Position, run: RunConfig) -> None:
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
    save_model(
        tuned.model,
        stage.folder / "model",
        changed=tuned.changed,
        lora=tuned.lora,
        data_rules=rules,
        tokenizer=stage.tokenizer.tokenizer,
        info=info,
    )
    done = {"identity": stage.identity, "steps": position.step, "seconds": position.seconds, **info}
    aside = stage.folder / ".done.json.writing"
    aside.write_text(json.dumps(done, indent=2), encoding="utf-8")
    os.replace(aside, stage.folder / "done.json")


def _write_plan(
    out: Path, name: str, mixture: Any, tokenizer: SampleTokenizer, run: RunConfig, total: int, ranks: Ranks
) -> None:
    """Look at samples before compute is spent; print and save what the stage will see."""
    stage = run.stages[name]
    report = check_supervision(
        mixture, tokenizer, run.data_for(name), run.data.check_samples, global_batch=stage.global_batch,
        max_tokens=stage.micro_batch_tokens,
    )  # fmt: skip
    if not ranks.is_main:
        return
    plan = {
        "sources": [
            {"name": s.name, "records": len(s), "weight": s.weight, "quarantined": s.num_quarantined}
            for s in mixture.sources
        ],
        "records_per_epoch": mixture.records_per_epoch,
        "global_batch": stage.global_batch,
        "steps": total,
        **report.as_dict(),
    }
    _merge_json(out / "data_plan.json", name, plan)
    sources = ", ".join(f"{s.name} {len(s):,}" for s in mixture.sources)
    print(
        f"{name}: {sources} records; {total:,} steps of {stage.global_batch}; "
        f"tokens a sample mean {report.tokens_mean:.0f}, p99 {report.tokens_p99:.0f}, "
        f"{100 * report.supervised_share:.0f}% supervised",
        file=sys.stderr,
    )
    against = share_at_most(run, name)[1]
    if against:
        print(f"{name}: {against}", file=sys.stderr)
    elif report.records_per_image > 1:
        print(
            f"{name}: {report.records_per_image:.1f} records share an image; computing it once saves "
            f"{100 * report.shared_share:.0f}% of the tokens and {100 * report.shared_images:.0f}% of the image encodings",
            file=sys.stderr,
        )


def _print_parts(tuned: Tuned, name: str, run: RunConfig, out: Path, ranks: Ranks) -> None:
    from rich.console import Console
    from rich.table import Table

    rows = table_of_parts(tuned.model, run.stages[name].tuning, run.stages[name].lr)
    if not ranks.is_main:
        return
    _merge_json(out / "parts.json", name, rows_as_dicts(rows))
    table = Table(title=f"stage {name}", title_justify="left")
    for column in ("part", "module", "mode", "parameters", "trained", "peak lr", "dtype"):
        table.add_column(column, justify="right" if column in ("parameters", "trained", "peak lr") else "left")
    for row in rows:
        lr = f"{row.lr:.1e}" if row.lr else "-"
        table.add_row(row.part, row.module, row.mode, f"{row.parameters:,}", f"{row.trainable:,}", lr, row.dtype)
    Console(stderr=True, width=None if sys.stderr.isatty() else 110).print(table)


def _merge_json(path: Path, key: str, value: Any) -> None:
    held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    held[key] = value
    aside = path.with_suffix(".writing")
    aside.write_text(json.dumps(held, indent=2), encoding="utf-8")
    os.replace(aside, path)


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
