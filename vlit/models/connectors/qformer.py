"""``type: qformer``: a few learned queries read the vision tokens.

BLIP-2, arXiv:2301.12597; MiniGPT-4, arXiv:2304.10592. The Q-Former is transformers' ``Blip2QFormerModel`` without its
text half; ``from_blip2`` starts from published weights.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from vlit.errors import ConfigError, ModelError
from vlit.models.interfaces import Connector, ConnectorConfig
from vlit.models.interop.weights import WeightFiles, fetch_folder
from vlit.registry import CONNECTORS
from vlit.types import VisionTokens

DEFAULTS = {"num_queries": 32, "width": 768, "layers": 12, "heads": 12, "cross_attention_every": 2}
PREFIXES = ("qformer.", "query_tokens", "language_projection.", "vision_model.post_layernorm.")
"""What is read of a BLIP-2 checkpoint; of a sharded one only the shards that hold it are fetched."""
PositiveInt = Annotated[int, Field(ge=1)]


class QFormerConnector(Connector):
    """Queries -> (self-attention, cross-attention to the vision tokens in every n-th layer, MLP) -> projection.

    A layer norm over the queries comes first, as in BLIP-2; ``input_norm`` adds one over the vision tokens. Without
    dropout, so that a batch and its parts give the same gradients. Initial weights: N(0, 0.02) for queries and Q-Former
    (BERT's), PyTorch's U(±1/√width) for the projection.
    """

    def __init__(
        self,
        *,
        in_width: int,
        out_width: int,
        num_queries: int,
        width: int,
        layers: int,
        heads: int,
        cross_attention_every: int,
        intermediate_width: int,
        input_norm: bool,
    ) -> None:
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        super().__init__()
        self.input_norm = nn.LayerNorm(in_width) if input_norm else None
        self.query_tokens = nn.Parameter(torch.randn(1, num_queries, width) * 0.02)
        self.qformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                intermediate_size=intermediate_width,
                encoder_hidden_size=in_width,
                cross_attention_frequency=cross_attention_every,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )
        self.language_projection = nn.Linear(width, out_width)

    def forward(self, vision: VisionTokens) -> VisionTokens:
        tokens_VSC = vision.tokens
        if self.input_norm is not None:
            tokens_VSC = self.input_norm(tokens_VSC)
        queries = self.query_tokens.expand(tokens_VSC.shape[0], -1, -1)
        read_VQW = self.qformer(query_embeds=queries, encoder_hidden_states=tokens_VSC).last_hidden_state
        return VisionTokens(self.language_projection(read_VQW))

    def freeze_qformer(self) -> None:
        """Make everything but the projection constant: these weights become buffers, which no optimizer sees."""
        for module in (self, *self.qformer.modules(), *([self.input_norm] if self.input_norm is not None else [])):
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    del module._parameters[name]
                    module.register_buffer(name, parameter.detach())


@CONNECTORS.register("qformer")
class QFormerConnectorConfig(ConnectorConfig):
    """BLIP-2's querying transformer and a projection."""

    type: str = "qformer"
    num_queries: PositiveInt | None = None
    """Learned queries, which is the number of tokens per view. Default: that of `from_blip2`, else 32."""
    width: PositiveInt | None = None
    """Width of the Q-Former. Default: that of `from_blip2`, else 768."""
    layers: PositiveInt | None = None
    """Layers of the Q-Former. Default: that of `from_blip2`, else 12."""
    heads: PositiveInt | None = None
    """Attention heads of the Q-Former. Default: that of `from_blip2`, else 12."""
    cross_attention_every: PositiveInt | None = None
    """Every n-th layer, from the first, reads the vision tokens. Default: that of `from_blip2`, else 2."""
    input_norm: bool = False
    """Layer norm over the vision tokens, for encoders without `final_norm`."""
    from_blip2: str | None = None
    """BLIP-2 folder or model id: loads `qformer.*`, `query_tokens` and, when the widths agree, `language_projection`."""
    freeze_qformer: bool = False
    """Keep Q-Former and queries as loaded and train the projection alone (MiniGPT-4)."""

    @model_validator(mode="after")
    def _check(self) -> QFormerConnectorConfig:
        if self.freeze_qformer and self.from_blip2 is None:
            raise ValueError("freeze_qformer needs from_blip2: a Q-Former that is frozen at random learns nothing")
        return self

    def num_tokens(self, tokens_in: int) -> int:
        return self._sizes()["num_queries"]

    def build(self, *, in_width: int, out_width: int, tokens_in: int) -> QFormerConnector:  # type: ignore[override]
        connector = self._make(in_width, out_width)
        if self.from_blip2 is not None:
            load_blip2(connector, self.from_blip2)
        if self.freeze_qformer:
            connector.freeze_qformer()
        return connector

    def build_empty(self, *, in_width: int, out_width: int, tokens_in: int) -> QFormerConnector:
        with torch.device("meta"):
            connector = self._make(in_width, out_width)
        if self.freeze_qformer:
            connector.freeze_qformer()
        return connector

    def _make(self, in_width: int, out_width: int) -> QFormerConnector:
        sizes = self._sizes()
        expected = sizes.pop("in_width", in_width)
        if expected != in_width:
            raise ModelError(
                f"model.connector.from_blip2: the Q-Former of {self.from_blip2} reads tokens of width {expected}, "
                f"the encoder gives {in_width}. Use the vision half of the same checkpoint as encoder."
            )
        if sizes["width"] % sizes["heads"]:
            raise ConfigError(
                f"model.connector.heads: {sizes['heads']} heads do not divide the width {sizes['width']}."
            )
        return QFormerConnector(in_width=in_width, out_width=out_width, input_norm=self.input_norm, **sizes)

    def _sizes(self) -> dict[str, int]:
        """Sizes of the Q-Former: set keys, else the checkpoint's, else BLIP-2's own."""
        held = blip2_sizes(self.from_blip2) if self.from_blip2 is not None else {}
        sizes: dict[str, int] = {**DEFAULTS, **held}
        for key in DEFAULTS:
            asked = getattr(self, key)
            if asked is not None and key in held and asked != held[key]:
                raise ModelError(
                    f"model.connector.{key}: {asked}, but {self.from_blip2} has {held[key]}. Remove one of them."
                )
            if asked is not None:
                sizes[key] = asked
        sizes.setdefault("intermediate_width", 4 * sizes["width"])
        return sizes


def blip2_sizes(folder: str) -> dict[str, int]:
    """Q-Former sizes of a BLIP-2 folder, from its config.json."""
    file = fetch_folder(folder, key="model.connector.from_blip2", prefixes=PREFIXES) / "config.json"
    if not file.is_file():
        raise ModelError(f'model.connector.from_blip2: "{folder}" holds no config.json. Give a BLIP-2 model folder.')
    config = json.loads(file.read_text(encoding="utf-8"))
    if "qformer_config" not in config:
        raise ModelError(
            f'model.connector.from_blip2: {file} has no qformer_config (model_type "{config.get("model_type")}"). '
            "Give a BLIP-2 model folder."
        )
    from transformers import Blip2QFormerConfig

    qformer = Blip2QFormerConfig(**config["qformer_config"])
    return {
        "num_queries": config.get("num_query_tokens", DEFAULTS["num_queries"]),
        "width": qformer.hidden_size,
        "layers": qformer.num_hidden_layers,
        "heads": qformer.num_attention_heads,
        "cross_attention_every": qformer.cross_attention_frequency,
        "intermediate_width": qformer.intermediate_size,
        "in_width": qformer.encoder_hidden_size,
    }


def load_blip2(connector: QFormerConnector, folder: str) -> None:
    """Copy BLIP-2's weights into ``connector`` in place.

    Raises:
        ModelError: a tensor is missing or has another shape. Only the projection may be fresh, when the language
            models' widths differ.
    """
    held = fetch_folder(folder, key="model.connector.from_blip2", prefixes=PREFIXES)
    files = WeightFiles(held, prefixes=PREFIXES)
    projection: Any = connector.language_projection
    if "language_projection.weight" not in files or (
        files.get("language_projection.weight").shape != projection.weight.shape
    ):
        skip = "language_projection."
    else:
        skip = "\0"
    for name, target in connector.state_dict().items():
        if name.startswith(skip):
            continue
        source = name.replace("input_norm.", "vision_model.post_layernorm.")
        if source not in files:
            raise ModelError(
                f"model.connector.from_blip2: {folder} has no tensor {source}. Give a complete BLIP-2 folder."
            )
        _copy(target, files.get(source), name=source, folder=folder)


def _copy(target: Tensor, source: Tensor, *, name: str, folder: str) -> None:
    if target.shape != source.shape:
        raise ModelError(
            f"model.connector.from_blip2: {folder}: {name} is {list(source.shape)}, its config.json asks for "
            f"{list(target.shape)}. The folder's files do not belong together."
        )
    with torch.no_grad():
        target.copy_(source)
