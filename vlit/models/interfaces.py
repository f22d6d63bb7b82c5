"""What an encoder, a connector, a language model and a fusion must offer. Nothing else is assumed about them.

Shape letters: V views, S vision tokens a view, C encoder width, D width of the language model, T tokens of a packed row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlit.config.component import ComponentConfig
from vlit.types import VisionTokens


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """What can be known of an encoder from its configuration alone (no weights are read)."""

    image_size: int  # pixels, square
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    tokens_per_view: int  # S, after the CLS policy
    width: int  # C
    resample: Literal["bicubic", "bilinear"] = "bicubic"


class Encoder(nn.Module):
    """pixels [V, 3, H, W] (normalised, any float dtype) -> VisionTokens [V, S, C]. Holds no layer past the feature layer."""

    spec: EncoderSpec

    @property
    def blocks(self) -> list[nn.Module]:
        """Transformer blocks: the longest module list."""
        return list(max((m for m in self.modules() if isinstance(m, nn.ModuleList)), key=len, default=()))

    def forward(self, pixels_V3HW: Tensor) -> VisionTokens:
        raise NotImplementedError(f"{type(self).__name__} must implement forward")

    def set_gradient_checkpointing(self, policy: str) -> None:
        """Recompute activations in the backward pass: ``none``, ``selective`` or ``full`` (only called when the encoder
        is trained; an encoder that cannot recompute in part does so in full).
        """
        raise NotImplementedError(f"{type(self).__name__} must implement set_gradient_checkpointing")


class EncoderConfig(ComponentConfig):
    """Config of an encoder: ``spec`` answers without weights, ``build`` loads them."""

    def spec(self) -> EncoderSpec:
        raise NotImplementedError

    def dropouts(self) -> dict[str, float]:
        """Dropout settings above 0, read from the configuration alone."""
        return {}

    def build(self, *, dtype: torch.dtype) -> Encoder:  # type: ignore[override]
        raise NotImplementedError

    def build_empty(self, *, dtype: torch.dtype) -> Encoder:
        """The module that ``build`` makes, on the meta device; a subclass makes it without reading weights."""
        return self.build(dtype=dtype).to("meta")


class Connector(nn.Module):
    """VisionTokens [V, S, C] -> VisionTokens [V, S', D]. Built with freshly initialised weights in fp32."""

    def forward(self, vision: VisionTokens) -> VisionTokens:
        raise NotImplementedError(f"{type(self).__name__} must implement forward")


class ConnectorConfig(ComponentConfig):
    """Config of a connector."""

    def num_tokens(self, tokens_in: int) -> int:
        """S' for S tokens a view; ConfigError when the connector cannot take that many."""
        raise NotImplementedError

    def build(self, *, in_width: int, out_width: int, tokens_in: int) -> Connector:  # type: ignore[override]
        raise NotImplementedError

    def build_empty(self, *, in_width: int, out_width: int, tokens_in: int) -> Connector:
        """The module that ``build`` makes, on the meta device."""
        with torch.device("meta"):
            return self.build(in_width=in_width, out_width=out_width, tokens_in=tokens_in)


class LanguageModel(nn.Module):
    """A causal decoder split into the three pieces training needs: embedding, trunk, head.

    ``hf`` is the transformers model itself; nothing of it is subclassed or patched.
    """

    hf: nn.Module
    width: int

    def embed(self, input_ids: Tensor) -> Tensor:
        raise NotImplementedError

    def hidden_states(self, embeds_BTD: Tensor, **kwargs: Any) -> Tensor:
        raise NotImplementedError


class LLMConfig(ComponentConfig):
    """Config of a language model and its tokenizer."""

    def width(self) -> int:
        """D, read from the configuration alone."""
        raise NotImplementedError

    def vocab_size(self) -> int | None:
        """Token embeddings, read from the configuration alone; None when that does not say."""
        return None

    def tokenizer_path(self) -> str:
        raise NotImplementedError

    def dropouts(self) -> dict[str, float]:
        """Dropout settings above 0, read from the configuration alone."""
        return {}

    def build(self, *, dtype: torch.dtype) -> LanguageModel:  # type: ignore[override]
        raise NotImplementedError

    def build_empty(self, *, dtype: torch.dtype) -> LanguageModel:
        """The module that ``build`` makes, on the meta device; a subclass makes it without reading weights."""
        return self.build(dtype=dtype).to("meta")
