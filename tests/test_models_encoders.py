"""Every encoder, every family: the features are the full model's hidden states, and nothing else is held or computed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.tiny import (
    ENCODER_KINDS,
    IMAGE_SIZE,
    PATCH_SIZE,
    VISION_LAYERS,
    build_blip2,
    build_encoder,
    build_open_clip,
    build_timm,
)
from vlit.errors import ModelError
from vlit.models.interfaces import EncoderConfig
from vlit.registry import ENCODERS

LARGER = 6 * PATCH_SIZE
Hidden = list[Tensor]


@dataclass(frozen=True)
class Case:
    """An encoder under test: how to configure it, the full model's hidden states by the library itself, its prefix."""

    type: str
    configure: Callable[..., EncoderConfig]
    hidden_states: Callable[
        [Tensor], Hidden
    ]  # entry i = hidden_states[i]; entry 0 is None where it cannot be asked for
    block: Callable[[], nn.Module]
    num_prefix: int
    first_layer: int  # smallest feature_layer that can be asked for


def pixels(size: int = IMAGE_SIZE, views: int = 2) -> Tensor:
    return torch.randn(views, 3, size, size, generator=torch.Generator().manual_seed(size))


def hf_case(kind: str, tiny_dir: Path) -> Case:
    import transformers as hf

    folder = build_blip2(tiny_dir / "blip2") if kind == "blip2" else build_encoder(kind, tiny_dir / kind)
    classes = {"blip2": hf.Blip2ForConditionalGeneration, "blip2_vision": hf.Blip2VisionModel}

    def full() -> Any:
        model: Any = classes.get(kind, hf.AutoModel).from_pretrained(folder).eval()
        return getattr(model, "vision_model", model)

    def hidden_states(images: Tensor) -> Hidden:
        arguments: dict[str, Any] = {"pixel_values": images}
        if kind == "siglip2_naflex":  # unfold is an independent way to cut patches; NaFlex wants colours last
            flat = nn.functional.unfold(images, PATCH_SIZE, stride=PATCH_SIZE).transpose(1, 2)
            colour_last = flat.reshape(*flat.shape[:2], 3, -1).transpose(2, 3).flatten(2)
            side = images.shape[-1] // PATCH_SIZE
            arguments = {
                "pixel_values": colour_last,
                "pixel_attention_mask": torch.ones(colour_last.shape[:2], dtype=torch.long),
                "spatial_shapes": torch.tensor([[side, side]] * len(images)),
            }
        elif kind != "dinov3_vit" and images.shape[-1] != IMAGE_SIZE and not kind.startswith("dinov2"):
            arguments["interpolate_pos_encoding"] = True
        with torch.no_grad():
            return list(full()(**arguments, output_hidden_states=True).hidden_states)

    def block() -> nn.Module:
        lists = [m for m in full().modules() if isinstance(m, nn.ModuleList) and len(m) == VISION_LAYERS]
        return lists[0][0]

    prefix = {"siglip": 0, "siglip_vision": 0, "siglip2": 0, "siglip2_naflex": 0, "dinov2_with_registers": 4}
    return Case(
        "hf",
        lambda **options: ENCODERS.get("hf")(path=str(folder), **options),
        hidden_states,
        block,
        {**prefix, "dinov3_vit": 3}.get(kind, 1),
        0,
    )


def block_outputs(model: nn.Module, blocks: nn.ModuleList, images: Tensor) -> Hidden:
    """What each block gives, read by hooks."""
    seen: list[Any] = [None]
    handles = [block.register_forward_hook(lambda m, i, out: seen.append(out)) for block in blocks]
    with torch.no_grad():
        model.eval()(images)
    for handle in handles:
        handle.remove()
    return seen


def timm_case(tiny_dir: Path, *, by_file: bool) -> Case:
    import timm

    folder = build_timm(tiny_dir / "timm")
    name = f"local-dir:{folder}"
    given = {"checkpoint": str(folder / "model.safetensors"), "pretrained": False} if by_file else {}

    def full(size: int = IMAGE_SIZE) -> Any:
        return timm.create_model(name, pretrained=True, img_size=size)

    return Case(
        "timm",
        lambda **options: ENCODERS.get("timm")(model=name, **given, **options),
        lambda images: block_outputs(model := full(images.shape[-1]), model.blocks, images),
        lambda: full().blocks[0],
        3,
        1,
    )


def open_clip_case(tiny_dir: Path) -> Case:
    import open_clip

    name = f"local-dir:{build_open_clip(tiny_dir / 'open_clip')}"

    def full(size: int = IMAGE_SIZE) -> Any:
        return open_clip.create_model(name, force_image_size=size).visual

    return Case(
        "open_clip",
        lambda **options: ENCODERS.get("open_clip")(model=name, **options),
        lambda images: block_outputs(model := full(images.shape[-1]), model.transformer.resblocks, images),
        lambda: full().transformer.resblocks[0],
        1,
        1,
    )


HF_KINDS = (*ENCODER_KINDS, "blip2")
ALL = (*(f"hf-{kind}" for kind in HF_KINDS), "timm", "timm-file", "open_clip")


SAME_CODE = {"hf-clip_vision", "hf-siglip_vision", "hf-siglip2", "hf-blip2_vision", "timm-file"}
"""Other files for a model that is there already: loading them is tested, what they compute is not tested again."""


@pytest.fixture(params=ALL)
def any_case(request: pytest.FixtureRequest, tiny_dir: Path) -> Case:
    return make_case(request.param, tiny_dir)


@pytest.fixture(params=[name for name in ALL if name not in SAME_CODE])
def case(request: pytest.FixtureRequest, tiny_dir: Path) -> Case:
    return make_case(request.param, tiny_dir)


def make_case(name: str, tiny_dir: Path) -> Case:
    if name.startswith("hf-"):
        return hf_case(name.removeprefix("hf-"), tiny_dir)
    return open_clip_case(tiny_dir) if name == "open_clip" else timm_case(tiny_dir, by_file=name == "timm-file")


def test_every_registered_encoder_is_in_this_suite() -> None:
    assert {name.partition("-")[0] for name in ALL} == set(ENCODERS.names())


def test_features_are_the_full_models_hidden_states(any_case: Case) -> None:
    case = any_case
    images = pixels()
    expected = case.hidden_states(images)
    assert len(expected) == VISION_LAYERS + 1
    for layer, policy in ((case.first_layer, "keep"), (1, "drop"), (-2, "drop"), (-2, "keep"), (VISION_LAYERS, "drop")):
        encoder = case.configure(feature_layer=layer, cls=policy).build(dtype=torch.float32).eval()
        with torch.no_grad():
            features = encoder(images).tokens
        first = case.num_prefix if policy == "drop" else 0
        torch.testing.assert_close(features, expected[layer][:, first:], rtol=0, atol=1e-5)


def test_spec_tells_without_weights_what_build_gives(case: Case) -> None:
    for options in ({"cls": "keep"}, {"feature_layer": -1, "image_size": LARGER}):
        config = case.configure(**options)
        spec = config.spec()
        encoder = config.build(dtype=torch.float32)
        features = encoder(pixels(spec.image_size, views=3)).tokens
        assert features.shape == (3, spec.tokens_per_view, spec.width)
        assert encoder.spec == spec
        assert spec.image_size == options.get("image_size", IMAGE_SIZE)
        patches = (spec.image_size // PATCH_SIZE) ** 2
        assert spec.tokens_per_view == patches + (case.num_prefix if "cls" in options else 0)


def test_another_image_size_gives_the_librarys_own_interpolation(case: Case) -> None:
    images = pixels(LARGER)
    encoder = case.configure(image_size=LARGER).build(dtype=torch.float32).eval()
    with torch.no_grad():
        features = encoder(images).tokens
    expected = case.hidden_states(images)[-2][:, case.num_prefix :]
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


def test_blocks_past_the_feature_layer_are_not_held(case: Case) -> None:
    def size(layer: int) -> int:
        return sum(p.numel() for p in case.configure(feature_layer=layer).build(dtype=torch.float32).parameters())

    one_block = sum(p.numel() for p in case.block().parameters())
    assert one_block > 1000
    assert [size(layer) - size(layer - 1) for layer in (-1, -2)] == [one_block, one_block]


def test_gradients_reach_every_parameter_of_a_trained_encoder_with_and_without_recomputation(case: Case) -> None:
    images = pixels()
    encoder = case.configure().build(dtype=torch.float32).train()
    calls = 0

    def count(module: nn.Module, args: Any) -> None:
        nonlocal calls
        calls += 1

    block = type(case.block())
    blocks = [m for m in encoder.modules() if type(m) is block]
    for module in blocks:
        norm = next(m for m in module.modules() if isinstance(m, nn.LayerNorm))
        norm.register_forward_pre_hook(count)
    gradients = []
    for recompute in (False, True):
        encoder.set_gradient_checkpointing("full" if recompute else "none")
        encoder.zero_grad()
        calls = 0
        encoder(images).tokens.square().sum().backward()
        assert calls == len(blocks) * (2 if recompute else 1) > 0
        assert [n for n, p in encoder.named_parameters() if p.grad is None] == []
        gradients.append({n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None})
    assert len(gradients[0]) > 20
    assert [n for n, g in gradients[0].items() if g.ndim > 1 and not g.any()] == []
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_final_norm_is_the_models_own(tiny_dir: Path) -> None:
    import transformers as hf

    for kind, attribute in (("siglip", "post_layernorm"), ("dinov2", "layernorm"), ("clip", "post_layernorm")):
        case = hf_case(kind, tiny_dir)
        model: Any = hf.AutoModel.from_pretrained(tiny_dir / kind)
        norm = getattr(getattr(model, "vision_model", model), attribute)
        images = pixels()
        encoder = case.configure(feature_layer=-2, final_norm=True, cls="keep").build(dtype=torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(encoder(images).tokens, norm(case.hidden_states(images)[-2]), rtol=0, atol=1e-5)


def test_training_mode_does_not_change_features(case: Case) -> None:
    encoder = case.configure().build(dtype=torch.float32)
    images = pixels()
    with torch.no_grad():
        assert torch.equal(encoder.train()(images).tokens, encoder.train()(images).tokens)
        torch.testing.assert_close(encoder.train()(images).tokens, encoder.eval()(images).tokens, rtol=0, atol=1e-5)


def test_bfloat16_takes_pixels_of_any_float_type(case: Case) -> None:
    encoder = case.configure().build(dtype=torch.bfloat16)
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    assert encoder(pixels()).tokens.dtype == torch.bfloat16


def test_a_missing_folder_is_one_line_with_a_remedy(tmp_path: Path) -> None:
    gone = ENCODERS.get("hf")(path=str(tmp_path / "gone"))
    for act in (gone.spec, lambda: gone.build(dtype=torch.float32)):
        with pytest.raises(ModelError, match=r"model\.encoder\.path .*gone.* does not exist") as caught:
            act()
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=r"no file .*gone"):
        ENCODERS.get("timm")(model="vit_tiny_patch16_224", checkpoint=str(tmp_path / "gone")).build(dtype=torch.float32)
    with pytest.raises(ModelError, match="would stay random"):
        ENCODERS.get("open_clip")(model="ViT-B-32").spec()


def test_a_checkpoint_that_lacks_a_kept_weight_is_refused(tiny_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    shutil.copytree(build_encoder("clip", tiny_dir / "clip"), folder)
    tensors = load_file(folder / "model.safetensors")
    for name, refused in (("encoder.layers.3.mlp.fc1.weight", False), ("encoder.layers.1.mlp.fc1.weight", True)):
        (lost,) = [n for n in tensors if n.startswith("vision") and n.endswith(name)]
        save_file({n: t for n, t in tensors.items() if n != lost}, folder / "model.safetensors", {"format": "pt"})
        config = ENCODERS.get("hf")(path=str(folder))
        if refused:
            with pytest.raises(ModelError, match=r"encoder\.layers\.1\.mlp\.fc1\.weight"):
                config.build(dtype=torch.float32)
        else:  # the last block is not needed for layer -2
            config.build(dtype=torch.float32)


def test_an_impossible_layer_names_the_possible_ones(case: Case) -> None:
    with pytest.raises(ModelError, match=r"model\.encoder\.feature_layer: 9 is out of range for 4 blocks"):
        case.configure(feature_layer=9).spec()


def test_detection_does_not_look_at_folder_names(tiny_dir: Path, tmp_path: Path) -> None:
    odd = tmp_path / "llava-siglip-clip"
    shutil.copytree(build_encoder("dinov2", tiny_dir / "dinov2"), odd)
    spec = ENCODERS.get("hf")(path=str(odd)).spec()
    assert spec.image_mean == (0.485, 0.456, 0.406)
    assert spec.tokens_per_view == 16
