"""Every YAML under configs/ loads, says what was published, and takes two steps a stage on tiny parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import build_blip2, build_encoder, build_llm
from tests.tiny_run import losses_of, write_captions, write_dataset
from vlit.config.load import load_config, read_yaml, validate_config
from vlit.config.schema import RunConfig
from vlit.models.assemble import build_model
from vlit.train.run import run_training

ROOT = Path(__file__).resolve().parent.parent
BUILDS = sorted((ROOT / "configs" / "synth").glob("*.yaml"))
"""Configurations of ``vlit synth build``, which the tests of that command read."""
RECIPES = sorted(set((ROOT / "configs").rglob("*.yaml")) - set(BUILDS))


def shrink(path: Path, tiny_dir: Path, output: Path) -> RunConfig:
    """The recipe with tiny parts of the same types, the test's dataset, two steps a stage and nothing else changed."""
    raw: dict[str, Any] = read_yaml(path)
    blip2 = build_blip2(tiny_dir / "blip2")
    model = raw["model"]
    is_blip2 = "blip2" in model["encoder"]["path"]
    model["encoder"]["path"] = str(blip2 if is_blip2 else build_encoder("clip", tiny_dir / "clip"))
    if "from_blip2" in model["connector"]:
        model["connector"]["from_blip2"] = str(blip2)
    model["llm"]["path"] = str(build_llm("llama", tiny_dir / "llama"))
    for number, stage in enumerate(raw["stages"].values()):
        data = str((write_captions if stage.get("template") == "plain" else write_dataset)(tiny_dir / "dataset"))
        stage["data"] = [{"path": data, "name": f"s{number}_{i}"} for i, _ in enumerate(stage["data"])]
        stage.get("validation", {}).pop("data", None)
        stage |= {"global_batch": 2, "max_steps": 2}
    raw["data"] = raw.get("data", {}) | {"cache_dir": str(tiny_dir / "cache"), "num_workers": 0, "check_samples": 4}
    raw |= {
        "world": None,
        "output_dir": str(output),
        "runtime": {"device": "cpu", "precision": "fp32", "num_threads": 1},
    }
    return validate_config(raw, name=str(path))


def test_all_recipes_are_found() -> None:
    names = {str(p.relative_to(ROOT / "configs")) for p in RECIPES}
    assert {
        "stage1.yaml",
        "stage2.yaml",
        "stage2_built.yaml",
        "recipes/llava/13b.yaml",
        "recipes/llava15/7b.yaml",
        "recipes/llava15/7b-lora.yaml",
        "recipes/llava15/13b.yaml",
        "recipes/minigpt4/13b.yaml",
        "recipes/stablellava/13b.yaml",
    } <= names


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_recipe_takes_two_steps_a_stage_on_tiny_parts(path: Path, tiny_dir: Path, tmp_path: Path) -> None:
    load_config(path)
    run = shrink(path, tiny_dir, tmp_path / "out")
    run_training(run)
    rows = losses_of(run)
    assert [(stage, step) for stage, step, _ in rows] == [(stage, i) for stage in run.stages for i in (1, 2)]
    assert all(loss > 0 for _, _, loss in rows)


def test_llava15_recipe_has_the_published_numbers() -> None:
    run = load_config(ROOT / "configs" / "recipes" / "llava15" / "7b.yaml")
    align, instruct = run.stages["align"], run.stages["instruct"]
    assert (align.lr, align.global_batch, align.epochs, align.schedule.warmup_ratio) == (1e-3, 256, 1, 0.03)
    assert (instruct.lr, instruct.global_batch, instruct.epochs, instruct.schedule.warmup_ratio) == (2e-5, 128, 1, 0.03)
    assert (align.tuning.of("llm").mode, instruct.tuning.of("llm").mode) == ("frozen", "full")
    assert (run.data_for("align").image_policy, run.data_for("instruct").image_policy) == ("crop", "pad")
    assert run.data.group_by_modality
    assert (run.data_for("align").template.type, run.data_for("instruct").template.type) == ("plain", "v1")
    assert run.model.encoder.model_dump()["path"] == "openai/clip-vit-large-patch14-336"
    lora = load_config(ROOT / "configs" / "recipes" / "llava15" / "7b-lora.yaml").stages["instruct"]
    assert (lora.lr, lora.tuning.connector.lr) == (2e-4, 2e-5)
    assert (lora.tuning.llm.rank, lora.tuning.llm.alpha, lora.tuning.llm.dropout) == (128, 256, 0.05)


def parts_of_connector(run: RunConfig) -> list[torch.Tensor]:
    model = build_model(run.model, dtype=torch.float32)
    return [*model.connector.parameters(), *model.connector.buffers()]


def test_minigpt4_trains_the_projection_alone(tiny_dir: Path, tmp_path: Path) -> None:
    run = shrink(ROOT / "configs" / "recipes" / "minigpt4" / "13b.yaml", tiny_dir, tmp_path / "out")
    run_training(run, only="align")
    parts = {r["part"]: r for r in json.loads((tmp_path / "out" / "parts.json").read_text())["align"]}
    assert parts["connector"]["trainable"] > 0
    assert {p: r["trainable"] for p, r in parts.items() if p != "connector"} == {"vision": 0, "llm": 0, "embeddings": 0}
    everything = sum(p.numel() for p in parts_of_connector(run))
    assert parts["connector"]["trainable"] < everything
