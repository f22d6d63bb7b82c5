"""The model of a stage and the engine that trains it: load, tune, describe, and spread over the ranks where asked."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vlit.config.schema import PartTuning, RunConfig
from vlit.errors import TrainingError
from vlit.models.artifact import check_same_parts, fingerprints, load_model, model_config, read_manifest
from vlit.models.assemble import VisionLanguageModel, build_model
from vlit.models.decoder_check import check_decoder
from vlit.models.flops import UsefulFlops
from vlit.models.interop import initialise
from vlit.models.trusted import asks_for_remote_code
from vlit.models.tuning import PartRow, apply_tuning, has_lora, merge_lora, table_of_parts
from vlit.train.distributed import Ranks
from vlit.train.engine import Engine
from vlit.train.replicated import ReplicatedEngine
from vlit.types import PARTS


@dataclass(slots=True)
class Tuned:
    """A model, what has been done to it since its base weights were loaded, and what was measured on its whole weights."""

    model: VisionLanguageModel
    changed: set[str]
    lora: dict[str, PartTuning]
    unchanged: dict[str, str] = field(default_factory=dict)  # fingerprint of every part as loaded, before training
    rows: list[PartRow] = field(default_factory=list)
    flops: UsefulFlops = None  # type: ignore[assignment]  # filled by model_of_stage


def model_of_stage(
    run: RunConfig, name: str, previous: Path | None, dtype: torch.dtype, strategy: str, ranks: Ranks
) -> Tuned:
    """The stage's model, tuned as it asks, on this rank's device: whole, or under ``zero3`` this rank's share of it.

    Under ``zero3`` rank 0 reads the weights into host memory and hands them out module by module; the others never hold
    more than one module, but for quantised weights, which stay whole. Otherwise every rank reads for itself.
    """
    started = time.perf_counter()

    def load() -> Tuned:
        tuned = _load(run, previous, dtype)
        if strategy == "zero3":
            check_decoder(tuned.model.llm)  # while the weights are whole
        _prepare_parts(tuned, name, run)
        tuned.unchanged = fingerprints(tuned.model)
        tuned.rows = table_of_parts(tuned.model, run.stages[name].tuning, run.stages[name].lr)
        tuned.flops = UsefulFlops(tuned.model)
        return tuned

    if strategy == "zero3":
        from vlit.train.zero.config import deepspeed_config
        from vlit.train.zero.engine import import_deepspeed
        from vlit.train.zero.shards import PackedWeights, shard, share_structure

        import_deepspeed().init_distributed(dist_backend=None, auto_mpi_discovery=False, verbose=False)
        loaded = ranks.on_main(load)
        packed = PackedWeights(loaded.model if loaded is not None else None)
        tuned = share_structure(loaded, ranks)
        packed.spread(tuned.model, ranks)
        shard(tuned.model, ranks, deepspeed_config(run.runtime, dtype, on_cpu=ranks.device.type == "cpu"))
    else:
        tuned = load()
        _same_on_all(tuned.unchanged, ranks)
    tuned.model.to(ranks.device)
    if strategy != "zero3":
        ranks.on_main(lambda: check_decoder(tuned.model.llm))
    if ranks.is_main:
        print(f"model loaded in {time.perf_counter() - started:.1f}s", file=sys.stderr)
    return tuned


def _same_on_all(fingerprints: dict[str, str], ranks: Ranks) -> None:
    """TrainingError on every rank when one of them read other weights than rank 0, as from an older copy of a model."""
    first, *others = ranks.gather(fingerprints)
    for part, expected in first.items():
        wrong = [rank for rank, held in enumerate(others, start=1) if held.get(part) != expected]
        if wrong:
            raise TrainingError(
                f"{part}: rank {', '.join(map(str, wrong))} read other weights than rank 0 (fingerprints "
                f"{others[wrong[0] - 1].get(part, 'none')[:12]} and {expected[:12]}). Give all machines the same model files."
            )


def make_engine(tuned: Tuned, run: RunConfig, name: str, dtype: torch.dtype, strategy: str, ranks: Ranks) -> Engine:
    """Masters and optimizer of a stage, by the strategy in force."""
    stage = run.stages[name]
    if strategy.startswith("zero"):
        from vlit.train.zero.engine import ZeroEngine

        return ZeroEngine(
            tuned.model, tuning=stage.tuning, lr=stage.lr, config=stage.optimizer, runtime=run.runtime, dtype=dtype,
            ranks=ranks,
        )  # fmt: skip
    return ReplicatedEngine(tuned.model, tuning=stage.tuning, lr=stage.lr, config=stage.optimizer, ranks=ranks)


def _load(run: RunConfig, previous: Path | None, dtype: torch.dtype) -> Tuned:
    """The predecessor's model, or the base parts (optionally initialised from other weights)."""
    source = previous
    if source is None and run.model.init_from is not None and (Path(run.model.init_from) / "manifest.json").is_file():
        source = Path(run.model.init_from)
        check_same_parts(run.model, model_config(source, read_manifest(source)), source=source)
    if source is not None:
        model, manifest = load_model(
            source, dtype=dtype, seed=run.seed, trust_remote_code=asks_for_remote_code(run.model)
        )
        lora = {part: PartTuning.model_validate(raw) for part, raw in manifest["lora"].items()}
        return Tuned(model, set(manifest["changed"]), lora)
    model = build_model(run.model, dtype=dtype, seed=run.seed)
    tuned = Tuned(model, set(), {})
    if run.model.init_from is not None:
        tuned.changed |= initialise(model, run.model.init_from)
    return tuned


def _prepare_parts(tuned: Tuned, name: str, run: RunConfig) -> None:
    """Apply the stage's tuning and note what it will change. Adapters are merged when their part is now trained whole."""
    tuning = run.stages[name].tuning
    for part in list(tuned.lora):
        wanted = tuning.of(part)
        if wanted.mode == "full" or (wanted.mode == "lora" and wanted.adapter != tuned.lora[part].adapter):
            merge_lora(tuned.model)
            tuned.changed |= set(tuned.lora)
            tuned.lora = {}
            break
    apply_tuning(tuned.model, tuning, seed=run.seed)
    for part in PARTS:
        mode = tuning.of(part).mode
        if mode == "full":
            tuned.changed.add(part)
        elif mode == "lora":
            tuned.lora[part] = tuning.of(part)
    for part, module in {"vision": tuned.model.encoder, "llm": tuned.model.llm.hf}.items():
        assert (part in tuned.lora) == has_lora(module)
