"""What timm and open_clip towers share: ``forward_intermediates``, pruning, and their shapes without weights."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlit.errors import ModelError
from vlit.models.encoders._hf_model import resolve_layer
from vlit.models.interfaces import Encoder, EncoderSpec
from vlit.types import VisionTokens


def read_features(tower: nn.Module, pixels_V3HW: Tensor, *, index: int, norm: bool) -> tuple[Tensor, int]:
    """Output of block ``index`` as [V, prefix + S, C], and how many prefix tokens it starts with.

    The patches of a feature map come row by row; a convolutional network's stage is a map without prefix tokens.
    """
    arguments: dict[str, Any] = {"indices": [index], "intermediates_only": True, "output_fmt": "NCHW"}
    known = inspect.signature(tower.forward_intermediates).parameters  # type: ignore[arg-type]
    if "normalize_intermediates" in known:  # open_clip
        out: Any = tower.forward_intermediates(  # type: ignore[operator]
            pixels_V3HW, normalize_intermediates=norm, output_extra_tokens=True, **arguments
        )
        features, prefix = out["image_intermediates"][0], out.get("image_intermediates_prefix")
        prefix = prefix[0] if prefix else None
    else:
        if "return_prefix_tokens" in known:
            arguments["return_prefix_tokens"] = True
        out = tower.forward_intermediates(pixels_V3HW, norm=norm, **arguments)  # type: ignore[operator]
        features, prefix = out[0] if isinstance(out[0], tuple) else (out[0], None)
    tokens_VSC = features.flatten(2).transpose(1, 2)
    if prefix is None:
        return tokens_VSC, 0
    return torch.cat([prefix, tokens_VSC], dim=1), prefix.shape[1]


@dataclass(frozen=True, slots=True)
class TowerStructure:
    """What a tower without weights shows once it is pruned for the feature layer."""

    index: int  # block (or stage) whose output is the feature
    num_tokens: int  # a view, prefix tokens included
    num_prefix: int
    width: int
    unused_parameters: tuple[str, ...]


def find_structure(
    tower: nn.Module, *, feature_layer: int, image_size: int, final_norm: bool, name: str
) -> TowerStructure:
    """Prune ``tower`` (on the meta device) in place for ``feature_layer`` and report what is left.

    Raises:
        ModelError: the tower cannot be pruned, the layer is out of range or 0 (these libraries hand out block outputs
            only), or there is no final norm to apply.
    """
    if not hasattr(tower, "prune_intermediate_layers"):
        raise ModelError(f'model.encoder.model: "{name}" ({type(tower).__name__}) gives no intermediate layers.')
    tower.eval()
    pixels = torch.empty(1, 3, image_size, image_size, device="meta")
    with torch.no_grad():
        out = tower.forward_intermediates(pixels, intermediates_only=True, output_fmt="NCHW")  # type: ignore[operator]
    num_layers = len(out["image_intermediates"] if isinstance(out, dict) else out)
    index = resolve_layer(feature_layer, num_layers, key="model.encoder.feature_layer") - 1
    if index < 0:
        raise ModelError(
            f'model.encoder.feature_layer: {feature_layer} asks for the embeddings, which "{name}" does not hand out. '
            f"Use 1 to {num_layers}, or -{num_layers} to -1."
        )
    norm = getattr(tower, "norm", getattr(tower, "ln_post", None))
    if final_norm and not isinstance(getattr(norm, "weight", None), nn.Parameter):
        raise ModelError(f'model.encoder.final_norm: "{name}" has no norm after its blocks. Set it to false.')
    prune(tower, index, final_norm=final_norm)
    with torch.inference_mode(False), torch.enable_grad():
        features, num_prefix = read_features(tower, pixels, index=index, norm=final_norm)
        features.sum().backward()
    unused = tuple(n for n, p in tower.named_parameters() if p.requires_grad and p.grad is None)
    return TowerStructure(index, features.shape[1], num_prefix, features.shape[2], unused)


def prune(tower: nn.Module, index: int, *, final_norm: bool) -> None:
    """Remove the blocks after ``index``, pooling and classifier, and the final norm unless it is used."""
    tower.prune_intermediate_layers([index], prune_norm=not final_norm, prune_head=True)  # type: ignore[operator]


class IntermediateEncoder(Encoder):
    """A pruned timm or open_clip tower whose last block's output is the feature.

    Args:
        tower: the pruned module with ``forward_intermediates``.
        structure: what :func:`find_structure` reported for it.
        final_norm: apply the tower's own norm to the feature.
        keep_prefix: keep CLS and register tokens before the patches.
        spec: what the configuration promised.
    """

    def __init__(
        self, tower: nn.Module, structure: TowerStructure, *, final_norm: bool, keep_prefix: bool, spec: EncoderSpec
    ) -> None:
        super().__init__()
        for name in structure.unused_parameters:
            owner, _, leaf = name.rpartition(".")
            tower.get_submodule(owner)._parameters[leaf] = None
        self.tower = tower
        self.index = structure.index
        self.final_norm = final_norm
        self.keep_prefix = keep_prefix
        self.spec = spec

    def forward(self, pixels_V3HW: Tensor) -> VisionTokens:
        pixels = pixels_V3HW.to(next(self.tower.parameters()).dtype)
        tokens_VSC, num_prefix = read_features(self.tower, pixels, index=self.index, norm=self.final_norm)
        return VisionTokens(tokens_VSC if self.keep_prefix else tokens_VSC[:, num_prefix:])

    def set_gradient_checkpointing(self, policy: str) -> None:
        self.tower.set_grad_checkpointing(policy != "none")  # type: ignore[operator]
