"""``type: mlp``: linear layers with an activation between them.

Depth 2 is LLaVA-1.5's ``mlp2x_gelu`` (arXiv:2310.03744).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from vlit.models.interfaces import Connector, ConnectorConfig
from vlit.registry import CONNECTORS
from vlit.types import VisionTokens

Activation = Literal["gelu", "gelu_tanh", "silu"]


def make_activation(name: Activation) -> nn.Module:
    """``gelu`` is the exact one (erf), ``gelu_tanh`` its tanh approximation."""
    if name == "silu":
        return nn.SiLU()
    return nn.GELU(approximate="tanh" if name == "gelu_tanh" else "none")


class MLPConnector(Connector):
    """``Linear(C, D)`` and then ``depth - 1`` times (activation, ``Linear(D, D)``), for every token.

    The linear layers are ``layers.0``, ``layers.2``, …, the numbers LLaVA gives them. Initialised U(±1/√fan_in) like
    LLaVA's, so its published learning rates apply.
    """

    def __init__(self, *, in_width: int, out_width: int, depth: int, activation: Activation) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(in_width, out_width)]
        for _ in range(depth - 1):
            layers += [make_activation(activation), nn.Linear(out_width, out_width)]
        self.layers = nn.Sequential(*layers)

    def forward(self, vision: VisionTokens) -> VisionTokens:
        return VisionTokens(self.layers(vision.tokens))


@CONNECTORS.register("mlp")
class MLPConnectorConfig(ConnectorConfig):
    """Linear layers with an activation between them."""

    type: str = "mlp"
    depth: Annotated[int, Field(ge=1)] = 2
    """How many linear layers; 2 is LLaVA-1.5's `mlp2x_gelu`."""
    activation: Activation = "gelu"
    """Between the layers: exact `gelu`, `gelu_tanh` or `silu`."""

    def num_tokens(self, tokens_in: int) -> int:
        return tokens_in

    def build(self, *, in_width: int, out_width: int, tokens_in: int) -> MLPConnector:  # type: ignore[override]
        return MLPConnector(in_width=in_width, out_width=out_width, depth=self.depth, activation=self.activation)
