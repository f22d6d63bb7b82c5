"""``type: <name>`` in the YAML becomes the config class registered under that name."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny
from pydantic_core import PydanticCustomError

from vlit.config.strict import Strict
from vlit.errors import ConfigError, did_you_mean
from vlit.registry import ALL


class ComponentConfig(Strict):
    """Base of every registered component's config. Subclasses add their keys and a ``build`` method."""

    type: str
    """Registered name of the component."""

    def build(self, **kwargs: Any) -> Any:
        """Make the component. Every subclass overrides this with keyword arguments of its kind."""
        raise ConfigError(f'{type(self).__name__} ("{self.type}") has no build method; define one beside its fields.')


def component(kind: str) -> Any:
    """Field type for a component of ``kind``: a dict with ``type`` (or just its name) -> the registered config class."""

    def resolve(value: Any) -> Any:
        if isinstance(value, ComponentConfig):
            return value
        if isinstance(value, str):
            value = {"type": value}
        if not isinstance(value, dict):
            raise PydanticCustomError(
                "component", ": expected a mapping with a key type, got {value}", {"value": repr(value)}
            )
        registry = ALL[kind]
        if "type" not in value:
            raise PydanticCustomError(
                "component", ".type: missing. {hint}", {"hint": did_you_mean("", registry.names())}
            )
        name = str(value["type"])
        if name not in registry.names():
            raise PydanticCustomError(
                "component",
                ".type: unknown {kind} {name}. {hint}",
                {"kind": kind, "name": f'"{name}"', "hint": did_you_mean(name, registry.names())},
            )
        return registry.get(name).model_validate(value)

    return Annotated[SerializeAsAny[ComponentConfig], BeforeValidator(resolve)]
