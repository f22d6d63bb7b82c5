"""Packed attention of every backend that runs here against one dense mask, written the obvious way."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlit.kernels import native
from vlit.kernels.attention import NO_PARENT, Segments, make_segments, packed_attention
from vlit.kernels.attention.blocked import plan_blocks
from vlit.kernels.attention.dense import dense_attention
from vlit.kernels.attention.proof import proves_right


def visible(segments: Segments, window: int | None = None) -> Tensor:
    """bool [T, T], built one query row at a time from what a record of its own would see."""
    allowed = torch.zeros(segments.num_tokens, segments.num_tokens, dtype=torch.bool)
    for start, length, parent in zip(segments.starts, segments.lengths, segments.parents, strict=True):
        before = []
        if parent != NO_PARENT:
            before = list(range(segments.starts[parent], segments.starts[parent] + segments.lengths[parent]))
        for row in range(length):
            record = before + list(range(start, start + row + 1))
            allowed[start + row, record if window is None else record[-window:]] = True
    return allowed


def attention_by_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """All heads repeated, softmax written out."""
    repeat = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
    scores = (q @ k.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~visible(segments, window), -math.inf).softmax(-1) @ v).transpose(0, 1)


def random_qkv(tokens: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    draw = [torch.randn(h, tokens, size, generator=generator, dtype=torch.float64) for h in (heads, kv_heads, kv_heads)]
    return [x.to(dtype).requires_grad_() for x in draw]


@st.composite
def trees(draw: st.DrawFn) -> Segments:
    lengths: list[int] = []
    parents: list[int] = []
    for _ in range(draw(st.integers(1, 4))):
        root = len(lengths)
        lengths.append(draw(st.integers(1, 70)))
        parents.append(NO_PARENT)
        for _ in range(draw(st.integers(0, 4))):
            lengths.append(draw(st.integers(1, 30)))
            parents.append(root)
    return make_segments(lengths, parents)


@settings(max_examples=60, deadline=None)
@given(
    segments=trees(),
    grouped=st.booleans(),
    options=st.sampled_from(
        [("blocked", None, None), ("dense", None, None), ("dense", 7, None), ("dense", 1, 3.0), ("auto", 9, 3.0)]
    ),
)
def test_packed_attention_and_its_gradients_equal_one_dense_mask(
    segments: Segments, grouped: bool, options: tuple[str, int | None, float | None]
) -> None:
    backend, window, softcap = options
    q, k, v = random_qkv(segments.num_tokens, 4, 2 if grouped else 4, 8, torch.float64)
    out = packed_attention(
        q, k, v, segments=segments, scale=0.3, sliding_window=window, softcap=softcap, backend=backend
    )
    expected = attention_by_mask(q, k, v, segments, 0.3, window, softcap)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)  # softmax is taken in fp32 on the soft-cap path
    weight = torch.randn_like(out)
    found = torch.autograd.grad((out * weight).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


ODD = make_segments([1, 2, 15, 16, 17, 63, 300, 64, 65, 129, 700, 20], [-1, -1, -1, -1, -1, -1, -1, 6, 6, 6, -1, 10])


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("auto", torch.bfloat16),
        ("blocked", torch.bfloat16),
        ("auto", torch.float32),
        ("blocked", torch.float32),
        ("dense", torch.float32),  # in bf16 its error is that of PyTorch's own kernel
    ],
)
def test_error_is_at_most_twice_that_of_pytorch_at_the_same_dtype(dtype: torch.dtype, backend: str) -> None:
    q, k, v = random_qkv(ODD.num_tokens, 4, 2, 32, dtype)
    weight = torch.randn(ODD.num_tokens, 4, 32, generator=torch.Generator().manual_seed(0)).to(dtype)

    def results(function, inputs: list[Tensor]) -> list[Tensor]:
        out = function(*inputs)
        return [out, *torch.autograd.grad(out, inputs, weight.to(out.dtype))]

    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = results(lambda *x: attention_by_mask(*x, ODD, 32**-0.5), doubles)
    plain = results(lambda *x: attention_by_mask(*x, ODD, 32**-0.5), [q, k, v])
    ours = results(lambda *x: packed_attention(*x, segments=ODD, scale=32**-0.5, backend=backend), [q, k, v])
    for found, bound, truth in zip(ours, plain, exact, strict=True):
        assert (found.double() - truth).abs().max() <= 2 * (bound.double() - truth).abs().max() + 1e-7


@pytest.mark.parametrize(
    ("backend", "dtype", "poison"),
    [
        ("dense", torch.float32, math.nan),
        ("blocked", torch.float32, 3e4),  # neighbours in one block meet as 0 · v, which hides any finite v
        ("auto", torch.bfloat16, 3e4),
    ],
)
def test_a_sample_never_sees_its_neighbour_nor_a_sibling(backend: str, dtype: torch.dtype, poison: float) -> None:
    segments = make_segments([9, 30, 5, 6, 4], [-1, -1, 1, 1, 1])
    q, k, v = (x.detach() for x in random_qkv(54, 2, 2, 16, dtype))

    def attend(k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q, k, v, segments=segments, scale=1.0, backend=backend)

    before = attend(k, v)
    poisoned_k, poisoned_v = k.clone(), v.clone()
    poisoned_k[:, 44:50], poisoned_v[:, 44:50] = poison, poison  # the second child
    after = attend(poisoned_k, poisoned_v)
    assert torch.equal(before[:44], after[:44])
    assert torch.equal(before[50:], after[50:])
    assert not torch.allclose(after[44:50], before[44:50])


def test_without_a_c_compiler_the_same_numbers_come_from_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = random_qkv(ODD.num_tokens, 4, 2, 32, torch.bfloat16)
    weight = torch.randn(ODD.num_tokens, 4, 32).bfloat16()

    def results() -> list[Tensor]:
        out = packed_attention(q, k, v, segments=ODD, scale=0.2, backend="blocked")
        return [out, *torch.autograd.grad(out, (q, k, v), weight)]

    with_c = results()
    monkeypatch.setattr(native, "compiled", lambda: None)
    for found, expected in zip(results(), with_c, strict=True):
        torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)


def test_a_row_is_cut_into_blocks_that_hold_every_row_once() -> None:
    blocks = plan_blocks(ODD)
    assert [row for block in blocks for row in range(block.lo, block.hi)] == list(range(ODD.num_tokens))
    computed = sum((b.hi - b.lo) * b.num_keys for b in blocks)
    assert ODD.num_pairs == int(visible(ODD).sum()) <= computed < 1.6 * ODD.num_pairs


def test_a_wrong_backend_is_found_out_before_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    def careless_attention(q: Tensor, k: Tensor, v: Tensor, *, segments: Segments, scale: float) -> Tensor:
        return dense_attention(q, k, v, segments=make_segments(segments.lengths), scale=scale)

    assert proves_right(dense_attention, torch.device("cpu"), torch.bfloat16, 32, 2)
    assert not proves_right(careless_attention, torch.device("cpu"), torch.bfloat16, 32, 2)
    assert "careless_attention is not used on this machine" in capsys.readouterr().err


def test_segments_refuse_what_is_no_tree() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        make_segments([3, 0])
    for parents in ([-1, 1], [-1, 0, 1], [-1, -1, 0]):
        with pytest.raises(ValueError, match="directly before its children"):
            make_segments([2] * len(parents), parents)


def test_a_backend_that_lacks_an_option_or_a_device_says_so() -> None:
    q, k, v = (x.detach() for x in random_qkv(10, 2, 2, 16, torch.float32))
    segments = make_segments([10])
    with pytest.raises(ValueError, match="knows no sliding window"):
        packed_attention(q, k, v, segments=segments, scale=1.0, sliding_window=3, backend="blocked")
    with pytest.raises(ValueError, match="unknown attention backend"):
        packed_attention(q, k, v, segments=segments, scale=1.0, backend="magic")
