"""``type: timm``: any timm model that hands out its intermediate features."""

from __future__ import annotations

import sys
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from torch import nn

from vlit.errors import ModelError
from vlit.models.encoders._intermediates import IntermediateEncoder, TowerStructure, find_structure, prune
from vlit.models.foreign import reads_model
from vlit.models.interfaces import EncoderConfig, EncoderSpec
from vlit.registry import ENCODERS


@ENCODERS.register("timm")
class TimmEncoderConfig(EncoderConfig):
    """Any timm model with intermediate features."""

    type: str = "timm"
    model: str
    """timm name (`vit_large_patch14_reg4_dinov2.lvd142m`), `hf-hub:<id>` or `local-dir:<folder>`."""
    checkpoint: str | None = None
    """Weights file (`.safetensors`, `.pth`) to load instead of the published ones."""
    pretrained: bool = True
    """Load the weights that belong to the name. Ignored when `checkpoint` is given."""
    feature_layer: int = -2
    """Feature by number: 1 = output of the first block, -1 = of the last before any final norm. Stages, for a CNN."""
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
        if self.checkpoint is not None:
            tower, missing = self._from_file(Path(self.checkpoint))
        elif self.pretrained:
            tower, missing = self._create(pretrained=True), set()
        else:
            raise ModelError(
                f'model.encoder: "{self.model}" with pretrained: false and no checkpoint would stay random. Set one.'
            )
        prune(tower, structure.index, final_norm=self.final_norm)
        if lost := sorted(missing & set(tower.state_dict())):
            raise ModelError(
                f"model.encoder.checkpoint: {self.checkpoint} lacks {len(lost)} tensors of {self.model}, "
                f"the first is {lost[0]}. They would stay random: give the checkpoint of this model."
            )
        return IntermediateEncoder(
            tower.to(dtype), structure, final_norm=self.final_norm, keep_prefix=self.cls == "keep", spec=spec
        )

    def build_empty(self, *, dtype: torch.dtype) -> IntermediateEncoder:
        spec, structure = self._inspect()
        with torch.device("meta"):
            tower = self._create(pretrained=False, num_classes=0)
        prune(tower, structure.index, final_norm=self.final_norm)
        return IntermediateEncoder(
            tower.to(dtype), structure, final_norm=self.final_norm, keep_prefix=self.cls == "keep", spec=spec
        )

    def _inspect(self) -> tuple[EncoderSpec, TowerStructure]:
        from timm.data import resolve_model_data_config

        with torch.device("meta"):
            tower = self._create(pretrained=False, num_classes=0)
        data = resolve_model_data_config(tower)
        if data["input_size"][1] != data["input_size"][2] and self.image_size is None:
            raise ModelError(
                f'model.encoder.model: "{self.model}" reads {data["input_size"][1:]} pixels, which is not square. '
                "Set model.encoder.image_size."
            )
        size = self.image_size or data["input_size"][1]
        structure = find_structure(
            tower, feature_layer=self.feature_layer, image_size=size, final_norm=self.final_norm, name=self.model
        )
        spec = EncoderSpec(
            image_size=size,
            image_mean=tuple(data["mean"]),
            image_std=tuple(data["std"]),
            tokens_per_view=structure.num_tokens - (structure.num_prefix if self.cls == "drop" else 0),
            width=structure.width,
            resample="bilinear" if data["interpolation"] == "bilinear" else "bicubic",
        )
        return spec, structure

    def _create(self, **arguments: Any) -> nn.Module:
        import timm

        try:
            if self.image_size is not None:
                with torch.device("meta"):
                    fixed_size = hasattr(timm.create_model(self.model, pretrained=False), "set_input_size")
                if fixed_size:  # a convolutional network takes any size as it is
                    arguments["img_size"] = self.image_size
            return timm.create_model(self.model, **arguments)
        except (RuntimeError, OSError, ValueError, TypeError, AssertionError, UnpicklingError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(
                f'model.encoder.model: timm cannot make "{self.model}": {reason}. See timm.list_models(); without '
                "a network give a weights file as model.encoder.checkpoint."
            ) from error

    def _from_file(self, file: Path) -> tuple[nn.Module, set[str]]:
        """The model with the weights of ``file``, converted and resized by timm's rules, and what the file lacks."""
        from safetensors import SafetensorError
        from timm.models import load_state_dict

        if not file.is_file():
            raise ModelError(f'model.encoder.checkpoint: no file "{file}". Check the path.')
        tower = self._create(pretrained=False, num_classes=0)
        try:
            state = load_state_dict(str(file), weights_only=True)
        except (RuntimeError, OSError, UnpicklingError, SafetensorError) as error:
            raise ModelError(
                f"model.encoder.checkpoint: {file} is not a file of plain tensors ({' '.join(str(error).split())[:120]}). "
                "Convert it to safetensors."
            ) from error
        convert = getattr(sys.modules[type(tower).__module__], "checkpoint_filter_fn", None)
        if convert is not None:
            state = convert(state, tower)
        try:
            missing, _ = tower.load_state_dict(state, strict=False)
        except RuntimeError as error:
            raise ModelError(
                f"model.encoder.checkpoint: {file} does not fit {self.model}: {' '.join(str(error).split())[:300]}"
            ) from error
        return tower, set(missing)
