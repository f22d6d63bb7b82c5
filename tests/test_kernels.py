"""Packed attention and splicing against plain PyTorch written the obvious way."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlit.kernels.attention import make_segments, packed_attention
from vlit.kernels.splice import splice_tokens


def attention_by_mask(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """One dense T x T mask, all heads repeated, softmax written out."""
    repeat = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    t = torch.arange(q.shape[1])
    visible = (segment[:, None] == segment[None, :]) & (t[:, None] >= t[None, :])
    if window is not None:
        visible &= t[:, None] - t[None, :] < window
    scores = (q @ k.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~visible, -math.inf).softmax(-1) @ v).transpose(0, 1)


def random_qkv(lengths: list[int], heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    total = sum(lengths)
    return [
        torch.randn(h, total, size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    ]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=8),
    grouped=st.booleans(),
    window=st.sampled_from([None, 1, 7]),
    softcap=st.sampled_from([None, 3.0]),
)
def test_packed_attention_and_its_gradients_equal_one_dense_mask(
    lengths: list[int], grouped: bool, window: int | None, softcap: float | None
) -> None:
    q, k, v = random_qkv(lengths, 4, 2 if grouped else 4, 8, torch.float64)
    out = packed_attention(q, k, v, segments=make_segments(lengths), scale=0.3, sliding_window=window, softcap=softcap)
    expected = attention_by_mask(q, k, v, lengths, 0.3, window, softcap)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)  # softmax is taken in fp32 on the soft-cap path
    weight = torch.randn_like(out)
    found = torch.autograd.grad((out * weight).sum(), (q, k, v))
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_error_is_at_most_twice_that_of_pytorch_at_the_same_dtype(dtype: torch.dtype) -> None:
    lengths = [1, 2, 15, 16, 17, 63, 64, 65, 129]
    q, k, v = random_qkv(lengths, 4, 2, 32, dtype)
    exact = attention_by_mask(*(x.double() for x in (q, k, v)), lengths, 32**-0.5, None, None)
    ours = packed_attention(q, k, v, segments=make_segments(lengths), scale=32**-0.5).double()
    plain = attention_by_mask(q, k, v, lengths, 32**-0.5, None, None).double()
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-7


def test_a_sample_never_sees_its_neighbour() -> None:
    lengths = [9, 30, 5]
    q, k, v = random_qkv(lengths, 2, 2, 8, torch.float32)
    segments = make_segments(lengths)
    before = packed_attention(q, k, v, segments=segments, scale=1.0)
    poisoned_k, poisoned_v = k.detach().clone(), v.detach().clone()
    poisoned_k[:, 9:39], poisoned_v[:, 9:39] = float("nan"), float("nan")
    after = packed_attention(q, poisoned_k, poisoned_v, segments=segments, scale=1.0)
    assert torch.equal(before[:9], after[:9])
    assert torch.equal(before[39:], after[39:])
    assert after[9:39].isnan().all()


def test_segments_refuse_an_empty_sample() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        make_segments([3, 0])


def test_splice_puts_vision_tokens_in_reading_order() -> None:
    text = torch.zeros(6, 2, requires_grad=True)
    vision = torch.arange(6.0).view(3, 2)
    is_image = torch.tensor([False, True, True, False, True, False])
    out = splice_tokens(text, vision, is_image)
    assert out[is_image].tolist() == vision.tolist()
    out.sum().backward()
    assert text.grad is not None
    assert text.grad[:, 0].tolist() == [1, 0, 0, 1, 0, 1]
