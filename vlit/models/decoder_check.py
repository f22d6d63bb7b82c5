"""Is this language model one that can be trained on packed rows? Found out by running it, before anything is trained.

transformers has decoders whose layers mix neighbouring tokens outside of attention (convolutions, linear attention, state
spaces), which no attention function can keep apart, and decoders that change embeddings or logits in ways of their own. Both
would train, and train something else. So a short packed row is run once with the weights that were loaded:

- no segment's output has a gradient with respect to the inputs of a segment that it must not see. It is exactly zero where
  samples are apart, whatever the precision and however experts are chosen. Some inputs are no token's embedding, as those of
  a picture are not;
- logits are those of the model's own forward pass on each sample alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlit.errors import ModelError, VlitError
from vlit.kernels.attention import NO_PARENT, Segments
from vlit.models.attention import packed_arguments
from vlit.models.llms.hf import HFLanguageModel
from vlit.models.quantize import is_quantised

_SEGMENTS = Segments((7, 5, 6, 4), (NO_PARENT, NO_PARENT, 1, 1))
"""A sample, and two samples that share a prefix."""
_SEEN = {0: (0,), 1: (1,), 2: (1, 2), 3: (1, 3)}
"""Segment -> the segments whose tokens it may see."""
_SAMPLES = ((0,), (1, 2), (1, 3))
_TOLERANCE = {torch.float32: 0.001}
_COARSE = 0.1
"""Largest relative distance of logits, root mean square. Two kernels leave 5e-7 in fp32, and 0.008 in bf16 (0.05 where experts
are chosen); an input that is left out, 0.1 at least."""


def check_decoder(llm: HFLanguageModel) -> None:
    """Run the packed row; nothing of the model is changed.

    Raises:
        ModelError: samples of a row see each other, the logits are not the model's own, or the model cannot be run.
    """
    kind = llm.hf.config.get_text_config().model_type
    training = {module: module.training for module in llm.modules()}
    llm.eval()
    try:
        ids_T, embeds_TD = _inputs(llm)
        _check_isolation(kind, llm, embeds_TD)
        _check_logits(kind, llm, ids_T, embeds_TD)
    except (VlitError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ModelError(
            f"model.llm: model_type {kind} cannot be run on packed rows ({reason}). Choose another decoder."
        ) from error
    finally:
        for module, mode in training.items():
            module.training = mode


def _inputs(llm: HFLanguageModel) -> tuple[Tensor, Tensor]:
    """Ids ``[T]`` and their embeddings ``[T, D]``."""
    generator = torch.Generator().manual_seed(0)
    ids_T = torch.randint(llm.vocabulary, (_SEGMENTS.num_tokens,), generator=generator)
    with torch.no_grad():
        embeds_TD = llm.embed(ids_T.to(next(llm.parameters()).device))
    return ids_T.to(embeds_TD.device), embeds_TD


def _run(llm: HFLanguageModel, embeds_TD: Tensor) -> Tensor:
    """Final hidden states ``[T, D]`` of the packed row."""
    positions = [
        torch.arange(length) + (0 if parent == NO_PARENT else _SEGMENTS.lengths[parent])
        for length, parent in zip(_SEGMENTS.lengths, _SEGMENTS.parents, strict=True)
    ]
    device = embeds_TD.device
    return llm.hidden_states(
        embeds_TD.unsqueeze(0),
        position_ids=torch.cat(positions).unsqueeze(0).to(device),
        **packed_arguments(_SEGMENTS, device),
    )[0]


@torch.enable_grad()
def _check_isolation(kind: str, llm: HFLanguageModel, embeds_TD: Tensor) -> None:
    """No gradient from a segment to one that it may not see."""
    picture_SD = embeds_TD[:4].roll(1, dims=-1)
    inputs_TD = torch.cat([picture_SD, embeds_TD[4:]]).requires_grad_()
    hidden_TD = _run(llm, inputs_TD)
    weights_D = torch.randn(hidden_TD.shape[-1], generator=torch.Generator().manual_seed(1)).to(hidden_TD)
    for number, output_SD in enumerate(hidden_TD.split(_SEGMENTS.lengths)):
        total = (output_SD * weights_D).sum()
        (gradient_TD,) = torch.autograd.grad(total, inputs_TD, retain_graph=True)
        for other, share_SD in enumerate(gradient_TD.split(_SEGMENTS.lengths)):
            if other in _SEEN[number] or not share_SD.count_nonzero():
                continue
            raise ModelError(
                f"model.llm: samples of model_type {kind} see each other in a packed row: some of its layers mix tokens by "
                "other means than transformers' attention interface (convolution, linear attention, state space, an attention "
                "of their own). Training would learn from the wrong text. Choose a decoder of attention and MLP or experts, "
                "such as LLaMA, Mistral, Qwen3 or Gemma 3."
            )


@torch.no_grad()
def _check_logits(kind: str, llm: HFLanguageModel, ids_T: Tensor, embeds_TD: Tensor) -> None:
    """The row's logits against the model's own, sample by sample."""
    hidden_TD = _run(llm, embeds_TD)
    ids, hidden = ids_T.split(_SEGMENTS.lengths), hidden_TD.split(_SEGMENTS.lengths)
    allowed = _COARSE if is_quantised(llm.trunk) else _TOLERANCE.get(hidden_TD.dtype, _COARSE)
    for sample in _SAMPLES:
        own = llm.hf(input_ids=torch.cat([ids[part] for part in sample])[None], use_cache=False).logits[0].float()
        ours = llm.logits(torch.cat([hidden[part] for part in sample])).float()
        distance = float((ours - own).norm() / (own - own.mean(-1, keepdim=True)).norm().clamp(min=1e-12))
        if not distance <= allowed:
            raise ModelError(
                f"model.llm: the logits of model_type {kind} in a packed row are {100 * distance:.2g} % away from the model's "
                f"own (at most {100 * allowed:g} %): it changes embeddings, positions or logits in a way that is not known "
                "here. Choose another decoder, and please report its model_type."
            )
