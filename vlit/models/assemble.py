"""Encoder + connector + fusion + language model -> one module that turns packed batches into a loss.

Shape letters: T tokens of a packed row, L supervised positions, V views, S vision tokens a view, D LLM width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlit.config.schema import ModelConfig
from vlit.kernels.attention import Backend, segments_of
from vlit.kernels.cross_entropy import CrossEntropy
from vlit.models.attention import packed_arguments, register, register_encoder
from vlit.models.interfaces import Connector, Encoder
from vlit.models.llms.hf import HFLanguageModel
from vlit.types import ModelSpec, PackedBatch, VisionTokens


def model_spec(config: ModelConfig) -> ModelSpec:
    """What the data floor needs to know, from configurations alone; checks that the parts fit each other."""
    encoder = config.encoder.spec()
    config.llm.width()  # a missing language model is an error now, not after the data is read
    return ModelSpec(
        tokenizer_path=config.llm.tokenizer_path(),
        image_size=encoder.image_size,
        image_mean=encoder.image_mean,
        image_std=encoder.image_std,
        tokens_per_view=config.connector.num_tokens(encoder.tokens_per_view),
        resample=encoder.resample,
        trust_remote_code=getattr(config.llm, "trust_remote_code", False),
        vocab_size=config.llm.vocab_size(),
        tokenizer_revision=getattr(config.llm, "revision", None)
        if getattr(config.llm, "tokenizer", None) is None
        else None,
    )


def build_model(config: ModelConfig, *, dtype: torch.dtype, seed: int = 0) -> VisionLanguageModel:
    """Load encoder and language model, make a fresh connector; all parts in ``dtype``, all parameters frozen.

    ``seed`` decides the connector's initial weights and nothing else.
    """
    spec = model_spec(config)
    encoder: Encoder = config.encoder.build(dtype=dtype)
    llm: HFLanguageModel = config.llm.build(dtype=dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        connector: Connector = config.connector.build(
            in_width=encoder.spec.width, out_width=llm.width, tokens_in=encoder.spec.tokens_per_view
        )
    fusion = config.fusion.build()
    model = VisionLanguageModel(config, spec, encoder, connector.to(dtype), fusion, llm)
    return model.requires_grad_(False)


def build_empty_model(config: ModelConfig, *, dtype: torch.dtype) -> VisionLanguageModel:
    """The model of :func:`build_model` on the meta device, from configurations alone: no weights are read or made."""
    spec = model_spec(config)
    encoder: Encoder = config.encoder.build_empty(dtype=dtype)
    llm: HFLanguageModel = config.llm.build_empty(dtype=dtype)
    connector: Connector = config.connector.build_empty(
        in_width=encoder.spec.width, out_width=llm.width, tokens_in=encoder.spec.tokens_per_view
    )
    model = VisionLanguageModel(config, spec, encoder, connector.to(dtype), config.fusion.build(), llm)
    return model.to("meta").requires_grad_(False)


class VisionLanguageModel(nn.Module):
    """Four parts and nothing else; each parameter lives in exactly one of them."""

    def __init__(
        self,
        config: ModelConfig,
        spec: ModelSpec,
        encoder: Encoder,
        connector: Connector,
        fusion: nn.Module,
        llm: HFLanguageModel,
    ) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.encoder, self.connector, self.fusion, self.llm = encoder, connector, fusion, llm
        self.attention_backend: Backend = "auto"
        self.z_loss = 0.0
        self.vision_on_every_row = False
        """Encode a blank picture where a row has none although nothing there is trained: sharded weights must be gathered on
        all ranks alike."""
        self._recompute = "none"
        self.image_mean: Tensor
        self.image_std: Tensor
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (spec.image_mean, spec.image_std))
        self.register_buffer("image_mean", mean, persistent=False)
        self.register_buffer("image_std", std, persistent=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a process that did not build it, a model must still find its attention functions."""
        super().__setstate__(state)
        register()
        register_encoder()

    @property
    def device(self) -> torch.device:
        return self.image_mean.device

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype (that of the language model's weights)."""
        return next(self.llm.parameters()).dtype

    def encode_images(self, pixels_V3HW: Tensor) -> VisionTokens:
        """uint8 pixels -> vision tokens ``[V, S, D]``. No graph is kept through a frozen encoder."""
        pixels = (pixels_V3HW.float() / 255.0 - self.image_mean) / self.image_std
        tuned = any(p.requires_grad for p in self.encoder.parameters())
        with torch.set_grad_enabled(tuned and torch.is_grad_enabled()):
            features = self.encoder(pixels.to(self.dtype))
        return self.connector(features)

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """Final hidden states ``[T, D]`` of a packed row; samples do not see each other."""
        text_TD = self.llm.embed(batch.input_ids)
        vision = None
        if batch.num_images:
            vision = self.encode_images(batch.pixels)
        elif self.vision_on_every_row or self._vision_is_tuned():
            # before the fusion, so that forward and backward pass the modules in the same order on every rank
            text_TD = text_TD + self._zero_weighted_vision().to(text_TD.dtype)
        embeds_TD, layer_arguments = self.fusion(text_TD, vision, batch.is_image)
        segments = segments_of(batch)
        return self.llm.hidden_states(
            embeds_TD.unsqueeze(0),
            position_ids=batch.position_ids.unsqueeze(0),
            **packed_arguments(segments, batch.input_ids.device, self.attention_backend),
            **layer_arguments,
        )[0]

    def forward(self, batch: PackedBatch) -> CrossEntropy:
        """Cross-entropy over the batch's supervised positions: its sum (fp32 scalar) and each position's share."""
        hidden_TD = self.hidden_states(batch)
        supervised_LD = hidden_TD.index_select(0, batch.supervised_positions)
        return self.llm.loss(supervised_LD, batch.targets, z_loss=self.z_loss)

    def logits(self, batch: PackedBatch) -> Tensor:
        """All logits ``[T, V]`` (tests and inspection; training never materialises them)."""
        return self.llm.logits(self.hidden_states(batch))

    def _vision_is_tuned(self) -> bool:
        return any(p.requires_grad for part in (self.encoder, self.connector) for p in part.parameters())

    def _zero_weighted_vision(self) -> Tensor:
        """Zero that depends on every vision weight, so text-only batches keep ranks in step and add no tokens."""
        size = self.spec.image_size
        blank = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=self.device)
        return 0.0 * self.encode_images(blank).tokens.sum()

    def train(self, mode: bool = True) -> VisionLanguageModel:
        """Frozen parts stay in eval mode: a frozen encoder must not drop out or drop paths.

        So does every batch normalisation, as in detectors: its statistics are those of pretraining. Statistics of the batch
        would make a picture's features depend on what shares its row or rank, and no checkpoint holds running ones.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        for part in (self.encoder, self.connector, self.llm):
            if not any(p.requires_grad for p in part.parameters()):
                part.eval()
        for layer in self.llm.layers if mode and self._recompute != "none" else ():
            layer.training = True  # transformers recomputes only in training mode; its children stay as they are
        return self

    def set_gradient_checkpointing(self, policy: str) -> None:
        """Recompute activations in the backward pass, in the language model and in a trained encoder.

        Args:
            policy: ``none``, ``selective`` (keep matrix products and attention) or ``full`` (keep each block's input).
        """
        if policy == self._recompute:
            return
        self._recompute = policy
        self.llm.set_gradient_checkpointing(policy)
        if any(p.requires_grad for p in self.encoder.parameters()):
            self.encoder.set_gradient_checkpointing(policy)

    def compile_blocks(self) -> None:
        """Compile the blocks of language model and encoder with torch.compile; lengths stay symbolic, so rows of any length
        share one graph.
        """
        for block in (*self.llm.layers, *self.encoder.blocks):
            block.compile(dynamic=True)
