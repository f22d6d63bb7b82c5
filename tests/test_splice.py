"""Vision tokens into a row of text embeddings."""

from __future__ import annotations

import torch

from vlit.kernels.splice import splice_tokens


def test_splice_puts_vision_tokens_in_reading_order() -> None:
    text = torch.zeros(6, 2, requires_grad=True)
    vision = torch.arange(6.0).view(3, 2)
    is_image = torch.tensor([False, True, True, False, True, False])
    out = splice_tokens(text, vision, is_image)
    assert out[is_image].tolist() == vision.tolist()
    out.sum().backward()
    assert text.grad is not None
    assert text.grad[:, 0].tolist() == [1, 0, 0, 1, 0, 1]
