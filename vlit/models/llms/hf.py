"""Any transformers causal language model, with its own tokenizer.

Nothing is subclassed: the model is split by its public accessors into embedding, trunk and head. What a family does to
its logits (soft cap, scale, bias) is read from its config, and a conformance test compares our loss with the model's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlit.errors import ModelError
from vlit.kernels.cross_entropy import CrossEntropy, linear_cross_entropy
from vlit.models.attention import NAME, register
from vlit.models.foreign import reads_model
from vlit.models.hub import dropouts, read_config, set_recompute
from vlit.models.interfaces import LanguageModel, LLMConfig
from vlit.models.quantize import Mode, quantise_decoder
from vlit.models.trusted import load_pretrained
from vlit.registry import LLMS


class HeadLoss(nn.Module):
    """The output head's cross-entropy as a module without weights of its own.

    The loss multiplies by the head's weight without calling the head. Sharded weights are gathered around the forward of a
    module, so there must be one for this, and it gathers the head no longer than needed.
    """

    def __init__(self, llm: HFLanguageModel) -> None:
        super().__init__()
        self._llm = (llm,)  # in a tuple, so that the parent is not registered as a child

    def forward(self, hidden_LD: Tensor, targets_L: Tensor, z_loss: float) -> CrossEntropy:
        llm = self._llm[0]
        head = llm.head
        return linear_cross_entropy(
            hidden_LD, head.weight, targets_L, bias_V=head.bias, softcap=llm.softcap, logit_scale=llm.logit_scale,
            z_loss=z_loss,
        )  # fmt: skip


def _logit_scale(config: Any) -> float:
    """What the family multiplies its logits by; they name it in three ways, and one name means two things."""
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if not scaling:
        return 1.0
    return float(scaling) if config.model_type.startswith("hyperclovax") else 1.0 / float(scaling)  # Granite divides


class HFLanguageModel(LanguageModel):
    """A transformers causal LM seen as ``embed -> hidden_states -> loss``."""

    hf: Any

    def __init__(self, hf: Any) -> None:
        super().__init__()
        self.hf = hf
        config = hf.config.get_text_config()
        self.width = int(config.hidden_size)
        self.vocabulary = int(config.vocab_size)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.logit_scale = _logit_scale(config)
        self.head_loss = HeadLoss(self)

    @property
    def head(self) -> nn.Linear:
        """Output embeddings ``[V, D]`` (tied or not)."""
        return self.hf.get_output_embeddings()

    @property
    def layers(self) -> nn.ModuleList:
        """Decoder blocks, found as the longest module list of the trunk."""
        lists = [m for m in self.trunk.modules() if isinstance(m, nn.ModuleList)]
        return max(lists, key=len)

    @property
    def trunk(self) -> nn.Module:
        """The decoder without its head."""
        return self.hf.get_decoder()

    def embed(self, input_ids: Tensor) -> Tensor:
        """ids ``[...]`` -> embeddings ``[..., D]``."""
        return self.hf.get_input_embeddings()(input_ids)

    def hidden_states(self, embeds_BTD: Tensor, **kwargs: Any) -> Tensor:
        """Trunk output after the final norm, ``[B, T, D]``; keyword arguments go to every layer."""
        return self.trunk(inputs_embeds=embeds_BTD, **kwargs).last_hidden_state

    def loss(self, hidden_LD: Tensor, targets_L: Tensor, *, z_loss: float = 0.0) -> CrossEntropy:
        """Cross-entropy at L positions, fp32."""
        return self.head_loss(hidden_LD, targets_L, z_loss)

    def logits(self, hidden: Tensor) -> Tensor:
        """``[..., D]`` -> ``[..., V]``, transformed as the model itself does."""
        logits = self.head(hidden) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def set_gradient_checkpointing(self, policy: str) -> None:
        """Recompute each block's activations in the backward pass: ``none``, ``selective`` or ``full``."""
        set_recompute(self.hf, policy)


@LLMS.register("hf")
class HFLanguageModelConfig(LLMConfig):
    """Any transformers causal LM whose layers are attention and MLP or experts: LLaMA/Vicuna, Mistral, Qwen, Phi, Gemma, ...

    Decoders that keep samples of a row apart in no way, or change logits in a way of their own, are refused at the start.
    """

    type: str = "hf"
    path: str
    """Local folder or Hugging Face hub id."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer. Default: `path`."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    trust_remote_code: bool = False
    """Run model code shipped with the weights. Off unless you trust its author."""
    quantize: Mode = "none"
    """`8bit` or `4bit` keeps the decoder's linear layers quantised (bitsandbytes); they are frozen, adapters are trained."""

    @reads_model("model.llm.path")
    def width(self) -> int:
        return int(self._config().hidden_size)

    @reads_model("model.llm.path")
    def vocab_size(self) -> int | None:
        return int(self._config().vocab_size)

    def tokenizer_path(self) -> str:
        return self.tokenizer or self.path

    @reads_model("model.llm.path")
    def dropouts(self) -> dict[str, float]:
        return dropouts(self._config())

    @reads_model("model.llm.path")
    def build(self, *, dtype: torch.dtype) -> HFLanguageModel:  # type: ignore[override]
        """Load weights in ``dtype`` with packed attention.

        Raises:
            ModelError: the folder is missing, is not a causal LM, or lacks weights (nothing is left at random).
        """
        from transformers import AutoModelForCausalLM

        config = self._config()
        try:
            loaded: Any = load_pretrained(
                AutoModelForCausalLM,
                self.path,
                key="model.llm.path",
                dtype=dtype,
                attn_implementation=register(),
                revision=self.revision,
                trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
            )
        except (OSError, ValueError) as error:
            raise ModelError(f'model.llm.path "{self.path}": {" ".join(str(error).split())[:400]}') from error
        except KeyError as error:
            if error.args != (NAME,):
                raise
            raise ModelError(
                f'model.llm.path "{self.path}": model_type {config.model_type} has attention of its own and takes no other, so '
                "its samples cannot be kept apart in a packed row. Choose another decoder."
            ) from error
        hf, info = loaded
        missing = sorted(info["missing_keys"])
        if missing:
            raise ModelError(
                f'model.llm.path "{self.path}": {len(missing)} weights are not in the checkpoint, for example '
                f"{missing[0]}; they would be random. Use a complete causal-LM checkpoint."
            )
        hf.config.use_cache = False
        quantise_decoder(hf, self.quantize, dtype=dtype)
        return HFLanguageModel(hf)

    @reads_model("model.llm.path")
    def build_empty(self, *, dtype: torch.dtype) -> HFLanguageModel:
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            hf: Any = AutoModelForCausalLM.from_config(
                self._config(), dtype=dtype, attn_implementation=register(), trust_remote_code=self.trust_remote_code
            )
        hf.config.use_cache = False
        quantise_decoder(hf, self.quantize, dtype=dtype)
        return HFLanguageModel(hf)

    def _config(self) -> Any:
        config = read_config(
            self.path, key="model.llm.path", revision=self.revision, trust_remote_code=self.trust_remote_code
        )
        text = config.get_text_config()
        if not hasattr(text, "vocab_size"):
            raise ModelError(f'model.llm.path "{self.path}": model_type {config.model_type} is not a language model.')
        if self.tokenizer is not None and Path(self.tokenizer).is_absolute() and not Path(self.tokenizer).is_dir():
            raise ModelError(f'model.llm.tokenizer "{self.tokenizer}": no such folder.')
        return text
