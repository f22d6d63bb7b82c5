"""Trained weights of LLaVA, in all its layouts, fill our parts; what does not fit is refused with its reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.batches import packed, random_example
from tests.tiny import IMAGE_SIZE, LLM_WIDTH, NUM_PATCHES, VISION_WIDTH, VOCAB_SIZE, build_encoder, build_llm
from vlit.config.schema import ModelConfig
from vlit.errors import ModelError
from vlit.models.assemble import VisionLanguageModel, build_model
from vlit.models.interop import detect, initialise
from vlit.models.interop.weights import WeightFiles

IMAGE_ID = VOCAB_SIZE
ROWS = VOCAB_SIZE + 64


def assemble(tiny_dir: Path, connector: dict[str, Any] | None = None, **encoder: Any) -> VisionLanguageModel:
    config = ModelConfig.model_validate(
        {
            "encoder": {"type": "hf", "path": str(build_encoder("clip", tiny_dir / "clip")), **encoder},
            "connector": connector or {"type": "mlp"},
            "llm": {"type": "hf", "path": str(build_llm("llama_gqa", tiny_dir / "llama_gqa"))},
        }
    )
    return build_model(config, dtype=torch.float32).eval()


def projector(depth: int = 2, width: int = VISION_WIDTH, out: int = LLM_WIDTH) -> dict[str, Tensor]:
    """LLaVA's own names without prefix: ``0.weight``, ``2.weight`` ...; depth 0 = a single matrix, ``weight``."""
    generator = torch.Generator().manual_seed(11)
    names = ["weight"] if depth == 0 else [f"{2 * i}.weight" for i in range(depth)]
    tensors = {}
    for number, name in enumerate(names):
        tensors[name] = torch.randn(out, width if number == 0 else out, generator=generator) * 0.1
        tensors[name.replace("weight", "bias")] = torch.randn(out, generator=generator) * 0.1
    return tensors


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "base_model.model.model.mm_projector."])
def test_mm_projector_fills_the_connector(prefix: str, tiny_dir: Path, tmp_path: Path) -> None:
    held = projector()
    file = tmp_path / "x"  # nothing is read from the name
    torch.save({f"{prefix}{name}": tensor for name, tensor in held.items()}, file)
    assert detect(file) == "mm_projector"
    model = assemble(tiny_dir)
    assert initialise(model, str(file)) == {"connector"}
    for name, tensor in model.connector.state_dict().items():
        assert torch.equal(tensor, held[name.removeprefix("layers.")])


def test_linear_and_deep_projectors_fill_their_connectors(tiny_dir: Path, tmp_path: Path) -> None:
    for depth, connector in (
        (0, {"type": "linear"}),
        (1, {"type": "mlp", "depth": 1}),
        (3, {"type": "mlp", "depth": 3}),
    ):
        folder = tmp_path / str(depth)
        folder.mkdir()
        held = projector(depth)
        torch.save({f"model.mm_projector.{n}": t for n, t in held.items()}, folder / "mm_projector.bin")
        model = assemble(tiny_dir, connector)
        initialise(model, str(folder))
        own = model.connector.state_dict()
        assert len(own) == len(held)
        assert all(torch.equal(own[f"linear.{n}" if depth == 0 else f"layers.{n}"], t) for n, t in held.items())


def test_a_projector_that_does_not_fit_names_tensor_shapes_and_cause(tiny_dir: Path, tmp_path: Path) -> None:
    def attempt(held: dict[str, Tensor], connector: dict[str, Any] | None = None, **extra: Tensor) -> str:
        torch.save({**{f"model.mm_projector.{n}": t for n, t in held.items()}, **extra}, tmp_path / "x.bin")
        with pytest.raises(ModelError) as caught:
            initialise(assemble(tiny_dir, connector), str(tmp_path / "x.bin"))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    wrong_encoder = attempt(projector(width=48))
    assert "layers.0.weight is [64, 48]" in wrong_encoder
    assert "[64, 32] in the model" in wrong_encoder
    assert "encoder of width 48, model.encoder gives 32" in wrong_encoder
    assert "language model of width 96, model.llm has 64" in attempt(projector(out=96))
    assert "Set model.connector to {type: linear}" in attempt(projector(0))
    assert "Set model.connector to {type: mlp, depth: 2}" in attempt(projector(), {"type": "linear"})
    embeddings = {"model.embed_tokens.weight": torch.zeros(2, LLM_WIDTH)}
    assert "mm_use_im_start_end" in attempt(projector(), **embeddings)
    newline = {"model.image_newline": torch.zeros(LLM_WIDTH)}
    assert "any-resolution" in attempt(projector(), **newline)


def test_files_of_another_kind_are_refused(tiny_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no LLaVA connector"):
        detect(build_llm("llama_gqa", tiny_dir / "llama_gqa"))
    with pytest.raises(ModelError, match="no such file or folder"):
        detect(tmp_path / "gone")
    (tmp_path / "noise.bin").write_bytes(b"not a tensor file at all")
    with pytest.raises(ModelError, match="not a file of plain tensors"):
        detect(tmp_path / "noise.bin")
    torch.save({"code": print}, tmp_path / "code.bin")
    with pytest.raises(ModelError, match="not a file of plain tensors"):
        detect(tmp_path / "code.bin")
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "vlit-model"}), encoding="utf-8")
    assert detect(tmp_path) == "vlit"


@pytest.fixture(scope="module")
def hf_llava(tiny_dir: Path) -> Path:
    """A LlavaForConditionalGeneration with weights of its own in every part and a vocabulary grown by 64 rows."""
    import transformers as hf

    folder = tiny_dir / "hf_llava"
    clip = hf.AutoConfig.from_pretrained(build_encoder("clip", tiny_dir / "clip"))
    text = hf.AutoConfig.from_pretrained(build_llm("llama_gqa", tiny_dir / "llama_gqa"))
    text.vocab_size = ROWS
    config = hf.LlavaConfig(vision_config=clip.vision_config, text_config=text, image_token_index=IMAGE_ID)
    torch.manual_seed(21)
    model = hf.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


def rename(tensors: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The same tensors under the names of another layout; ours here are transformers' own before saving."""
    rules = {
        "up to 4.51": [
            ("model.language_model.", "language_model.model."),
            ("lm_head.", "language_model.lm_head."),
            ("model.vision_tower.", "vision_tower.vision_model."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
        ],
        "since 4.52": [("model.vision_tower.", "model.vision_tower.vision_model.")],
        "flat": [],
        "original": [
            ("model.language_model.", "model."),
            ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
            ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
            ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ],
    }[layout]
    renamed = {}
    for name, tensor in tensors.items():
        for before, after in rules:
            if name.startswith(before):
                name = after + name[len(before) :]
                break
        renamed[name] = tensor
    return renamed


def write_layout(source: Path, layout: str, folder: Path, shards: int = 1) -> Path:
    import transformers as hf

    model = hf.LlavaForConditionalGeneration.from_pretrained(source)
    tensors = {n: t.contiguous() for n, t in rename(dict(model.state_dict()), layout).items()}
    folder.mkdir(parents=True)
    if layout != "original":
        shutil.copy(source / "config.json", folder)
    names = sorted(tensors)
    index = {}
    for number in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{number}.safetensors"
        part = {n: tensors[n] for n in names[number::shards]}
        save_file(part, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    return folder


@pytest.mark.parametrize("layout", ["up to 4.51", "since 4.52", "flat", "original"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_whole_llava_checkpoint_gives_its_own_logits(
    layout: str, shards: int, hf_llava: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    import transformers as hf

    folder = write_layout(hf_llava, layout, tmp_path / "x", shards)
    assert detect(folder) == ("llava" if layout == "original" else "hf_llava")
    model = assemble(tiny_dir)
    assert initialise(model, str(folder)) == {"connector", "llm", "embeddings", "vision"}
    reference = hf.LlavaForConditionalGeneration.from_pretrained(hf_llava).eval()
    example = random_example(
        tokens=9, images=2, tokens_per_view=NUM_PATCHES, image_size=IMAGE_SIZE, vocabulary=VOCAB_SIZE, seed=0
    )
    ids = torch.where(example.ids < 0, IMAGE_ID, example.ids)
    images = (example.pixels.float() / 255 - model.image_mean) / model.image_std
    with torch.no_grad():
        expected = reference(input_ids=ids[None], pixel_values=images).logits[0, :, :VOCAB_SIZE]
        torch.testing.assert_close(model.logits(packed([example])), expected, rtol=0, atol=1e-5)


def test_an_unchanged_vision_tower_is_not_reported_as_changed(hf_llava: Path, tiny_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    shutil.copytree(hf_llava, folder)
    held = load_file(folder / "model.safetensors")
    tower = load_file(tiny_dir / "clip" / "model.safetensors")
    for name in held:
        if "vision_tower." in name:
            leaf = name.rpartition("vision_tower.")[2].removeprefix("vision_model.")
            held[name] = tower[f"vision_model.{leaf}"]
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    assert initialise(assemble(tiny_dir), str(folder)) == {"connector", "llm", "embeddings"}


def test_a_checkpoint_of_other_parts_is_refused_by_name(hf_llava: Path, tiny_dir: Path, tmp_path: Path) -> None:
    def attempt(change: dict[str, Any] | None = None, model: VisionLanguageModel | None = None, lose: str = "") -> str:
        folder = tmp_path / "x"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(hf_llava, folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(config | (change or {})), encoding="utf-8")
        if lose:
            held = load_file(folder / "model.safetensors")
            save_file({n: t for n, t in held.items() if not n.endswith(lose)}, folder / "model.safetensors")
        with pytest.raises(ModelError) as caught:
            initialise(model or assemble(tiny_dir), str(folder))
        return str(caught.value)

    assert "was trained on layer -2" in attempt(model=assemble(tiny_dir, feature_layer=-1))
    assert "the image token is number 5" in attempt({"image_token_index": 5})
    assert "lacks 1 tensors" in attempt(lose="layers.1.mlp.up_proj.weight")
    assert "without encoder.layers.1.mlp.fc1.weight" in attempt(lose="vision_tower.encoder.layers.1.mlp.fc1.weight")
    assert "trained with activation silu" in attempt({"projector_hidden_act": "silu"})
    assert "image_size" in attempt(model=assemble(tiny_dir, image_size=48))
    assert "cls: keep, which drops 0" in attempt(model=assemble(tiny_dir, cls="keep"))
    assert "cls: drop, which drops 1" in attempt({"vision_feature_select_strategy": "full"})


def test_a_connector_that_saw_cls_fits_only_an_encoder_that_keeps_it(
    hf_llava: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "own"
    shutil.copytree(hf_llava, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["vision_feature_select_strategy"]
    for feature, fits, other in (("patch", "drop", "keep"), ("cls_patch", "keep", "drop")):
        own = config | {"mm_vision_select_feature": feature}  # the key of LLaVA's own code
        (folder / "config.json").write_text(json.dumps(own), encoding="utf-8")
        with pytest.raises(ModelError, match=f"trained with {feature}, which drops .* Set cls to {fits}"):
            initialise(assemble(tiny_dir, cls=other), str(folder))
        assert "connector" in initialise(assemble(tiny_dir, cls=fits), str(folder))


def test_rows_of_added_tokens_are_not_cut(hf_llava: Path, tiny_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    shutil.copytree(hf_llava, folder)
    added = {str(VOCAB_SIZE + i): {"content": t} for i, t in enumerate(("<image>", "<pad>", "<box>"))}
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({"added_tokens_decoder": added}), encoding="utf-8")
    with pytest.raises(ModelError, match="<box> have rows there"):
        initialise(assemble(tiny_dir), str(folder))
    del added[str(VOCAB_SIZE + 2)]
    file.write_text(json.dumps({"added_tokens_decoder": added}), encoding="utf-8")
    initialise(assemble(tiny_dir), str(folder))


def test_a_missing_shard_is_named(hf_llava: Path, tmp_path: Path) -> None:
    folder = write_layout(hf_llava, "flat", tmp_path / "x", shards=2)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lists model-1\.safetensors, which is not there"):
        WeightFiles(folder)


def test_a_llava_checkpoint_also_serves_as_an_encoder(hf_llava: Path, tmp_path: Path, tiny_dir: Path) -> None:
    import transformers as hf

    folder = tmp_path / "x"
    shutil.copytree(hf_llava, folder)
    shutil.copy(tiny_dir / "clip" / "preprocessor_config.json", folder)
    from vlit.registry import ENCODERS

    encoder = ENCODERS.get("hf")(path=str(folder)).build(dtype=torch.float32).eval()
    images = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    tower = hf.LlavaForConditionalGeneration.from_pretrained(hf_llava).model.vision_tower.eval()
    with torch.no_grad():
        expected = tower(images, output_hidden_states=True).hidden_states[-2][:, 1:]
        torch.testing.assert_close(encoder(images).tokens, expected, rtol=0, atol=1e-5)
