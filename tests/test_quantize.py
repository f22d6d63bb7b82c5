"""A decoder in 8 or 4 bits: nothing else is quantised, adapters train on it and come back, what cannot work says so."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.rank_cases import Case, run_cases
from tests.rank_hooks import Hook
from tests.tiny import build_encoder, build_llm, needs_bitsandbytes
from tests.tiny_run import losses_of, tiny_run, write_dataset
from vlit.config.schema import ModelConfig, PartTuning, TuningConfig
from vlit.errors import ConfigError, ModelError
from vlit.models.artifact import load_model
from vlit.models.assemble import VisionLanguageModel, build_model
from vlit.models.quantize import is_quantised, packed_layers, packed_tensors
from vlit.models.tuning import apply_tuning, merge_lora, table_of_parts

MODES = ("8bit", "4bit")
LORA = {"mode": "lora", "rank": 4, "alpha": 8}


def built(tiny_dir: Path, quantize: str, *, dtype: torch.dtype = torch.float32) -> VisionLanguageModel:
    raw = {
        "encoder": {"type": "hf", "path": str(build_encoder("clip", tiny_dir / "clip"))},
        "connector": {"type": "mlp"},
        "llm": {"type": "hf", "path": str(build_llm("llama_wide", tiny_dir / "llama_wide")), "quantize": quantize},
    }
    return build_model(ModelConfig.model_validate(raw), dtype=dtype)


def logits(model: VisionLanguageModel) -> torch.Tensor:
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        return model.llm.hf(input_ids=ids).logits


def qlora_words(tiny_dir: Path, mode: str) -> tuple[str, ...]:
    """Connector alone, then connector and adapters, then a stage that changes nothing and validates what it was given."""
    held_out = [{"path": str(write_dataset(tiny_dir / "dataset"))}]
    validation = {"data": held_out, "every_steps": 100, "max_records": 8, "sample_generations": 0}
    adapters = {"connector": "full", "llm": LORA}
    again = {
        "data": held_out, "lr": 1e-30, "global_batch": 4, "max_steps": 1, "tuning": adapters, "validation": validation,
        "micro_batch_tokens": 2048,
    }  # fmt: skip
    return (
        f"model.llm.quantize={mode}", "stages.align.max_steps=2",
        f"stages.instruct.tuning={json.dumps(adapters)}", f"stages.instruct.validation={json.dumps(validation)}",
        f"stages.again={json.dumps(again)}",
    )  # fmt: skip


def qlora_run(tiny_dir: Path, out: Path, mode: str, *overrides: str) -> Any:
    return tiny_run(tiny_dir, out, *qlora_words(tiny_dir, mode), *overrides, llm="llama_wide")


def validation_losses(out: Path) -> dict[str, float]:
    """stage -> loss."""
    rows = [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]
    return {row["stage"]: row["loss"] for row in rows}


@needs_bitsandbytes
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_decoders_linear_layers_are_quantised(tiny_dir: Path, mode: str, dtype: torch.dtype) -> None:
    model = built(tiny_dir, mode, dtype=dtype)
    packed = {"8bit": torch.int8, "4bit": torch.uint8}[mode]
    names = {name for name, p in model.named_parameters() if p.dtype == packed}
    expected = {
        f"llm.hf.model.{name}.weight" for name, m in model.llm.trunk.named_modules() if isinstance(m, nn.Linear)
    }
    assert names == expected
    assert len(names) == 14
    for module in (model.connector, model.encoder, model.llm.head, model.llm.hf.get_input_embeddings()):
        assert {p.dtype for p in module.parameters()} == {dtype}
        assert not is_quantised(module)
    assert model.dtype == dtype


@needs_bitsandbytes
@pytest.mark.parametrize(("mode", "bits", "error"), [("8bit", 8, 0.05), ("4bit", 4.6, 0.35)])
def test_a_quantised_decoder_says_nearly_the_same_in_less_memory(
    tiny_dir: Path, mode: str, bits: float, error: float
) -> None:
    plain, quantised = built(tiny_dir, "none"), built(tiny_dir, mode)
    wanted, found = logits(plain), logits(quantised)
    relative = (found - wanted).norm() / wanted.norm()
    assert 0 < relative < error
    layer: Any = quantised.llm.trunk.get_submodule("layers.0.mlp.down_proj")
    used = layer.weight.numel() * layer.weight.element_size()
    assert used * 8 <= bits * 128 * 64


@needs_bitsandbytes
@pytest.mark.parametrize("mode", MODES)
def test_nothing_keeps_the_weights_that_were_quantised(tiny_dir: Path, mode: str) -> None:
    """A fingerprint's sample once was a view of the whole weight, so nothing was saved at all."""
    model = built(tiny_dir, mode, dtype=torch.bfloat16)
    for layer in packed_layers(model):
        size = layer.in_features * layer.out_features * 2
        held = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in packed_tensors(layer)
        }
        assert sum(held.values()) < 0.6 * size
        assert layer.original.sample.untyped_storage().nbytes() <= 2 * 8191
        assert layer.original.sample.untyped_storage().data_ptr() not in held


@needs_bitsandbytes
@pytest.mark.parametrize("mode", MODES)
def test_the_table_of_parts_counts_and_fingerprints_the_weights_that_were_quantised(tiny_dir: Path, mode: str) -> None:
    tuning = TuningConfig(connector=PartTuning(mode="full"))
    plain = {row.part: row for row in table_of_parts(built(tiny_dir, "none"), tuning, 1e-3)}
    held = {row.part: row for row in table_of_parts(built(tiny_dir, mode), tuning, 1e-3)}
    assert held["llm"].dtype == mode
    assert (held["llm"].parameters, held["llm"].sha256) == (plain["llm"].parameters, plain["llm"].sha256)
    assert held["embeddings"].dtype == "float32"


@needs_bitsandbytes
@pytest.mark.parametrize("mode", MODES)
def test_adapters_get_gradients_through_the_quantised_base_and_it_stays(tiny_dir: Path, mode: str) -> None:
    model = built(tiny_dir, mode)
    apply_tuning(model, TuningConfig(connector=PartTuning(mode="full"), llm=PartTuning(**LORA)))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    pixels = torch.randint(0, 255, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(3, 19)
    losses = []
    for _ in range(5):
        vision = model.encode_images(pixels).tokens[0]
        embeds = torch.cat([vision, model.llm.embed(ids)])[None]
        hidden = model.llm.hf.model(inputs_embeds=embeds).last_hidden_state[0, -len(ids) : -1]
        loss = nn.functional.cross_entropy(model.llm.logits(hidden), ids[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert any(name.startswith("connector.") for name in moved)
    assert sum(".lora_" in name for name in moved) == 28


@needs_bitsandbytes
@pytest.mark.parametrize("mode", MODES)
def test_a_qlora_run_is_saved_and_loaded_as_it_was_trained(tiny_dir: Path, tmp_path: Path, mode: str) -> None:
    """The validation loss of the trained model equals that of the next stage, which loads it from its folder."""
    from vlit.train.run import run_training

    run_training(qlora_run(tiny_dir, tmp_path / "out", mode))
    loss = validation_losses(tmp_path / "out")
    assert math.isfinite(loss["instruct"])
    assert loss["again"] == pytest.approx(loss["instruct"], rel=1e-6)
    folder = tmp_path / "out" / "instruct" / "model"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["model"]["llm"]["quantize"] == mode
    assert {"connector.safetensors", "llm_lora.safetensors"} <= manifest["files"].keys()
    assert not any(name.startswith("llm/") for name in manifest["files"])
    one, two = (load_model(folder, dtype=torch.float32)[0] for _ in range(2))
    assert torch.equal(logits(one), logits(two))
    assert not torch.equal(logits(one), logits(built(tiny_dir, mode)))
    with pytest.raises(ModelError, match="cannot be merged into a quantised"):
        merge_lora(one)
    merged, _ = load_model(folder, dtype=torch.float32, quantize="none")
    whole = logits(merged)
    merge_lora(merged)
    torch.testing.assert_close(logits(merged), whole, rtol=1e-4, atol=1e-5)
    assert (whole - logits(one)).norm() / whole.norm() < {"8bit": 0.05, "4bit": 0.35}[mode]


@needs_bitsandbytes
@pytest.mark.slow
def test_ranks_of_zero3_hold_the_packed_weights_whole_and_save_what_one_process_saves(
    tiny_dir: Path, tmp_path: Path
) -> None:
    """Stopped in the third step of adapters and started again. (Validation deals records out to ranks, and LLM.int8() looks for
    outliers in a whole row of records, so only the training steps, whose rows are alike, are compared with one process.)"""
    from vlit.train.run import run_training

    wide, sharded = (("llm", "llama_wide"),), "runtime.strategy=zero3"
    cases = [Case(tmp_path / mode, (*qlora_words(tiny_dir, mode), sharded), wide) for mode in MODES]
    stopped = [replace(case, hook=Hook(stop_after=3)) for case in cases]
    done = run_cases(2, [*stopped, *cases], tiny_dir, tmp_path, timeout_s=300)
    assert done.returncode == 0, done.stdout[-4000:]
    assert done.stdout.count("resuming after step 2") == len(MODES)
    for mode in MODES:
        run_training(qlora_run(tiny_dir, tmp_path / f"{mode}-alone", mode))
        alone, shared = (losses_of(qlora_run(tiny_dir, tmp_path / name, mode)) for name in (f"{mode}-alone", mode))
        assert len(shared) == 9
        assert [loss for *_, loss in shared] == pytest.approx([loss for *_, loss in alone], rel=1e-5)
        validated = validation_losses(tmp_path / mode)
        assert validated["again"] == pytest.approx(validated["instruct"], rel=1e-6)
        files = {path.name for path in (tmp_path / mode / "instruct" / "model").rglob("*.safetensors")}
        assert files == {"connector.safetensors", "llm_lora.safetensors"}


@needs_bitsandbytes
def test_a_qlora_run_is_exported_in_full_precision(tiny_dir: Path, tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    from vlit.serve.commands import export
    from vlit.train.run import run_training

    run_training(qlora_run(tiny_dir, tmp_path / "out", "4bit", "stages.again=null"))
    export(tmp_path / "out", "hf", tmp_path / "hf")
    hf = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    merged, _ = load_model(tmp_path / "out" / "instruct" / "model", dtype=torch.float32, quantize="none")
    merge_lora(merged)
    found = hf(input_ids=torch.arange(3, 27)[None]).logits[..., : logits(merged).shape[-1]]
    torch.testing.assert_close(found, logits(merged), rtol=1e-4, atol=1e-4)


@needs_bitsandbytes
def test_weights_that_do_not_fit_the_blocks_are_refused(tiny_dir: Path) -> None:
    raw = {
        "encoder": {"type": "hf", "path": str(build_encoder("clip", tiny_dir / "clip"))},
        "connector": {"type": "linear"},
        "llm": {"type": "hf", "path": str(build_llm("llama", tiny_dir / "llama")), "quantize": "4bit"},
    }
    with pytest.raises(ModelError, match=r"blocks of 64 weights, but .*down_proj has 96 inputs"):
        build_model(ModelConfig.model_validate(raw), dtype=torch.float32)


@needs_bitsandbytes
def test_a_quantised_language_model_cannot_be_trained_whole(tiny_dir: Path) -> None:
    for part in ("llm", "embeddings"):
        with pytest.raises(ModelError, match=f"tuning.{part}: full, but model.llm.quantize is on"):
            apply_tuning(built(tiny_dir, "8bit"), TuningConfig(**{part: PartTuning(mode="full")}))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ('stages.instruct.tuning={"llm": "full"}',),
            "stages.instruct.tuning.llm: full, but model.llm.quantize is 4bit",
        ),
        (('stages.instruct.tuning={"embeddings": "full"}',), "tuning.embeddings: full"),
        (("stages.again.tuning.llm.rank=8",), "another rank, alpha or targets"),
        (("model.llm.quantize=2bit",), "quantize"),
    ],
)
def test_what_a_quantised_run_cannot_do_is_said_when_the_configuration_is_read(
    tiny_dir: Path, tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        qlora_run(tiny_dir, tmp_path, "4bit", *overrides)


def test_a_missing_bitsandbytes_is_one_line_with_the_way_out(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # what Python itself does for a failed import
    with pytest.raises(ModelError, match=r"pip install \"vlit\[quantization\]\", or set quantize: none"):
        built(tiny_dir, "8bit")
