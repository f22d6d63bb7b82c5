"""Chunked linear cross-entropy against plain PyTorch over all logits, written the obvious way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cross_entropy import cases
from vlit.kernels import cross_entropy
from vlit.kernels.cross_entropy import Sizes, linear_cross_entropy


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """7 positions a chunk and 3 a block at V = 50, so that 23 positions are 4 chunks with ragged ends."""
    monkeypatch.setitem(cross_entropy.SIZES, "cpu", Sizes(7 * 50, 1, 3 * 50))
    return


def plain(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Total and per-position loss from all logits, fp32 at least."""
    logits = F.linear(hidden, weight, bias)
    logits = logit_scale * logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    each = F.cross_entropy(logits, targets, reduction="none")
    return each.sum() + z_loss * logits.logsumexp(-1).square().sum(), each


def head(positions: int, width: int, vocabulary: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Hidden states and a head whose logits spread like a trained model's, and targets."""
    generator = torch.Generator().manual_seed(positions)
    hidden = torch.randn(positions, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) * (2 / width**0.5)
    targets = torch.randint(0, vocabulary, (positions,), generator=generator).to(device)
    return [hidden.to(device, dtype).requires_grad_(), weight.to(device, dtype).requires_grad_(), targets]


@pytest.mark.parametrize("z_loss", [0.0, 0.03])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.usefixtures("small_chunks")
def test_loss_and_gradients_equal_autograd_over_all_logits(z_loss: float, softcap: float | None, bias: bool) -> None:
    hidden, weight, targets = head(23, 16, 50, torch.float64)
    offset = torch.randn(50, dtype=torch.float64, requires_grad=True) if bias else None
    inputs = [x for x in (hidden, weight, offset) if x is not None]
    total, each = plain(hidden, weight, targets, offset, softcap, 0.7, z_loss)
    ours = linear_cross_entropy(hidden, weight, targets, bias_V=offset, softcap=softcap, logit_scale=0.7, z_loss=z_loss)
    torch.testing.assert_close(ours.total, total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.per_position, each, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(0.25 * total, inputs)
    found = torch.autograd.grad(0.25 * ours.total, inputs)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("small_chunks")
def test_a_frozen_head_gets_no_weight_gradient_and_no_positions_give_zero() -> None:
    hidden, weight, targets = head(5, 8, 11, torch.float32)
    linear_cross_entropy(hidden, weight.detach(), targets).total.backward()
    assert hidden.grad is not None
    assert weight.grad is None
    none = linear_cross_entropy(hidden[:0], weight, targets[:0])
    assert none.total.item() == 0.0
    assert none.per_position.shape == (0,)
    none.total.backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def error(found: Tensor, exact: Tensor) -> float:
    """Distance to the exact tensor as a share of it."""
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("rows", [64, 5])
@pytest.mark.parametrize("positions", [40, 700])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_error_is_at_most_twice_that_of_pytorch_at_the_same_dtype(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, positions: int, rows: int
) -> None:
    """From 1 chunk to 140 of them, whose sum in bf16 would be ten times worse."""
    monkeypatch.setitem(cross_entropy.SIZES, "cpu", Sizes(rows * 999, rows, 10 * 999))
    check_error("cpu", dtype, positions)


def check_error(device: str, dtype: torch.dtype, positions: int) -> None:
    hidden, weight, targets = head(positions, 96, 999, dtype, device)
    exact_inputs = [hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    exact_total, exact_each = plain(*exact_inputs, targets)
    exact = [exact_each.detach(), *torch.autograd.grad(exact_total / positions, exact_inputs)]
    found = {}
    for name, function in (("plain", plain), ("ours", linear_cross_entropy)):
        total, each = function(hidden, weight, targets)
        found[name] = [each.detach(), *torch.autograd.grad(total / positions, [hidden, weight])]
    for what, wanted, ours, theirs in zip(
        ("loss", "hidden", "weight"), exact, found["ours"], found["plain"], strict=True
    ):
        assert ours.shape == theirs.shape
        assert error(ours, wanted) <= 2 * error(theirs, wanted) + 1e-7, what


def test_the_incoming_gradient_is_not_rounded_to_bf16() -> None:
    """1/681 lies in the middle between two bf16 numbers: rounding it would shrink every gradient by 0.24 %."""
    hidden, weight, targets = head(681, 96, 999, torch.bfloat16)
    whole = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets).total, [hidden, weight])
    shares = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets).total / 681, [hidden, weight])
    for one, part in zip(whole, shares, strict=True):
        scale = (part.double() * one.double()).sum() / one.double().square().sum()
        assert abs(681 * scale - 1) < 2e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_target_with_no_probability_left_has_a_finite_exact_loss(dtype: torch.dtype) -> None:
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=dtype, requires_grad=True)
    weight = torch.tensor([[512.0, 0.0], [0.0, 512.0], [0.0, 0.0]], dtype=dtype)
    ours = linear_cross_entropy(hidden, weight, torch.tensor([1, 1]))
    assert ours.per_position.tolist() == [512.0, 0.0]
    ours.total.backward()
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[512.0, -512.0], [0.0, 0.0]]


class Sightings(TorchDispatchMode):
    """The operators called under it and the number of elements of the largest tensor any of them returned."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        tensors = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor)]
        self.largest = max([self.largest, *(x.numel() for x in tensors)])
        return out

    @property
    def products(self) -> int:
        return sum(name in ("mm", "addmm", "matmul") for name in self.names)


@pytest.mark.usefixtures("small_chunks")
def test_each_chunk_costs_one_product_for_each_thing_asked_and_no_tensor_holds_all_logits() -> None:
    hidden, weight, targets = head(23, 4, 50, torch.bfloat16)
    chunks, products = 4, {}
    with Sightings() as frozen:
        linear_cross_entropy(hidden, weight.detach(), targets).total.backward()
    with Sightings() as trained:
        linear_cross_entropy(hidden, weight, targets).total.backward()
    with torch.no_grad(), Sightings() as validation:
        loss = linear_cross_entropy(hidden, weight, targets)
    products = [seen.products for seen in (validation, frozen, trained)]
    assert products == [chunks, 2 * chunks, 3 * chunks]
    assert max(seen.largest for seen in (validation, frozen, trained)) <= 7 * 50 < 23 * 50
    assert not loss.total.requires_grad
    assert loss.per_position.tolist() == linear_cross_entropy(hidden, weight, targets).per_position.tolist()


@pytest.mark.parametrize("positions", [6, 23])
@pytest.mark.usefixtures("small_chunks")
def test_the_weight_gradient_reaches_the_parameter_without_a_copy(positions: int) -> None:
    hidden, weight, targets = head(positions, 16, 50, torch.bfloat16)
    total = linear_cross_entropy(hidden, weight, targets).total
    assert total.grad_fn is not None
    address = total.grad_fn.saved_tensors[1].data_ptr()
    (total / 3).backward()
    assert weight.grad is not None
    assert weight.grad.data_ptr() == address


def test_a_second_backward_is_refused_since_the_first_scaled_the_gradients_in_place() -> None:
    hidden, weight, targets = head(6, 16, 50, torch.float32)
    total = linear_cross_entropy(hidden, weight, targets).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="Compute the loss again"):
        total.backward()


def test_a_tied_head_and_a_head_merged_from_parts_get_the_gradient_of_plain_pytorch() -> None:
    torch.manual_seed(0)
    embedding = torch.randn(50, 16, dtype=torch.float64, requires_grad=True)
    down, up = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((50, 3), (3, 16)))
    ids, targets = torch.randint(0, 50, (2, 23))
    for weight, leaves in ((embedding, [embedding]), (embedding.detach() + down @ up, [down, up])):
        hidden = torch.tanh(F.embedding(ids, embedding))
        found = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets).total, leaves, retain_graph=True)
        wanted = torch.autograd.grad(plain(hidden, weight, targets)[0], leaves)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_same_input_gives_the_same_bits() -> None:
    hidden, weight, targets = head(300, 64, 777, torch.bfloat16)
    runs = []
    for _ in range(5):
        ours = linear_cross_entropy(hidden, weight, targets)
        runs.append([ours.per_position, *torch.autograd.grad(ours.total / 300, [hidden, weight])])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_the_benchmark_finds_no_error_above_twice_that_of_eager() -> None:
    rows = cases(quick=True)
    eager = {row["case"]: row["error"] for row in rows if row["system"] == "eager"}
    ours = {row["case"]: row["error"] for row in rows if row["system"] == "vlit"}
    assert eager.keys() == ours.keys()
    assert len(eager) >= 4
    for case, found in ours.items():
        assert found <= 2 * eager[case] + 1e-7, case


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_error_on_the_gpu_is_at_most_twice_that_of_pytorch(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setitem(cross_entropy.SIZES, "cuda", Sizes(64 * 999, 64, 10 * 999))
    for positions in (40, 700):
        check_error("cuda", dtype, positions)


@pytest.mark.gpu
def test_the_gpu_is_never_waited_for() -> None:
    hidden, weight, targets = head(700, 64, 999, torch.bfloat16, "cuda")
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = linear_cross_entropy(hidden, weight, targets, softcap=30.0, logit_scale=0.5, z_loss=1e-4)
        (loss.total / 700).backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert weight.grad is not None
    assert bool(weight.grad.isfinite().all())
