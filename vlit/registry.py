"""Components by exact name: one registry a kind, one file a component, found by importing the kind's package.

A component is registered as its *config class*: a strict pydantic model with a ``build`` method. The YAML says
``type: <name>`` and the remaining keys are validated by that class, so a mistyped key is an error before any weight is
loaded. ``build`` hands flat keyword arguments to the module it makes; config objects never enter modules.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, TypeVar

from vlit.errors import ConfigError, did_you_mean

C = TypeVar("C", bound=type)


class Registry:
    """Names -> config classes of one kind of component.

    Args:
        kind: the word users read in errors, for example ``"connector"``.
        package: dotted name of the package whose modules register the components; imported on first use.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._entries: dict[str, type] = {}
        self._discovered = False

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator. A second class under the same name is an error, never a silent replacement."""

        def add(cls: C) -> C:
            held = self._entries.get(name)
            if held is not None and (held.__module__, held.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ConfigError(
                    f'{self.kind} "{name}" is registered twice: {held.__module__}.{held.__qualname__} and '
                    f"{cls.__module__}.{cls.__qualname__}. Rename one of them."
                )
            self._entries[name] = cls
            return cls

        return add

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._discover()
        return sorted(self._entries)

    def get(self, name: str) -> Any:
        """The config class registered under ``name``; ConfigError with the known names otherwise."""
        self._discover()
        if name not in self._entries:
            raise ConfigError(f'unknown {self.kind} type "{name}". {did_you_mean(name, self._entries)}')
        return self._entries[name]

    def _discover(self) -> None:
        if self._discovered:
            return
        self._discovered = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"{self.package}.{module.name}")


ENCODERS = Registry("encoder", "vlit.models.encoders")
CONNECTORS = Registry("connector", "vlit.models.connectors")
LLMS = Registry("llm", "vlit.models.llms")
FUSIONS = Registry("fusion", "vlit.models.fusion")
TEMPLATES = Registry("template", "vlit.data.templates")
FORMATS = Registry("format", "vlit.data.formats")
BENCHMARKS = Registry("benchmark", "vlit.eval.benchmarks")
WORLDS = Registry("world", "vlit.synth.worlds")
TRACKERS = Registry("tracker", "vlit.train.trackers")
TEACHERS = Registry("teacher", "vlit.synth.teachers")
RECIPES = Registry("recipe", "vlit.synth.recipes")
GENERATORS = Registry("generator", "vlit.synth.generators")

_MODEL = (ENCODERS, CONNECTORS, LLMS, FUSIONS)
_DATA = (TEMPLATES, FORMATS, BENCHMARKS, WORLDS, TRACKERS)
_SYNTH = (TEACHERS, RECIPES, GENERATORS)
ALL = {r.kind: r for r in (*_MODEL, *_DATA, *_SYNTH)}


def load_plugins(modules: list[str]) -> None:
    """Import out-of-tree modules so that their components register themselves (``plugins:`` in the YAML)."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ConfigError:
            raise
        except Exception as error:  # whatever a module does when it is imported
            kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
            raise ConfigError(
                f'plugins: cannot import "{name}": {kind}{error}. Install it or put its folder on PYTHONPATH.'
            ) from error
