"""Tiny real parts, saved as ordinary Hugging Face folders: what the tests assemble models from.

Every builder writes a folder that ``from_pretrained`` (or vlit's own encoders and language models) loads like a
published checkpoint; weights are drawn from a fixed seed, so the same call writes the same bytes. A folder that is
already complete is left alone. The session fixture ``tiny_dir`` (conftest) keeps one copy for the whole run::

    vision = build_encoder("clip", tiny_dir / "clip")
    llm = build_llm("llama", tiny_dir / "llama")

Vision parts: 32 px images, 8 px patches (16 patches), width 32, 4 blocks. Language models: width 64, 2 layers.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

IMAGE_SIZE = 32
PATCH_SIZE = 8
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
VISION_WIDTH = 32
VISION_LAYERS = 4
LLM_WIDTH = 64
VOCAB_SIZE = 384

VISION: dict[str, Any] = {
    "hidden_size": VISION_WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": VISION_LAYERS,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}
TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)

ENCODER_KINDS = (
    "clip", "clip_vision", "siglip", "siglip_vision", "siglip2", "siglip2_naflex", "dinov2", "dinov2_with_registers",
    "dinov3_vit", "vit", "blip2_vision",
)  # fmt: skip
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
LLM_KINDS = (
    "llama", "llama_gqa", "llama_tied", "mistral", "qwen2", "qwen3", "phi", "phi3", "gemma", "gemma2", "gemma3",
)  # fmt: skip

TOKENIZER_TEXT = """A chat between a curious user and an artificial intelligence assistant. The assistant gives
helpful, detailed, and polite answers to the user's questions. USER: What is in the picture? ASSISTANT: There is a red
seven on the left and a blue three on the right. How many digits are there? Two. Is the green digit an even number?
Yes, it is. What is the colour of the largest digit? The largest digit is yellow. Answer the question using a single
word or phrase. Describe the image in detail. ### Human: ### Assistant: system user assistant [INST] [/INST]
0 1 2 3 4 5 6 7 8 9 10 11 12"""


def _randomise(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter a non-trivial value: freshly built zero biases and unit scales would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, 0.1, generator=generator)
            parameter.copy_(parameter + noise.to(parameter.dtype))


def _complete(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _image_processor(folder: Path, kind: str, mean: tuple[float, ...], std: tuple[float, ...], *, crop: bool) -> None:
    size = {"shortest_edge": IMAGE_SIZE} if crop else {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    data: dict[str, Any] = {
        "image_processor_type": kind,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "size": size,
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
    if crop:
        data |= {"do_center_crop": True, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(data, indent=2), encoding="utf-8")


def _encoder_model(kind: str) -> nn.Module:
    import transformers as hf

    if kind == "clip":
        return hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24))
    if kind == "clip_vision":
        return hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION, projection_dim=24))
    if kind == "siglip":
        return hf.SiglipModel(hf.SiglipConfig(text_config=TEXT, vision_config=VISION))
    if kind == "siglip_vision":
        return hf.SiglipVisionModel(hf.SiglipVisionConfig(**VISION))
    if kind == "siglip2":  # published fixed-resolution SigLIP2 checkpoints declare model_type "siglip"
        return hf.SiglipModel(hf.SiglipConfig(text_config=TEXT | {"vocab_size": 80}, vision_config=VISION))
    if kind == "siglip2_naflex":
        vision = {k: v for k, v in VISION.items() if k != "image_size"} | {"num_patches": NUM_PATCHES}
        return hf.Siglip2Model(hf.Siglip2Config(text_config=TEXT, vision_config=vision))
    if kind == "dinov2":
        return hf.Dinov2Model(hf.Dinov2Config(**VISION, mlp_ratio=2))
    if kind == "dinov2_with_registers":
        return hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**VISION, mlp_ratio=2, num_register_tokens=3))
    if kind == "dinov3_vit":
        return hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**VISION, num_register_tokens=2))
    if kind == "vit":
        return hf.ViTModel(hf.ViTConfig(**VISION))
    if kind == "blip2_vision":
        return hf.Blip2VisionModel(hf.Blip2VisionConfig(**VISION))
    raise ValueError(f"no tiny encoder {kind!r}; known: {', '.join(ENCODER_KINDS)}")


def build_encoder(kind: str, folder: Path) -> Path:
    """Write a tiny vision model of ``kind`` (see ENCODER_KINDS) and its preprocessor_config.json; return ``folder``."""
    folder = Path(folder)
    if _complete(folder):
        return folder
    torch.manual_seed(0)
    model = _encoder_model(kind)
    _randomise(model)
    model.save_pretrained(folder)
    if kind.startswith("clip"):
        _image_processor(folder, "CLIPImageProcessor", CLIP_MEAN, CLIP_STD, crop=True)
    elif kind.startswith("siglip"):
        _image_processor(folder, "SiglipImageProcessor", HALF, HALF, crop=False)
    elif kind.startswith("dinov2"):
        _image_processor(folder, "BitImageProcessor", IMAGENET_MEAN, IMAGENET_STD, crop=True)
    elif kind == "dinov3_vit":
        _image_processor(folder, "DINOv3ViTImageProcessorFast", IMAGENET_MEAN, IMAGENET_STD, crop=False)
    elif kind == "vit":
        _image_processor(folder, "ViTImageProcessor", HALF, HALF, crop=False)
    else:
        _image_processor(folder, "BlipImageProcessor", CLIP_MEAN, CLIP_STD, crop=False)
    return folder


def build_tokenizer(
    folder: Path, *, vocab_size: int = VOCAB_SIZE, add_bos: bool = True, pad_token: str | None = None
) -> Path:
    """Train a byte-level BPE with specials ``<s>`` 0, ``</s>`` 1, ``<unk>`` 2; without a pad token unless given."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TOKENIZER_TEXT.splitlines(), trainer)
    if add_bos:
        bpe.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token=pad_token,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
    return folder


def _llm_model(kind: str, vocab_size: int) -> nn.Module:
    import transformers as hf

    base: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": LLM_WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    gqa = base | {"num_key_value_heads": 2}
    gemma = gqa | {"head_dim": 16, "tie_word_embeddings": True}
    window = {"sliding_window": 512}
    configs: dict[str, Any] = {
        "llama": lambda: hf.LlamaConfig(**base),
        "llama_wide": lambda: hf.LlamaConfig(**base | {"intermediate_size": 128}),  # 4 bit works on blocks of 64
        "llama_gqa": lambda: hf.LlamaConfig(**gqa),
        "llama_tied": lambda: hf.LlamaConfig(**base | {"tie_word_embeddings": True}),
        "mistral": lambda: hf.MistralConfig(**gqa, sliding_window=None),
        "qwen2": lambda: hf.Qwen2Config(**gqa),
        "qwen3": lambda: hf.Qwen3Config(**gqa | {"tie_word_embeddings": True}, head_dim=16),
        "phi": lambda: hf.PhiConfig(**base),
        "phi3": lambda: hf.Phi3Config(**gqa),
        "gemma": lambda: hf.GemmaConfig(**gemma),
        "gemma2": lambda: hf.Gemma2Config(**gemma, **window, query_pre_attn_scalar=16),
        "gemma3": lambda: hf.Gemma3TextConfig(**gemma, **window, query_pre_attn_scalar=16),
    }
    if kind not in configs:
        raise ValueError(f"no tiny language model {kind!r}; known: {', '.join(LLM_KINDS)}")
    return hf.AutoModelForCausalLM.from_config(configs[kind]())


def build_llm(kind: str, folder: Path, *, vocab_size: int = VOCAB_SIZE) -> Path:
    """Write a tiny causal LM (one of LLM_KINDS, or ``llama_wide``) with a real byte-level BPE tokenizer; return ``folder``."""
    folder = Path(folder)
    if _complete(folder):
        return folder
    torch.manual_seed(1)
    model = _llm_model(kind, vocab_size)
    _randomise(model, seed=1)
    model.save_pretrained(folder)
    # Qwen2's tokenizer class adds its own pad token outside this vocabulary unless one is declared: pad == eos here.
    build_tokenizer(folder, vocab_size=vocab_size, pad_token="</s>" if kind == "qwen2" else None)
    return folder


def build_blip2(folder: Path, *, num_queries: int = 5) -> Path:
    """Write a tiny Blip2ForConditionalGeneration (vision, Q-Former, OPT language model of width 64)."""
    import transformers as hf

    folder = Path(folder)
    if _complete(folder):
        return folder
    torch.manual_seed(2)
    config = hf.Blip2Config(
        vision_config=VISION,
        qformer_config={
            "hidden_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 40,
            "encoder_hidden_size": VISION_WIDTH,
            "cross_attention_frequency": 2,
            "vocab_size": 64,
        },
        text_config={
            "model_type": "opt",
            "vocab_size": VOCAB_SIZE,
            "hidden_size": LLM_WIDTH,
            "word_embed_proj_dim": LLM_WIDTH,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        },
        num_query_tokens=num_queries,
        image_token_index=VOCAB_SIZE - 1,
    )
    model = hf.Blip2ForConditionalGeneration(config)
    _randomise(model, seed=2)
    model.save_pretrained(folder)
    _image_processor(folder, "BlipImageProcessor", CLIP_MEAN, CLIP_STD, crop=False)
    return folder


def build_timm(folder: Path) -> Path:
    """Write a tiny timm ViT (named through ``local-dir:<folder>``, with CLS and two registers); return ``folder``."""
    import timm
    from safetensors.torch import save_file

    folder = Path(folder)
    if _complete(folder):
        return folder
    arguments = {"img_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "embed_dim": VISION_WIDTH, "depth": VISION_LAYERS}
    arguments |= {"num_heads": 4, "reg_tokens": 2}
    torch.manual_seed(3)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, **arguments)
    _randomise(model, seed=3)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 0,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, IMAGE_SIZE, IMAGE_SIZE],
            "num_classes": 0,
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "interpolation": "bicubic",
            "fixed_input_size": True,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def build_open_clip(folder: Path) -> Path:
    """Write a tiny open_clip model (named through ``local-dir:<folder>``): 4 blocks of width 64; return ``folder``."""
    import open_clip
    from safetensors.torch import save_file

    folder = Path(folder)
    weights = folder / "open_clip_model.safetensors"
    if weights.is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    vision = {
        "image_size": IMAGE_SIZE,
        "layers": VISION_LAYERS,
        "width": 64,
        "head_width": 16,
        "patch_size": PATCH_SIZE,
    }
    config = {
        "model_cfg": {
            "embed_dim": 24,
            "vision_cfg": vision,
            "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 4, "layers": 2},
        },
        "preprocess_cfg": {"mean": HALF, "std": HALF, "interpolation": "bilinear"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.manual_seed(4)
    clip = open_clip.CLIP(
        embed_dim=24,
        vision_cfg=open_clip.CLIPVisionCfg(**vision),
        text_cfg=open_clip.CLIPTextCfg(context_length=16, vocab_size=64, width=32, heads=4, layers=2),
    )
    _randomise(clip, seed=4)
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, weights)
    return folder
