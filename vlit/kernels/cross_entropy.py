"""Linear layer + cross-entropy on supervised positions only, in chunks, never holding all logits.

For position l with hidden h_l, target y_l, head W, b and transform f (scale, then softcap):

    z_l = f(W h_l + b),  n_l = logsumexp(z_l),  total = sum_l  n_l - z_l[y_l] + z_loss · n_l²
    dtotal/dz_l = softmax(z_l) · (1 + 2 · z_loss · n_l) - onehot(y_l)

The gradients are computed chunk by chunk in the forward pass, while the chunk's logits exist, and only for the inputs
that need them: a frozen head costs no weight gradient, ``no_grad`` costs no gradient. The backward pass multiplies them
in place by the incoming scalar. Chunking: Liger-Kernel (arXiv:2410.10989 §3.2). z-loss: PaLM (arXiv:2204.02311 §5).

A *chunk* of positions is one matrix product each for logits, hidden gradient and weight gradient. Inside it the softmax
runs in fp32 on one *block* of rows after another, small enough for the processor's cache, and overwrites the logits
with their gradient.

Shape letters: L supervised positions, R rows of a chunk, B rows of a block, D width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlit.kernels.planning import device_kind


class Sizes(NamedTuple):
    """How the work is cut up on a kind of device."""

    chunk_logits: int
    """Logits of a chunk."""
    weight_chunk_rows: int
    """Least rows of a bf16 chunk with a weight gradient: a second chunk needs an fp32 sum [V, D] beside the product."""
    block_logits: int
    """Logits of a block."""


SIZES = {"cpu": Sizes(1 << 23, 1024, 1 << 20), "cuda": Sizes(1 << 25, 4096, 1 << 25)}
"""CPU, measured at V 32000, bf16: a chunk of 16 MB stays in the last-level cache (half or four times the size: 11 to 20 %
slower with a frozen head); 1024 positions with a weight gradient are up to 12 % faster in one chunk than in four, and
need less memory; a block of 0.5 to 16 MB of fp32 is the same within noise. CUDA, not tuned: long kernels, and the sum's
traffic small next to the product by count of bytes."""

CAST_ROWS = 512
"""Rows of a bf16 product cast at a time before they are added to an fp32 sum: 8 times faster than adding two dtypes."""


class CrossEntropy(NamedTuple):
    """``total``, z-loss included, carries the gradient; ``per_position`` [L], pure cross-entropy, carries none."""

    total: Tensor
    per_position: Tensor


class _Transform(NamedTuple):
    softcap: float | None
    logit_scale: float
    z_loss: float


class _Gradients(NamedTuple):
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _chunk_rows(hidden_LD: Tensor, vocabulary: int, need_weight: bool, sizes: Sizes) -> int:
    """Rows of a chunk, nearly the same for all chunks of one call."""
    limit = max(1, sizes.chunk_logits // vocabulary)
    if need_weight and hidden_LD.dtype != _exact(hidden_LD.dtype):
        limit = max(limit, sizes.weight_chunk_rows)
    chunks = max(1, math.ceil(len(hidden_LD) / limit))
    return max(1, math.ceil(len(hidden_LD) / chunks))


def _softmax_loss_(
    z_BV: Tensor, y_B1: Tensor, scratch_BV: Tensor, transform: _Transform, need_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and logsumexp of each row, ``[B, 1]``; then, if needed, ``z`` becomes the gradient of its rows.

    The gradient is that of the scaled logits: the factor `logit_scale` is left to the backward pass. The arithmetic
    happens in ``scratch``, which may be ``z`` itself.

    ``torch.softmax`` is over twice as fast as exp, sum and division, but keeps its normaliser to itself. The largest
    probability, never below 1/V, gives it back: logsumexp(z) = max z - log max softmax(z).
    """
    softcap, logit_scale, z_loss = transform
    s_BV = scratch_BV if scratch_BV is z_BV else scratch_BV.copy_(z_BV)
    slope_BV = None
    if logit_scale != 1.0:
        s_BV.mul_(logit_scale)
    if softcap is not None:
        s_BV.div_(softcap).tanh_()
        slope_BV = 1.0 - s_BV.square() if need_gradient else None
        s_BV.mul_(softcap)
    target_B1, top_B1 = s_BV.gather(1, y_B1), s_BV.amax(1, keepdim=True)
    torch.softmax(s_BV, 1, out=s_BV)
    log_top_B1 = s_BV.amax(1, keepdim=True).log_()
    loss_B1, norm_B1 = (top_B1 - target_B1) - log_top_B1, top_B1 - log_top_B1
    if need_gradient:
        at_target_B1 = torch.expm1(-loss_B1)
        if z_loss != 0.0:
            pull_B1 = norm_B1 * (2 * z_loss)
            at_target_B1 += torch.exp(-loss_B1) * pull_B1
            s_BV.mul_(1.0 + pull_B1)
        s_BV.scatter_(1, y_B1, at_target_B1)
        if slope_BV is not None:
            s_BV.mul_(slope_BV)
        if s_BV is not z_BV:
            z_BV.copy_(s_BV)
    return loss_B1, norm_B1


def _add_product_(sum_MN: Tensor, a_MK: Tensor, b_KN: Tensor, *, first: bool, product_MN: Tensor | None = None) -> None:
    """``sum = a @ b`` the first time, then ``sum += a @ b``, in the sum's dtype.

    A CPU product of bf16 matrices is bf16: ``product`` is the room for it when the sum is wider.
    """
    beta = 0.0 if first else 1.0
    if product_MN is not None:
        torch.mm(a_MK, b_KN, out=product_MN)
        for sum_PN, product_PN in zip(sum_MN.split(CAST_ROWS), product_MN.split(CAST_ROWS), strict=True):
            sum_PN.copy_(product_PN) if first else sum_PN.add_(product_PN.to(sum_MN.dtype))
    elif sum_MN.dtype == a_MK.dtype:
        torch.addmm(sum_MN, a_MK, b_KN, beta=beta, out=sum_MN)
    else:
        torch.addmm(sum_MN, a_MK, b_KN, out_dtype=sum_MN.dtype, beta=beta, out=sum_MN)


def _loss_and_gradients(
    hidden_LD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_L: Tensor,
    transform: _Transform,
    need: tuple[bool, ...],
) -> tuple[Tensor, Tensor, _Gradients]:
    """Total, each position's loss, and the gradients (of hidden, weight, bias) that ``need`` asks for.

    The gradients lack the factor `logit_scale`. They are fp32 where products come in fp32 (CUDA), else in the dtype of
    their input; the backward pass casts the former while it scales them.
    """
    need_hidden, need_weight, need_bias = need
    dtype, exact, vocabulary = hidden_LD.dtype, _exact(hidden_LD.dtype), len(weight_VD)
    on_gpu = device_kind(hidden_LD) == "cuda"
    sizes = SIZES["cuda" if on_gpu else "cpu"]
    rows = _chunk_rows(hidden_LD, vocabulary, need_weight, sizes)
    block = min(rows, max(1, sizes.block_logits // vocabulary))
    logits_RV = hidden_LD.new_empty((rows, vocabulary))
    scratch_BV = None if dtype == exact else hidden_LD.new_empty((block, vocabulary), dtype=exact)
    losses_L1 = hidden_LD.new_empty((len(hidden_LD), 1), dtype=exact)
    norms_L1 = torch.empty_like(losses_L1)

    wide = exact if on_gpu else dtype
    summed = exact if rows < len(hidden_LD) else wide
    grad_hidden = torch.empty_like(hidden_LD, dtype=wide) if need_hidden else None
    grad_weight = torch.empty_like(weight_VD, dtype=summed) if need_weight else None
    product_VD = torch.empty_like(weight_VD) if need_weight and summed != wide else None
    grad_bias = weight_VD.new_zeros(vocabulary, dtype=exact) if need_bias else None

    for start in range(0, max(1, len(hidden_LD)), rows):
        chunk = slice(start, start + rows)
        h_RD, y_R1, loss_R1, norm_R1 = hidden_LD[chunk], targets_L[chunk, None], losses_L1[chunk], norms_L1[chunk]
        z_RV = logits_RV[: len(h_RD)]
        if bias_V is None:
            torch.mm(h_RD, weight_VD.t(), out=z_RV)
        else:
            torch.addmm(bias_V, h_RD, weight_VD.t(), out=z_RV)
        for z_BV, y_B1, loss_B1, norm_B1 in zip(*(x.split(block) for x in (z_RV, y_R1, loss_R1, norm_R1)), strict=True):
            s_BV = z_BV if scratch_BV is None else scratch_BV[: len(z_BV)]
            loss, norm = _softmax_loss_(z_BV, y_B1, s_BV, transform, any(need))
            loss_B1.copy_(loss)
            norm_B1.copy_(norm)
        if grad_hidden is not None:
            _add_product_(grad_hidden[chunk], z_RV, weight_VD, first=True)
        if grad_weight is not None:
            _add_product_(grad_weight, z_RV.t(), h_RD, first=start == 0, product_MN=product_VD)
        if grad_bias is not None:
            grad_bias += z_RV.sum(0, dtype=exact)

    if product_VD is not None and grad_weight is not None:
        grad_weight = product_VD.copy_(grad_weight)
    total = losses_L1.sum()
    if transform.z_loss != 0.0:
        total += transform.z_loss * norms_L1.square().sum()
    return total, losses_L1[:, 0], _Gradients(grad_hidden, grad_weight, grad_bias)


def _scaled_(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """``gradient * factor`` in ``dtype``, without a second tensor where the dtype allows."""
    if gradient is None:
        return None
    if gradient.dtype == dtype:
        return gradient.mul_(factor)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_LD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_L: Tensor,
        transform: _Transform,
    ) -> tuple[Tensor, Tensor]:
        total, losses_L, gradients = _loss_and_gradients(
            hidden_LD, weight_VD, bias_V, targets_L, transform, ctx.needs_input_grad[:3]
        )
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden_LD, weight_VD, bias_V)]
        ctx.logit_scale, ctx.spent = transform.logit_scale, False
        ctx.mark_non_differentiable(losses_L)
        return total, losses_L

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError(
                "linear_cross_entropy: this loss has been through 1 backward pass, which scaled its gradients in place; "
                "a second one has nothing to start from. Compute the loss again."
            )
        ctx.spent = True
        factor = grad_outputs[0] * ctx.logit_scale
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (*(_scaled_(gradient, factor, dtype) for gradient, dtype in pairs), None, None)


def linear_cross_entropy(
    hidden_LD: Tensor,
    weight_VD: Tensor,
    targets_L: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
) -> CrossEntropy:
    """Cross-entropy of ``softmax(f(W h + b))`` at ``targets``: fp32 sum over L (0 when L = 0) and each position's loss.

    ``f`` multiplies by ``logit_scale`` and then applies ``softcap · tanh(· / softcap)`` when a softcap is given.
    ``z_loss`` adds ``z_loss · logsumexp(f(W h + b))²`` of each position to the sum, to hold the normaliser near 1; 1e-4
    is PaLM's value. The sum is returned, not a mean: the caller divides by the number of label tokens of the whole
    optimizer step. One backward pass per call: a second raises ``RuntimeError``. float64 is computed in float64.
    """
    transform = _Transform(softcap, logit_scale, z_loss)
    if not torch.is_grad_enabled():
        total, losses_L, _ = _loss_and_gradients(hidden_LD, weight_VD, bias_V, targets_L, transform, (False,) * 3)
        return CrossEntropy(total, losses_L)
    return CrossEntropy(*_LinearCrossEntropy.apply(hidden_LD, weight_VD, bias_V, targets_L, transform))
