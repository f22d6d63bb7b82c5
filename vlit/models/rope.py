"""Rotary embeddings whose frequencies depend on the longest sample of a row: packing would change what others compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlit.errors import ConfigError
from vlit.models.hub import read_config
from vlit.models.llms.hf import HFLanguageModelConfig


def check_lengths(llm: Any, max_tokens: Mapping[str, int]) -> None:
    """Refuse samples so long that they would change the frequencies of their whole row.

    transformers takes LongRoPE's long factors (arXiv:2402.13753) and dynamic NTK scaling once a position of the row lies
    beyond the length of pretraining. Up to there, a sample computes the same in a row as by itself.

    Args:
        llm: configuration of the language model.
        max_tokens: configuration key -> longest sample, in tokens.

    Raises:
        ConfigError: one of them is beyond; names key, type of rotary embedding and both lengths.
    """
    if not isinstance(llm, HFLanguageModelConfig):
        return
    config = read_config(llm.path, key="model.llm.path", revision=llm.revision, trust_remote_code=llm.trust_remote_code)
    for kind, limit in _limits(config.get_text_config()):
        for key, length in max_tokens.items():
            if length > limit:
                raise ConfigError(
                    f"{key}: {length}, but the rotary embeddings of {llm.path} (rope_type {kind}) change for a whole row when "
                    f"one of its samples has more than {limit} tokens, so samples of a row would not be separate. Set it to "
                    f"{limit} or less, or take another language model."
                )


def _limits(config: Any) -> list[tuple[str, int]]:
    """(rope type, longest sample that leaves the frequencies alone) of those that depend on the length."""
    held = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in held.values() if isinstance(value, dict)]  # one for each kind of layer
    limits = []
    for parameters in nested if "rope_type" not in held else [held]:
        kind = str(parameters.get("rope_type", "default"))
        if kind == "longrope":
            limits.append(
                (kind, int(parameters.get("original_max_position_embeddings", config.max_position_embeddings)))
            )
        elif "dynamic" in kind:
            limits.append((kind, int(config.max_position_embeddings)))
    return limits
