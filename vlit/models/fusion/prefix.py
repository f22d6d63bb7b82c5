"""Prefix splice: vision tokens stand in the text where `<image>` stood (LLaVA, MiniGPT-4, Qwen-VL)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vlit.config.component import ComponentConfig
from vlit.kernels.splice import splice_tokens
from vlit.registry import FUSIONS
from vlit.types import VisionTokens


class PrefixFusion(nn.Module):
    """Has no weights. A fusion prepares the decoder's input and the keyword arguments its layers receive."""

    def forward(
        self, text_TD: Tensor, vision: VisionTokens | None, is_image_T: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        """Text embeddings ``[T, D]`` and vision tokens ``[V, S, D]`` -> decoder input ``[T, D]`` and layer arguments."""
        if vision is None:
            return text_TD, {}
        return splice_tokens(text_TD, vision.tokens.flatten(0, 1), is_image_T), {}


@FUSIONS.register("prefix")
class PrefixFusionConfig(ComponentConfig):
    """Vision tokens take the place of `<image>` in the text."""

    type: str = "prefix"

    def build(self, **kwargs: Any) -> PrefixFusion:
        return PrefixFusion()
