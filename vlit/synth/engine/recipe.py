"""What a recipe is: a registered configuration that turns its inputs into items and says which stages they pass."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import field_validator

from vlit.config.component import ComponentConfig
from vlit.data.record import Record, to_json
from vlit.errors import ConfigError
from vlit.synth.engine.prompts import check_own
from vlit.synth.engine.stages import Item, Stage
from vlit.synth.engine.teacher import content_hash
from vlit.synth.engine.views import View, read_views, views_of_folder
from vlit.types import IMAGE_PLACEHOLDER, Turn


@dataclass(frozen=True)
class Inputs:
    """What a run was given."""

    annotations: tuple[Path, ...] = ()
    images: Path = Path()
    records: tuple[Path, ...] = ()
    out: Path = Path()
    seed: int = 0
    max_items: int | None = None
    domains: frozenset[str] | None = None
    """Domains the teacher can answer in; None: all."""

    def take(self, items: list[Any]) -> list[Any]:
        """The first ``max_items`` after a seeded shuffle, in their own order; more items keep those that were taken."""
        if self.max_items is None or self.max_items >= len(items):
            return items
        order = list(range(len(items)))
        random.Random(f"{self.seed}:take").shuffle(order)
        return [items[n] for n in sorted(order[: self.max_items])]


class RecipeConfig(ComponentConfig):
    """Base of all recipes."""

    is_author: ClassVar[bool] = True
    """Whether a teacher's words are what its records say: the records then name the teacher."""
    prompts: str | None = None
    """Folder of one's own prompt files, laid out as `vlit/synth/engine/prompts`; its files go before those of vlit."""

    @field_validator("prompts")
    @classmethod
    def _holds_prompts(cls, folder: str | None) -> str | None:
        if folder is not None:
            check_own(Path(folder))
        return folder

    def inputs(self, inputs: Inputs) -> list[Item]:
        """Items of the first stage: one view a picture, with annotations where they were given."""
        views = read_views(inputs.annotations, inputs.images) if inputs.annotations else views_of_folder(inputs.images)
        return [view.to_item() for view in inputs.take(views)]

    def stages(self, inputs: Inputs) -> list[Stage]:
        """The stages in order; the items of the last are canonical records as JSON."""
        raise NotImplementedError(f"{type(self).__name__} must implement stages")

    def build(self, **kwargs: Any) -> Any:
        """The stages."""
        return self.stages(**kwargs)

    def version(self, *files: str) -> str:
        """Cache version of a stage: the recipe's settings and the versions of its prompt files."""
        return content_hash([self.model_dump(mode="json"), *files])[:16]


def items_of(records: Iterable[Record]) -> list[Item]:
    """Finished records as items. An id that occurs again gets a number, since stages know items by their id."""
    times: Counter[str] = Counter()
    taken: set[str] = set()
    items: list[Item] = []
    for record in records:
        identity = record.id
        while identity in taken:
            times[record.id] += 1
            identity = f"{record.id}#{times[record.id] + 1}"
        taken.add(identity)
        items.append(to_json(record) | {"id": identity})
    return items


def needs_annotations(recipe: str, inputs: Inputs) -> None:
    """ConfigError unless COCO files were given."""
    if not inputs.annotations:
        raise ConfigError(
            f"recipe {recipe}: needs annotations (--annotations, COCO files). Without any, begin with the recipe mminstruct or "
            "minigpt4, which look at pictures through a vision teacher."
        )


def random_for(seed: int, *words: object) -> random.Random:
    """A generator of its own for one item: the same whatever the order of work."""
    return random.Random(":".join(str(word) for word in (seed, *words)))


def record_item(
    view: View,
    pairs: list[tuple[str, str]],
    *,
    suffix: str = "",
    image_first: bool = True,
    provenance: dict[str, Any],
    **fields: Any,
) -> Item:
    """A canonical record of one picture as JSON: the image mark in the first question, before or after it.

    LLaVA puts it on either side at random (arXiv:2304.08485 eq. 2).
    """
    turns: list[Turn] = []
    for number, (question, answer) in enumerate(pairs):
        mark = f"{IMAGE_PLACEHOLDER}\n{question}" if image_first else f"{question}\n{IMAGE_PLACEHOLDER}"
        turns += [Turn("user", mark if number == 0 else question), Turn("assistant", answer)]
    identity = f"{view.id}-{suffix}" if suffix else view.id
    provenance = provenance | ({"license": view.license} if view.license else {})
    return to_json(Record(identity, tuple(turns), (view.image,), provenance=provenance, **fields))
