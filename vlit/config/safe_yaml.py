"""YAML as configurations need it: plain data only, no key twice, ``1e-3`` a number, bounded whatever the text holds."""

from __future__ import annotations

import re
from typing import Any

import yaml

from vlit.errors import ConfigError

MAX_NODES = 100_000
"""Values of a file with every alias written out. Aliases of aliases ("billion laughs") grow exponentially."""
MAX_DEPTH = 64


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key written twice is an error, and ``1e-3`` is a number (YAML 1.2), not a string."""


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue  # its keys stand below the mapping's own
        if not isinstance(key_node, yaml.ScalarNode):
            mark = key_node.start_mark
            raise ConfigError(f"{mark.name}:{mark.line + 1}: a key is a list or a mapping. Write a word.")
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            mark = key_node.start_mark
            raise ConfigError(f'{mark.name}:{mark.line + 1}: key "{key}" is written twice. Keep one of them.')
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: bytes | str, *, name: str) -> Any:
    """The one document of ``text`` as plain Python values; None when it is empty.

    Args:
        name: what errors call the text: a file, or an override.

    Raises:
        ConfigError: not YAML, a tag that would make a Python object, a key written twice, too large or too deep.
    """
    try:
        loader = _Loader(text)
        try:
            loader.name = name  # errors name it beside the line
            node = loader.get_single_node()
            if node is None:
                return None
            _check_size(node, name)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError as error:
        raise ConfigError(f"{name}: nested too deeply. Write at most {MAX_DEPTH} levels.") from error
    except (yaml.YAMLError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        # PyYAML lets the errors of int(), float() and datetime() through
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())[:300]}") from error


def _check_size(root: yaml.Node, name: str) -> None:
    """ConfigError when the document, aliases written out, has too many values or levels (a recursive one has endless)."""
    count, waiting = 0, [(root, 1)]
    while waiting:
        node, depth = waiting.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise ConfigError(f"{name}: nested deeper than {MAX_DEPTH} levels. Remove levels, or a self-reference (*).")
        if count > MAX_NODES:
            raise ConfigError(f"{name}: more than {MAX_NODES} values with its aliases (*) written out. Use fewer.")
        if isinstance(node, yaml.MappingNode):
            waiting += [(child, depth + 1) for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(child, depth + 1) for child in node.value]
