"""Finds its way in any transformers vision model by running it, never by names of folders or model families.

A model without weights (meta device) is built from the configuration and run once. The order in which its modules are
called shows the stack of blocks, the norm after it and the pooling heads; a backward pass shows which parameters the
features do not depend on. That is all an encoder needs to keep exactly what it computes.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlit.errors import ModelError


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' load report and progress bars; what they would say is checked here and raised."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def vision_class(config: Any, *, path: str, trust_remote_code: bool) -> tuple[type[nn.Module], Any]:
    """The model class of the vision half and its configuration, for a whole (CLIP, LLaVA ...) or vision-only model."""
    import transformers
    from transformers import AutoModel
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    vision = getattr(config, "vision_config", None) or config
    if isinstance(vision, dict):
        raise ModelError(
            f'model.encoder.path: the vision_config of "{path}" is of an unknown kind. Give a vision-only checkpoint.'
        )
    if type(vision) in MODEL_MAPPING:
        found = MODEL_MAPPING[type(vision)]
        return (found[0] if isinstance(found, tuple) else found), vision  # type: ignore[return-value]
    architecture = (getattr(config, "architectures", None) or [""])[0]
    named = getattr(transformers, architecture, None)  # a name from a file: only a model class may be called by it
    with torch.device("meta"), quiet_transformers():
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            whole: Any = named(config)
        else:
            try:
                whole = AutoModel.from_config(config, trust_remote_code=trust_remote_code)
            except (ValueError, KeyError) as error:
                raise ModelError(
                    f'model.encoder.path: "{path}" names architecture "{architecture}", which transformers does not know. '
                    "Give a vision model such as CLIP, SigLIP, DINOv2 or ViT."
                ) from error
    for module in whole.modules():
        if isinstance(getattr(module, "config", None), type(vision)) and hasattr(module, "from_pretrained"):
            return type(module), vision
    raise ModelError(
        f'model.encoder.path: "{path}" ({type(config).__name__}) has no part that reads pixels. Give a vision '
        "model such as CLIP, SigLIP, DINOv2 or ViT."
    )


@dataclass(frozen=True, slots=True)
class VisionStructure:
    """What one run of the weightless model showed. Names are module paths inside the vision model."""

    blocks: str  # the ModuleList of transformer blocks
    num_layers: int  # how many the checkpoint has
    kept_layers: int  # how many are computed for the feature layer
    after_blocks: tuple[str, ...]  # topmost modules called after the blocks: norm, pooling head
    final_norm: str | None
    unused_parameters: tuple[str, ...]
    num_tokens: int  # a view, prefix tokens included
    num_prefix: int  # CLS and register tokens, which come first
    width: int


class PassThrough(nn.Module):
    """Stands where a pooling head or norm was: returns its first argument."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden


def run_model(model: nn.Module, pixels_V3HW: Tensor, patch_size: int) -> Tensor:
    """Hidden states after the last block held by ``model``: [V, S + prefix, C]."""
    if "spatial_shapes" in inspect.signature(model.forward).parameters:  # SigLIP2 NaFlex takes flattened patches
        views, channels, height, width = pixels_V3HW.shape
        rows, columns = height // patch_size, width // patch_size
        patches = pixels_V3HW[:, :, : rows * patch_size, : columns * patch_size]
        patches = patches.reshape(views, channels, rows, patch_size, columns, patch_size).permute(0, 2, 4, 3, 5, 1)
        shapes = torch.tensor([[rows, columns]] * views)
        flat = patches.reshape(views, rows * columns, -1)
        return model(pixel_values=flat, pixel_attention_mask=None, spatial_shapes=shapes).last_hidden_state
    return model(pixel_values=pixels_V3HW).last_hidden_state


def own_image_size(config: Any, *, path: str) -> int:
    """Side in pixels of the square images the checkpoint was made for."""
    size = getattr(config, "image_size", None)
    if size is None and hasattr(config, "num_patches"):
        size = int(config.num_patches**0.5) * config.patch_size
    if isinstance(size, (list, tuple)):
        if len(set(size)) != 1:
            raise ModelError(f'model.encoder.path: "{path}" reads {size} pixels; only square images are supported.')
        size = size[0]
    if not isinstance(size, int):
        raise ModelError(f'model.encoder.path: "{path}" names no image_size. Set model.encoder.image_size.')
    return size


def patch_side(config: Any) -> int:
    """Patch side in pixels."""
    size = config.patch_size
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def resolve_layer(feature_layer: int, num_layers: int, *, key: str) -> int:
    """How many blocks hidden_states[feature_layer] needs (0 = embeddings only)."""
    if not -(num_layers + 1) <= feature_layer <= num_layers:
        raise ModelError(
            f"{key}: {feature_layer} is out of range for {num_layers} blocks. Hidden states are numbered 0 "
            f"(embeddings) to {num_layers}, or from the end -1 to {-(num_layers + 1)}."
        )
    return feature_layer if feature_layer >= 0 else num_layers + 1 + feature_layer


def find_structure(
    cls: type[nn.Module], config: Any, *, feature_layer: int, image_size: int, path: str
) -> VisionStructure:
    """Build ``cls`` without weights, run it once forward and backward, and report its structure."""
    config = copy.deepcopy(config)
    if hasattr(config, "image_size"):
        config.image_size = image_size
    with torch.device("meta"), quiet_transformers():
        model = cls(config)
    model.eval()
    count = getattr(config, "num_hidden_layers", None)
    stacks = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and len({type(m) for m in module}) == 1
    }
    if not stacks or not hasattr(config, "patch_size"):
        raise ModelError(
            f'model.encoder.path: "{path}" ({cls.__name__}) is not one stack of equal blocks over patches, so it has '
            "no numbered hidden states. Use a plain vision transformer (CLIP, SigLIP, DINOv2, DINOv3, ViT, BLIP-2)."
        )
    blocks = max(stacks, key=lambda name: sum(p.numel() for p in stacks[name].parameters()))
    kept = resolve_layer(feature_layer, len(stacks[blocks]), key="model.encoder.feature_layer")
    num_layers = len(stacks[blocks])
    pixels = torch.empty(1, getattr(config, "num_channels", 3), image_size, image_size, device="meta")
    stack = model.get_submodule(blocks)
    assert isinstance(stack, nn.ModuleList)
    del stack[1:]  # blocks are equal: one shows what all do
    after, norm = _called_after(model, stack[0], pixels, patch_side(config))
    for name in after:
        model.set_submodule(name, PassThrough())
    del stack[kept:]
    with torch.inference_mode(False), torch.enable_grad():
        hidden = run_model(model, pixels, patch_side(config))
        hidden.sum().backward()
    first = f"{blocks}.0."
    unused: list[str] = []
    for name in [name for name, p in model.named_parameters() if p.grad is None]:
        inside = name.startswith(first)
        unused += [f"{blocks}.{i}.{name.removeprefix(first)}" for i in range(kept)] if inside else [name]
    num_patches = (image_size // patch_side(config)) ** 2
    if hidden.ndim != 3 or hidden.shape[1] < num_patches:
        raise ModelError(
            f'model.encoder.path: "{path}" gives hidden states {tuple(hidden.shape)} for {num_patches} patches; '
            "expected one token a patch after optional prefix tokens."
        )
    return VisionStructure(
        blocks=blocks,
        num_layers=num_layers,
        kept_layers=kept,
        after_blocks=after,
        final_norm=norm,
        unused_parameters=tuple(unused),
        num_tokens=hidden.shape[1],
        num_prefix=hidden.shape[1] - num_patches,
        width=hidden.shape[2],
    )


def _called_after(
    model: nn.Module, last_block: nn.Module, pixels: Tensor, patch_size: int
) -> tuple[tuple[str, ...], str | None]:
    """Topmost modules that start after ``last_block`` has ended, and the first leaf norm among everything that does."""
    started: list[str] = []
    ended = False
    width = 0

    def on_start(name: str) -> Any:
        return lambda module, args: started.append(name) if ended else None

    def on_end(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal ended, width
        ended = True
        width = (output[0] if isinstance(output, tuple) else output).shape[-1]

    handles = [module.register_forward_pre_hook(on_start(name)) for name, module in model.named_modules() if name]
    handles.append(last_block.register_forward_hook(on_end))
    with torch.no_grad():
        run_model(model, pixels, patch_size)
    for handle in handles:
        handle.remove()
    topmost = [name for name in dict.fromkeys(started) if not any(name.startswith(f"{other}.") for other in started)]
    for name in started:
        module = model.get_submodule(name)
        weight = getattr(module, "weight", None)
        if weight is not None and tuple(weight.shape) == (width,) and not list(module.children()):
            return tuple(topmost), name
    return tuple(topmost), None
