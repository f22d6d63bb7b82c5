"""The model folder: what evaluation, chat, export and the next stage load.

It holds what training changed and says where the rest comes from::

    manifest.json            configuration, data rules, fingerprints of unchanged parts, sha256 of every file
    connector.safetensors    always
    llm/                     the whole language model as a Hugging Face folder, once it or its embeddings were tuned
    vision.safetensors       the encoder, once it was tuned
    {llm,vision}_lora.safetensors   adapters
    tokenizer/               the tokenizer the model was trained with

It is written aside and renamed, so it is complete or absent. Loading checks every hash, and that the unchanged parts are
the ones the model was trained on. Nothing is decided by a folder's name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlit.config.schema import DataConfig, ModelConfig, PartTuning
from vlit.durable import file_sha256, make_folder, replace_folder, sync_tree
from vlit.errors import CheckpointError, ModelError
from vlit.models.assemble import VisionLanguageModel, build_model
from vlit.models.hub import quiet_progress
from vlit.models.quantize import Mode, Original, original_of
from vlit.models.trusted import check_model_folder, refuse_remote_code
from vlit.models.tuning import LORA_MARK, add_lora, embedding_parameters, fingerprint, part_of_parameters

M = TypeVar("M", ModelConfig, DataConfig)

FORMAT = "vlit-model"
VERSION = 1


def save_model(
    model: VisionLanguageModel,
    folder: Path,
    *,
    weights: dict[str, Tensor],
    unchanged: dict[str, str],
    changed: set[str],
    lora: dict[str, PartTuning],
    data_rules: dict[str, Any],
    tokenizer: Any,
    info: dict[str, Any],
) -> None:
    """Write the model folder atomically, replacing an older one.

    Args:
        model: its structure; the values come from ``weights``, since a sharded model holds only a share of them.
        weights: every weight by its ``state_dict`` name.
        unchanged: fingerprints of the parts as they were loaded (:func:`fingerprints`). The manifest takes those that still
            are their base; the connector's file is hashed as a file.
        changed: parts trained in full since the base weights were loaded.
        lora: adapter settings of the parts that carry adapters.
        data_rules: template, image policy and length the model was trained with (a ``DataConfig`` dump).
        info: provenance, for example stage, steps and run name.

    Raises:
        OSError: the disk is full, say; what stood there before is intact.
    """
    aside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        make_folder(aside)
        _write_weights(model, aside, weights, changed=changed, lora=lora)
        tokenizer.save_pretrained(aside / "tokenizer")
        config = model.config.model_dump(mode="json")
        if changed & {"llm", "embeddings"}:
            config["llm"] = {**config["llm"], "path": "llm"}
        config["llm"]["tokenizer"] = "tokenizer"
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "model": _with_absolute_paths(config),
            "data": data_rules,
            "spec": asdict(model.spec),
            "changed": sorted(changed),
            "lora": {part: tuning.model_dump(mode="json") for part, tuning in lora.items()},
            "unchanged": {p: digest for p, digest in unchanged.items() if p not in changed | {"connector"}},
            "info": info,
            "files": {str(p.relative_to(aside)): file_sha256(p) for p in sorted(aside.rglob("*")) if p.is_file()},
        }
        (aside / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        sync_tree(aside)
        replace_folder(aside, folder)
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)  # half a model would keep a full disk full
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found and not isinstance(error, OSError):  # safetensors and tokenizers say it in words
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
        raise


def _write_weights(
    model: VisionLanguageModel,
    aside: Path,
    weights: dict[str, Tensor],
    *,
    changed: set[str],
    lora: dict[str, PartTuning],
) -> None:
    _save(_below(weights, "connector."), aside / "connector.safetensors")
    if changed & {"llm", "embeddings"}:
        with quiet_progress():
            model.llm.hf.save_pretrained(aside / "llm", state_dict=_without_lora(_below(weights, "llm.hf.")))
    if "vision" in changed:
        _save(_without_lora(_below(weights, "encoder.")), aside / "vision.safetensors")
    for part, prefix in {"llm": "llm.hf.", "vision": "encoder."}.items():
        if part in lora:
            adapters = {n: t for n, t in _below(weights, prefix).items() if LORA_MARK in n}
            _save(adapters, aside / f"{part}_lora.safetensors")


def _below(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a model folder. CheckpointError when there is none or it is from a newer vlit."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: not a vlit model folder (no manifest.json). Give <output_dir>/<stage>/model of a finished stage."
        )
    try:
        manifest = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}). Copy the model folder again.") from error
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        held = f"{manifest.get('format')} version {manifest.get('version')}"
        raise CheckpointError(f"{path}: is {held}, this vlit reads {FORMAT} version {VERSION}.")
    kinds = {"model": dict, "data": dict, "changed": list, "lora": dict, "unchanged": dict, "info": dict, "files": dict}
    if wrong := [key for key, kind in kinds.items() if not isinstance(manifest.get(key), kind)]:
        raise CheckpointError(f"{path}: {wrong[0]} is missing or of the wrong kind. Copy the model folder again.")
    return manifest


def load_model(
    folder: Path, *, dtype: torch.dtype, seed: int = 0, trust_remote_code: bool = False, quantize: Mode | None = None
) -> tuple[VisionLanguageModel, dict[str, Any]]:
    """Model and manifest; every file's sha256 and every unchanged part's fingerprint is checked.

    Args:
        trust_remote_code: run program code that comes with a base model, where the manifest says it needs that.
        quantize: hold the decoder's weights like this instead of as in training; ``none`` to merge adapters.

    Raises:
        CheckpointError: a file is missing, damaged or not the folder's own, or a base model is not the one the run was
            trained on.
        ModelError: the manifest asks for remote code and ``trust_remote_code`` is not given.
    """
    manifest = read_manifest(folder)
    refuse_remote_code(manifest["model"], folder=folder, trusted=trust_remote_code)
    check_model_folder(folder, manifest["files"])
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: listed in manifest.json but missing. Restore it or train the stage again.")
        if (found := file_sha256(path)) != expected:
            raise CheckpointError(f"{path}: damaged (sha256 {found[:12]}…, manifest says {expected[:12]}…).")
    own = ["connector", *(["vision"] if "vision" in manifest["changed"] else [])]
    for name in [f"{part}.safetensors" for part in (*own, *(f"{part}_lora" for part in manifest["lora"]))]:
        if name not in manifest["files"]:
            raise CheckpointError(
                f"{folder}/manifest.json: does not list {name}, which this model needs. Copy it again."
            )
    config = model_config(folder, manifest)
    if quantize is not None and "quantize" in type(config.llm).model_fields:
        config = config.model_copy(update={"llm": config.llm.model_copy(update={"quantize": quantize})})
    model = build_model(config, dtype=dtype, seed=seed)
    _load(model.connector, folder / "connector.safetensors")
    if "vision" in manifest["changed"]:
        _load(model.encoder, folder / "vision.safetensors")
    exclude = embedding_parameters(model)
    for part, raw in manifest["lora"].items():
        module = model.encoder if part == "vision" else model.llm.hf
        add_lora(module, PartTuning.model_validate(raw), part=part, exclude=exclude)
        _load(module, folder / f"{part}_lora.safetensors", only_lora=True)
    _check_unchanged(model, manifest, folder)
    return model.requires_grad_(False), manifest


def model_config(folder: Path, manifest: dict[str, Any]) -> ModelConfig:
    """Model configuration of a model folder with the folder's own parts resolved to it."""
    raw = json.loads(json.dumps(manifest["model"]))
    if raw["llm"]["path"] == "llm":
        raw["llm"]["path"] = str(folder / "llm")
    raw["llm"]["tokenizer"] = str(folder / "tokenizer")
    raw["init_from"] = None
    return _validated(ModelConfig, raw, where=f"{folder}/manifest.json: model")


def data_rules(folder: Path, manifest: dict[str, Any]) -> DataConfig:
    """Template, image policy and length the model of a model folder was trained with."""
    return _validated(DataConfig, manifest["data"], where=f"{folder}/manifest.json: data")


def _validated(kind: type[M], raw: dict[str, Any], *, where: str) -> M:
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"])
        raise CheckpointError(
            f"{where}.{place}{first['msg']} A component of a plugin needs --plugin MODULE (plugins: in a configuration)."
        ) from error


def check_same_parts(wanted: ModelConfig, held: ModelConfig, *, source: Path) -> None:
    """ModelError when a run starts from a model folder whose parts are of another kind than its configuration says."""
    places = ("path", "tokenizer", "checkpoint", "pretrained", "from_blip2", "revision")
    for part in ("encoder", "connector", "llm", "fusion"):
        ours, theirs = (
            {k: v for k, v in getattr(config, part).model_dump(mode="json").items() if k not in places}
            for config in (wanted, held)
        )
        if ours != theirs:
            raise ModelError(
                f"model.init_from {source}: its {part} is {theirs}, the configuration says {ours}. Write the same "
                f"model.{part}, or start from other weights."
            )


def _with_absolute_paths(config: dict[str, Any]) -> dict[str, Any]:
    """Local base folders as absolute paths, so that the model loads from any working directory."""
    for part in ("encoder", "connector", "llm"):
        for key in ("path", "checkpoint", "pretrained", "from_blip2"):
            value = config[part].get(key)
            if isinstance(value, str) and (part, value) != ("llm", "llm") and Path(value).exists():
                config[part][key] = str(Path(value).resolve())
    return config


def fingerprints(model: VisionLanguageModel) -> dict[str, str]:
    """Part -> fingerprint of its weights, adapters left out: after loading, those of its base or of a connector's file."""
    groups: dict[str, dict[str, Tensor | Original]] = {}
    for name, part in part_of_parameters(model).items():
        if LORA_MARK not in name:
            groups.setdefault(part, {})[name.replace(".base_layer", "")] = original_of(model, name)
    return {part: fingerprint(tensors) for part, tensors in groups.items()}


def _check_unchanged(model: VisionLanguageModel, manifest: dict[str, Any], folder: Path) -> None:
    found = fingerprints(model)
    for part, expected in manifest["unchanged"].items():
        if found.get(part) != expected:
            source = manifest["model"]["encoder" if part == "vision" else "llm"].get("path", "its base")
            raise CheckpointError(
                f"{folder}: the base of part {part} ({source}) is not the one this model was trained on: fingerprint "
                f"{str(found.get(part))[:12]}…, manifest says {expected[:12]}…. Restore the original base weights."
            )


def _without_lora(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names they had before adapters were added."""
    return {n.replace(".base_layer", ""): t for n, t in weights.items() if LORA_MARK not in n}


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path)


def _load(module: nn.Module, path: Path, *, only_lora: bool = False) -> None:
    tensors = load_file(path)
    own = dict(module.named_parameters()) if only_lora else module.state_dict()
    expected = {n for n in own if LORA_MARK in n} if only_lora else set(own)
    if set(tensors) != expected:
        extra, missing = sorted(set(tensors) - expected)[:3], sorted(expected - set(tensors))[:3]
        raise CheckpointError(
            f"{path}: weights do not fit the model. Not in the model: {extra}; not in the file: {missing}."
        )
    module.load_state_dict(tensors, strict=not only_lora)
