"""Generation from token ids and images, batched with left padding, by transformers' own ``generate``.

Batched equals single: every prompt keeps its own positions and sees only itself. Shape letters: B prompts, T longest
prompt, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlit.models.assemble import VisionLanguageModel


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: ids ``[T]`` with 0 where an image token stands, mask ``[T]`` of those, uint8 views ``[V, 3, H, W]``."""

    input_ids: Tensor
    is_image: Tensor
    pixels: Tensor


def generate_ids(
    model: VisionLanguageModel,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    stop: Sequence[Sequence[int]],
    temperature: float = 0.0,
    top_p: float = 1.0,
    streamer: Any = None,
) -> list[list[int]]:
    """New token ids for each prompt, without the stop sequence that ended them.

    Args:
        stop: id sequences that end an answer (the template's end token or text).
        temperature: 0 is greedy decoding; otherwise samples from the ``top_p`` nucleus.
        streamer: a transformers streamer, for one prompt.
    """
    from transformers import GenerationConfig, StoppingCriteriaList

    hf: Any = model.llm.hf
    was_training = model.training
    model.eval()
    with torch.no_grad():  # not inference_mode: weights gathered here (ZeRO-3) may stay, and are trained later
        embeds, mask = _left_padded(model, prompts)
        ends = [list(s) for s in stop if s]
        single = sorted({s[0] for s in ends if len(s) == 1})
        pad = single[0] if single else 0
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            **({"temperature": temperature, "top_p": top_p} if temperature > 0 else {}),
            eos_token_id=single or None,
            pad_token_id=pad,
            use_cache=True,
        )
        longer = [s for s in ends if len(s) > 1]
        with _no_defaults(hf):
            out = hf.generate(
                inputs_embeds=embeds,
                attention_mask=mask,
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([_EndsWith(longer)] if longer else []),
                streamer=streamer,
            )
    model.train(was_training)
    return [_before_stop(row, ends) for row in out.tolist()]


@contextmanager
def _no_defaults(hf: Any) -> Iterator[None]:
    """Without the ``generation_config.json`` of the base model: what a config leaves open would be taken from there, and a
    repetition penalty or beams are not greedy decoding.
    """
    from transformers import GenerationConfig

    held = hf.generation_config
    hf.generation_config = GenerationConfig()
    try:
        yield
    finally:
        hf.generation_config = held


def _left_padded(model: VisionLanguageModel, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    device = model.device
    ids = torch.cat([p.input_ids for p in prompts]).to(device)
    is_image = torch.cat([p.is_image for p in prompts]).to(device)
    pixels = torch.cat([p.pixels for p in prompts]).to(device)
    vision = model.encode_images(pixels) if len(pixels) else None
    row_TD, _ = model.fusion(model.llm.embed(ids), vision, is_image)
    pieces = row_TD.split([len(p.input_ids) for p in prompts])
    embeds_BTD = pad_sequence([x.flip(0) for x in pieces], batch_first=True).flip(1)
    mask_BT = pad_sequence([torch.ones(len(x), dtype=torch.long) for x in pieces], batch_first=True).flip(1)
    return embeds_BTD, mask_BT.to(device)


class _EndsWith:
    """Stops a row when what it has generated ends with one of the sequences."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self.sequences = [torch.tensor(s) for s in sequences]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        for sequence in self.sequences:
            if input_ids.shape[1] >= len(sequence):
                done |= (input_ids[:, -len(sequence) :] == sequence.to(input_ids.device)).all(1)
        return done


def _before_stop(ids: list[int], stop: Sequence[Sequence[int]]) -> list[int]:
    cut = len(ids)
    for sequence in stop:
        n = len(sequence)
        first = next((i for i in range(len(ids) - n + 1) if ids[i : i + n] == list(sequence)), cut)
        cut = min(cut, first)
    return ids[:cut]
