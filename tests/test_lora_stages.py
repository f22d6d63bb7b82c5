"""Adapters go on in a later stage of the same rank, alpha and targets, whatever its learning rate and dropout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft.tuners.lora import LoraLayer
from torch import nn

from tests.test_interop_parity import assemble
from tests.tiny_run import tiny_run
from vlit.config.schema import RunConfig, TuningConfig
from vlit.errors import ConfigError
from vlit.models.tuning import apply_tuning
from vlit.train.run import run_training

LORA = {"mode": "lora", "rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}
SAME = {"lr": 1e-4, "dropout": 0.1, "targets": ["v_proj", "q_proj"]}


def _run(tiny_dir: Path, output: Path, *overrides: str, **second: object) -> RunConfig:
    first, then = ({"connector": "full", "llm": LORA | more} for more in ({}, second))
    return tiny_run(
        tiny_dir, output, f"stages.align.tuning={json.dumps(first)}", f"stages.instruct.tuning={json.dumps(then)}",
        "stages.align.max_steps=2", "stages.instruct.max_steps=2", *overrides,
    )  # fmt: skip


def test_another_learning_rate_or_dropout_is_no_other_adapter(tiny_dir: Path, tmp_path: Path) -> None:
    folder = run_training(_run(tiny_dir, tmp_path / "same", **SAME))
    names = {path.name for path in folder.iterdir()}
    assert "llm_lora.safetensors" in names
    assert "llm" not in names
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert "llm" not in manifest["changed"]
    assert manifest["lora"]["llm"]["dropout"] == 0.1
    folder = run_training(_run(tiny_dir, tmp_path / "other", rank=2))
    assert {"llm", "llm_lora.safetensors"} <= {path.name for path in folder.iterdir()}


def test_a_later_stages_dropout_is_in_force(tiny_dir: Path) -> None:
    model = assemble(tiny_dir)
    for dropout in (0.0, 0.3, 0.0):
        apply_tuning(model, TuningConfig.model_validate({"llm": LORA | {"dropout": dropout}}))
        layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
        held = [module for layer in layers for module in layer.lora_dropout.values()]
        assert len(held) == len(layers) > 3
        assert {module.p if isinstance(module, nn.Dropout) else 0.0 for module in held} == {dropout}


def test_quantised_stages_may_differ_in_learning_rate_and_dropout(tiny_dir: Path, tmp_path: Path) -> None:
    assert _run(tiny_dir, tmp_path, "model.llm.quantize=4bit", **SAME).stages["instruct"].tuning.llm.lr == 1e-4
    with pytest.raises(ConfigError, match="another rank, alpha or targets of llm"):
        _run(tiny_dir, tmp_path, "model.llm.quantize=4bit", rank=2)
