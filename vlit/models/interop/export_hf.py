"""A trained model as ``LlavaForConditionalGeneration``: what transformers, vLLM, SGLang and others load.

The folder has the layout of the published llava-hf checkpoints, because every version and every other reader knows it:
tensor names of transformers up to 4.51 (``vision_tower.vision_model.*``; 5.x saves names that older readers miss), and
the *whole* vision tower, blocks past the feature layer included (from the encoder's own checkpoint), with
``vision_feature_layer`` counted from the end. A shorter tower with layer -1 would give the same features in transformers,
but readers that assume -2 would not notice.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlit.errors import ExportError
from vlit.models.connectors.mlp import MLPConnector
from vlit.models.encoders._hf_model import patch_side, quiet_transformers
from vlit.models.encoders.hf import HfVisionEncoder
from vlit.models.fusion.prefix import PrefixFusion
from vlit.models.interop.chat_template import jinja_template

if TYPE_CHECKING:
    from vlit.models.assemble import VisionLanguageModel

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "silu": "silu"}
_WRAPPED_TOWERS = {"clip_vision_model", "siglip_vision_model"}
"""Towers whose tensors carried ``vision_model.`` before transformers 5."""
_SHARD_BYTES = 5_000_000_000
_ROWS = 64
"""Vocabularies that grow are padded to a multiple of this, as the published conversions are (32,000 -> 32,064)."""


def export_hf(model: VisionLanguageModel, out: Path, *, template: Any = None, image_policy: str = "pad") -> None:
    """Write ``model`` and its processor to the new folder ``out``.

    Args:
        model: without adapters (merge them first).
        template: chat template of the run; written as Jinja when it is one of ours or the tokenizer's own.
        image_policy: ``pad``, ``crop`` or ``squash``; decides the image processor.

    Raises:
        ExportError: a part cannot be expressed there; the message names it and why. Or ``out`` is not empty.
    """
    out = Path(out)
    if reasons := why_not(model):
        raise ExportError("not expressible as LlavaForConditionalGeneration: " + " ".join(reasons))
    if out.exists() and any(out.iterdir()):
        raise ExportError(f"{out}: not empty. Give a new folder.")
    tokenizer = _tokenizer(model)
    rows = add_tokens(tokenizer, held=model.llm.head.weight.shape[0])
    chat = tokenizer.chat_template if template is None else jinja_template(template, tokenizer)
    tower = _whole_tower(model)
    config = _config(model, tower, tokenizer, rows)
    tensors = _tensors(model, tower, config)
    processor = _processor(model, config, tokenizer, chat, image_policy)
    aside = out.with_name(f".{out.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with quiet_transformers():
        config.save_pretrained(aside)
        _generation(tokenizer, template).save_pretrained(aside)
        processor.save_pretrained(aside)
        processor.image_processor.save_pretrained(aside)  # preprocessor_config.json, for readers older than 5.0
    _write(tensors, aside, config=config)
    if out.exists():
        out.rmdir()
    aside.rename(out)


def why_not(model: VisionLanguageModel) -> list[str]:
    """One sentence for each part that LlavaForConditionalGeneration has no place for; empty = expressible."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    reasons: list[str] = []
    encoder, connector, llm = model.encoder, model.connector, model.llm
    if not isinstance(encoder, HfVisionEncoder):
        reasons.append(f"encoder: type {model.config.encoder.type} is not a transformers vision model.")
    else:
        config: Any = encoder.hf.config
        if type(config) not in MODEL_MAPPING:
            reasons.append(f"encoder: transformers' AutoModel cannot build a {type(config).__name__} by itself.")
        elif "num_patches" in vars(config):
            reasons.append(f"encoder: {type(config).__name__} reads flattened patches (NaFlex), LLaVA gives pixels.")
        if encoder.norm is not None:
            reasons.append("encoder: final_norm is true, LLaVA takes hidden states without it.")
        if encoder.num_prefix > 1:
            reasons.append(f"encoder: {encoder.num_prefix} prefix tokens are dropped, LLaVA can drop only the first.")
    if not isinstance(connector, MLPConnector):
        reasons.append(f"connector: type {model.config.connector.type}; LLaVA's is always two linear layers.")
    elif len(connector.layers) != 3:
        reasons.append(f"connector: depth {(len(connector.layers) + 1) // 2}; LLaVA's is always two linear layers.")
    if not isinstance(model.fusion, PrefixFusion):
        reasons.append(f"fusion: type {model.config.fusion.type}; LLaVA splices tokens into the text.")
    if any(".lora_" in name for name, _ in model.named_parameters()):
        reasons.append("adapters: merge them first (vlit.models.tuning.merge_lora).")
    if type(llm.hf.config) not in MODEL_MAPPING:
        reasons.append(f"llm: transformers' AutoModel does not know {type(llm.hf.config).__name__}.")
    if llm.head.bias is not None:
        reasons.append("llm: its output layer has a bias, LLaVA's has none.")
    if llm.softcap is not None or llm.logit_scale != 1.0:
        reasons.append("llm: it scales or caps its logits, LLaVA's output layer does not.")
    return reasons


def _tokenizer(model: VisionLanguageModel) -> Any:
    from transformers import AutoTokenizer

    spec = model.spec
    local = {"local_files_only": True} if Path(spec.tokenizer_path).is_dir() else {}
    return AutoTokenizer.from_pretrained(
        spec.tokenizer_path,
        trust_remote_code=spec.trust_remote_code,
        revision=spec.tokenizer_revision or "main",
        **local,
    )


def add_tokens(tokenizer: Any, *, held: int) -> int:
    """Give ``tokenizer`` an image token and, when it has none, a pad token; returns the rows the embeddings need."""
    from transformers import AddedToken

    tokenizer.add_tokens(AddedToken(IMAGE_TOKEN, special=True, normalized=False), special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    needed = max(int(i) for i in (*tokenizer.added_tokens_decoder, len(tokenizer) - 1)) + 1
    return held if needed <= held else -(-needed // _ROWS) * _ROWS


def _whole_tower(model: VisionLanguageModel) -> nn.Module:
    """The encoder's checkpoint with all blocks, at the model's image size, holding the encoder's present weights."""
    encoder: Any = model.encoder
    tower: nn.Module = model.config.encoder.load_whole(dtype=next(encoder.parameters()).dtype)
    _, unexpected = tower.load_state_dict(encoder.hf.state_dict(), strict=False)
    if unexpected:
        raise ExportError(f"encoder: its own checkpoint's tower has no place for {unexpected[0]}.")
    return tower


def _config(model: VisionLanguageModel, tower: nn.Module, tokenizer: Any, rows: int) -> Any:
    from transformers import LlavaConfig

    own: Any = model.llm.hf.config
    text = type(own).from_dict(own.to_dict())
    text.vocab_size, text.use_cache = rows, True
    encoder: Any = model.encoder
    blocks = len(encoder.hf.get_submodule(encoder.blocks_name))
    vision: Any = copy.deepcopy(tower.config)
    for part in (text, vision):
        part._name_or_path = ""  # a path of this machine
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=model.spec.tokens_per_view,
        projector_hidden_act=_ACTIVATIONS[model.config.connector.activation],
        vision_feature_layer=blocks - vision.num_hidden_layers - 1,
        vision_feature_select_strategy="default" if encoder.num_prefix == 1 else "full",
        tie_word_embeddings=text.tie_word_embeddings,
    )
    config.update(
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": text.bos_token_id,
            "eos_token_id": text.eos_token_id,
        }
    )
    config.dtype = next(model.llm.parameters()).dtype
    return config


def _tensors(model: VisionLanguageModel, tower: nn.Module, config: Any) -> dict[str, Tensor]:
    """All tensors by transformers' present names, checked against the model that will load them."""
    from transformers import LlavaForConditionalGeneration

    rows = config.text_config.vocab_size
    hf: Any = model.llm.hf
    embeddings = hf.get_input_embeddings().weight
    tensors = {f"model.vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()}
    for name, tensor in model.connector.state_dict().items():
        _, number, leaf = name.split(".")
        tensors[f"model.multi_modal_projector.linear_{1 + int(number) // 2}.{leaf}"] = tensor
    for name, tensor in model.llm.trunk.state_dict().items():
        same = tensor.data_ptr() == embeddings.data_ptr()
        tensors[f"model.language_model.{name}"] = _grow(tensor, rows) if same else tensor
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = _grow(model.llm.head.weight, rows)
    with torch.device("meta"), quiet_transformers():
        wanted = LlavaForConditionalGeneration(copy.deepcopy(config)).state_dict()
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    reshaped = {n for n in wanted.keys() & tensors.keys() if wanted[n].shape != tensors[n].shape}
    if wrong := sorted(reshaped | (wanted.keys() ^ tensors.keys())):
        raise ExportError(
            f"llm: {type(model.llm.hf).__name__} has other weights inside LLaVA than by itself, the first is {wrong[0]}."
        )
    return tensors


def _published_name(name: str, vision_type: str) -> str:
    """A present tensor name as the published checkpoints (transformers up to 4.51) have it."""
    inner = "vision_model." if vision_type in _WRAPPED_TOWERS else ""
    for now, then in (
        ("model.vision_tower.", f"vision_tower.{inner}"),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ):
        if name.startswith(now):
            return then + name[len(now) :]
    return name


def _write(tensors: dict[str, Tensor], folder: Path, *, config: Any) -> None:
    """Safetensors of at most 5 GB each, with an index when there are several."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    kind = config.vision_config.model_type
    named = {_published_name(name, kind): tensor.detach() for name, tensor in tensors.items()}
    plan = split_torch_state_dict_into_shards(
        named, max_shard_size=_SHARD_BYTES, filename_pattern="model{suffix}.safetensors"
    )
    for file, names in plan.filename_to_tensors.items():
        shard = {name: named[name].cpu().contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _grow(weight: Tensor, rows: int) -> Tensor:
    """``weight [R, D]`` with rows appended up to ``rows``, each the mean of the others.

    The mean is the least conspicuous row: as an output it never wins, as an input it is never read (image features
    replace the image token's row, padding is masked).
    """
    extra = rows - weight.shape[0]
    if extra <= 0:
        return weight
    mean = weight.detach().float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([weight.detach(), mean.expand(extra, -1)])


def _generation(tokenizer: Any, template: Any) -> Any:
    """Greedy decoding that ends where the template ends an answer."""
    from transformers import GenerationConfig

    pieces = [] if template is None else template.end(tokenizer)
    names = [piece.text for piece in pieces if piece.kind == "special"][:1]
    ends = [*(tokenizer.convert_tokens_to_ids(name) for name in names), tokenizer.eos_token_id]
    ends = list(dict.fromkeys(i for i in ends if i is not None))
    return GenerationConfig(
        eos_token_id=ends or None, bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id
    )


def _processor(model: VisionLanguageModel, config: Any, tokenizer: Any, chat: str | None, image_policy: str) -> Any:
    from transformers import CLIPImageProcessor, LlavaImageProcessor, LlavaProcessor

    spec = model.spec
    square = {"height": spec.image_size, "width": spec.image_size}
    common: dict[str, Any] = {
        "image_mean": list(spec.image_mean),
        "image_std": list(spec.image_std),
        "resample": 2 if spec.resample == "bilinear" else 3,
        "crop_size": square,
    }
    if image_policy == "pad":
        images: Any = LlavaImageProcessor(do_pad=True, size=square, do_center_crop=False, **common)
    elif image_policy == "crop":
        images = CLIPImageProcessor(size={"shortest_edge": spec.image_size}, do_center_crop=True, **common)
    else:
        images = CLIPImageProcessor(size=square, do_center_crop=False, **common)
    patch = patch_side(config.vision_config)
    patches = (spec.image_size // patch) ** 2
    dropped = config.vision_feature_select_strategy == "default"
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=spec.tokens_per_view + dropped - patches,
        chat_template=chat,
        image_token=IMAGE_TOKEN,
    )
