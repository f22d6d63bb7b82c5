"""A backend proves itself on the machine it is to run on, before training trusts it.

Compilers, drivers and GPUs differ from those a kernel was tested on. Once a process, for its head size, grouping and dtype,
a small tree is computed forward and backward and compared with PyTorch's attention in fp32 (about 0.1 s after compiling).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor

from vlit.kernels.attention.dense import dense_attention
from vlit.kernels.attention.segments import make_segments

_LENGTHS = (150, 70, 37, 1, 33, 129, 20)
_PARENTS = (-1, 0, 0, 0, -1, -1, 5)


@lru_cache(maxsize=32)
def proves_right(
    attention: Callable[..., Tensor], device: torch.device, dtype: torch.dtype, head_size: int, groups: int
) -> bool:
    """Whether ``attention`` gives the output and gradients of :func:`dense_attention`; says so on stderr when it does not.

    The bound is twice the error that PyTorch's own attention makes in ``dtype``, and an absolute 1e-5 in fp32. It is
    asked in the middle of a step, perhaps inside a checkpointed region or without gradients; a thread of its own knows
    nothing of such modes.
    """

    def both() -> list[list[float]]:
        return [_errors(function, device, dtype, head_size, groups) for function in (attention, dense_attention)]

    try:
        with ThreadPoolExecutor(1) as thread:
            ours, plain = thread.submit(both).result()
    except Exception as error:  # a kernel that does not compile must not end a run that PyTorch can carry
        return _refused(attention, f"{type(error).__name__}: {str(error)[:300]}")
    for name, own, bound in zip(("output", "dQ", "dK", "dV"), ours, plain, strict=True):
        if not own <= 2 * bound + 1e-5:  # also refuses NaN
            return _refused(attention, f"its {name} is off by {own:.1e} (PyTorch in the same precision: {bound:.1e})")
    return True


def _refused(attention: Callable[..., Tensor], reason: str) -> bool:
    print(
        f"warning: {attention.__name__} is not used on this machine, because {reason}. Training goes on with PyTorch's "
        "attention (slower, correct); please report this with your versions of torch and triton.",
        file=sys.stderr,
    )
    return False


def _errors(
    attention: Callable[..., Tensor], device: torch.device, dtype: torch.dtype, head_size: int, groups: int
) -> list[float]:
    """Largest errors of output and of the three gradients, against fp32."""
    generator = torch.Generator().manual_seed(0)
    segments, tokens = make_segments(_LENGTHS, _PARENTS), sum(_LENGTHS)
    shapes = [(2 * groups, tokens, head_size), (2, tokens, head_size), (2, tokens, head_size)]
    exact = [torch.randn(shape, generator=generator).to(device=device, dtype=dtype).float() for shape in shapes]
    weight = torch.randn(tokens, 2 * groups, head_size, generator=generator).to(device)

    def results(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves, segments=segments, scale=head_size**-0.5)
        return [out.detach(), *torch.autograd.grad(out, leaves, weight.to(out.dtype))]

    wanted = results(dense_attention, exact)
    found = results(attention, [x.to(dtype) for x in exact])
    return [float((a.float() - b).abs().max()) for a, b in zip(found, wanted, strict=True)]
