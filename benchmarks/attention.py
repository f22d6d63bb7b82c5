"""Attention of packed rows beside its peers: shapes, systems, errors and times (:mod:`benchmarks.kernels` shows them).

``sdpa`` gets batches ``[n, H, L, E]`` made beforehand, in the memory layout that a projection leaves: one segment a row, or,
where records share a prefix, each record with a prefix of its own, which is how they are trained without sharing. It runs only
where all rows of that batch have one length.

Shape letters: T tokens of the row, H query heads, K key/value heads, E head size; n rows of L tokens of a dense batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import timing
from vlit.kernels.attention import NO_PARENT, Segments, choose_backend, gpu_peers, make_segments, packed_attention

PASSES = {"forward": 1.0, "forward+backward": 3.5}
"""Useful FLOPs as a multiple of the forward pass."""
OWN = "vlit"
"""Systems whose names begin so are not peers."""


@dataclass(frozen=True)
class Shape:
    """Heads and segments of one case. Not causal: every token sees its whole segment, as in an image encoder."""

    name: str
    heads: int
    key_heads: int
    size: int
    lengths: tuple[int, ...]
    parents: tuple[int, ...] | None = None
    causal: bool = True

    @property
    def segments(self) -> Segments:
        return make_segments(self.lengths, self.parents)

    @property
    def flops(self) -> float:
        """Useful FLOPs of the forward pass."""
        pairs = self.segments.num_pairs if self.causal else sum(length**2 for length in self.lengths)
        return 4.0 * self.size * self.heads * pairs

    def __str__(self) -> str:
        return f"{self.name}, heads {self.heads}:{self.key_heads} of {self.size}"


def trees(families: int, prefix: int, children: int, own: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths and parents of ``families`` images with ``children`` records each."""
    lengths, parents = [], []
    for family in range(families):
        lengths += [prefix, *[own] * children]
        parents += [NO_PARENT, *[family * (children + 1)] * children]
    return tuple(lengths), tuple(parents)


def log_normal(total: int, mean: float, sigma: float, least: int) -> tuple[int, ...]:
    """Lengths from a fixed seed that sum to ``total``: ``least`` and a log-normal rest; ``mean`` counts both."""
    rng = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < total:
        lengths.append(least + round(rng.lognormal(math.log(mean - least) - sigma**2 / 2, sigma)))
    lengths[-1] -= sum(lengths) - total
    return tuple(length for length in lengths if length)


def shapes(device: str, quick: bool) -> list[Shape]:
    """What is measured; quick: the same kinds of rows, tiny."""
    if quick:
        encoder = [Shape("encoder, 2 of 37", 2, 2, 32, (37,) * 2, causal=False)] if device == "cpu" else []
        return [
            Shape("2 segments of 40", 2, 2, 32, (40,) * 2),
            Shape("2 segments of 40", 4, 2, 32, (40,) * 2),
            Shape("2 trees of 30 + 3 x 10", 2, 2, 32, *trees(2, 30, 3, 10)),
            Shape("lengths 17 to 50", 2, 2, 32, (17, 50, 33)),
            *encoder,
        ]
    if device == "cpu":
        return [
            Shape("8 segments of 276", 8, 8, 64, (276,) * 8),
            Shape("4 segments of 512", 8, 8, 64, (512,) * 4),
            Shape("2 segments of 1024", 8, 8, 64, (1024,) * 2),
            Shape("4 segments of 512", 8, 2, 128, (512,) * 4),
            Shape("4 trees of 291 + 6 x 46", 8, 8, 64, *trees(4, 291, 6, 46)),
            Shape("encoder, 16 of 257", 6, 6, 64, (257,) * 16, causal=False),
        ]
    stage1, stage2 = log_normal(8192, 606, 0.4, 577), log_normal(8192, 800, 0.5, 600)
    return [
        Shape("LLaVA-1.5 stage 1, 8192 tokens in segments of about 606", 32, 32, 128, stage1),
        Shape("LLaVA-1.5 stage 2, 8192 tokens in segments of about 800", 32, 32, 128, stage2),
        Shape("MMInstruct, 9 trees of 620 + 6 x 50", 32, 32, 128, *trees(9, 620, 6, 50)),
        Shape("2 segments of 4096", 32, 32, 128, (4096,) * 2),
        Shape("8 segments of 1024", 32, 32, 128, (1024,) * 8),
        Shape("LLaVA-1.5 stage 2, 8192 tokens in segments of about 800", 32, 8, 128, stage2),
        Shape("MMInstruct, 9 trees of 620 + 6 x 50", 32, 8, 128, *trees(9, 620, 6, 50)),
    ]


class Problem:
    """Inputs of one shape, drawn from a seed, and their exact results."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.segments, self.scale = shape, shape.segments, shape.size**-0.5
        generator = torch.Generator().manual_seed(0)
        tokens, heads, keys = self.segments.num_tokens, shape.heads, shape.key_heads
        joined = torch.randn(tokens, heads + 2 * keys, shape.size, generator=generator).to(device, torch.bfloat16)
        self.inputs = [x.transpose(0, 1) for x in joined.split((heads, keys, keys), 1)]
        """q ``[H, T, E]``, k and v ``[K, T, E]``: views of one projection."""
        self.d_out_THE = torch.randn(tokens, heads, shape.size, generator=generator).to(device, torch.bfloat16)
        self.dense = dense_rows(shape, device)
        self.exact = self._exact()

    def _exact(self) -> list[Tensor]:
        """Output ``[T, H, E]`` and three gradients in fp64, from the definition, segment by segment."""
        group = self.shape.heads // self.shape.key_heads
        leaves = [x.double().requires_grad_() for x in self.inputs]
        q, k, v = leaves[0], *(x.repeat_interleave(group, 0) for x in leaves[1:])
        outs = []
        for start, length, parent in zip(
            self.segments.starts, self.segments.lengths, self.segments.parents, strict=True
        ):
            seen = torch.arange(start, start + length, device=q.device)
            if parent != NO_PARENT:
                begin = self.segments.starts[parent]
                seen = torch.cat([begin + torch.arange(self.segments.lengths[parent], device=q.device), seen])
            scores = q[:, start : start + length] @ k[:, seen].transpose(1, 2) * self.scale
            if self.shape.causal:
                hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(len(seen) - length + 1)
                scores = scores.masked_fill(hidden, -math.inf)
            outs.append(torch.softmax(scores, -1) @ v[:, seen])
        out_THE = torch.cat(outs, 1).transpose(0, 1)
        return [out_THE.detach(), *torch.autograd.grad(out_THE, leaves, self.d_out_THE.double())]


def dense_rows(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Token of the packed row at each place of the dense batch, int64 ``[n, L]``, and whether it stands there first, bool;
    None where the batch would need padding.
    """
    segments, rows, first = shape.segments, [], []
    parents = {parent for parent in segments.parents if parent != NO_PARENT}
    met: set[int] = set()
    for number, (start, length, parent) in enumerate(
        zip(segments.starts, segments.lengths, segments.parents, strict=True)
    ):
        if number in parents:
            continue
        prefix = segments.prefix_lengths[number]
        begin = segments.starts[parent] if prefix else 0
        rows.append([*range(begin, begin + prefix), *range(start, start + length)])
        first.append([parent not in met] * prefix + [True] * length)
        met.add(parent)
    if len({len(row) for row in rows}) > 1:
        return None
    return torch.tensor(rows, device=device), torch.tensor(first, device=device)


class Packed:
    """A function of the packed row, ``[H, T, E]`` and ``[K, T, E]`` -> ``[T, H, E]``."""

    def __init__(self, problem: Problem, function: Callable[..., Tensor]) -> None:
        self.function = partial(function, segments=problem.segments, scale=problem.scale)
        self.leaves = [x.detach().requires_grad_() for x in problem.inputs]
        self.d_out = problem.d_out_THE

    def __call__(self, backward: bool) -> list[Tensor]:
        """The output; with ``backward`` also the three gradients."""
        with torch.set_grad_enabled(backward):
            out = self.function(*self.leaves)
        return [out, *torch.autograd.grad(out, self.leaves, self.d_out)] if backward else [out]

    def packed(self, results: list[Tensor]) -> list[Tensor]:
        """Results as those of the packed row."""
        return results


class Dense(Packed):
    """A function of the dense batch, ``[n, H, L, E]`` and ``[n, K, L, E]`` -> ``[n, H, L, E]``."""

    def __init__(self, problem: Problem, function: Callable[..., Tensor], dtype: torch.dtype = torch.bfloat16) -> None:
        if problem.dense is None:
            raise timing.Unsuited("needs records of one length")
        self.rows_nL, self.first_nL = rows, first = problem.dense
        self.function = partial(function, scale=problem.scale)
        self.leaves = [
            x.transpose(0, 1)[rows].to(dtype).transpose(1, 2).detach().requires_grad_() for x in problem.inputs
        ]
        self.d_out = (problem.d_out_THE[rows].to(dtype) * first[..., None, None]).transpose(1, 2)

    def packed(self, results: list[Tensor]) -> list[Tensor]:
        out, *gradients = (x.transpose(1, 2).flatten(0, 1).double() for x in results)
        first, rows, total = self.first_nL.flatten(), self.rows_nL.flatten(), int(self.rows_nL.max()) + 1
        found = [out[first][rows[first].argsort()]]
        for gradient in gradients:
            zeros = gradient.new_zeros(total, *gradient.shape[1:])
            found.append(zeros.index_add(0, rows, gradient).transpose(0, 1))
        return found


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, backend: str | None = None) -> Tensor:
    """PyTorch's attention, on a GPU with the named backend of ``torch.nn.attention.SDPBackend`` or none at all."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, backend)) if backend else nullcontext():
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )


def flash_attn_package(q_HTE: Tensor, k_KTE: Tensor, v_KTE: Tensor, *, segments: Segments, scale: float) -> Tensor:
    """The package flash-attn, where it is installed."""
    from flash_attn import flash_attn_varlen_func

    if any(segments.prefix_lengths):
        raise timing.Unsuited("knows no shared prefix")
    bounds = torch.tensor([*segments.starts, segments.num_tokens], dtype=torch.int32, device=q_HTE.device)
    longest = max(segments.lengths)
    q_THE, k_TKE, v_TKE = (x.transpose(0, 1) for x in (q_HTE, k_KTE, v_KTE))
    return flash_attn_varlen_func(
        q_THE, k_TKE, v_TKE, bounds, bounds, longest, longest, softmax_scale=scale, causal=True
    )


def flash_full(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """vlit's C kernel on whole images."""
    from vlit.kernels.attention.flash_cpu import flash_cpu_full

    return flash_cpu_full(q, k, v, scale=scale).transpose(1, 2)


def systems(problem: Problem) -> dict[str, Callable[[], Packed]]:
    """What computes this shape, by name; making one or calling it may fail."""
    q_HTE, k_KTE, _ = problem.inputs
    plain = partial(sdpa, causal=problem.shape.causal)
    found: dict[str, Callable[[], Packed]] = {}
    if problem.shape.causal:
        auto = choose_backend(q_HTE, k_KTE, problem.segments)
        for name in dict.fromkeys([auto, *(("triton", "dense") if q_HTE.is_cuda else ("flash", "blocked"))]):
            label = f"{OWN} {name} (auto)" if name == auto else f"{OWN} {name}"
            found[label] = partial(Packed, problem, partial(packed_attention, backend=name))
    else:  # measured on a CPU only: on a GPU vlit leaves encoders to PyTorch
        found[f"{OWN} flash"] = lambda: Dense(problem, flash_full)
    if q_HTE.is_cuda:
        return found | {
            "flex": lambda: Packed(problem, gpu_peers.flex_attention),
            "varlen": lambda: Packed(problem, gpu_peers.varlen_attention),
            "flash-attn": lambda: Packed(problem, flash_attn_package),
            "sdpa flash": lambda: Dense(problem, partial(plain, backend="FLASH_ATTENTION")),
            "sdpa cudnn": lambda: Dense(problem, partial(plain, backend="CUDNN_ATTENTION")),
        }
    return found | {
        "sdpa bf16": lambda: Dense(problem, plain),
        "sdpa fp32": lambda: Dense(problem, plain, torch.float32),
    }
