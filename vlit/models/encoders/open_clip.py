"""``type: open_clip``: the vision tower of any open_clip model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from torch import nn

from vlit.errors import ModelError
from vlit.models.encoders._intermediates import IntermediateEncoder, TowerStructure, find_structure, prune
from vlit.models.foreign import reads_model
from vlit.models.interfaces import EncoderConfig, EncoderSpec
from vlit.registry import ENCODERS


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip logs on the root logger, random weights even when only shapes are wanted; errors are raised as well."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(disabled)


@ENCODERS.register("open_clip")
class OpenClipEncoderConfig(EncoderConfig):
    """The vision tower of any open_clip model."""

    type: str = "open_clip"
    model: str
    """open_clip name (`ViT-L-14-336`), `hf-hub:<id>` or `local-dir:<folder>` (both bring their weights)."""
    pretrained: str | None = None
    """Tag (`openai`, `laion2b_s32b_b82k`) or weights file of a named model."""
    feature_layer: int = -2
    """Feature by number: 1 = output of the first block, -1 = of the last before any final norm."""
    cls: Literal["drop", "keep"] = "drop"
    """`drop` leaves out all prefix tokens (CLS and registers), `keep` passes them on before the patches."""
    final_norm: bool = False
    """Apply the model's final norm to the features."""
    image_size: int | None = None
    """Side of the square input in pixels. Another size than the model's own resizes its position table once."""

    @reads_model("model.encoder.model", attribute="model")
    def spec(self) -> EncoderSpec:
        return self._inspect()[0]

    @reads_model("model.encoder.model", attribute="model")
    def build(self, *, dtype: torch.dtype) -> IntermediateEncoder:  # type: ignore[override]
        spec, structure = self._inspect()
        tower = self._tower(load_weights=True)
        prune(tower, structure.index, final_norm=self.final_norm)
        return IntermediateEncoder(
            tower.to(dtype), structure, final_norm=self.final_norm, keep_prefix=self.cls == "keep", spec=spec
        )

    def build_empty(self, *, dtype: torch.dtype) -> IntermediateEncoder:
        spec, structure = self._inspect()
        with torch.device("meta"):
            tower = self._tower(load_weights=False)
        if not hasattr(tower, "prune_intermediate_layers"):
            tower = getattr(tower, "trunk", tower)
        prune(tower, structure.index, final_norm=self.final_norm)
        return IntermediateEncoder(
            tower.to(dtype), structure, final_norm=self.final_norm, keep_prefix=self.cls == "keep", spec=spec
        )

    def _inspect(self) -> tuple[EncoderSpec, TowerStructure]:
        import open_clip

        named = not self.model.startswith(("hf-hub:", "local-dir:"))
        if named and self.pretrained is None:
            raise ModelError(
                f'model.encoder.pretrained: not set, "{self.model}" would stay random. Give a weights file or one of '
                f"the tags: {', '.join(open_clip.list_pretrained_tags_by_model(self.model)) or 'none known'}."
            )
        with torch.device("meta"):
            tower = self._tower(load_weights=False)
        preprocess: dict[str, Any] = dict(tower.preprocess_cfg)  # type: ignore[arg-type]
        if named:
            published = open_clip.get_pretrained_cfg(self.model, self.pretrained or "")
            preprocess |= {key: published[key] for key in ("mean", "std", "interpolation") if published.get(key)}
        size = self.image_size or self._own_size(tower)
        # A timm trunk keeps its own interface; around it open_clip only pools and projects.
        structure = find_structure(
            tower if hasattr(tower, "prune_intermediate_layers") else getattr(tower, "trunk", tower),
            feature_layer=self.feature_layer,
            image_size=size,
            final_norm=self.final_norm,
            name=self.model,
        )
        spec = EncoderSpec(
            image_size=size,
            image_mean=tuple(preprocess["mean"]),
            image_std=tuple(preprocess["std"]),
            tokens_per_view=structure.num_tokens - (structure.num_prefix if self.cls == "drop" else 0),
            width=structure.width,
            resample="bilinear" if preprocess["interpolation"] == "bilinear" else "bicubic",
        )
        return spec, structure

    def _own_size(self, tower: nn.Module) -> int:
        size: Any = tower.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        if height != width:
            raise ModelError(
                f'model.encoder.model: "{self.model}" reads {height}x{width} pixels, which is not square. '
                "Set model.encoder.image_size."
            )
        return int(height)

    def _tower(self, *, load_weights: bool) -> nn.Module:
        import open_clip

        try:
            with _quiet():
                clip = open_clip.create_model(
                    self.model,
                    pretrained=self.pretrained if load_weights else None,
                    load_weights=load_weights,
                    device="cpu" if load_weights else "meta",
                    require_pretrained=load_weights,
                    weights_only=True,
                    pretrained_text=False,
                    force_image_size=self.image_size,
                    force_patch_dropout=0.0,
                    force_quick_gelu=self._quick_gelu(),
                )
        except (RuntimeError, OSError, ValueError, KeyError, UnpicklingError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(
                f'model.encoder: open_clip cannot make "{self.model}" with weights "{self.pretrained}": {reason}'
            ) from error
        tower: nn.Module = clip.visual
        if load_weights and not hasattr(tower, "prune_intermediate_layers"):
            tower = getattr(tower, "trunk", tower)
        return tower

    def _quick_gelu(self) -> bool:
        """Whether the tag's weights were trained with QuickGELU; under GELU they give other features."""
        import open_clip

        return bool(open_clip.get_pretrained_cfg(self.model, self.pretrained or "").get("quick_gelu", False))
