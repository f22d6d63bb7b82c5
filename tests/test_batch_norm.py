"""A trained convolutional encoder: its batch normalisation keeps its statistics, so nothing depends on batch or resume."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from tests.tiny_run import losses_of, tiny_run
from vlit.config.schema import RunConfig
from vlit.models.artifact import load_model
from vlit.train.run import run_training

NAME = "test_resnet"


def _checkpoint(folder: Path) -> Path:
    """Weights of timm's smallest ResNet, with statistics that are not those of a fresh one."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model(NAME, pretrained=False).train()
    with torch.no_grad():
        model(torch.randn(8, 3, 64, 64))
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, folder / "cnn.safetensors")
    return folder / "cnn.safetensors"


def _run(tiny_dir: Path, output: Path, checkpoint: Path) -> RunConfig:
    encoder = f"{{type: timm, model: {NAME}, checkpoint: {checkpoint}, image_size: 64, feature_layer: -2}}"
    return tiny_run(
        tiny_dir, output, f"model.encoder={encoder}", "stages.instruct=null", "stages.align.max_steps=4",
        "stages.align.tuning={vision: full, connector: full}",
    )  # fmt: skip


def test_a_resumed_run_of_a_trained_cnn_equals_a_straight_one(tiny_dir: Path, tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path / "weights")
    straight, resumed = (_run(tiny_dir, tmp_path / name, checkpoint) for name in ("straight", "resumed"))
    model, _ = load_model(run_training(straight), dtype=torch.float32)
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    state = tmp_path / "resumed" / "align" / "state"
    assert [step.name for step in state.glob("step-*")] == ["step-2"]
    shutil.rmtree(tmp_path / "resumed" / "align" / "model")
    (tmp_path / "resumed" / "align" / "done.json").unlink()
    again, _ = load_model(run_training(resumed), dtype=torch.float32)
    assert losses_of(straight) == losses_of(resumed)
    before, trained, after = _state(checkpoint), model.encoder.state_dict(), again.encoder.state_dict()
    assert trained.keys() == after.keys()
    statistics = [name for name in trained if "running_" in name]
    assert len(statistics) > 4
    for name, tensor in trained.items():
        assert torch.equal(tensor, after[name]), name
        if name in statistics:
            assert torch.equal(tensor, before[name.removeprefix("tower.")]), name
    assert any(not torch.equal(t, before[n.removeprefix("tower.")]) for n, t in trained.items())


def _state(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)
