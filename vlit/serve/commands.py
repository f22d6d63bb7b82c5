"""What the commands do: read a configuration or checkpoint, call the floor below, print where the result lies."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlit.config.load import load_config
from vlit.errors import CheckpointError, ConfigError, DataError


def train(config_path: str, overrides: Sequence[str], *, stage: str | None = None) -> None:
    """Build the world if the configuration names one, train, write the report."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    run = load_config(config_path, overrides)
    from vlit.train.distributed import start_ranks
    from vlit.train.run import run_training

    ranks = start_ranks(run.runtime)
    _build_world(run, ranks)
    model = run_training(run, only=stage)
    if ranks.is_main:
        from vlit.serve.report import write_report

        print(f"model   {model}", file=sys.stderr)
        print(f"report  {write_report(Path(run.output_dir))}", file=sys.stderr)


def _build_world(run: Any, ranks: Any = None) -> None:
    if run.world is not None:
        if ranks is None or ranks.is_main:
            run.world.build()
        if ranks is not None:
            ranks.barrier()


def open_checkpoint(
    checkpoint: Path, *, template: str | None = None, trust_remote_code: bool = False
) -> tuple[Path, dict[str, Any]]:
    """The model folder meant by ``checkpoint`` and its manifest; no weights are read.

    ``template`` (a registered name or a YAML mapping) replaces the template of the model's last stage: a model that was only
    aligned was trained with `plain`, which has no question in it.

    Raises:
        CheckpointError: no trained model there, or the run's own config.yaml names a folder elsewhere.
        ModelError: it runs code that comes with a base model, and ``trust_remote_code`` is not given.
    """
    import yaml

    from vlit.models.artifact import read_manifest
    from vlit.models.trusted import refuse_remote_code
    from vlit.train.run import model_folder

    folder = model_folder(checkpoint)
    if not folder.is_relative_to(checkpoint) or ".." in folder.relative_to(checkpoint).parts:
        raise CheckpointError(
            f"{checkpoint}/config.yaml: a stage leads to {folder}, outside of the run. Restore the file."
        )
    manifest = read_manifest(folder)
    refuse_remote_code(manifest["model"], folder=folder, trusted=trust_remote_code)
    if template is not None:
        manifest["data"] = manifest["data"] | {"template": yaml.safe_load(template)}
    return folder, manifest


def load_answerer(
    checkpoint: Path, *, max_new_tokens: int, template: str | None = None, trust_remote_code: bool = False
) -> tuple[Any, dict[str, Any]]:
    """An :class:`~vlit.answer.Answerer` on this machine's best device, and the model's manifest."""
    from vlit.answer import Answerer
    from vlit.config.schema import RuntimeConfig
    from vlit.models.artifact import data_rules, load_model
    from vlit.train.distributed import compute_dtype, start_ranks

    runtime = RuntimeConfig()
    ranks = start_ranks(runtime)
    folder, manifest = open_checkpoint(checkpoint, template=template, trust_remote_code=trust_remote_code)
    dtype = compute_dtype(runtime, ranks.device)
    model, _ = load_model(folder, dtype=dtype, trust_remote_code=trust_remote_code)
    model.to(ranks.device).eval()
    return Answerer(model, data_rules(folder, manifest), max_new_tokens=max_new_tokens), manifest


def export(checkpoint: Path, to: str, out: Path, *, dtype: str = "fp32", trust_remote_code: bool = False) -> None:
    """Write a Hugging Face checkpoint of a trained model."""
    import torch

    from vlit.models.artifact import data_rules, load_model
    from vlit.models.interop.export_hf import export_hf
    from vlit.models.tuning import merge_lora

    folder, _ = open_checkpoint(checkpoint, trust_remote_code=trust_remote_code)
    weights = torch.float32 if dtype == "fp32" else torch.bfloat16
    model, manifest = load_model(folder, dtype=weights, trust_remote_code=trust_remote_code, quantize="none")
    merge_lora(model)
    data = data_rules(folder, manifest)
    export_hf(model, out, template=data.template, image_policy=data.image_policy)
    print(f"exported  {out}  (load with transformers.LlavaForConditionalGeneration.from_pretrained)", file=sys.stderr)


def preview(
    config_path: str, overrides: Sequence[str], *, stage: str | None, samples: int, out: Path | None, terminal: bool
) -> None:
    """Render the first samples of each stage as HTML and in the terminal."""
    from vlit.serve.preview import write_preview

    run = load_config(config_path, overrides)
    _build_world(run)
    if stage is not None and stage not in run.stages:
        raise ConfigError(f"--stage {stage}: no such stage in {config_path}. Known: {', '.join(run.stages)}.")
    path = out or Path(run.output_dir) / "preview.html"
    write_preview(run, stages=[stage] if stage else list(run.stages), samples=samples, out=path, terminal=terminal)
    print(f"preview  {path}", file=sys.stderr)


def doctor(
    config_path: str,
    overrides: Sequence[str],
    *,
    stage: str | None,
    out: Path | None,
    workers: int | None,
    decode: bool,
) -> bool:
    """Examine the datasets of a configuration, write manifest, summary and page, print a table. True: nothing is bad.

    Raises:
        DataError: a file or folder cannot be read or written.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run = load_config(config_path, overrides)
    if stage is not None and stage not in run.stages:
        raise ConfigError(f"--stage {stage}: no such stage in {config_path}. Known: {', '.join(run.stages)}.")
    from rich.console import Console

    from vlit.data.doctor.manifest import FILE_NAME, doctor_folder
    from vlit.data.doctor.scan import examine
    from vlit.models.assemble import model_spec
    from vlit.serve.doctor_page import build_page, findings_table

    _build_world(run)
    folder = out or doctor_folder(run)
    stages = [stage] if stage else list(run.stages)
    page = folder / "doctor.html"
    try:
        diagnosis = examine(run, model_spec(run.model), stages=stages, out=folder, workers=workers, decode=decode)
        page.write_text(build_page(diagnosis, title=run.name), encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"doctor, which writes to {folder}: {error}. Name a folder that can be written with --out, or mend the file."
        ) from error
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 110)
    console.print(findings_table(diagnosis))
    for failed in diagnosis.unreadable:
        console.print(f"cannot be examined: {failed.name} ({', '.join(failed.uses)}): {failed.reason}", markup=False)
    print(f"manifest  {folder / FILE_NAME}\npage      {page}", file=sys.stderr)
    return not diagnosis.has_errors
