"""Which parameter belongs to which part, how each part is trained, and the table that says so.

A parameter that belongs to no part, or a mode that trains nothing, stops the run before it starts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlit.config.schema import PartTuning, TuningConfig
from vlit.errors import ModelError
from vlit.models.assemble import VisionLanguageModel
from vlit.models.quantize import Original, is_quantised, original_of, sample_of
from vlit.types import PARTS

LORA_MARK = ".lora_"


@dataclass(frozen=True, slots=True)
class PartRow:
    """One line of the table of parts. ``lr`` is the peak rate; ``sha256`` fingerprints the part's weights."""

    part: str
    module: str
    mode: str
    parameters: int
    trainable: int
    lr: float | None
    dtype: str
    sha256: str


def embedding_parameters(model: VisionLanguageModel) -> set[int]:
    """Ids of the input and output embedding parameters (tied ones appear once)."""
    hf: Any = model.llm.hf
    found: set[int] = set()
    for module in (hf.get_input_embeddings(), hf.get_output_embeddings()):
        if module is not None:
            found.update(id(p) for p in module.parameters())
    return found


def part_of_parameters(model: VisionLanguageModel) -> dict[str, str]:
    """Parameter name -> part, for every parameter of the model."""
    prefixes = {"encoder.": "vision", "connector.": "connector", "fusion.": "fusion", "llm.": "llm"}
    embeddings = embedding_parameters(model)
    parts: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        part = next((part for prefix, part in prefixes.items() if name.startswith(prefix)), None)
        if part is None:
            raise ModelError(f"parameter {name} belongs to no part ({', '.join(PARTS)}).")
        parts[name] = "embeddings" if id(parameter) in embeddings else part
    return parts


def apply_tuning(model: VisionLanguageModel, tuning: TuningConfig, *, seed: int = 0) -> None:
    """Freeze, unfreeze and add adapters in place, as the stage asks. ``seed`` decides the adapters' initial weights.

    Raises:
        ModelError: a mode that would train nothing, or LoRA targets that do not exist in the part.
    """
    if is_quantised(model.llm):
        refuse_full(tuning)
    modules = {"vision": model.encoder, "llm": model.llm.hf}
    for part, module in modules.items():
        if tuning.of(part).mode != "lora":
            continue
        if has_lora(module):
            _set_dropout(module, tuning.of(part).dropout)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                add_lora(module, tuning.of(part), part=part, exclude=embedding_parameters(model))
    parts = part_of_parameters(model)
    trained = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        mode = tuning.of(parts[name]).mode
        parameter.requires_grad_(mode == "full" or (mode == "lora" and LORA_MARK in name))
        trained[parts[name]] += parameter.requires_grad
    for part, count in trained.items():
        if tuning.of(part).mode != "frozen" and not count and part != "fusion":
            raise ModelError(f"tuning.{part}: mode {tuning.of(part).mode}, but this part has no parameters to train.")
    if not sum(trained.values()):
        raise ModelError("tuning: every part is frozen, so there is nothing to train. Set one part to full or lora.")


def refuse_full(tuning: TuningConfig) -> None:
    """ModelError when a tuning would train weights of a quantised language model, or replace it in the model folder."""
    for part in ("llm", "embeddings"):
        if tuning.of(part).mode == "full":
            raise ModelError(
                f"tuning.{part}: full, but model.llm.quantize is on: quantised weights cannot be trained or saved. Use "
                f"{'lora' if part == 'llm' else 'frozen'}, or quantize: none."
            )


def _set_dropout(module: nn.Module, dropout: float) -> None:
    """Give the adapters of an earlier stage the dropout of this one."""
    from peft.tuners.lora import LoraLayer

    for layer in module.modules():
        if isinstance(layer, LoraLayer):
            for name in layer.lora_dropout:
                layer.lora_dropout[name] = nn.Dropout(dropout) if dropout else nn.Identity()


def has_lora(module: nn.Module) -> bool:
    """Whether adapters have been added to ``module``."""
    return any(LORA_MARK in name for name, _ in module.named_parameters())


def lora_targets(module: nn.Module, tuning: PartTuning, *, part: str, exclude: set[int]) -> list[str]:
    """Full names of the linear layers that receive an adapter (never the embeddings or the output head)."""
    linear = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and id(layer.weight) not in exclude
    }
    if tuning.targets == "all-linear":
        return sorted(linear)
    chosen = [name for name in linear if name.rpartition(".")[2] in tuning.targets]
    unknown = set(tuning.targets) - {name.rpartition(".")[2] for name in linear}
    if unknown:
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise ModelError(
            f"tuning.{part}.targets: no linear layer is called {sorted(unknown)}. Known: {', '.join(known)}."
        )
    return sorted(chosen)


def add_lora(module: nn.Module, tuning: PartTuning, *, part: str, exclude: set[int]) -> None:
    """Inject peft adapters into ``module`` in place; adapter weights take the dtype of their layer."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,  # type: ignore[arg-type]
        lora_dropout=tuning.dropout,
        target_modules=lora_targets(module, tuning, part=part, exclude=exclude),
    )
    dtype = next(module.parameters()).dtype
    inject_adapter_in_model(config, module)
    for name, parameter in module.named_parameters():
        if LORA_MARK in name:
            parameter.data = parameter.data.to(dtype)


def merge_lora(model: VisionLanguageModel) -> None:
    """Fold every adapter into its layer and remove it, in place; calling it again changes nothing.

    Raises:
        ModelError: the language model is quantised: rounding the sum back to 8 or 4 bits would lose much of the adapter.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils import _get_submodules

    roots: tuple[nn.Module, ...] = (model.encoder, model.llm.hf)
    if has_lora(model.llm) and is_quantised(model.llm):
        raise ModelError(
            "adapters cannot be merged into a quantised language model: rounding them to its few bits would lose them. Load "
            'the model folder with load_model(..., quantize="none"), as vlit export does, and merge there.'
        )
    for root in roots:
        for name, module in list(root.named_modules()):
            if isinstance(module, LoraLayer):
                module.merge(safe_merge=True)
                parent, _, child = _get_submodules(root, name)
                setattr(parent, child, module.get_base_layer())


def fingerprint(tensors: Mapping[str, Tensor | Original]) -> str:
    """sha256 over names, shapes and up to 4096 evenly spaced values of each tensor, rounded to bf16.

    Cheap enough for 7B weights, independent of the dtype they were loaded in, and different for any other checkpoint. Of a
    quantised weight it is that of the weight before.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        sampled = tensor.sample if isinstance(tensor, Original) else sample_of(tensor)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sampled.numpy().tobytes())
    return digest.hexdigest()


def table_of_parts(model: VisionLanguageModel, tuning: TuningConfig, lr: float) -> list[PartRow]:
    """What is trained, how, and with which peak rate; one row a part that has parameters."""
    parts = part_of_parameters(model)
    modules = {
        "vision": type(getattr(model.encoder, "hf", model.encoder)).__name__,
        "connector": type(model.connector).__name__,
        "fusion": type(model.fusion).__name__,
        "llm": type(model.llm.hf).__name__,
        "embeddings": "tied" if model.llm.head.weight is model.llm.hf.get_input_embeddings().weight else "untied",
    }
    rows = []
    for part in PARTS:
        own = {n: p for n, p in model.named_parameters() if parts[n] == part}
        if not own:
            continue
        trainable = sum(p.numel() for p in own.values() if p.requires_grad)
        whole = {n: original_of(model, n) for n in own}
        rows.append(
            PartRow(
                part=part,
                module=modules[part],
                mode=tuning.of(part).mode,
                parameters=sum(p.numel() for p in whole.values()),
                trainable=trainable,
                lr=(tuning.of(part).lr or lr) if trainable else None,
                dtype=_dtype_of(own, model.get_submodule("llm") if part == "llm" else None),
                sha256=fingerprint(whole),
            )
        )
    return rows


def _dtype_of(parameters: Mapping[str, nn.Parameter], llm: nn.Module | None) -> str:
    if llm is not None and is_quantised(llm):
        return "4bit" if any(p.dtype == torch.uint8 for p in parameters.values()) else "8bit"
    return str(next(iter(parameters.values())).dtype).removeprefix("torch.")


def rows_as_dicts(rows: list[PartRow]) -> list[dict[str, Any]]:
    """For ``parts.json``."""
    return [asdict(row) for row in rows]
