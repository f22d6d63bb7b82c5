"""The configuration reference (Markdown) and the JSON schema editors complete YAML with, both made from the code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from vlit.config.component import ComponentConfig
from vlit.config.schema import (
    CheckpointConfig,
    DataConfig,
    DataSource,
    ModelConfig,
    OptimizerConfig,
    PartTuning,
    RunConfig,
    RuntimeConfig,
    ScheduleConfig,
    StageConfig,
    TuningConfig,
    ValidationConfig,
)
from vlit.registry import ALL
from vlit.synth.engine.settings import BuildConfig, EngineSettings, QualitySettings, SynthConfig

SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("Run (top level)", RunConfig),
    ("`model`", ModelConfig),
    ("`data`", DataConfig),
    ("`stages.<name>`", StageConfig),
    ("`stages.<name>.data[]`", DataSource),
    ("`stages.<name>.tuning`", TuningConfig),
    ("`stages.<name>.tuning.<part>`", PartTuning),
    ("`stages.<name>.optimizer`", OptimizerConfig),
    ("`stages.<name>.schedule`", ScheduleConfig),
    ("`stages.<name>.validation`", ValidationConfig),
    ("`stages.<name>.checkpoint`", CheckpointConfig),
    ("`runtime`", RuntimeConfig),
)

ENGINE_SECTIONS: tuple[tuple[str, type[BaseModel], tuple[str, ...]], ...] = (
    ("`vlit synth run` and `estimate`", SynthConfig, ()),
    ("`vlit synth build`", BuildConfig, tuple(EngineSettings.model_fields)),
    ("`quality` of `vlit synth build`", QualitySettings, ()),
)
"""Configurations of the data engine; a build has the keys of a run too, but for those left out here."""

HEADER = """# Configuration reference

Made from the code by `make docs`; do not edit. A run is `model + data + stages`, written in YAML. `extends: other.yaml` merges
a file below this one; `key.path=value` on the command line overrides both. Unknown keys are errors. Editors that know the
YAML language server complete keys when the file starts with `# yaml-language-server: $schema=docs/config.schema.json`.
"""


def write_reference(folder: Path) -> list[Path]:
    """Write ``configuration.md`` and ``config.schema.json`` into ``folder``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {"configuration.md": reference_markdown(), "config.schema.json": json.dumps(json_schema(), indent=1) + "\n"}
    for name, text in pages.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in pages]


def reference_markdown() -> str:
    """All sections, then every registered component of every kind."""
    parts = [HEADER]
    for title, model in SECTIONS:
        parts.append(f"\n## {title}\n\n{_summary(model)}\n\n{_table(model)}")
    for title, model, known in ENGINE_SECTIONS:
        also = " Also every key of `vlit synth run` but `recipe` and `calls`." if known else ""
        parts.append(f"\n## {title}\n\n{_summary(model)}{also}\n\n{_table(model, skip=known)}")
    parts.append(
        "\n## Components\n\nWherever a key is a component, `type:` picks one of these; a bare name stands for its defaults.\n"
    )
    for kind, registry in ALL.items():
        for name in registry.names():
            model = registry.get(name)
            parts.append(f"\n### {kind} `{name}`\n\n{_summary(model)}\n\n{_table(model, skip=('type',))}")
    return "".join(parts).rstrip() + "\n"


def json_schema() -> dict[str, Any]:
    """JSON schema of a run configuration; a component is any of its kind's registered configs, or its name."""
    schema = RunConfig.model_json_schema()
    definitions: dict[str, Any] = schema.setdefault("$defs", {})
    for kind, registry in ALL.items():
        options: list[dict[str, Any]] = [{"type": "string", "enum": registry.names()}]
        for name in registry.names():
            own = registry.get(name).model_json_schema()
            definitions.update(own.pop("$defs", {}))
            own.setdefault("properties", {})["type"] = {"const": name}
            own["required"] = sorted({*own.get("required", []), "type"})
            definitions[f"{kind}.{name}"] = own
            options.append({"$ref": f"#/$defs/{kind}.{name}"})
        definitions[f"component.{kind}"] = {"anyOf": options}
    definitions.pop("ComponentConfig", None)
    _point_components(schema)
    schema["properties"]["extends"] = {"type": "string", "description": "Another YAML file merged below this one."}
    schema["required"] = [key for key in schema.get("required", []) if key not in ("model", "stages")]
    return schema


_KIND_OF_FIELD = {
    "encoder": "encoder", "connector": "connector", "llm": "llm", "fusion": "fusion", "template": "template",
    "format": "format", "world": "world", "trackers": "tracker", "generator": "generator",
}  # fmt: skip


def _point_components(node: Any, field: str = "") -> None:
    """Replace references to the component base class by the union of the kind the field is of."""
    if isinstance(node, dict):
        if node.get("$ref") == "#/$defs/ComponentConfig":
            node["$ref"] = f"#/$defs/component.{_KIND_OF_FIELD[field]}"
        for key, value in node.items():
            _point_components(value, key if key in _KIND_OF_FIELD else field)
    elif isinstance(node, list):
        for value in node:
            _point_components(value, field)


def _summary(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split())


def _table(model: type[BaseModel], skip: tuple[str, ...] = ()) -> str:
    fields = {name: field for name, field in model.model_fields.items() if name not in skip}
    if not fields:
        return "No keys.\n"
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        kind = _type_name(field.annotation).replace("|", "\\|")
        lines.append(f"| `{name}` | {kind} | {_default(field)} | {meaning} |")
    return "\n".join(lines) + "\n"


def _default(field: Any) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or value is None:
        return "none"
    if isinstance(value, ComponentConfig):
        return f"`{value.type}`"
    if isinstance(value, dict) and set(value) == {"type"}:
        return f"`{value['type']}`"
    if isinstance(value, BaseModel):
        changed = value.model_dump(exclude_defaults=True)
        return f"`{json.dumps(changed)}`" if changed else "see below"
    return f"`{json.dumps(value)}`"


def _type_name(annotation: Any) -> str:
    text = str(annotation) if not isinstance(annotation, type) else annotation.__name__
    for noise in (
        "typing.",
        "pathlib.",
        "vlit.config.schema.",
        "vlit.config.component.",
        "<class '",
        "'>",
        "collections.abc.",
    ):
        text = text.replace(noise, "")
    if "ComponentConfig" in text:
        return {"list": "list of components", "dict": "mapping of components"}.get(text.split("[")[0], "component")
    while "Annotated[" in text:
        start = text.index("Annotated[")
        depth, comma, end = 0, None, len(text)
        for place in range(start + len("Annotated["), len(text)):
            character = text[place]
            if character in "[(":
                depth += 1
            elif character in "])":
                if depth == 0:
                    end = place
                    break
                depth -= 1
            elif character == "," and depth == 0 and comma is None:
                comma = place
        inner = text[start + len("Annotated[") : comma if comma is not None else end]
        text = text[:start] + inner + text[end + 1 :]
    return "`" + text.replace("NoneType", "None") + "`"
