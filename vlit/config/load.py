"""YAML files with ``extends:`` and dotted overrides -> a validated :class:`RunConfig`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vlit.config.deepspeed import deepspeed_mistakes
from vlit.config.safe_yaml import parse_yaml
from vlit.config.schema import RunConfig
from vlit.errors import ConfigError
from vlit.registry import load_plugins

_MAX_LINE = 1500
"""Longest line of an error; a value of a thousand digits says no more than its ends."""


def read_yaml(path: Path) -> dict[str, Any]:
    """One YAML file as a dict, its ``extends:`` parent (relative to the file) merged below it. Cycles are errors."""
    return _read(path.resolve(), path, ())[0]


def _read(path: Path, shown: Path, chain: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    if path in chain:
        raise ConfigError(f"{shown}: extends itself through {' -> '.join(p.name for p in (*chain, path))}.")
    by = f" (extended by {chain[-1].name})" if chain else ""
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise ConfigError(
            f"{shown}: no such configuration file{by}. Check the path; published ones are under configs/."
        ) from error
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be read{by} ({error.strerror}). Check the path and its rights.") from error
    data = parse_yaml(text, name=str(shown))
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{shown}: expected a mapping of keys at the top level, got {type(data).__name__}.")
    parent = data.pop("extends", None)
    origins = {".".join(p): str(shown) for p in _paths(data)}
    if parent is None:
        return data, origins
    if not isinstance(parent, str) or not parent or "\0" in parent:
        raise ConfigError(f"{shown}: extends: {parent!r} is not the path of a file. Give one, relative to this file.")
    base, base_origins = _read((path.parent / parent).resolve(), shown.parent / parent, (*chain, path))
    return merge(base, data), {**base_origins, **origins}


def _paths(data: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [prefix] if prefix else []
    if isinstance(data, dict):
        for key, value in data.items():
            found += _paths(value, (*prefix, str(key)))
    return found


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Deep merge: mappings merge key by key, anything else replaces. A mapping whose ``type`` changes replaces whole."""
    merged = dict(base)
    for key, value in over.items():
        held = merged.get(key)
        if (
            isinstance(held, dict)
            and isinstance(value, dict)
            and value.get("type", held.get("type")) == held.get("type")
        ):
            merged[key] = merge(held, value)
        else:
            merged[key] = value
    return merged


def apply_override(data: dict[str, Any], override: str) -> None:
    """Apply one ``a.b.c=value`` in place; the value is read as YAML. List items are addressed by number."""
    path, sep, text = override.partition("=")
    keys = path.strip().split(".")
    if not sep or not all(keys):
        raise ConfigError(f'override "{override}": expected key.path=value, for example stages.align.max_steps=20.')
    value = parse_yaml(text, name=f'override "{override}": the value')
    node: Any = data
    for depth, key in enumerate(keys[:-1]):
        if isinstance(node, list):
            node = _item(node, key, override)
        else:
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
        if not isinstance(node, (dict, list)):
            here = ".".join(keys[: depth + 1])
            raise ConfigError(f'override "{override}": {here} is {node!r}, it has no key "{keys[depth + 1]}".')
    if isinstance(node, list):
        _item(node, keys[-1], override)
        node[int(keys[-1])] = value
    else:
        node.update(merge(node, {keys[-1]: value}))


def _item(node: list[Any], key: str, override: str) -> Any:
    if not node:
        raise ConfigError(
            f'override "{override}": the list is empty, it has no item "{key}". Set the whole list: [...].'
        )
    if not key.lstrip("-").isdigit() or not -len(node) <= int(key) < len(node):
        raise ConfigError(
            f'override "{override}": "{key}" is not an item of a list of {len(node)} (0-{len(node) - 1}).'
        )
    return node[int(key)]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, merge, override and validate a run configuration.

    Raises:
        ConfigError: one line per mistake, each naming file (or override), key, and the closest known key.
    """
    shown = Path(path)
    data, origins = _read(shown.resolve(), shown, ())
    mistakes: list[str] = []
    for override in overrides:
        try:
            apply_override(data, override)
        except ConfigError as error:
            mistakes.append(str(error))
        origins[override.partition("=")[0].strip()] = f'override "{override}"'
    try:
        run = validate_config(data, name=str(shown), origins=origins)
    except ConfigError as error:
        mistakes.append(str(error))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return run


def validate_config(data: dict[str, Any], *, name: str, origins: dict[str, str] | None = None) -> RunConfig:
    """Validate a plain mapping; ``name`` and ``origins`` (dotted key -> file) only serve the error text.

    A stage set to null is left out, so that ``stages.align=null`` drops a stage of a parent file.
    """
    if isinstance(data.get("stages"), dict):
        data = data | {"stages": {name: stage for name, stage in data["stages"].items() if stage is not None}}
    plugins = data.get("plugins") or []
    if isinstance(plugins, list):
        load_plugins([str(p) for p in plugins])
    try:
        run = RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e, name, origins or {}) for e in error.errors())) from error
    mistakes = deepspeed_mistakes(run.runtime)
    if mistakes:
        raise ConfigError("\n".join(_line(where, text, name, origins or {}) for where, text in mistakes))
    return run


def _explain(error: Any, name: str, origins: dict[str, str]) -> str:
    loc = [str(part) for part in error["loc"] if not str(part).startswith("function-")]
    message, where = error["msg"], ".".join(loc)
    if error["type"] == "unknown_key":
        where = ".".join([*loc, error["ctx"]["key"]])
        message = message.split(": ", 1)[1]
    elif error["type"] == "component":
        where, message = where + message.split(": ", 1)[0], message.split(": ", 1)[1]
    elif error["type"] == "value_error" and isinstance(error.get("input"), dict):
        where, message = _of_section(where, message.removeprefix("Value error, "), error["input"])
    else:
        shown = repr(error.get("input"))
        message = f"{message} (got {shown if len(shown) < 80 else shown[:77] + '...'})"
        if error["type"] == "missing":
            message = "this key is required and missing"
    return _line(where, message, name, origins)


def _of_section(where: str, message: str, held: dict[str, Any]) -> tuple[str, str]:
    """Key and text of what a check of a whole section says; ``inner.key: text`` names the key that it means."""
    inner = re.match(r"([\w.-]+): ", message)
    if inner is None or inner[1].split(".")[0] not in held:
        return where, message
    return ".".join(part for part in (where, inner[1]) if part), message[inner.end() :]


def _line(where: str, message: str, name: str, origins: dict[str, str]) -> str:
    """``message`` after the key it is about and the file or override that wrote it."""
    source, probe = name, where
    while probe:
        if probe in origins:
            source = origins[probe]
            break
        probe = probe.rpartition(".")[0]
    line = f"{source}: {where}: {message}" if where else f"{source}: {message}"
    return line if len(line) <= _MAX_LINE else f"{line[: _MAX_LINE // 2]} … {line[-_MAX_LINE // 2 :]}"
