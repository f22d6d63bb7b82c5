"""What a run will cost, before it: the recipe is rehearsed on some of its inputs with a stand-in for the teacher.

The rehearsal counts the real prompts. Replies are those of the embedded teacher where it can answer, so that later stages have
something to ask about; their length is taken from the recipe (``likely_tokens_out``), not from the stand-in. Nothing is sent.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlit.synth.engine.parse import Rejected
from vlit.synth.engine.pipeline import build_teachers, inputs_of
from vlit.synth.engine.settings import SynthConfig
from vlit.synth.engine.stages import AskEach, Each, Item, Select, SelectedItems, unique
from vlit.synth.engine.teacher import Ask, Reply, Teacher

REHEARSED = 64
"""Items that each asking stage is rehearsed on."""


@dataclass(frozen=True)
class StageCost:
    """What one stage will ask for; tokens and dollars."""

    name: str
    requests: int
    tokens_in: int
    tokens_out: int
    most_tokens_out: int
    usd: float
    most_usd: float


@dataclass(frozen=True)
class Estimate:
    """All stages. ``most``: every reply at its token limit, and every reply but the last draw rejected."""

    items: int
    stages: list[StageCost]

    @property
    def usd(self) -> float:
        return sum(stage.usd for stage in self.stages)

    @property
    def most_usd(self) -> float:
        return sum(stage.most_usd for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        return {
            "items": self.items,
            "usd": self.usd,
            "most_usd": self.most_usd,
            "stages": [vars(s) for s in self.stages],
        }

    def text(self) -> str:
        """A small table."""
        rows = [
            f"{s.name:<9} {s.requests} requests, about {s.tokens_in:,} tokens in and {s.tokens_out:,} out: ${s.usd:,.4f} "
            f"(at most ${s.most_usd:,.4f})"
            for s in self.stages
        ]
        return "\n".join(
            [f"inputs    {self.items}", *rows, f"estimate  ${self.usd:,.4f}, at most ${self.most_usd:,.4f}"]
        )


def estimate(settings: SynthConfig) -> Estimate:
    """The cost of a run that begins from nothing; work that is already done is not subtracted."""
    from vlit.synth.teachers.annotations import AnnotationsTeacher

    teachers = build_teachers(settings)
    inputs = inputs_of(settings, teachers)
    with tempfile.TemporaryDirectory(prefix="vlit-estimate-") as folder:
        items: list[Item] = list(unique(settings.recipe.inputs(inputs)))
        total, scale = len(items), 1.0
        costs: list[StageCost] = []
        for stage in settings.recipe.stages(replace(inputs, out=Path(folder))):
            if not items:
                break
            if isinstance(stage, AskEach):
                kept = _spread(items, REHEARSED)
                scale *= len(items) / len(kept)
                asks = [(item, stage.prepare(item)) for item in kept]
                sent = [ask for _, ask in asks if ask is not None]
                costs.append(_cost(stage, sent, teachers[stage.role], scale))
                items = [made for item, ask in asks for made in _rehearse(stage, item, ask, AnnotationsTeacher())]
            elif isinstance(stage, Each):
                kept = _spread(items, REHEARSED)
                scale *= len(items) / len(kept)
                items = [made for item in kept for made in _made(stage, item)]
            elif isinstance(stage, Select):
                items = list(SelectedItems(stage, items))
            else:
                items = stage.work(items)
            items = list(unique(items))
    return Estimate(total, costs)


def _spread(items: list[Item], count: int) -> list[Item]:
    """At most ``count`` items, evenly from the whole list."""
    return items if len(items) <= count else [items[n * len(items) // count] for n in range(count)]


def _made(stage: Each, item: Item) -> list[Item]:
    try:
        return stage.work(item)
    except Rejected:
        return []


def _rehearse(stage: AskEach, item: Item, ask: Ask | None, stand_in: Teacher) -> list[Item]:
    try:
        reply: Reply | None = None if ask is None else stand_in.read(stand_in.send(ask))
        return stage.finish(item, reply)
    except Rejected:
        return []


def _cost(stage: AskEach, asks: Sequence[Ask], teacher: Teacher, scale: float) -> StageCost:
    likely_out = [min(stage.likely_tokens_out, ask.max_tokens) for ask in asks]
    tokens_in, tokens_out = (round(scale * n) for n in (sum(map(teacher.likely_tokens_in, asks)), sum(likely_out)))
    most = sum(teacher.limits.cost(teacher.most_tokens_in(ask), ask.max_tokens) for ask in asks)
    return StageCost(
        stage.name,
        round(scale * len(asks)),
        tokens_in,
        tokens_out,
        round(scale * sum(ask.max_tokens for ask in asks)),
        teacher.limits.cost(tokens_in, tokens_out) / 1e9,
        scale * most * stage.draws / 1e9,
    )
