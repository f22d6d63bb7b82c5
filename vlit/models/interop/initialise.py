"""``init_from``: copy trained weights of a LLaVA checkpoint into a freshly built model, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlit.errors import ModelError
from vlit.models.interop.llava import (
    Layout,
    connector_tensors,
    detect,
    layout_of,
    llava_config,
    llm_tensors,
    vision_tensors,
)
from vlit.models.interop.weights import WeightFiles
from vlit.models.quantize import is_quantised

if TYPE_CHECKING:
    from vlit.models.assemble import VisionLanguageModel


def initialise(model: VisionLanguageModel, path: str) -> set[str]:
    """Load what ``path`` holds into ``model`` in place and return the parts that now differ from their base weights.

    LLaVA's ``mm_projector.bin`` fills the connector. A whole LLaVA model (Hugging Face's layouts, or LLaVA's own) also
    fills the language model with its embeddings, and the encoder when the checkpoint holds one.

    Raises:
        ModelError: nothing readable there, or a tensor does not fit; the message names it, both shapes and the cause.
    """
    kind = detect(path)
    if kind == "vlit":
        raise ModelError(
            f'model.init_from: "{path}" is a vlit model folder; load it with vlit.models.artifact.load_model.'
        )
    files = WeightFiles(path)
    layout = layout_of(files)
    load_connector(model.connector, connector_tensors(files, layout), source=path)
    if kind == "mm_projector":
        return {"connector"}
    config = llava_config(path)
    _check_features(model, config, path)
    load_llm(model.llm, llm_tensors(files, layout), config=config, source=path)
    changed = {"connector", "llm", "embeddings"}
    if _load_vision(model.encoder, files, layout, path):
        changed.add("vision")
    return changed


def load_connector(connector: nn.Module, tensors: dict[str, Tensor], *, source: str) -> None:
    """Fill ``connector`` exactly: every tensor of both sides, or ModelError."""
    own = connector.state_dict()
    if set(tensors) != set(own):
        held, wanted = sorted(tensors), sorted(own)
        raise ModelError(
            f'model.connector: "{source}" holds {_describe(held)} ({", ".join(held)}), the model has '
            f"{_describe(wanted)} ({', '.join(wanted)}). Set model.connector to {_as_yaml(held)}."
        )
    for name, tensor in tensors.items():
        if tensor.shape == own[name].shape:
            continue
        first = name in ("layers.0.weight", "linear.weight")
        if first and tensor.shape[1] != own[name].shape[1]:
            cause = (
                f"it was trained with an encoder of width {tensor.shape[1]}, model.encoder gives {own[name].shape[1]}"
            )
        else:
            cause = (
                f"it was trained for a language model of width {tensor.shape[0]}, model.llm has {own[name].shape[0]}"
            )
        raise ModelError(
            f'model.connector: {name} is {list(tensor.shape)} in "{source}" and {list(own[name].shape)} in the '
            f"model: {cause}."
        )
    connector.load_state_dict(tensors)


def load_llm(llm: Any, tensors: Iterator[tuple[str, Tensor]], *, config: dict[str, Any], source: str) -> None:
    """Fill trunk and head of ``llm`` (``hf``, ``trunk``, ``head``) from ``trunk.*`` and ``head.*`` tensors.

    The published conversions grow LLaMA's 32,000 rows to 32,064 for ``<image>``, ``<pad>`` and a multiple of 64. Those
    rows carry no text, so they are left out when the model's own vocabulary is the smaller one.
    """
    if is_quantised(llm):
        raise ModelError(
            f'model.init_from: "{source}" holds a whole language model, which cannot be copied into quantised weights. Export '
            "it as a Hugging Face language model and set model.llm.path to that, or quantize: none."
        )
    own = {f"trunk.{name}": t for name, t in llm.trunk.state_dict().items()}
    embedding_rows = llm.hf.get_input_embeddings().weight.shape[0]
    tied = llm.head.weight is llm.hf.get_input_embeddings().weight
    own |= {f"head.{name}": t for name, t in llm.head.state_dict().items()}
    filled: set[str] = set()
    held_head: Tensor | None = None
    for name, tensor in tensors:
        if name not in own:
            if name.endswith("rotary_emb.inv_freq"):  # a constant that old transformers wrote
                continue
            raise ModelError(
                f'model.llm: "{source}" holds {name}, which the model of model.llm.path lacks. {_OTHER_LLM}'
            )
        target = own[name]
        vocabulary = name == "head.weight" or target.data_ptr() == llm.hf.get_input_embeddings().weight.data_ptr()
        if vocabulary and tensor.shape[0] > target.shape[0] and tensor.shape[1:] == target.shape[1:]:
            _check_extra_rows(config, rows=embedding_rows, held=tensor.shape[0], source=source)
            tensor = tensor[: target.shape[0]]
        if tensor.shape != target.shape:
            raise ModelError(
                f'model.llm: {name} is {list(tensor.shape)} in "{source}" and {list(target.shape)} in the model of '
                f"model.llm.path. {_OTHER_LLM}"
            )
        filled.add(name)
        if tied and name == "head.weight":
            held_head = tensor
            continue
        with torch.no_grad():
            target.copy_(tensor)
    if held_head is not None and not torch.equal(llm.head.weight, held_head.to(llm.head.weight.dtype)):
        raise ModelError(
            f'model.llm: "{source}" has output embeddings of its own, the model of model.llm.path shares them with the '
            f"input. {_OTHER_LLM}"
        )
    if tied:
        filled.add("head.weight")
    if missing := sorted(set(own) - filled):
        raise ModelError(
            f'model.llm: "{source}" lacks {len(missing)} tensors of the model of model.llm.path, the first is '
            f"{missing[0]}. " + _OTHER_LLM
        )


_OTHER_LLM = "They are different language models: set model.llm.path to the one the checkpoint was made from."


def _check_extra_rows(config: dict[str, Any], *, rows: int, held: int, source: str) -> None:
    """ModelError when a row that would be cut belongs to a token other than the image and padding tokens."""
    image = config.get("image_token_index", config.get("image_token_id"))
    cause = None
    if image is not None and image < rows:
        cause = f"the image token is number {image}, so the rows from {rows} on are not its own"
    named = [t for i, t in _added_tokens(Path(source)).items() if i >= rows and t not in ("<image>", "<pad>")]
    if named:
        cause = f"its tokens {', '.join(named[:5])} have rows there"
    if cause is not None:
        raise ModelError(
            f'model.llm: "{source}" has {held} token embeddings, the model of model.llm.path has {rows}: {cause}. '
            "Use a language model and tokenizer with these tokens."
        )


def _added_tokens(folder: Path) -> dict[int, str]:
    """Id -> string of the tokens that were added to the tokenizer of ``folder``; {} for a lone weights file."""
    found: dict[int, str] = {}
    config, fast = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if config.is_file():
        held = json.loads(config.read_text(encoding="utf-8")).get("added_tokens_decoder", {})
        found |= {int(i): token["content"] for i, token in held.items()}
    if fast.is_file():
        held = json.loads(fast.read_text(encoding="utf-8")).get("added_tokens", [])
        found |= {int(token["id"]): token["content"] for token in held}
    return found


def _check_features(model: VisionLanguageModel, config: dict[str, Any], source: str) -> None:
    """The connector was trained on one layer's features, with or without CLS, and with one activation; others would be noise
    to it.
    """
    activations = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}
    held = config.get("projector_hidden_act", "gelu")
    own = getattr(model.config.connector, "activation", None)
    if own is not None and activations.get(held, held) != own:
        raise ModelError(
            f'model.connector.activation: {own}, but the connector of "{source}" was trained with activation {held}.'
        )
    layer = config.get("vision_feature_layer", config.get("mm_vision_select_layer"))
    asked = getattr(model.config.encoder, "feature_layer", None)
    blocks = config.get("vision_config", {}).get("num_hidden_layers")
    tower: Any = getattr(model.encoder, "hf", None)
    if not isinstance(layer, int) or not isinstance(asked, int) or tower is None:
        return
    if blocks is None:
        same = layer == asked
    else:
        same = len(tower.get_submodule(model.encoder.blocks_name)) == (layer if layer >= 0 else layer + 1 + blocks)
    if not same:
        raise ModelError(
            f'model.encoder.feature_layer: {asked}, but the connector of "{source}" was trained on layer {layer}. '
            f"Set it to {layer}."
        )
    _check_prefix(model, config, source)


def _check_prefix(model: VisionLanguageModel, config: dict[str, Any], source: str) -> None:
    """ModelError when the connector saw CLS and would not, or the other way round. LLaVA's own code drops nothing from a
    tower without CLS, transformers drops its first patch.
    """
    encoder: Any = model.encoder
    asked = model.config.encoder.cls
    if (held := config.get("vision_feature_select_strategy")) is not None:
        dropped = int(held == "default")
    elif (held := config.get("mm_vision_select_feature")) is not None:
        dropped = 0 if held == "cls_patch" or (asked == "drop" and encoder.num_prefix == 0) else 1
    else:
        return
    if dropped != encoder.num_prefix:
        raise ModelError(
            f"model.encoder.cls: {asked}, which drops {encoder.num_prefix} tokens of a picture, but the connector of "
            f'"{source}" was trained with {held}, which drops {dropped}. Set cls to {"drop" if dropped else "keep"}, or take '
            "the encoder it was trained with."
        )


def _load_vision(encoder: nn.Module, files: WeightFiles, layout: Layout, source: str) -> bool:
    """Copy the checkpoint's tower into the encoder; True when that changed it. Blocks it has no use for are left."""
    tower = getattr(encoder, "hf", None)
    own = {n.removeprefix("vision_model."): t for n, t in tower.state_dict().items()} if tower is not None else {}
    changed, filled = False, set()
    for name, tensor in vision_tensors(files, layout):
        if tower is None:
            raise ModelError(
                f'model.encoder.type: "{source}" holds a transformers vision tower. Set it to hf, with the path of the '
                "tower it was made from."
            )
        if name not in own:
            continue
        if own[name].shape != tensor.shape:
            raise ModelError(
                f'model.encoder: {name} is {list(tensor.shape)} in "{source}" and {list(own[name].shape)} in the '
                "encoder. Set path and image_size to what the checkpoint was made with."
            )
        filled.add(name)
        if not torch.equal(own[name], tensor.to(own[name].dtype)):
            changed = True
            with torch.no_grad():
                own[name].copy_(tensor)
    if filled and (missing := sorted(set(own) - filled)):
        raise ModelError(
            f'model.encoder: "{source}" holds a vision tower without {missing[0]}. Set path to the tower it was made '
            "from."
        )
    return changed


def _describe(names: list[str]) -> str:
    depth = sum(n.startswith("layers.") and n.endswith(".weight") for n in names)
    return (
        "a linear connector"
        if "linear.weight" in names
        else f"an MLP of depth {depth}"
        if depth
        else "another connector"
    )


def _as_yaml(names: list[str]) -> str:
    depth = sum(n.startswith("layers.") and n.endswith(".weight") for n in names)
    return "{type: linear}" if "linear.weight" in names else f"{{type: mlp, depth: {depth}}}"
