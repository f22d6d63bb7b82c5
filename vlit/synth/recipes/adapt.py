"""Annotation adaption: existing annotations as instructions by templates, without a teacher.

After MultiInstruct (arXiv:2212.10773 §3.2): at least five instructions a task with the same meaning in other words, one
drawn for each record, at most ``max_per_task`` records a task; tasks derived from the same annotations (region to name and name
to region). Where MultiInstruct writes ``<bin_i>`` tokens, boxes are text ``[x0, y0, x1, y1]`` with two decimals, as LLaVA-1.5.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from string import Template
from typing import Annotated

from pydantic import Field

from vlit.data.record import Region
from vlit.errors import ConfigError, did_you_mean
from vlit.registry import RECIPES
from vlit.synth.engine.embedded import alone, relation
from vlit.synth.engine.parse import LETTERS
from vlit.synth.engine.prompts import read_list
from vlit.synth.engine.recipe import Inputs, RecipeConfig, needs_annotations, random_for, record_item
from vlit.synth.engine.stages import Each, Item, Select, Stage
from vlit.synth.engine.views import Thing, View

MIN_INSTRUCTIONS = 5
OTHER_NAMES = 12


class Instance:
    """One instance of a task: what its template is filled with, the answer, and what else the record says."""

    def __init__(
        self, values: dict[str, str], answer: str, things: tuple[Thing, ...] = (), options: tuple[str, ...] = ()
    ) -> None:
        self.values, self.answer, self.things, self.options = values, answer, things, options


Maker = Callable[[View, list[str], Random], Instance | None]


def _caption(view: View, names: list[str], rng: Random) -> Instance | None:
    return Instance({}, rng.choice(view.captions)) if view.captions else None


def _detection(view: View, names: list[str], rng: Random) -> Instance | None:
    if not view.countable:
        return None
    name = rng.choice(sorted({thing.name for thing in view.countable}))
    found = tuple(thing for thing in view.things if thing.name == name)
    return Instance({"name": name}, ", ".join(thing.box_text() for thing in found), found)


def _region_name(view: View, names: list[str], rng: Random) -> Instance | None:
    if not view.things:
        return None
    thing = rng.choice(view.things)
    return Instance({"box": thing.box_text()}, thing.phrase, (thing,))


def _refer(view: View, names: list[str], rng: Random) -> Instance | None:
    candidates = alone(view.countable, lambda thing: thing.phrase)
    if not candidates:
        return None
    thing = rng.choice(candidates)
    return Instance({"phrase": thing.phrase}, thing.box_text(), (thing,))


def _count(view: View, names: list[str], rng: Random) -> Instance | None:
    if not view.countable:
        return None
    name = rng.choice(sorted({thing.name for thing in view.countable}))
    found = tuple(thing for thing in view.things if thing.name == name)
    return Instance({"name": name}, str(len(found)), found)


def _existence(view: View, names: list[str], rng: Random) -> Instance | None:
    """Yes and no are equally likely, whatever the picture."""
    here = sorted({thing.name for thing in view.things} | {*view.crowds})
    absent = [name for name in names if name not in here]
    if not here or not absent:
        return None
    is_there = rng.random() < 0.5
    return Instance({"name": rng.choice(here if is_there else absent)}, "Yes" if is_there else "No")


def _classify(view: View, names: list[str], rng: Random) -> Instance | None:
    """Four names, the right letter uniform."""
    others = sorted(set(names))
    if not view.things or len(others) < 4:
        return None
    thing = rng.choice(view.things)
    options = [*rng.sample([name for name in others if name != thing.name], 3), thing.name]
    rng.shuffle(options)
    lines = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    letter = LETTERS[options.index(thing.name)]
    return Instance({"box": thing.box_text(), "options": lines}, letter, (thing,), tuple(options))


def _relation(view: View, names: list[str], rng: Random) -> Instance | None:
    found = relation(view, rng)
    if found is None:
        return None
    first, second = found.sentence.removeprefix("the ").removesuffix(".").split(" is to the {} of the ")
    return Instance({"first": first, "second": second}, found.value)


TASKS: dict[str, Maker] = {
    "caption": _caption,
    "detection": _detection,
    "region_name": _region_name,
    "refer": _refer,
    "count": _count,
    "existence": _existence,
    "classify": _classify,
    "relation": _relation,
}


@RECIPES.register("adapt")
class AdaptRecipe(RecipeConfig):
    """Templates over annotations (MultiInstruct's way): captions, boxes, counts, attributes, relations."""

    type: str = "adapt"
    tasks: list[str] = list(TASKS)
    """Which tasks: caption, detection, region_name, refer, count, existence, classify, relation."""
    max_per_task: Annotated[int, Field(ge=1)] = 10_000
    """Records of a task at most (MultiInstruct: 10,000), drawn at random."""

    def inputs(self, inputs: Inputs) -> list[Item]:
        """One item a picture, with some names from the whole set that wrong options and absent things are drawn from."""
        items = super().inputs(inputs)
        names = sorted({thing["name"] for item in items for thing in item["things"]})
        few = min(OTHER_NAMES, len(names))
        return [item | {"others": random_for(inputs.seed, "others", item["id"]).sample(names, few)} for item in items]

    def stages(self, inputs: Inputs) -> list[Stage]:
        needs_annotations("adapt", inputs)
        if unknown := [task for task in self.tasks if task not in TASKS]:
            raise ConfigError(f'recipe.tasks: unknown task "{unknown[0]}". {did_you_mean(unknown[0], TASKS)}')
        lists = {task: read_list(f"adapt/{task}", own=self.prompts, is_filled=True) for task in self.tasks}
        for task, (templates, name) in lists.items():
            if len(templates) < MIN_INSTRUCTIONS:
                raise ConfigError(
                    f"{name}: {len(templates)} instructions for {task}, at least {MIN_INSTRUCTIONS} are needed."
                )
        version = self.version(*(v for _, v in lists.values()), str(inputs.seed))

        def fill(item: Item) -> list[Item]:
            made = (self._record(task, lists[task], View.of(item), item["others"], inputs.seed) for task in self.tasks)
            return [record for record in made if record is not None]

        def limit(columns: dict[str, list[str]]) -> set[int]:
            kept: set[int] = set()
            for task in self.tasks:
                numbers = [number for number, kind in enumerate(columns["kind"]) if kind == task]
                kept.update(
                    random_for(inputs.seed, "limit", task).sample(numbers, min(len(numbers), self.max_per_task))
                )
            return kept

        return [Each("fill", version, fill), Select("limit", ("kind",), limit)]

    def _record(
        self, task: str, written: tuple[list[str], str], view: View, names: list[str], seed: int
    ) -> Item | None:
        """One record of a task, or None where the picture does not allow it."""
        rng = random_for(seed, view.id, task)
        made = TASKS[task](view, sorted({*names, *(thing.name for thing in view.things)}), rng)
        if made is None:
            return None
        templates, version = written
        number = rng.randrange(len(templates))
        question = Template(templates[number]).substitute(made.values)
        return record_item(
            view,
            [(question, made.answer)],
            suffix=task,
            image_first=rng.random() < 0.5,
            kind=task,
            instruction_type=task,
            regions=tuple(Region(thing.phrase, thing.box) for thing in made.things),
            options=made.options,
            provenance={"recipe": "adapt", "template": f"{version}#{number}"},
        )
