"""How many floating-point operations the mathematics of a step needs, and how many the machine can do.

Useful FLOPs count what training cannot do without: no recomputation, no padding, logits only at supervised positions.
For a part with linear weights N applied to n tokens: forward 2·N·n; backward the same again for the gradient of its input
(when something before it is trained) and once more for the gradient of its weights (when it is trained itself).
Attention: 4·width FLOPs a layer for every visible pair of query and key (s(s + 1)/2 in a causal segment of s tokens, plus
s·p behind a shared prefix of p), 2.5 times that backward; a vision encoder sees all pairs. The matmul peak is measured in
the same process, so the share is honest on a shared machine.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from vlit.kernels.attention import segments_of
from vlit.models.assemble import VisionLanguageModel
from vlit.types import PackedBatch


def matmul_peak(device: torch.device, dtype: torch.dtype, *, size: int | None = None) -> float:
    """Best rate of a square matrix product in FLOP/s over a few tries (about 0.2 s)."""
    n = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best, deadline = 0.0, time.perf_counter() + 0.2
    for attempt in range(50):
        _synchronise(device)
        start = time.perf_counter()
        torch.mm(a, b)
        _synchronise(device)
        if attempt:
            best = max(best, 2.0 * n**3 / (time.perf_counter() - start))
        if time.perf_counter() > deadline and attempt > 2:
            break
    return best


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _linear_flops(module: nn.Module, *, input_gradient: float) -> float:
    """FLOPs a token through a module's linear layers: forward, gradient of the weights that are trained (under LoRA the
    adapters only), and of the inputs of a share of the layers. A packed 4-bit weight counts as what it stands for.
    """
    layers = [m for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    sizes = [m.in_features * m.out_features if isinstance(m, nn.Linear) else m.weight.numel() for m in layers]
    trained = sum(size for size, m in zip(sizes, layers, strict=True) if m.weight.requires_grad)
    return 2.0 * (sum(sizes) * (1.0 + input_gradient) + trained)


def _attention_width(config: Any) -> int:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(size * config.num_attention_heads)


class UsefulFlops:
    """FLOPs of a micro-batch for one model and tuning; made once a stage, asked once a micro-batch."""

    def __init__(self, model: VisionLanguageModel) -> None:
        def trained(module: nn.Module) -> bool:
            return any(p.requires_grad for p in module.parameters())

        encoder_trained, connector_trained, llm_trained = (
            trained(m) for m in (model.encoder, model.connector, model.llm)
        )
        spec = model.encoder.spec
        blocks = max((len(m) for m in model.encoder.modules() if isinstance(m, nn.ModuleList)), default=0)
        attention = 4.0 * spec.tokens_per_view**2 * spec.width * blocks
        self.per_image = attention * (3.5 if encoder_trained else 1.0)
        self.per_image += spec.tokens_per_view * _linear_flops(model.encoder, input_gradient=float(encoder_trained))
        before_connector = (
            1.0 if encoder_trained else 0.5 * connector_trained
        )  # behind a frozen encoder not its first layer
        self.per_image += model.spec.tokens_per_view * _linear_flops(model.connector, input_gradient=before_connector)
        llm_backward = encoder_trained or connector_trained or llm_trained
        self.per_token = _linear_flops(model.llm.trunk, input_gradient=float(llm_backward))
        width = _attention_width(model.llm.hf.config.get_text_config())
        self.per_pair = 4.0 * width * len(model.llm.layers) * (3.5 if llm_backward else 1.0)
        head: Any = model.llm.head
        self.per_label = 2.0 * head.weight.numel() * (1.0 + llm_backward + head.weight.requires_grad)

    def of(self, batch: PackedBatch) -> float:
        """Useful FLOPs of forward and backward for one packed row."""
        pairs = segments_of(batch).num_pairs
        return (
            self.per_image * batch.num_images
            + self.per_token * batch.num_tokens
            + self.per_pair * pairs
            + self.per_label * batch.num_label_tokens
        )
