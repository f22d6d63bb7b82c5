"""Decoders that can be trained on packed rows pass the check at the start of a run; each of the others is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.tiny import LLM_KINDS, build_llm, build_tokenizer
from tests.tiny_run import tiny_run
from vlit.errors import ModelError
from vlit.models.decoder_check import check_decoder
from vlit.models.llms.hf import HFLanguageModel, HFLanguageModelConfig
from vlit.train.run import run_training

BASE: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
    "tie_word_embeddings": False,
}  # fmt: skip
SMALL = {"vocab_size": 384, "hidden_size": 64, "num_hidden_layers": 2}
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
PER_LAYER = {"head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 384,
             "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8,
             "tie_word_embeddings": True}  # fmt: skip
TRAINABLE = {
    "mixtral": ("MixtralConfig", BASE | {"num_local_experts": 4}),
    "deepseek_v3": ("DeepseekV3Config", BASE | {
        "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "num_experts_per_tok": 2, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 16}),
    "cohere2": ("Cohere2Config", BASE | {"tie_word_embeddings": True, "sliding_window": 8, "logit_scale": 0.25}),
    "granite": ("GraniteConfig", BASE | {"logits_scaling": 4.0, "embedding_multiplier": 3.0}),
    "hyperclovax": ("HyperCLOVAXConfig", BASE | {"logits_scaling": 0.5}),
    "gpt_neox": ("GPTNeoXConfig", SMALL | {"intermediate_size": 96, "num_attention_heads": 4}),
    "opt": ("OPTConfig", SMALL | {"ffn_dim": 96, "num_attention_heads": 4, "word_embed_proj_dim": 64}),
}  # fmt: skip
SEE_EACH_OTHER = "samples of model_type {kind} see each other in a packed row"
REFUSED = {
    "lfm2": ("Lfm2Config", BASE | {"layer_types": ["conv", "full_attention"]}, SEE_EACH_OTHER),
    "qwen3_5_text": ("Qwen3_5TextConfig", BASE | LINEAR | {
        "layer_types": ["linear_attention", "full_attention"], "head_dim": 16}, SEE_EACH_OTHER),
    "mamba2": ("Mamba2Config", SMALL | {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1}, SEE_EACH_OTHER),
    "falcon_h1": ("FalconH1Config", BASE | {
        "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "head_dim": 16,
        "lm_head_multiplier": 0.5}, SEE_EACH_OTHER),
    "recurrent_gemma": ("RecurrentGemmaConfig", BASE | {
        "num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 64, "tie_word_embeddings": True}, SEE_EACH_OTHER),
    "mpt": ("MptConfig", {"vocab_size": 384, "d_model": 64, "n_layers": 2, "n_heads": 4}, SEE_EACH_OTHER),
    "gemma3n_text": ("Gemma3nTextConfig", BASE | PER_LAYER | {
        "laurel_rank": 8, "activation_sparsity_pattern": [0.0, 0.0], "altup_num_inputs": 2, "intermediate_size": [96, 96]},
        "the logits of model_type {kind} in a packed row are"),
    "gemma4_text": ("Gemma4TextConfig", BASE | PER_LAYER | {"global_head_dim": 16}, "model_type {kind} cannot be run"),
    "doge": ("DogeConfig", BASE, "brings a mask or bias of its own"),
    "bloom": ("BloomConfig", {"vocab_size": 384, "hidden_size": 64, "n_layer": 2, "n_head": 4}, "{kind} cannot be run"),
    "falcon": ("FalconConfig", SMALL | {"num_attention_heads": 4}, "model_type {kind} has attention of its own"),
}  # fmt: skip


def write(folder: Path, name: str, options: dict[str, Any]) -> Path:
    """A model of that configuration whose weights are all away from where they start."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def decoder(folder: Path, dtype: torch.dtype) -> HFLanguageModel:
    return HFLanguageModelConfig(path=str(folder)).build(dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("kind", LLM_KINDS)
def test_the_usual_decoders_pass_and_stay_as_they_were(kind: str, tiny_dir: Path) -> None:
    llm = decoder(build_llm(kind, tiny_dir / kind), torch.float32)
    llm.train()
    before = {name: value.clone() for name, value in llm.state_dict().items()}
    check_decoder(llm)
    assert all(module.training for module in llm.modules())
    assert all(torch.equal(before[name], value) for name, value in llm.state_dict().items())
    assert all(parameter.grad is None for parameter in llm.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", TRAINABLE)
def test_experts_latent_attention_and_scaled_logits_pass(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    check_decoder(decoder(write(tmp_path, *TRAINABLE[kind]), dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", REFUSED)
def test_decoders_that_would_learn_something_else_are_refused(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    name, options, message = REFUSED[kind]
    folder = write(tmp_path, name, options)
    with pytest.raises(ModelError, match=message.format(kind=kind)):
        check_decoder(decoder(folder, dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda llm: setattr(llm, "logit_scale", 2.0), "the logits of model_type llama"),
        (lambda llm: setattr(llm, "softcap", 0.5), "the logits of model_type llama"),
        (lambda llm: llm.layers[1].register_forward_hook(lambda m, a, out: out + out.roll(1, 1)), "see each other"),
        (
            lambda llm: llm.layers[0].register_forward_hook(lambda m, a, out: out + out.mean(1, keepdim=True)),
            "see each",
        ),
    ],
    ids=["scale", "soft cap", "token before", "mean of the row"],
)
def test_a_changed_scale_and_a_look_at_a_neighbour_are_found(
    change: Callable[[HFLanguageModel], Any], message: str, tiny_dir: Path
) -> None:
    llm = decoder(build_llm("llama", tiny_dir / "llama"), torch.float32)
    check_decoder(llm)
    change(llm)
    with pytest.raises(ModelError, match=message):
        check_decoder(llm)


def test_a_run_is_refused_before_its_first_step(tiny_dir: Path, tmp_path: Path) -> None:
    name, options, _ = REFUSED["lfm2"]
    folder = build_tokenizer(write(tmp_path / "lfm2", name, options))
    run = tiny_run(tiny_dir, tmp_path / "out", f"model.llm.path={folder}")
    with pytest.raises(ModelError, match="samples of model_type lfm2 see each other"):
        run_training(run)
    assert not list((tmp_path / "out").rglob("metrics.jsonl"))
