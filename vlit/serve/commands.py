"""What the commands do: read a configuration or checkpoint, call the floor below, print where the result lies."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vlit.config.load import apply_override, load_config
from vlit.errors import ConfigError
from vlit.registry import BENCHMARKS


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


def load_answerer(checkpoint: Path, *, max_new_tokens: int, template: str | None = None) -> tuple[Any, dict[str, Any]]:
    """An :class:`~vlit.answer.Answerer` on this machine's best device, and the model's manifest.

    ``template`` (a registered name or a YAML mapping) replaces the template of the model's last stage: a model that was only
    aligned was trained with `plain`, which has no question in it.
    """
    import yaml

    from vlit.answer import Answerer
    from vlit.config.schema import RuntimeConfig
    from vlit.models.artifact import data_rules, load_model
    from vlit.train.distributed import compute_dtype, start_ranks
    from vlit.train.run import model_folder

    runtime = RuntimeConfig()
    ranks = start_ranks(runtime)
    folder = model_folder(checkpoint)
    model, manifest = load_model(folder, dtype=compute_dtype(runtime, ranks.device))
    model.to(ranks.device).eval()
    if template is not None:
        manifest["data"] = manifest["data"] | {"template": yaml.safe_load(template)}
    data = data_rules(folder, manifest)
    return Answerer(model, data, max_new_tokens=max_new_tokens), manifest | {"folder": str(folder)}


def evaluate_checkpoint(
    checkpoint: Path,
    benchmark: str,
    overrides: Sequence[str],
    *,
    out: Path | None = None,
    rows: Sequence[str] = ("image",),
    batch_size: int = 64,
    max_new_tokens: int = 64,
    template: str | None = None,
) -> dict[str, Any]:
    """Answer a benchmark greedily and score it; resumes where an interrupted evaluation stopped."""
    import hashlib

    from rich.console import Console
    from tqdm import tqdm

    from vlit.answer import ask
    from vlit.eval.run import evaluate

    raw: dict[str, Any] = {"type": benchmark}
    for override in overrides:
        apply_override(raw, override)
    try:
        config = BENCHMARKS.get(benchmark).model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"--benchmark {benchmark}: {where}{first['msg'] if not where else ': ' + first['msg']}"
        ) from error
    built = config.build()
    built.load()  # a missing question file is an error before the model is loaded
    answerer, manifest = load_answerer(checkpoint, max_new_tokens=max_new_tokens, template=template)
    folder = Path(manifest["folder"])
    stage = str(manifest["info"].get("stage", folder.parent.name))
    out = out or folder.parent.parent / "evaluations" / f"{stage}-{built.name}"
    weights = hashlib.sha256(repr(sorted(manifest["files"].items())).encode()).hexdigest()
    bar = tqdm(desc=built.name, unit="question", disable=not sys.stderr.isatty(), leave=False)

    def answer(questions: list[Any]) -> list[str]:
        requests = [ask(q.turn_text(), q.images) for q in questions]
        return answerer.answers(requests, batch_size=batch_size)

    def advance(row: str, answered: int, total: int) -> None:
        bar.set_description(f"{built.name} {row}")
        bar.total, bar.n = total, answered
        bar.refresh()

    results = evaluate(
        answer,
        built,
        out,
        rows=rows,
        batch_size=batch_size * 4,
        checkpoint=str(folder),
        settings={
            "max_new_tokens": max_new_tokens,
            "weights_sha256": weights,
            "template": manifest["data"]["template"],
        },
        progress=advance,
    )
    bar.close()
    Console(stderr=True, width=None if sys.stderr.isatty() else 110).print(results_table(results))
    print(f"results  {out / 'results.json'}", file=sys.stderr)
    return results


def results_table(results: dict[str, Any]) -> Any:
    """Accuracy per kind and row with the 95 % interval of the first row."""
    from rich.table import Table

    table = Table(title=f"{results['benchmark']}  ({results['checkpoint']})", title_justify="left")
    for column in ("kind", "n", *results["rows"], "95 % interval", "chance"):
        table.add_column(column, justify="left" if column == "kind" else "right")

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    def interval(row: dict[str, Any]) -> str:
        return f"{percent(row['ci_low'])}-{percent(row['ci_high'])}"

    for kind, first in results["per_kind"].items():
        cells = [percent(row["per_kind"][kind]["accuracy"]) for row in results["rows"].values()]
        table.add_row(kind, str(first["n"]), *cells, interval(first), percent(first.get("chance")))
    totals = [percent(row["accuracy"]) for row in results["rows"].values()]
    table.add_section()
    table.add_row("all", str(results["n"]), *totals, interval(results), percent(results.get("chance")))
    return table


def export(checkpoint: Path, to: str, out: Path, *, dtype: str = "fp32") -> None:
    """Write a Hugging Face checkpoint of a trained model."""
    import torch

    from vlit.models.artifact import data_rules, load_model
    from vlit.models.interop.export_hf import export_hf
    from vlit.models.tuning import merge_lora
    from vlit.train.run import model_folder

    folder = model_folder(checkpoint)
    model, manifest = load_model(folder, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16)
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
