"""The fused bf16 attention for CPUs against dense attention in fp64.

Every buffer starts as NaN here, those of tensors and those of the kernel, so what the kernel forgets to write shows.
"""

from __future__ import annotations

import ctypes
import math
import random
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vlit.kernels import native
from vlit.kernels.attention import NO_PARENT, Segments, make_segments
from vlit.kernels.attention.flash_cpu import available, flash_cpu_attention, flash_cpu_full, plan_tiles

needs_kernel = pytest.mark.skipif(
    not available(torch.empty(1, 64, dtype=torch.bfloat16)), reason="needs a CPU with AVX512-BF16 and a C compiler"
)
TREE = make_segments([70, 20, 33, 1, 60, 90, 131, 31], [NO_PARENT, 0, 0, 0, 0, NO_PARENT, NO_PARENT, 6])
M_PERTURB = -6


@pytest.fixture(autouse=True)
def _memory_starts_as_nan() -> Iterator[None]:
    libc, kernels = ctypes.CDLL(None), native.compiled()
    if kernels is not None and kernels.vlit_flash_lanes():
        kernels.vlit_flash_release()
    libc.mallopt(M_PERTURB, 0x100)  # glibc fills with the complement of the low byte: 0xff, a NaN in bf16 and fp32
    yield
    libc.mallopt(M_PERTURB, 0)


def visible(segments: Segments, causal: bool = True) -> Tensor:
    """bool [T, T]: query row sees key column."""
    mask = torch.zeros(segments.num_tokens, segments.num_tokens, dtype=torch.bool)
    ranges = [slice(lo, lo + n) for lo, n in zip(segments.starts, segments.lengths, strict=True)]
    for own, parent in zip(ranges, segments.parents, strict=True):
        mask[own, own] = torch.ones_like(mask[own, own]).tril() if causal else True
        if parent != NO_PARENT:
            mask[own, ranges[parent]] = True
    return mask


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """[.., H, T, E] and [.., K, T, E] -> [.., T, H, E]; softmax in fp32 or better, products in the dtype of q."""
    repeat = q.shape[-3] // k.shape[-3]
    k, v = k.repeat_interleave(repeat, -3), v.repeat_interleave(repeat, -3)
    scores = ((q @ k.transpose(-1, -2)) * scale).masked_fill(~mask, -math.inf)
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return (weights @ v).transpose(-2, -3)


def random_qkv(*shape: int, heads: tuple[int, int], seed: int = 0) -> list[Tensor]:
    """bf16 leaves [.., heads, T, E] for a shape (.., T, E)."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(*shape[:-2], h, *shape[-2:], generator=generator).bfloat16().requires_grad_()
        for h in (heads[0], heads[1], heads[1])
    ]


def with_gradients(out: Tensor, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def assert_at_most_twice_the_error_of_pytorch(ours: Tensor, inputs: list[Tensor], mask: Tensor, scale: float) -> None:
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = with_gradients(dense(*exact_inputs, mask, scale), exact_inputs, grad.double())
    plain = with_gradients(dense(*inputs, mask, scale), inputs, grad)
    results = with_gradients(ours, inputs, grad)
    for name, result, baseline, truth in zip(("out", "dq", "dk", "dv"), results, plain, exact, strict=True):
        error, allowed = (result.double() - truth).abs(), (baseline.double() - truth).abs()
        # with one visible key the gradients of q and k are 0: PyTorch finds exactly that, sums in another order 1e-7 of dO
        assert error.max() <= 2 * allowed.max() + 1e-5, name
        assert error.square().mean().sqrt() <= 2 * allowed.square().mean().sqrt() + 1e-5, name


@needs_kernel
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300])
@pytest.mark.parametrize("heads", [(3, 3), (4, 2)])
def test_one_segment_is_as_exact_as_pytorch(length: int, heads: tuple[int, int]) -> None:
    inputs, segments = random_qkv(length, 64, heads=heads, seed=length), make_segments([length])
    out = flash_cpu_attention(*inputs, segments=segments, scale=0.125)
    assert_at_most_twice_the_error_of_pytorch(out, inputs, visible(segments), 0.125)


@needs_kernel
@pytest.mark.parametrize("size", [16, 32, 48, 64, 80, 96, 112, 128, 256])
def test_every_head_size_is_as_exact_as_pytorch(size: int) -> None:
    inputs, segments = random_qkv(212, size, heads=(4, 2), seed=size), make_segments([77, 130, 5])
    out = flash_cpu_attention(*inputs, segments=segments, scale=size**-0.5)
    assert_at_most_twice_the_error_of_pytorch(out, inputs, visible(segments), size**-0.5)


@needs_kernel
@pytest.mark.parametrize("seed", range(8))
def test_a_random_forest_of_segments_is_as_exact_as_pytorch(seed: int) -> None:
    rng = random.Random(seed)
    lengths: list[int] = []
    parents: list[int] = []
    for _ in range(rng.randint(1, 4)):
        root = len(lengths)
        children = rng.choice([0, 0, 1, 3, 6])
        lengths += [rng.randint(1, 150), *(rng.randint(1, 70) for _ in range(children))]
        parents += [NO_PARENT, *[root] * children]
    segments = make_segments(lengths, parents)
    inputs = random_qkv(segments.num_tokens, 32, heads=rng.choice([(2, 2), (4, 1), (6, 3)]), seed=seed)
    out = flash_cpu_attention(*inputs, segments=segments, scale=0.2)
    assert_at_most_twice_the_error_of_pytorch(out, inputs, visible(segments), 0.2)


@needs_kernel
@pytest.mark.parametrize(("tokens", "heads"), [(1, (2, 2)), (16, (2, 1)), (65, (4, 2)), (257, (3, 3))])
def test_whole_images_are_as_exact_as_pytorch(tokens: int, heads: tuple[int, int]) -> None:
    inputs = random_qkv(2, tokens, 64, heads=heads, seed=tokens)
    everything = torch.ones(tokens, tokens, dtype=torch.bool)
    assert_at_most_twice_the_error_of_pytorch(flash_cpu_full(*inputs, scale=0.125), inputs, everything, 0.125)


@needs_kernel
def test_peaked_weights_and_scores_of_a_thousand_are_as_exact_as_pytorch() -> None:
    inputs, segments = random_qkv(200, 64, heads=(2, 2)), make_segments([200])
    out = flash_cpu_attention(*inputs, segments=segments, scale=30.0)
    assert_at_most_twice_the_error_of_pytorch(out, inputs, visible(segments), 30.0)


def run(inputs: list[Tensor], segments: Segments = TREE, grad: Tensor | None = None) -> list[Tensor]:
    out = flash_cpu_attention(*inputs, segments=segments, scale=0.125)
    if grad is None:
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    return with_gradients(out, inputs, grad)


@needs_kernel
@pytest.mark.parametrize("layout", ["fused projection at an odd address", "head size not last in memory"])
def test_strides_do_not_change_a_bit(layout: str) -> None:
    heads, tokens, size = (4, 2), TREE.num_tokens, 64
    packed = random_qkv(tokens, size, heads=heads)
    if layout == "head size not last in memory":
        strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in packed]
    else:
        memory = torch.full((tokens, 1 + (heads[0] + 2 * heads[1]) * size), math.nan, dtype=torch.bfloat16)
        fused = memory[:, 1:].unflatten(1, (heads[0] + 2 * heads[1], size))
        fused.copy_(torch.cat([x.detach() for x in packed]).transpose(0, 1))
        strided = [x.transpose(0, 1).requires_grad_() for x in fused.split([heads[0], heads[1], heads[1]], 1)]
    assert not any(x.is_contiguous() for x in strided)
    for ours, expected in zip(run(strided), run(packed), strict=True):
        assert torch.equal(ours, expected)


@needs_kernel
@pytest.mark.parametrize("number", range(len(TREE.lengths)))
def test_a_segment_of_nan_reaches_only_those_who_see_it(number: int) -> None:
    inputs = random_qkv(TREE.num_tokens, 64, heads=(4, 2))
    grad = torch.randn(TREE.num_tokens, 4, 64).bfloat16()
    clean = run(inputs, grad=grad)
    own = slice(TREE.starts[number], TREE.starts[number] + TREE.lengths[number])
    with torch.no_grad():
        for x in inputs:
            x[:, own] = math.nan
        grad[own] = math.nan
    spoiled = run(inputs, grad=grad)
    sees, rows = visible(TREE), torch.zeros(TREE.num_tokens, dtype=torch.bool)
    rows[own] = True
    queries = (sees & rows).any(1)  # rows that see the segment
    keys = (sees & queries[:, None]).any(0)  # rows that any of those sees
    for name, before, after in zip(("out", "dq", "dk", "dv"), clean, spoiled, strict=True):
        before, after = (x if name == "out" else x.transpose(0, 1) for x in (before, after))
        affected = keys if name in ("dk", "dv") else queries
        assert affected.any()
        assert not affected.all()
        assert torch.equal(before[~affected], after[~affected]), name
        assert after[affected].isnan().all(), name


@needs_kernel
def test_a_nan_or_infinite_score_spoils_its_row() -> None:
    q, k, v = random_qkv(150, 64, heads=(1, 1))
    clean = flash_cpu_attention(q, k, v, segments=make_segments([150]), scale=1.0)
    with torch.no_grad():
        q[:, 20] = math.nan
        q[:, 90], k[:, 70] = 1e30, 1e30  # 1e60 is infinite, 1e30 is not
    out = flash_cpu_attention(q, k, v, segments=make_segments([150]), scale=1.0)
    assert out[[20, 90]].isnan().all()
    untouched = [row for row in range(70) if row != 20]
    assert torch.equal(out[untouched], clean[untouched])
    assert out[untouched].isfinite().all()


@needs_kernel
def test_weights_of_minus_infinity_are_zero() -> None:
    q, k, v = random_qkv(300, 64, heads=(1, 1))
    with torch.no_grad():
        q[:, 200:], k[:, :200] = -1e30, 1e30
    out = flash_cpu_attention(q, k, v, segments=make_segments([300]), scale=1e-30)
    expected = dense(q.double(), k.double(), v.double(), visible(make_segments([300])), 1e-30)
    torch.testing.assert_close(out[200:].double(), expected[200:], rtol=0, atol=0.02)
    assert expected[200:].abs().max() > 0.5


@needs_kernel
@pytest.mark.parametrize("segments", [TREE, make_segments([700])], ids=["tree", "one segment"])
@pytest.mark.parametrize("heads", [(4, 2), (16, 8)])
def test_bits_depend_neither_on_the_run_nor_on_the_number_of_threads(
    segments: Segments, heads: tuple[int, int]
) -> None:
    inputs, before = random_qkv(segments.num_tokens, 64, heads=heads), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(inputs, segments)
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            for ours, one_thread in zip(run(inputs, segments), expected, strict=True):
                assert torch.equal(ours, one_thread)
    finally:
        torch.set_num_threads(before)


@needs_kernel
def test_python_threads_at_the_same_time_do_not_share_buffers() -> None:
    problems = [random_qkv(TREE.num_tokens, size, heads=(4, 2), seed=size) for size in (32, 64, 128, 256)]
    expected = [run(inputs) for inputs in problems]
    with ThreadPoolExecutor(len(problems)) as pool:
        results = list(pool.map(run, problems * 8))
    for ours, alone in zip(results, expected * 8, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, alone, strict=True))


@needs_kernel
def test_gradients_flow_through_the_graph_around_it() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TREE.num_tokens, 48, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(48, 8 * 32, generator=generator).bfloat16().mul(48**-0.5).requires_grad_()

    def gradients(x: Tensor, weight: Tensor, fused: bool) -> list[Tensor]:
        q, k, v = (x @ weight).unflatten(1, (8, 32)).transpose(0, 1).split([4, 2, 2])
        if fused:
            out = flash_cpu_attention(q, k, v, segments=TREE, scale=0.2)
        else:
            out = dense(q, k, v, visible(TREE), 0.2)
        return list(torch.autograd.grad(out.sum(), [x, weight]))  # the gradient of a sum arrives with strides of 0

    exact = gradients(x.detach().double().requires_grad_(), weight.detach().double().requires_grad_(), False)
    for ours, plain, truth in zip(gradients(x, weight, True), gradients(x, weight, False), exact, strict=True):
        assert (ours.double() - truth).norm() <= 2 * (plain.double() - truth).norm()


@needs_kernel
def test_a_frozen_input_gets_no_gradient_and_the_others_are_unchanged() -> None:
    q, k, v = random_qkv(TREE.num_tokens, 64, heads=(2, 2))
    expected = run([q, k, v])[2]
    frozen = flash_cpu_attention(q.detach(), k, v.detach(), segments=TREE, scale=0.125)
    grad = torch.randn(frozen.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert torch.equal(torch.autograd.grad(frozen, k, grad)[0], expected)


@needs_kernel
def test_tiles_hold_every_row_once_and_siblings_share_them() -> None:
    segments = make_segments([290, *[25] * 10], [NO_PARENT, *[0] * 10])
    plan = plan_tiles(segments)
    runs, tiles = (torch.tensor(list(plan.arrays[i])).view(-1, width) for i, width in ((1, 4), (2, 3)))
    rows = torch.cat([torch.arange(row, row + count) for row, count, *_ in runs.tolist()])
    assert torch.equal(rows.sort().values, torch.arange(segments.num_tokens))
    for first, last, _ in tiles.tolist():
        ends = [lane + count for _, count, lane, _ in runs[first:last].tolist()]
        begins = [lane for _, _, lane, _ in runs[first:last].tolist()]
        assert all(begin % 2 == 0 for begin in begins)
        assert all(end <= begin for end, begin in zip(ends, begins[1:], strict=False))
        assert ends[-1] <= 64
    assert len(tiles) == 5 + 5  # 290 rows, and ten siblings of 25 + 1 lanes


@needs_kernel
def test_what_does_not_fit_is_named() -> None:
    q, k, v = random_qkv(8, 64, heads=(4, 2))
    with pytest.raises(ValueError, match="segments hold 9 tokens, q holds 8"):
        flash_cpu_attention(q, k, v, segments=make_segments([9]), scale=1.0)
    with pytest.raises(ValueError, match=r"divides 4.*\[3, 8, 64\]"):
        flash_cpu_attention(q, q[:3], q[:3], segments=make_segments([8]), scale=1.0)
    with pytest.raises(ValueError, match="scale must be positive, got 0"):
        flash_cpu_full(q[None], k[None], v[None], scale=0.0)
    with pytest.raises(ValueError, match="head size 24; use blocked_attention"):
        flash_cpu_full(q[None, ..., :24], k[None, ..., :24], v[None, ..., :24], scale=1.0)


@needs_kernel
def test_only_bf16_on_a_cpu_with_a_head_size_in_steps_of_16_is_taken() -> None:
    def takes(size: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> bool:
        return available(torch.empty(2, 5, size, dtype=dtype, device=device))

    assert takes(16)
    assert takes(256)
    assert not any(takes(size) for size in (0, 8, 24, 272))
    assert not takes(64, torch.float32)
    assert not takes(64, torch.float16)
    assert not takes(64, device="meta")


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_build_for_an_older_cpu_says_that_it_has_no_kernel(tmp_path: Path) -> None:
    source = Path(native.__file__).with_name("flash.c")
    command = ["cc", "-march=x86-64", "-shared", "-fPIC", str(source), "-o", str(tmp_path / "old.so")]
    subprocess.run(command, check=True)
    assert ctypes.CDLL(str(tmp_path / "old.so")).vlit_flash_lanes() == 0
