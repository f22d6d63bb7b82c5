"""What we export is what we trained: transformers' LLaVA gives our logits, prompts and pixels from the exported folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.batches import Example, packed, random_example
from tests.tiny import LLM_KINDS, build_encoder, build_llm, build_open_clip, build_timm
from vlit.config.schema import DataConfig, ModelConfig, TuningConfig
from vlit.data.images import load_view
from vlit.data.tokenize import SampleTokenizer
from vlit.errors import ExportError
from vlit.models.assemble import VisionLanguageModel, build_model
from vlit.models.interop import initialise
from vlit.models.interop.export_hf import export_hf, why_not
from vlit.models.interop.weights import WeightFiles
from vlit.models.tuning import apply_tuning, merge_lora
from vlit.registry import TEMPLATES
from vlit.types import Sample, Turn

ENCODERS = ("clip", "clip_vision", "siglip", "dinov2", "vit")
LLMS = tuple(kind for kind in LLM_KINDS if kind not in ("phi", "gemma2"))
OPTIONS: tuple[dict[str, Any], ...] = (
    {"image_size": 48},
    {"cls": "keep"},
    {"feature_layer": -1},
    {"feature_layer": 1},
    {"feature_layer": 0},
)


def assemble(
    tiny_dir: Path, *, encoder: str = "clip", llm: str = "llama_gqa", connector: Any = "mlp", **options: Any
) -> VisionLanguageModel:
    config = ModelConfig.model_validate(
        {
            "encoder": {"type": "hf", "path": str(build_encoder(encoder, tiny_dir / encoder)), **options},
            "connector": connector,
            "llm": {"type": "hf", "path": str(build_llm(llm, tiny_dir / llm))},
        }
    )
    model = build_model(config, dtype=torch.float32).eval()
    with torch.no_grad():  # as if every part had been trained
        generator = torch.Generator().manual_seed(5)
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def examples(model: VisionLanguageModel) -> list[Example]:
    vocabulary, tokens = model.llm.head.weight.shape[0], model.spec.tokens_per_view
    return [
        random_example(
            tokens=n, images=i, tokens_per_view=tokens, image_size=model.spec.image_size, vocabulary=vocabulary, seed=n
        )
        for n, i in ((12, 1), (7, 0), (9, 2))
    ]


def exported_logits(folder: Path, model: VisionLanguageModel, sample: Example) -> Tensor:
    from transformers import LlavaForConditionalGeneration

    llava, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.where(sample.ids < 0, llava.config.image_token_id, sample.ids)[None]
    images = (sample.pixels.float() / 255 - model.image_mean) / model.image_std
    with torch.no_grad():
        out = llava.eval()(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=images if len(images) else None
        )
    return out.logits[0, :, : model.llm.head.weight.shape[0]]


def assert_parity(model: VisionLanguageModel, folder: Path) -> None:
    samples = examples(model)
    with torch.no_grad():
        together = model.logits(packed(samples)).split([len(s.ids) for s in samples])
        apart = [model.logits(packed([sample])) for sample in samples]
    for sample, row, alone in zip(samples, together, apart, strict=True):
        expected = exported_logits(folder, model, sample)
        assert expected.std() > 0.1
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(alone, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_logits_equal_for_every_encoder_family(encoder: str, tiny_dir: Path, tmp_path: Path) -> None:
    model = assemble(tiny_dir, encoder=encoder)
    export_hf(model, tmp_path / "x")
    assert_parity(model, tmp_path / "x")


@pytest.mark.parametrize("llm", LLMS)
def test_logits_equal_for_every_language_model_family(llm: str, tiny_dir: Path, tmp_path: Path) -> None:
    model = assemble(tiny_dir, llm=llm)
    export_hf(model, tmp_path / "x")
    assert_parity(model, tmp_path / "x")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_logits_equal_for_every_feature_option(options: dict[str, Any], tiny_dir: Path, tmp_path: Path) -> None:
    model = assemble(tiny_dir, **options)
    export_hf(model, tmp_path / "x")
    assert_parity(model, tmp_path / "x")


@pytest.mark.parametrize("activation", ["gelu_tanh", "silu"])
def test_logits_equal_for_every_activation(activation: str, tiny_dir: Path, tmp_path: Path) -> None:
    model = assemble(tiny_dir, connector={"type": "mlp", "activation": activation})
    export_hf(model, tmp_path / "x")
    assert_parity(model, tmp_path / "x")


def test_logits_equal_after_adapters_are_merged(tiny_dir: Path, tmp_path: Path) -> None:
    model = assemble(tiny_dir)
    lora = {"mode": "lora", "rank": 4, "alpha": 8}
    apply_tuning(model, TuningConfig.model_validate({"vision": lora, "llm": lora}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    with pytest.raises(ExportError, match="adapters: merge them first"):
        export_hf(model, tmp_path / "x")
    merge_lora(model)
    export_hf(model, tmp_path / "x")
    assert_parity(model.eval(), tmp_path / "x")


def test_what_was_exported_can_be_trained_further(tiny_dir: Path, tmp_path: Path) -> None:
    model = assemble(tiny_dir)
    export_hf(model, tmp_path / "x")
    again = assemble(tiny_dir)
    again.connector.requires_grad_(False).apply(lambda m: [p.zero_() for p in m.parameters(recurse=False)])
    assert initialise(again, str(tmp_path / "x")) == {"connector", "llm", "embeddings"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_the_folder_has_the_published_layout_and_names_no_local_path(tiny_dir: Path, tmp_path: Path) -> None:
    model = assemble(tiny_dir)
    export_hf(model, tmp_path / "x", template=TEMPLATES.get("v1")())
    names = WeightFiles(tmp_path / "x").names()
    assert "vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight" in names
    assert "language_model.model.layers.0.mlp.up_proj.weight" in names
    assert {n.split(".")[0] for n in names} == {"vision_tower", "multi_modal_projector", "language_model"}
    config = json.loads((tmp_path / "x" / "config.json").read_text(encoding="utf-8"))
    assert (config["vision_feature_layer"], config["image_token_index"]) == (-2, 384)
    assert (config["text_config"]["vocab_size"], config["vision_config"]["num_hidden_layers"]) == (448, 4)
    for file in (tmp_path / "x").glob("*.json*"):
        assert str(tiny_dir) not in file.read_text(encoding="utf-8"), file.name
    with pytest.raises(ExportError, match="not empty"):
        export_hf(model, tmp_path / "x")


def test_what_llava_has_no_place_for_is_named(tiny_dir: Path, tmp_path: Path) -> None:
    def reasons(**parts: Any) -> str:
        return " ".join(why_not(assemble(tiny_dir, **parts)))

    assert why_not(assemble(tiny_dir)) == []
    assert "connector: type linear" in reasons(connector="linear")
    assert "connector: depth 3" in reasons(connector={"type": "mlp", "depth": 3})
    qformer = {"type": "qformer", "num_queries": 4, "width": 16, "layers": 1, "heads": 2}
    assert "connector: type qformer" in reasons(connector=qformer)
    assert "output layer has a bias" in reasons(llm="phi")
    assert "caps its logits" in reasons(llm="gemma2")
    assert "final_norm" in reasons(final_norm=True)
    assert "4 prefix tokens" in reasons(encoder="dinov2_with_registers")
    assert "flattened patches" in reasons(encoder="siglip2_naflex")
    assert "Blip2VisionConfig" in reasons(encoder="blip2_vision")
    for kind, folder in (
        ("timm", build_timm(tiny_dir / "timm")),
        ("open_clip", build_open_clip(tiny_dir / "open_clip")),
    ):
        llm = build_llm("llama_gqa", tiny_dir / "llama_gqa")
        config = {
            "encoder": {"type": kind, "model": f"local-dir:{folder}"},
            "connector": "mlp",
            "llm": {"type": "hf", "path": str(llm)},
        }
        model = build_model(ModelConfig.model_validate(config), dtype=torch.float32)
        with pytest.raises(ExportError, match=f"encoder: type {kind} is not a transformers vision model"):
            export_hf(model, tmp_path / kind)
        assert not (tmp_path / kind).exists()


TURNS = (
    Turn("user", "<image>\nWhat is in the picture?"),
    Turn("assistant", "A red seven."),
    Turn("user", "How many digits are there?"),
    Turn("assistant", "Two."),
)


@pytest.mark.parametrize("name", ["v0", "v1", "llama2", "llama3", "mistral", "chatml", "plain"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_exported_chat_template_writes_the_ids_of_training(
    name: str, system: str | None, tiny_dir: Path, tmp_path: Path
) -> None:
    from transformers import AutoProcessor

    model = assemble(tiny_dir)
    template = TEMPLATES.get(name)(**({"system": system} if system else {}))
    export_hf(model, tmp_path / "x", template=template)
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "x")
    tokenizer = SampleTokenizer(model.spec, DataConfig.model_validate({"template": template.model_dump()}))
    picture = Image.new("RGB", (40, 30), "red")
    for turns in (TURNS[:1], TURNS[:3]) if name != "plain" else (TURNS[:1],):
        ours = tokenizer.prompt(turns, ["a.png"])
        as_text = [{"role": t.role, "content": t.text} for t in turns]
        parts = [{"type": "image", "image": picture}, {"type": "text", "text": turns[0].text.removeprefix("<image>\n")}]
        as_parts = [{"role": "user", "content": parts}, *as_text[1:]]
        prompt = processor.apply_chat_template(as_text, add_generation_prompt=True)
        assert processor.apply_chat_template(as_parts, add_generation_prompt=True) == prompt
        theirs = processor(text=prompt, images=[picture], return_tensors="pt").input_ids[0]
        image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
        assert theirs.tolist() == np.where(ours.is_image, image_id, ours.input_ids).tolist()
        direct = processor.apply_chat_template(
            as_parts, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert direct["input_ids"][0].tolist() == theirs.tolist()


def test_the_exported_template_continues_a_conversation_as_training_wrote_it(tiny_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    model = assemble(tiny_dir)
    for name in ("v1", "llama2", "chatml", "llama3"):
        template = TEMPLATES.get(name)()
        export_hf(model, tmp_path / name, template=template)
        processor: Any = AutoProcessor.from_pretrained(tmp_path / name)
        tokenizer = SampleTokenizer(model.spec, DataConfig.model_validate({"template": {"type": name}}))
        ours = tokenizer.tokenize(Sample("0", "s", TURNS, ("a.png",)))
        text = processor.apply_chat_template([{"role": t.role, "content": t.text} for t in TURNS])
        theirs = processor(text=text, images=[Image.new("RGB", (9, 9))], return_tensors="pt").input_ids[0]
        assert theirs.tolist() == np.where(ours.is_image, 384, ours.input_ids).tolist()


SENTENCEPIECE = ("v0", "v1", "llama2", "mistral", "plain")
NATURAL = {
    "spm": SENTENCEPIECE,
    "spm_legacy": SENTENCEPIECE,
    "spm_prepend": SENTENCEPIECE,
    "tekken": ("v1", "mistral", "plain"),
    "gpt": ("v0", "v1", "llama2", "plain"),
    "chatml": ("chatml",),
}
"""Real tokenizers with the templates that have their special tokens (or need none)."""


@pytest.mark.parametrize("name", NATURAL)
def test_the_chat_template_writes_the_ids_of_training_under_real_tokenizers(name: str, tmp_path: Path) -> None:
    from tests.chat_templates import processor_of
    from tests.data_fixtures import BUILDERS, make_spec

    BUILDERS[name](tmp_path)
    spec = make_spec(str(tmp_path))
    for kind in NATURAL[name]:
        template = TEMPLATES.get(kind)()
        ours = SampleTokenizer(spec, DataConfig.model_validate({"template": {"type": kind}}))
        processor, image_id = processor_of(spec, template)
        for turns in (TURNS[:1], TURNS[:3], TURNS) if kind != "plain" else (TURNS[:1],):
            open_ended = len(turns) % 2 == 1
            wanted = ours.prompt(turns, ["a"]) if open_ended else ours.tokenize(Sample("0", "s", turns, ("a",)))
            messages = [{"role": t.role, "content": t.text} for t in turns]
            text = processor.apply_chat_template(messages, add_generation_prompt=open_ended)
            ids = processor(text=text, images=[Image.new("RGB", (9, 9))]).input_ids[0]
            assert list(ids) == np.where(wanted.is_image, image_id, wanted.input_ids).tolist(), kind


@pytest.mark.parametrize("policy", ["pad", "crop", "squash"])
def test_the_exported_processor_makes_the_pixels_of_training(policy: Any, tiny_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    model = assemble(tiny_dir)
    export_hf(model, tmp_path / "x", image_policy=policy)
    generator = np.random.default_rng(0)
    for width, height in ((64, 48), (30, 50), (32, 32)):
        file = tmp_path / f"{width}.png"
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file)
        view = torch.from_numpy(load_view(file, policy=policy, spec=model.spec, exact=True)).float()
        ours = (view / 255 - model.image_mean[0]) / model.image_std[0]
        processor: Any = AutoImageProcessor.from_pretrained(tmp_path / "x", backend="pil")
        theirs = processor(Image.open(file), return_tensors="pt").pixel_values[0]
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_answers_end_where_the_template_ends_them(tiny_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = assemble(tiny_dir)
    export_hf(model, tmp_path / "x", template=TEMPLATES.get("v1")())
    llava: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path / "x")
    assert llava.generation_config.eos_token_id == [1]
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "x")
    inputs = processor(text="USER: <image>\nHi ASSISTANT:", images=[Image.new("RGB", (9, 9))], return_tensors="pt")
    out = llava.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert inputs.input_ids.shape[1] < out.shape[1] <= inputs.input_ids.shape[1] + 5
