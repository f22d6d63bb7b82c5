"""Put vision tokens into a row of text embeddings."""

from __future__ import annotations

from torch import Tensor


def splice_tokens(text_TD: Tensor, vision_SD: Tensor, is_image_T: Tensor) -> Tensor:
    """Replace the image positions of a packed row by the vision tokens, in reading order.

    ``is_image_T`` marks as many positions as ``vision_SD`` has rows; ``collate`` guarantees count and order, so nothing is
    checked here (a count on the GPU would stall the stream). No gradient reaches the replaced text embeddings.
    """
    return text_TD.masked_scatter(is_image_T.unsqueeze(-1), vision_SD.to(text_TD.dtype))
