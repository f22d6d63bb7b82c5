"""Linear layer + cross-entropy on supervised positions only, in chunks, never holding all logits.

For position l with hidden h_l, target y_l and head W, b (optional transform f = softcap or scale):

    z_l = f(W h_l + b),  loss = sum_l  logsumexp(z_l) - z_l[y_l]
    dloss/dz_l = softmax(z_l) - onehot(y_l)

The gradients are computed chunk by chunk in the forward pass, while the chunk's logits exist, and only for the inputs
that need them: a frozen head costs no weight gradient. Idea of chunking: Liger-Kernel (arXiv:2410.10989 §3.2).

Shape letters: L supervised positions, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK_LOGITS = 1 << 25
"""Most logits held at once (a chunk has about CHUNK_LOGITS / V positions)."""


class CrossEntropy(NamedTuple):
    """``total`` carries the gradient; ``per_position`` [L] is for metrics and carries none."""

    total: Tensor
    per_position: Tensor


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_LD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_L: Tensor,
        softcap: float | None,
        logit_scale: float,
    ) -> tuple[Tensor, Tensor]:
        need_hidden, need_weight = hidden_LD.requires_grad, weight_VD.requires_grad
        need_bias = bias_V is not None and bias_V.requires_grad
        grad_hidden = torch.empty_like(hidden_LD) if need_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if need_bias and bias_V is not None else None
        losses_L = hidden_LD.new_empty(hidden_LD.shape[0], dtype=torch.float32)
        rows = max(1, CHUNK_LOGITS // weight_VD.shape[0])
        for start in range(0, hidden_LD.shape[0], rows):
            h, y = hidden_LD[start : start + rows], targets_L[start : start + rows]
            z = h @ weight_VD.t()
            if bias_V is not None:
                z = z + bias_V
            z = z.float() * logit_scale
            slope = None
            if softcap is not None:
                z = torch.tanh(z / softcap)
                slope = 1 - z * z
                z = softcap * z
            log_norm = torch.logsumexp(z, -1)
            losses_L[start : start + rows] = log_norm - z.gather(1, y[:, None])[:, 0]
            if not (need_hidden or need_weight or need_bias):
                continue
            dz = torch.exp(z - log_norm[:, None])
            dz.scatter_add_(1, y[:, None], dz.new_full((len(y), 1), -1.0))
            if slope is not None:
                dz = dz * slope
            dz = (dz * logit_scale).to(hidden_LD.dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + rows] = dz @ weight_VD
            if grad_weight is not None:
                grad_weight += (dz.t() @ h).float()
            if grad_bias is not None:
                grad_bias += dz.float().sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        ctx.mark_non_differentiable(losses_L)
        return losses_L.sum(), losses_L

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad_outputs[0]
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad).to(weight_dtype),
            None if grad_bias is None else (grad_bias * grad).to(bias_dtype),
            None,
            None,
            None,
        )


def linear_cross_entropy(
    hidden_LD: Tensor,
    weight_VD: Tensor,
    targets_L: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> CrossEntropy:
    """Cross-entropy of ``softmax(f(W h + b))`` at ``targets``: fp32 sum over L (0 when L = 0) and each position's loss.

    ``f`` multiplies by ``logit_scale`` and then applies ``softcap · tanh(· / softcap)`` when a softcap is given.
    The sum is returned, not a mean: the caller divides by the number of label tokens of the whole optimizer step.
    """
    total, each = _LinearCrossEntropy.apply(hidden_LD, weight_VD, bias_V, targets_L, softcap, logit_scale)
    return CrossEntropy(total, each)
