"""Connectors: shapes, hand-written references, and BLIP-2's own projected queries."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from tests.tiny import IMAGE_SIZE, LLM_WIDTH, NUM_PATCHES, VISION_WIDTH, build_blip2
from vlit.errors import ModelError
from vlit.models.connectors.qformer import PREFIXES
from vlit.models.interfaces import Connector
from vlit.models.interop.weights import shards_of
from vlit.registry import CONNECTORS, ENCODERS
from vlit.types import VisionTokens

SMALL: dict[str, list[dict[str, Any]]] = {
    "linear": [{}],
    "mlp": [{"depth": 1}, {"depth": 2}, {"depth": 3, "activation": "silu"}, {"activation": "gelu_tanh"}],
    "qformer": [
        {"num_queries": 5, "width": 24, "layers": 3, "heads": 4},
        {"num_queries": 3, "width": 8, "heads": 2, "layers": 1, "input_norm": True},
    ],
}
CASES = [(name, options) for name, several in SMALL.items() for options in several]


def build(name: str, options: dict[str, Any], seed: int = 0) -> tuple[Any, Connector]:
    torch.manual_seed(seed)
    config = CONNECTORS.get(name)(**options)
    return config, config.build(in_width=VISION_WIDTH, out_width=LLM_WIDTH, tokens_in=NUM_PATCHES)


def features(views: int = 2) -> VisionTokens:
    return VisionTokens(torch.randn(views, NUM_PATCHES, VISION_WIDTH, generator=torch.Generator().manual_seed(7)))


def test_every_registered_connector_is_in_this_suite() -> None:
    assert set(SMALL) == set(CONNECTORS.names())


@pytest.mark.parametrize(("name", "options"), CASES)
def test_output_has_the_promised_tokens_and_width_and_trains_every_parameter(
    name: str, options: dict[str, Any]
) -> None:
    config, connector = build(name, options)
    out = connector(features(views=3)).tokens
    assert out.shape == (3, config.num_tokens(NUM_PATCHES), LLM_WIDTH)
    out.square().sum().backward()
    parameters = dict(connector.named_parameters())
    assert len(parameters) >= 2
    assert [n for n, p in parameters.items() if p.grad is None or (p.ndim > 1 and not p.grad.any())] == []


@pytest.mark.parametrize(("name", "options"), CASES)
def test_views_do_not_see_each_other(name: str, options: dict[str, Any]) -> None:
    connector = build(name, options)[1].eval()
    both = features()
    with torch.no_grad():
        together = connector(both).tokens
        apart = torch.cat([connector(VisionTokens(both.tokens[i : i + 1])).tokens for i in range(2)])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_seed_decides_initial_weights(name: str, options: dict[str, Any]) -> None:
    first, again, other = (build(name, options, seed)[1].state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


def test_mlp_of_depth_two_is_llavas_projector() -> None:
    _, connector = build("mlp", {"depth": 2})
    w = connector.state_dict()
    assert sorted(w) == ["layers.0.bias", "layers.0.weight", "layers.2.bias", "layers.2.weight"]
    x = features().tokens
    inner = x @ w["layers.0.weight"].T + w["layers.0.bias"]
    inner = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
    expected = inner @ w["layers.2.weight"].T + w["layers.2.bias"]
    torch.testing.assert_close(connector(features()).tokens, expected, rtol=1e-5, atol=1e-6)


def test_linear_is_one_matrix() -> None:
    _, connector = build("linear", {})
    w = connector.state_dict()
    torch.testing.assert_close(
        connector(features()).tokens, F.linear(features().tokens, w["linear.weight"], w["linear.bias"])
    )


def blip2_features(folder: Path, images: Tensor) -> VisionTokens:
    encoder = ENCODERS.get("hf")(path=str(folder), feature_layer=-1, final_norm=True, cls="keep")
    return encoder.build(dtype=torch.float32)(images)


def test_qformer_from_blip2_gives_blip2s_projected_queries(tiny_dir: Path) -> None:
    from transformers import Blip2ForConditionalGeneration

    folder = build_blip2(tiny_dir / "blip2")
    images = torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    model = Blip2ForConditionalGeneration.from_pretrained(folder).eval()
    _, connector = build("qformer", {"from_blip2": str(folder)})
    with torch.no_grad():
        expected = model.get_image_features(images).pooler_output
        torch.testing.assert_close(connector(blip2_features(folder, images)).tokens, expected, rtol=0, atol=1e-6)
    without_norm = ENCODERS.get("hf")(path=str(folder), feature_layer=-1, cls="keep").build(dtype=torch.float32)
    torch.manual_seed(0)
    normed = CONNECTORS.get("qformer")(from_blip2=str(folder), input_norm=True)
    connector = normed.build(in_width=VISION_WIDTH, out_width=LLM_WIDTH, tokens_in=NUM_PATCHES + 1)
    with torch.no_grad():
        torch.testing.assert_close(connector(without_norm(images)).tokens, expected, rtol=0, atol=1e-4)


def test_a_frozen_qformer_trains_its_projection_alone(tiny_dir: Path) -> None:
    folder = str(build_blip2(tiny_dir / "blip2"))
    _, free = build("qformer", {"from_blip2": folder})
    _, frozen = build("qformer", {"from_blip2": folder, "freeze_qformer": True})
    names = [n for n, _ in frozen.named_parameters()]
    assert names == ["language_projection.weight", "language_projection.bias"]
    frozen.requires_grad_(True)
    frozen(features()).tokens.sum().backward()
    assert frozen.state_dict().keys() == free.state_dict().keys()
    torch.testing.assert_close(frozen(features()).tokens, free(features()).tokens)
    with pytest.raises(ValidationError, match="freeze_qformer needs from_blip2"):
        CONNECTORS.get("qformer")(freeze_qformer=True)


def test_another_language_model_width_leaves_only_the_projection_fresh(tiny_dir: Path) -> None:
    folder = build_blip2(tiny_dir / "blip2")
    held = load_file(folder / "model.safetensors")
    connector = CONNECTORS.get("qformer")(from_blip2=str(folder)).build(
        in_width=VISION_WIDTH, out_width=40, tokens_in=17
    )
    own = connector.state_dict()
    assert own["language_projection.weight"].shape == (40, 24)
    copied = [n for n in own if n in held and torch.equal(own[n], held[n])]
    assert len(copied) == len(own) - 2 > 40


def test_a_blip2_folder_without_a_tensor_or_for_another_encoder_is_refused(tiny_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    shutil.copytree(build_blip2(tiny_dir / "blip2"), folder)
    config = CONNECTORS.get("qformer")(from_blip2=str(folder))
    with pytest.raises(ModelError, match="reads tokens of width 32, the encoder gives 48"):
        config.build(in_width=48, out_width=LLM_WIDTH, tokens_in=16)
    with pytest.raises(ModelError, match=r"model\.connector\.layers: 2, but .* has 3"):
        CONNECTORS.get("qformer")(from_blip2=str(folder), layers=2).num_tokens(16)
    held = load_file(folder / "model.safetensors")
    del held["qformer.encoder.layer.1.output_query.dense.weight"]
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"has no tensor qformer\.encoder\.layer\.1\.output_query\.dense\.weight"):
        config.build(in_width=VISION_WIDTH, out_width=LLM_WIDTH, tokens_in=16)
    with pytest.raises(ModelError, match=r"model\.connector\.from_blip2: .* is neither a folder nor a hub model"):
        CONNECTORS.get("qformer")(from_blip2=str(tmp_path / "gone")).num_tokens(16)


def test_only_the_shards_that_hold_the_qformer_are_needed(tiny_dir: Path, tmp_path: Path) -> None:
    from transformers import Blip2ForConditionalGeneration

    whole = build_blip2(tiny_dir / "blip2")
    Blip2ForConditionalGeneration.from_pretrained(whole).save_pretrained(tmp_path, max_shard_size="60KB")
    needed = set(shards_of(tmp_path / "model.safetensors.index.json", PREFIXES))
    files = {p.name for p in tmp_path.glob("*.safetensors")}
    assert 0 < len(needed) < len(files)
    for name in files - needed:
        (tmp_path / name).unlink()
    ours = [
        CONNECTORS.get("qformer")(from_blip2=str(p)).build(in_width=VISION_WIDTH, out_width=LLM_WIDTH, tokens_in=17)
        for p in (whole, tmp_path)
    ]
    first, second = (connector.state_dict() for connector in ours)
    assert all(torch.equal(first[name], second[name]) for name in first)
    (tmp_path / sorted(needed)[0]).unlink()
    with pytest.raises(ModelError, match="which is not there"):
        CONNECTORS.get("qformer")(from_blip2=str(tmp_path)).build(in_width=VISION_WIDTH, out_width=64, tokens_in=17)
