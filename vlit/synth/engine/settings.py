"""``vlit synth``'s own configuration: what to make, from what, by whom, for how much at most."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from vlit.config.component import component
from vlit.config.load import apply_override, read_yaml
from vlit.config.strict import Strict
from vlit.errors import ConfigError

RESERVED = ("quality", ".", "..")
"""Names below ``out`` that no recipe may take."""


class EngineSettings(Strict):
    """What every run of the data engine is told."""

    teacher: component("teacher") = {"type": "annotations"}  # type: ignore[valid-type]
    """Who answers text prompts. `annotations` is embedded: it answers from the annotations, without model and network."""
    vision_teacher: component("teacher") | None = None  # type: ignore[valid-type]
    """Who looks at pictures; null: the same as teacher."""
    annotations: list[str] = []
    """COCO files, or folders of them."""
    images: str = ""
    """Folder that image paths are relative to, in the annotations and in what is written."""
    records: list[str] = []
    """Canonical JSONL files of finished records, for recipes that build on them."""
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


class SynthConfig(EngineSettings):
    """A run of one recipe. Every key can be set as ``key=value`` behind ``vlit synth run``."""

    recipe: component("recipe")  # type: ignore[valid-type]
    """How instructions are made."""
    out: str
    """Folder of the run: journals, replies, dataset.jsonl, rejected.jsonl, report.json."""
    calls: str = ""
    """File of all requests and replies; empty: calls.jsonl of the run. Runs with the same file share replies and budget."""


class QualitySettings(Strict):
    """What a built dataset is compared with, and what of it is kept (`vlit synth quality`)."""

    keep: list[str] = ["clean"]
    """Filters, as for `vlit synth quality --keep`; all must hold."""
    select: Annotated[int, Field(ge=1)] | None = None
    """Then keep this many records by quality and diversity; null: all."""
    annotations: list[str] = []
    """COCO instances that answers are compared with, each `FILE` or `FOLDER/=FILE`. Empty: the build's own."""
    eval_texts: list[str] = []
    """Evaluation files whose questions must not be among the records."""
    eval_images: list[str] = []
    """Folders of evaluation pictures that must not be among the pictures."""


class BuildConfig(EngineSettings):
    """Several recipes over the same pictures, then measured and filtered. Every key can be set as ``key=value`` behind ``vlit
    synth build``."""

    world: component("world") | None = None  # type: ignore[valid-type]
    """A self-made world of pictures and annotations to build first (`digits`)."""
    recipes: Annotated[dict[str, component("recipe")], Field(min_length=1)]  # type: ignore[valid-type]
    """Recipes by a name of your choice; each works in a folder of that name below `out`. Null leaves one out."""
    out: str
    """Folder of the build: one folder a recipe, calls.jsonl, dataset.jsonl, quality/, train.jsonl."""
    quality: QualitySettings = QualitySettings()

    def settings_of(self, name: str) -> SynthConfig:
        """The run of one recipe; all runs share replies and budget."""
        shared = {key: getattr(self, key) for key in EngineSettings.model_fields}
        folder = Path(self.out)
        return SynthConfig(
            **shared, recipe=self.recipes[name], out=str(folder / name), calls=str(folder / "calls.jsonl")
        )


def read_build(path: Path, overrides: Sequence[str] = ()) -> BuildConfig:
    """A YAML file (with ``extends:``) and dotted overrides.

    Raises:
        ConfigError: one line a mistake.
    """
    from vlit.registry import load_plugins

    data = read_yaml(path)
    for override in overrides:
        apply_override(data, override)
    recipes = data.get("recipes")
    if isinstance(recipes, dict):
        data["recipes"] = {name: held for name, held in recipes.items() if held is not None}
        if unusable := [name for name in data["recipes"] if Path(name).name != name or name in RESERVED]:
            raise ConfigError(f'{path}: recipes: "{unusable[0]}" cannot be the name of a folder here. Choose another.')
    load_plugins([str(name) for name in data.get("plugins") or []])
    try:
        return BuildConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {_explain(e)}" for e in error.errors())) from error


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
        return SynthConfig.model_validate(data)
    except ValidationError as error:
        shown = str(path) if path else "vlit synth"
        raise ConfigError("\n".join(f"{shown}: {_explain(e)}" for e in error.errors())) from error


def _explain(error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"] if not str(part).startswith("function-"))
    text = error["msg"]
    return f"{place}{text}".removeprefix(".") if text.startswith(".") else f"{place}: {text}"
