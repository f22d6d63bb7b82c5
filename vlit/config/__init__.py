"""Configuration: strict models, YAML with ``extends:``, dotted overrides, JSON schema. Questioned without weights."""

from vlit.config.component import ComponentConfig
from vlit.config.load import load_config
from vlit.config.schema import RunConfig, StageConfig
from vlit.config.strict import Strict

__all__ = ["ComponentConfig", "RunConfig", "StageConfig", "Strict", "load_config"]
