"""LLaVA's weight files: LLaVA's own ``mm_projector.bin`` and folders, and Hugging Face's
``LlavaForConditionalGeneration``.

What a file is, is decided by the tensors it holds. Four layouts are known; each says where the parts are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from vlit.errors import ModelError
from vlit.models.interop.weights import WeightFiles

Kind = Literal["vlit", "mm_projector", "llava", "hf_llava"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Prefixes of the parts' tensor names. ``trunk`` is the decoder without its head."""

    kind: Kind
    connector: str
    trunk: str = "\0"
    head: str = "\0"
    vision: str = "\0"


LAYOUTS = (
    Layout(  # transformers since 4.52
        "hf_llava", "model.multi_modal_projector.", "model.language_model.", "lm_head.", "model.vision_tower."
    ),
    Layout(  # transformers up to 4.51, and the published llava-hf checkpoints
        "hf_llava", "multi_modal_projector.", "language_model.model.", "language_model.lm_head.", "vision_tower."
    ),
    Layout("llava", "model.mm_projector.", "model.", "lm_head.", "model.vision_tower.vision_tower."),
)
_HF_CONNECTOR = {"linear_1": "layers.0", "linear_2": "layers.2"}


def detect(path: str | Path) -> Kind:
    """What ``path`` holds, by its content; ModelError when it is none of the kinds that can be read.

    ``vlit`` a model folder of ours, ``mm_projector`` LLaVA's connector alone (file, or folder with it), ``llava`` a
    whole model in LLaVA's own names, ``hf_llava`` one of transformers.
    """
    manifest = Path(path) / "manifest.json"
    if manifest.is_file() and _json_object(manifest).get("format") == "vlit-model":
        return "vlit"
    return layout_of(WeightFiles(path)).kind


def layout_of(files: WeightFiles) -> Layout:
    """The layout whose connector ``files`` holds."""
    names = files.names()
    for layout in LAYOUTS:
        if any(n.startswith(layout.connector) for n in names) and any(n.startswith(layout.head) for n in names):
            return layout
        tied = any(n.startswith(f"{layout.trunk}embed_tokens.") for n in names)
        if layout.kind == "hf_llava" and tied and any(n.startswith(layout.connector) for n in names):
            return layout
    for name in names:
        before, found, _ = name.partition("mm_projector.")
        if found:
            return Layout("mm_projector", before + found)
    shown = ", ".join(names[:3])
    raise ModelError(
        f'"{files.path}": holds no LLaVA connector (neither mm_projector nor multi_modal_projector); its '
        f"tensors are {shown}, ... Give LLaVA's mm_projector.bin, a Hugging Face LLaVA folder or a vlit model folder."
    )


def connector_tensors(files: WeightFiles, layout: Layout) -> dict[str, Tensor]:
    """The connector under our names: ``layers.N.*`` for an MLP, ``linear.*`` for a single matrix.

    Raises:
        ModelError: the file also holds trained token embeddings or an any-resolution row mark, which would be lost.
    """
    _refuse_extras(files, layout)
    tensors: dict[str, Tensor] = {}
    for name, tensor in files.items(layout.connector):
        head, _, leaf = name.rpartition(".")
        if not head:
            tensors[f"linear.{leaf}"] = tensor
        elif head in _HF_CONNECTOR:
            tensors[f"{_HF_CONNECTOR[head]}.{leaf}"] = tensor
        else:
            tensors[f"layers.{head}.{leaf}"] = tensor
    return tensors


def llm_tensors(files: WeightFiles, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the language model, one at a time: ``trunk.*`` and, when the head is untied, ``head.*``."""
    others = (layout.connector, layout.vision, "model.image_newline", "model.vision_tower.")
    for name in files.names():
        if name.startswith(layout.head):
            yield f"head.{name[len(layout.head) :]}", files.get(name)
        elif name.startswith(layout.trunk) and (layout.kind != "llava" or not name.startswith(others)):
            yield f"trunk.{name[len(layout.trunk) :]}", files.get(name)


def vision_tensors(files: WeightFiles, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the vision tower under transformers' names since 5.0 (without ``vision_model.``)."""
    for name, tensor in files.items(layout.vision):
        yield name.removeprefix("vision_model."), tensor


def llava_config(path: str | Path) -> dict[str, Any]:
    """The folder's config.json, or {} for a lone weights file."""
    file = Path(path) / "config.json"
    return _json_object(file) if file.is_file() else {}


def _json_object(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"{file}: cannot be read ({' '.join(str(error).split())[:160]}). Fetch it again.") from error


def _refuse_extras(files: WeightFiles, layout: Layout) -> None:
    names = files.names()
    if newline := [n for n in names if n.endswith("image_newline")]:
        raise ModelError(
            f'"{files.path}": holds {newline[0]}, so it is an any-resolution model (LLaVA-NeXT, OneVision), '
            "which reads an "
            "image as several tiles. Only one view an image can be read: use a LLaVA or LLaVA-1.5 checkpoint."
        )
    if layout.kind == "mm_projector" and (rows := [n for n in names if "embed_tokens" in n]):
        raise ModelError(
            f'"{files.path}": holds {rows[0]}, embeddings trained for <im_start> and <im_end> '
            "(mm_use_im_start_end). vlit does "
            "not use these tokens, so the connector would not fit: use one trained without them."
        )
