"""``vlit synth``'s own configuration: what to make, from what, by whom, for how much at most."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from vlit.config.component import ComponentConfig, component
from vlit.config.load import apply_override, read_yaml
from vlit.config.strict import Strict
from vlit.errors import ConfigError


class SynthConfig(Strict):
    """A run of the data engine. Every key can be set as ``key=value`` behind ``vlit synth run``."""

    recipe: component("recipe")  # type: ignore[valid-type]
    """How instructions are made."""
    teacher: component("teacher") = ComponentConfig(type="annotations")  # type: ignore[valid-type]
    """Who answers text prompts. `annotations` is embedded: it answers from the annotations, without model and network."""
    vision_teacher: component("teacher") | None = None  # type: ignore[valid-type]
    """Who looks at pictures; null: the same as teacher."""
    annotations: list[str] = []
    """COCO files, or folders of them."""
    images: str = ""
    """Folder that image paths are relative to, in the annotations and in what is written."""
    records: list[str] = []
    """Canonical JSONL files of finished records, for recipes that build on them."""
    out: str
    """Folder of the run: journals, replies, dataset.jsonl, rejected.jsonl, report.json."""
    calls: str = ""
    """File of all requests and replies; empty: calls.jsonl of the run. Runs with the same file share replies and budget."""
    budget_usd: Annotated[float, Field(ge=0)] | None = None
    """What all requests of the calls file together may cost at most; needs the teachers' prices."""
    max_items: Annotated[int, Field(ge=1)] | None = None
    """Take this many inputs (the first after a seeded shuffle); null: all."""
    max_unanswered: Annotated[int, Field(ge=1)] = 20
    """End the run when this many requests in a row have failed for good."""
    write_partial: bool = False
    """Write dataset.jsonl even though some requests were not answered; the next run asks those again."""
    seed: int = 0
    """Decides selections and draws."""
    plugins: list[str] = []
    """Modules that register further teachers, recipes or generators."""


def read_settings(path: Path | None, given: dict[str, Any], overrides: Sequence[str] = ()) -> SynthConfig:
    """A YAML file, options of the command line and dotted overrides, later ones first.

    Raises:
        ConfigError: one line a mistake.
    """
    from vlit.registry import load_plugins

    data = read_yaml(path) if path else {}
    for key, value in given.items():
        if value not in (None, [], ""):
            held = data.get(key)
            same = isinstance(held, dict) and held.get("type") == value
            data[key] = held if same else value
    for name in ("recipe", "teacher", "vision_teacher"):
        if isinstance(data.get(name), str):
            data[name] = {"type": data[name]}
    for override in overrides:
        apply_override(data, override)
    load_plugins([str(name) for name in data.get("plugins") or []])
    try:
        return SynthConfig.model_validate({"teacher": "annotations"} | data)
    except ValidationError as error:
        shown = str(path) if path else "vlit synth"
        raise ConfigError("\n".join(f"{shown}: {_explain(e)}" for e in error.errors())) from error


def _explain(error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"] if not str(part).startswith("function-"))
    text = error["msg"]
    return f"{place}{text}" if text.startswith(".") else f"{place}: {text}"
