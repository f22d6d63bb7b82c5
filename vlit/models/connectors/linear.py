"""``type: linear``: one matrix between encoder and language model (LLaVA, arXiv:2304.08485 eq. 1)."""

from __future__ import annotations

from torch import nn

from vlit.models.interfaces import Connector, ConnectorConfig
from vlit.registry import CONNECTORS
from vlit.types import VisionTokens


class LinearConnector(Connector):
    """``W x + b`` for every token. Initialised U(±1/√C) like LLaVA's, so its published learning rates apply."""

    def __init__(self, *, in_width: int, out_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_width, out_width)

    def forward(self, vision: VisionTokens) -> VisionTokens:
        return VisionTokens(self.linear(vision.tokens))


@CONNECTORS.register("linear")
class LinearConnectorConfig(ConnectorConfig):
    """One linear layer with bias."""

    type: str = "linear"

    def num_tokens(self, tokens_in: int) -> int:
        return tokens_in

    def build(self, *, in_width: int, out_width: int, tokens_in: int) -> LinearConnector:  # type: ignore[override]
        return LinearConnector(in_width=in_width, out_width=out_width)
