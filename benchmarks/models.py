"""The models that are measured: CLIP + two-layer MLP + LLaMA of three sizes, with random weights.

Both sides of a comparison load the same folders, so they start from the same weights.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vlit.config.schema import ModelConfig


@dataclass(frozen=True)
class Size:
    """Widths and depths of one model size."""

    image_size: int
    patch_size: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    width: int
    layers: int
    heads: int
    ff: int
    vocabulary: int

    @property
    def image_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2


SIZES = {
    "tiny": Size(56, 14, 64, 2, 2, 128, 2, 2, 256, 1024),
    "small": Size(224, 14, 384, 6, 6, 512, 8, 8, 1376, 32_000),
    "7b": Size(336, 14, 1024, 24, 16, 4096, 32, 32, 11_008, 32_000),
}
"""``small`` is CLIP 384x6 at 224 px and LLaMA 512x8 with 32,000 words; ``7b`` is shaped like LLaVA-1.5-7B."""


def write_parts(size: Size, folder: Path) -> tuple[Path, Path]:
    """Save a random CLIP vision tower and a random LLaMA as ordinary Hugging Face folders; returns their paths."""
    from transformers import CLIPImageProcessor, CLIPVisionModel, LlamaForCausalLM

    torch.manual_seed(0)
    vision, llm = folder / "clip", folder / "llama"
    CLIPVisionModel(vision_config(size)).to(torch.bfloat16).save_pretrained(vision)
    CLIPImageProcessor(
        size={"shortest_edge": size.image_size}, crop_size={"height": size.image_size, "width": size.image_size}
    ).save_pretrained(vision)
    LlamaForCausalLM(text_config(size)).to(torch.bfloat16).save_pretrained(llm)
    return vision, llm


def vision_config(size: Size) -> Any:
    """CLIP's vision tower of this size."""
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=size.vision_width, intermediate_size=4 * size.vision_width, num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_heads, image_size=size.image_size, patch_size=size.patch_size,
    )  # fmt: skip


def text_config(size: Size) -> Any:
    """LLaMA of this size."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=size.ff, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.heads, max_position_embeddings=4096,
    )  # fmt: skip


def model_config(vision: Path, llm: Path, *, quantize: str = "none") -> ModelConfig:
    """vlit's configuration of the assembled model: features of the last block but one, as LLaVA takes them."""
    return ModelConfig.model_validate(
        {
            "encoder": {"type": "hf", "path": str(vision), "feature_layer": -2, "cls": "drop"},
            "connector": {"type": "mlp", "depth": 2},
            "llm": {"type": "hf", "path": str(llm), "quantize": quantize},
        }
    )


def sizes_as_dict() -> dict[str, dict[str, int]]:
    """For the machine-readable result."""
    return {name: asdict(size) for name, size in SIZES.items()}
