"""What a run will cost, before it: the recipe is rehearsed on some of its inputs with stand-ins for the teacher's replies.

The rehearsal counts the real prompts; nothing is sent and nothing is drawn. A stand-in has a form that the recipe accepts
(``rehearsal.py``) and the length the recipe expects (``likely_tokens_out``), so later prompts are about as long as in a run.
Whether a later request is needed can depend on the length of a reply (``minigpt4`` continues short descriptions), so the recipe
is rehearsed with brief replies too, and of each stage the rehearsal with more requests counts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from vlit.synth.engine.parse import Rejected
from vlit.synth.engine.pipeline import build_teachers, inputs_of
from vlit.synth.engine.rehearsal import answered, undrawn
from vlit.synth.engine.settings import SynthConfig
from vlit.synth.engine.stages import AskEach, Each, Item, Select, SelectedItems, Stage, Whole, unique
from vlit.synth.engine.teacher import BYTES_PER_TOKEN, Ask, Teacher

REHEARSED = 64
"""Items that each stage is rehearsed on."""


@dataclass(frozen=True)
class StageCost:
    """What one stage will ask for; tokens and dollars.

    ``is_guess``: no stand-in has the form of an earlier reply, so its prompts are unknown. It is priced as one request an item
    with the earlier prompts.
    """

    name: str
    requests: int
    tokens_in: int
    tokens_out: int
    most_tokens_out: int
    usd: float
    most_usd: float
    is_guess: bool = False

    def text(self) -> str:
        """One line."""
        guess = "; a guess: no stand-in has the form of the replies before it, so its prompts are unknown"
        return (
            f"{self.name:<9} {self.requests} requests, about {self.tokens_in:,} tokens in and {self.tokens_out:,} out: "
            f"${self.usd:,.4f} (at most ${self.most_usd:,.4f}){guess * self.is_guess}"
        )


@dataclass(frozen=True)
class Estimate:
    """All stages that ask. ``most``: every reply at its token limit, also where a later prompt holds it, and every reply but
    the last draw rejected."""

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
        rows = [stage.text() for stage in self.stages]
        return "\n".join(
            [f"inputs    {self.items}", *rows, f"estimate  ${self.usd:,.4f}, at most ${self.most_usd:,.4f}"]
        )


def estimate(settings: SynthConfig) -> Estimate:
    """The cost of a run that begins from nothing; work that is already done is not subtracted."""
    teachers, recipe = build_teachers(settings), undrawn(settings.recipe)
    inputs = inputs_of(settings, teachers)
    items: list[Item] = list(unique(recipe.inputs(inputs)))
    with tempfile.TemporaryDirectory(prefix="vlit-estimate-") as folder:
        stages = recipe.stages(replace(inputs, out=Path(folder)))
        asking = [number for number, stage in enumerate(stages) if isinstance(stage, AskEach)]
        if not asking:
            return Estimate(len(items), [])
        _, start = _rehearse(stages[: asking[0]], _Sample(items), teachers)
        rehearsals = [
            _rehearse(stages[asking[0] : asking[-1] + 1], start, teachers, is_brief=is_brief)[0]
            for is_brief in (False, True)
        ]
    return Estimate(len(items), [_merged(costs) for costs in zip(*rehearsals, strict=True)])


@dataclass(frozen=True)
class _Sample:
    """Items on their way through the stages, each of which stands for ``scale`` of them."""

    items: list[Item]
    scale: float = 1.0
    unsaid: int = 0
    """Bytes by which a prompt grows when all replies before it end at their token limits."""
    unread: tuple[Ask, ...] = ()
    """The last requests whose replies have an unknown form; there are no items then."""

    def few(self) -> _Sample:
        """At most ``REHEARSED`` of the items, evenly from the whole list."""
        total = len(self.items)
        if total <= REHEARSED:
            return self
        kept = [self.items[n * total // REHEARSED] for n in range(REHEARSED)]
        return replace(self, items=kept, scale=self.scale * total / REHEARSED)


def _rehearse(
    stages: Sequence[Stage], sample: _Sample, teachers: dict[str, Teacher], *, is_brief: bool = False
) -> tuple[list[StageCost], _Sample]:
    """The costs of the stages that ask, and what comes out of the last stage."""
    costs: list[StageCost] = []
    for stage in stages:
        if isinstance(stage, AskEach):
            cost, sample = _asked(stage, sample, teachers[stage.role], is_brief=is_brief)
            costs.append(cost)
        elif sample.items:
            sample = _worked(stage, sample)
    return costs, sample


def _worked(stage: Each | Whole | Select, sample: _Sample) -> _Sample:
    if isinstance(stage, Select):
        return replace(sample, items=list(SelectedItems(stage, sample.items)))
    if isinstance(stage, Whole):
        return replace(sample, items=list(unique(stage.work(sample.items))))
    sample = sample.few()
    return replace(sample, items=list(unique(made for item in sample.items for made in _made(stage, item))))


def _made(stage: Each, item: Item) -> list[Item]:
    try:
        return stage.work(item)
    except Rejected:
        return []


def _asked(stage: AskEach, sample: _Sample, teacher: Teacher, *, is_brief: bool) -> tuple[StageCost, _Sample]:
    """The cost of a stage, and its items after stand-in replies; items without one are counted by the others."""
    if sample.unread:
        return replace(_cost(stage, sample.unread, teacher, sample), is_guess=True), sample
    sample = sample.few()
    sent: list[Ask] = []
    unread: list[Ask] = []
    made: list[list[Item]] = []
    unsaid = 0
    for item in sample.items:
        ask = stage.prepare(item)
        if ask is None:
            made.append(_unasked(stage, item))
            continue
        sent.append(ask)
        found = answered(stage, item, ask, tokens=1 if is_brief else min(stage.likely_tokens_out, ask.max_tokens))
        if found is None:
            unread.append(ask)
            continue
        text, items = found
        made.append(items)
        unsaid = max(unsaid, _most_bytes(ask) - len(text.encode()))
    cost = _cost(stage, sent, teacher, sample)
    fruitful = sum(map(bool, made))
    if unread and not fruitful:
        longest = max(map(_most_bytes, unread))
        return cost, replace(sample, items=[], unsaid=sample.unsaid + longest, unread=tuple(unread))
    scale = sample.scale * (fruitful + len(unread)) / fruitful if unread else sample.scale
    return cost, _Sample(list(unique(chain(*made))), scale, sample.unsaid + unsaid)


def _most_bytes(ask: Ask) -> int:
    """Of a reply that ends at its token limit."""
    return round(ask.max_tokens * BYTES_PER_TOKEN)


def _unasked(stage: AskEach, item: Item) -> list[Item]:
    try:
        return stage.finish(item, None)
    except Rejected:
        return []


def _cost(stage: AskEach, asks: Sequence[Ask], teacher: Teacher, sample: _Sample) -> StageCost:
    likely_out = [min(stage.likely_tokens_out, ask.max_tokens) for ask in asks]
    likely_in = map(teacher.likely_tokens_in, asks)
    tokens_in, tokens_out = round(sample.scale * sum(likely_in)), round(sample.scale * sum(likely_out))
    most = sum(teacher.limits.cost(teacher.most_tokens_in(ask) + sample.unsaid, ask.max_tokens) for ask in asks)
    return StageCost(
        stage.name,
        round(sample.scale * len(asks)),
        tokens_in,
        tokens_out,
        round(sample.scale * sum(ask.max_tokens for ask in asks)),
        teacher.limits.cost(tokens_in, tokens_out) / 1e9,
        sample.scale * most * stage.draws / 1e9,
    )


def _merged(costs: Sequence[StageCost]) -> StageCost:
    """One stage in several rehearsals: the one with most requests, the first of equal ones; the worst of all worst cases."""
    return replace(
        max(costs, key=lambda cost: cost.requests),
        most_tokens_out=max(cost.most_tokens_out for cost in costs),
        most_usd=max(cost.most_usd for cost in costs),
        is_guess=any(cost.is_guess for cost in costs),
    )
