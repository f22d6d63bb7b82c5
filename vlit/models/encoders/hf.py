"""``type: hf``: any transformers vision transformer, whole (its vision half is taken) or vision-only.

``feature_layer`` counts as transformers' ``hidden_states`` do: 0 = the embeddings, -1 = the output of the last block
before any final norm, -2 = the block before it (LLaVA's choice, arXiv:2304.08485 §4). Blocks past it are neither loaded
nor computed, and neither are pooling heads. The checkpoint must hold every weight that is kept: a tower that is
silently random is the costliest mistake of this field.
"""

from __future__ import annotations

import copy
import re
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlit.errors import ModelError
from vlit.models.attention import register_encoder
from vlit.models.encoders._hf_model import (
    PassThrough,
    VisionStructure,
    find_structure,
    own_image_size,
    patch_side,
    quiet_transformers,
    run_model,
    vision_class,
)
from vlit.models.foreign import reads_model
from vlit.models.hub import dropouts, read_config, set_recompute
from vlit.models.interfaces import Encoder, EncoderConfig, EncoderSpec
from vlit.models.trusted import load_pretrained
from vlit.registry import ENCODERS
from vlit.types import VisionTokens


class HfVisionEncoder(Encoder):
    """A transformers vision model cut at the feature layer.

    Args:
        model: the vision model; its ``last_hidden_state`` is the output of the last block it still holds.
        blocks: path of the block list inside ``model``.
        norm: norm applied to the features, or None.
        num_prefix: leading tokens (CLS, registers) to leave out.
        patch_size: patch side in pixels.
        spec: what the configuration promised; equal to what forward gives.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        blocks: str,
        norm: nn.Module | None,
        num_prefix: int,
        patch_size: int,
        spec: EncoderSpec,
    ) -> None:
        super().__init__()
        self.hf = model
        self.norm = norm
        self.blocks_name = blocks
        self.num_prefix = num_prefix
        self.patch_size = patch_size
        self.spec = spec
        self.train(False)

    def forward(self, pixels_V3HW: Tensor) -> VisionTokens:
        dtype = next(self.hf.parameters()).dtype
        hidden_VSC = run_model(self.hf, pixels_V3HW.to(dtype), self.patch_size)
        if self.norm is not None:
            hidden_VSC = self.norm(hidden_VSC)
        return VisionTokens(hidden_VSC[:, self.num_prefix :])

    def train(self, mode: bool = True) -> HfVisionEncoder:
        """Only the blocks of a *trained* encoder enter training mode.

        Outside the blocks training mode switches on random position shifts (DINOv3), which belong to pretraining; a
        frozen encoder must give the features that it will give at inference.
        """
        super().train(False)
        if mode and any(p.requires_grad for p in self.parameters()):
            self.hf.get_submodule(self.blocks_name).train(True)
        self.training = mode
        return self

    def set_gradient_checkpointing(self, policy: str) -> None:
        set_recompute(self.hf, policy)


@ENCODERS.register("hf")
class HfEncoderConfig(EncoderConfig):
    """Any transformers vision model."""

    type: str = "hf"
    path: str
    """Folder written by `save_pretrained`, or a model id of the Hugging Face Hub."""
    feature_layer: int = -2
    """Hidden state used as features: 0 = embeddings, -1 = output of the last block before any final norm."""
    cls: Literal["drop", "keep"] = "drop"
    """`drop` leaves out all prefix tokens (CLS and registers), `keep` passes them on before the patches."""
    final_norm: bool = False
    """Apply the model's final norm to the features."""
    image_size: int | None = None
    """Side of the square input in pixels. Another size than the checkpoint's own resizes its position table once."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""

    @reads_model("model.encoder.path")
    def spec(self) -> EncoderSpec:
        return self._spec(self._structure()[2])

    @reads_model("model.encoder.path")
    def build(self, *, dtype: torch.dtype) -> HfVisionEncoder:  # type: ignore[override]
        cls, config, structure = self._structure()
        model, missing = self._load(cls, config, structure.kept_layers, dtype)
        encoder = self._cut(model, config, structure, missing, cls.__name__)
        size = self.image_size or own_image_size(config, path=self.path)
        if size != own_image_size(config, path=self.path):
            resize_positions(model, config, image_size=size)
        return encoder

    @reads_model("model.encoder.path")
    def build_empty(self, *, dtype: torch.dtype) -> HfVisionEncoder:
        cls, config, structure = self._structure()
        held = copy.deepcopy(config)
        held.num_hidden_layers = max(structure.kept_layers, 1)
        if hasattr(held, "image_size"):
            held.image_size = self.image_size or own_image_size(config, path=self.path)
        options: dict[str, Any] = {}
        if getattr(cls, "_supports_attention_backend", False):
            options["attn_implementation"] = register_encoder()
        with torch.device("meta"), quiet_transformers():
            model = cls._from_config(held, dtype=dtype, **options)
        return self._cut(model, held, structure, set(), cls.__name__)

    def _cut(
        self, model: nn.Module, config: Any, structure: VisionStructure, missing: set[str], kind: str
    ) -> HfVisionEncoder:
        """Leave in ``model`` what the features need; ``missing`` are tensors that the checkpoint lacks."""
        norm = None
        for name in structure.after_blocks:
            if name == structure.final_norm and self.final_norm:
                norm = model.get_submodule(name)
            model.set_submodule(name, PassThrough())
        stack = model.get_submodule(structure.blocks)
        assert isinstance(stack, nn.ModuleList)
        del stack[structure.kept_layers :]
        for name in structure.unused_parameters:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._parameters[leaf] = None
        kept = set(model.state_dict())
        if norm is not None:
            kept |= {f"{structure.final_norm}.{name}" for name in norm.state_dict()}
        if lost := sorted(kept & missing):
            raise ModelError(
                f'model.encoder.path: "{self.path}" holds no weights for {len(lost)} of {len(kept)} tensors of its '
                f"{kind}, the first is {lost[0]}. They would stay random: give the complete checkpoint."
            )
        return HfVisionEncoder(
            model,
            blocks=structure.blocks,
            norm=norm,
            num_prefix=structure.num_prefix if self.cls == "drop" else 0,
            patch_size=patch_side(config),
            spec=self._spec(structure),
        )

    @reads_model("model.encoder.path")
    def load_whole(self, *, dtype: torch.dtype) -> nn.Module:
        """The transformers vision model with all its blocks, norms and heads, at ``image_size`` (for export)."""
        cls, config, structure = self._structure()
        model, _ = self._load(cls, config, structure.num_layers, dtype)
        size = self.image_size or own_image_size(config, path=self.path)
        if size != own_image_size(config, path=self.path):
            resize_positions(model, config, image_size=size)
        return model

    def _structure(self) -> tuple[Any, Any, VisionStructure]:
        whole = self._config()
        cls, config = vision_class(whole, path=self.path, trust_remote_code=self.trust_remote_code)
        size = self.image_size or own_image_size(config, path=self.path)
        structure = find_structure(cls, config, feature_layer=self.feature_layer, image_size=size, path=self.path)
        if self.final_norm and structure.final_norm not in structure.after_blocks:
            raise ModelError(
                f'model.encoder.final_norm: "{self.path}" ({cls.__name__}) has no norm after the blocks. Set it false.'
            )
        return cls, config, structure

    @reads_model("model.encoder.path")
    def dropouts(self) -> dict[str, float]:
        config = self._config()
        return dropouts(getattr(config, "vision_config", None) or config)

    def _config(self) -> Any:
        with quiet_transformers():
            return read_config(
                self.path,
                key="model.encoder.path",
                revision=self.revision,
                trust_remote_code=self.trust_remote_code,
            )

    def _spec(self, structure: VisionStructure) -> EncoderSpec:
        from transformers import AutoImageProcessor

        try:
            processor = AutoImageProcessor.from_pretrained(
                self.path, trust_remote_code=self.trust_remote_code, revision=self.revision
            )
            mean, std = tuple(processor.image_mean), tuple(processor.image_std)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ModelError(
                f'model.encoder.path: "{self.path}" has no preprocessor_config.json with image_mean and image_std. '
                "Copy the one of the model it was made from into the folder."
            ) from error
        resample = getattr(processor, "resample", 3)
        bilinear = str(getattr(resample, "name", resample)).upper() in ("BILINEAR", "2")
        config = self._config()
        config = getattr(config, "vision_config", None) or config
        return EncoderSpec(
            image_size=self.image_size or own_image_size(config, path=self.path),
            image_mean=mean,
            image_std=std,
            tokens_per_view=structure.num_tokens - (structure.num_prefix if self.cls == "drop" else 0),
            width=structure.width,
            resample="bilinear" if bilinear else "bicubic",
        )

    def _load(self, cls: Any, config: Any, num_layers: int, dtype: torch.dtype) -> tuple[nn.Module, set[str]]:
        """The vision model with its first ``num_layers`` blocks, and the names of tensors the checkpoint lacks."""
        config = copy.deepcopy(config)
        config.num_hidden_layers = max(num_layers, 1)
        options = {
            "config": config,
            "dtype": dtype,
            "revision": self.revision,
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,  # reported below with their shapes
        }
        if getattr(cls, "_supports_attention_backend", False):
            options["attn_implementation"] = register_encoder()
        try:
            with quiet_transformers():
                model, info = load_pretrained(cls, self.path, key="model.encoder.path", **options)
                if prefix := _key_prefix(model, info):
                    renamed = {f"^{re.escape(prefix)}": ""}
                    model, info = load_pretrained(
                        cls, self.path, key="model.encoder.path", key_mapping=renamed, **options
                    )
        except (OSError, RuntimeError, ValueError) as error:
            raise ModelError(
                f'model.encoder.path: cannot load the weights of "{self.path}": {" ".join(str(error).split())[:300]}'
            ) from error
        if other := sorted(info["mismatched_keys"]):
            name, held, wanted = other[0]
            raise ModelError(
                f'model.encoder.path: {name} is {list(held)} in the weights of "{self.path}" and {list(wanted)} by its '
                "config.json. The folder's files do not belong together."
            )
        return model, set(info["missing_keys"])


def _key_prefix(model: nn.Module, info: dict[str, Any]) -> str:
    """Where the vision half sits in a larger checkpoint (BLIP-2, LLaVA); empty when names fit as they are.

    Only asked when nothing at all was found, and only a prefix that completes *every* name counts: a text tower has
    blocks of the same names, and must never stand in for a lost one.
    """
    missing = set(info["missing_keys"])
    if not missing or {name for name, _ in model.named_parameters()} - missing:
        return ""
    prefixes: set[str] | None = None
    for name in missing:
        found = {key[: -len(name)] for key in info["unexpected_keys"] if key.endswith(f".{name}")}
        prefixes = found if prefixes is None else prefixes & found
    return prefixes.pop() if prefixes and len(prefixes) == 1 else ""


def resize_positions(model: nn.Module, config: Any, *, image_size: int) -> None:
    """Give ``model`` the position table of ``image_size``, interpolated once by the model's own method.

    The module that owns the table is found by its ``interpolate_pos_encoding`` method; models without one (rotary
    positions, NaFlex) take any size as they are.
    """
    config = copy.deepcopy(config)
    config.image_size = image_size
    for name, module in model.named_modules():
        if not hasattr(module, "interpolate_pos_encoding"):
            continue
        resized = type(module)(config)
        old, new = module.state_dict(), resized.state_dict()
        tables = [key for key in old if key in new and old[key].shape != new[key].shape]
        for key in tables:
            rows, width = new[key].shape[-2:]
            with torch.no_grad():  # in fp32, whatever the weights are kept in
                exact = copy.deepcopy(module).float()
                table = exact.interpolate_pos_encoding(torch.empty(1, rows, width), image_size, image_size)
            old[key] = table.reshape(new[key].shape).to(old[key].dtype).contiguous()
        resized.load_state_dict(old, strict=False, assign=True)
        for parameter_name, parameter in resized.named_parameters():
            if parameter_name not in old:
                owner, _, leaf = parameter_name.rpartition(".")
                resized.get_submodule(owner)._parameters[leaf] = None
            else:
                parameter.requires_grad_(True)
        model.set_submodule(name, resized)
    model.config.image_size = image_size  # type: ignore[union-attr]
