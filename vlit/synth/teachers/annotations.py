"""The embedded teacher: deterministic, free, offline; it answers each task of the recipes from the annotations.

It receives what every teacher receives and answers in the form that the prompt asks for, so all that follows (parsing,
rejection, records) is the code that reads a large model's replies.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from random import Random
from typing import Annotated, Any

from pydantic import Field

from vlit.config.component import ComponentConfig
from vlit.errors import ConfigError, did_you_mean
from vlit.registry import TEACHERS
from vlit.synth.engine import embedded
from vlit.synth.engine.parse import LETTERS, Pair
from vlit.synth.engine.teacher import Ask, BrokenReply, Limits, Reply, Teacher, content_hash
from vlit.synth.engine.views import View

VERSION = 1
"""Part of every cache key; raise it when an answer changes."""
NOTHING = "NOTHING TO SAY"


@TEACHERS.register("annotations")
class AnnotationsConfig(ComponentConfig):
    """Answers from the annotations, without model and network. For demonstrations, tests, and pipelines under construction."""

    type: str = "annotations"
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides which facts it speaks about."""

    def build(self, **kwargs: Any) -> AnnotationsTeacher:
        """The teacher."""
        return AnnotationsTeacher(self.seed)


class AnnotationsTeacher(Teacher):
    """One function a task."""

    name = "annotations"
    limits = Limits(concurrency=1)

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def identity(self) -> dict[str, Any]:
        return {"type": self.name, "version": VERSION, "seed": self.seed}

    @property
    def tasks(self) -> Mapping[str, Callable[[dict[str, Any], Random], str]]:
        """What it can do: from the facts of a request to its answer."""
        return TASKS

    def known_domains(self) -> set[str] | None:
        return set(embedded.DOMAINS)

    def key(self, ask: Ask) -> str:
        return content_hash([super().key(ask), ask.task, ask.facts])

    def send(self, ask: Ask) -> str:
        if ask.task not in self.tasks:
            known = did_you_mean(ask.task, self.tasks)
            raise ConfigError(f'teacher {self.name}: cannot do the task "{ask.task}". {known}')
        rng = Random(f"{self.seed}:{ask.task}:{ask.sample}:{content_hash(ask.facts)}")
        return json.dumps({"text": self.tasks[ask.task](ask.facts, rng)})

    def read(self, body: str) -> Reply:
        try:
            text = json.loads(body)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise BrokenReply(str(error)) from error
        return Reply(text, refused="the annotations say too little" if text == NOTHING else "")


def blocks(pairs: list[Pair]) -> str:
    """``Question:`` / ``===`` / ``Answer:`` blocks."""
    return "\n===\n".join(f"Question:\n{q}\n===\nAnswer:\n{a}" for q, a, _ in pairs) or NOTHING


def tagged(pairs: list[Pair]) -> str:
    """Numbered tags."""
    lines = []
    for number, (question, answer, options) in enumerate(pairs, start=1):
        choices = " ".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
        lines.append(f"<Q{number}>{question}</Q{number}>" + (f"<C{number}>{choices}</C{number}>" if options else ""))
        lines.append(f"<A{number}>{answer}</A{number}>")
    return "\n".join(lines) or NOTHING


def _reasoning(facts: dict[str, Any], rng: Random) -> str:
    pair = embedded.reason(View.of(facts), rng)
    return blocks([pair]) if pair else NOTHING


def _describe(facts: dict[str, Any], rng: Random) -> str:
    return embedded.describe(View.of(facts)) or NOTHING


def _continue(facts: dict[str, Any], rng: Random) -> str:
    return " ".join(View.of(facts).captions[:1])


def _refine(facts: dict[str, Any], rng: Random) -> str:
    """Sentences once, in their order; an unfinished end left out."""
    sentences = [s.strip() for s in facts["text"].replace("\n", " ").split(". ")]
    kept = dict.fromkeys(s.rstrip(".") + "." for s in sentences if s)
    return " ".join(kept)


def _domain(facts: dict[str, Any], rng: Random) -> str:
    if facts["domain"] not in embedded.DOMAINS:
        return NOTHING  # rehearsing for a teacher that knows more
    drawn = [embedded.domain_pair(View.of(facts["view"]), facts["domain"], facts["kind"], rng) for _ in range(9)]
    different = {pair.question: pair for pair in drawn if pair is not None}
    return tagged(list(different.values())[: facts["questions"]])


def _picture(facts: dict[str, Any], rng: Random) -> str:
    """An image prompt of the keywords, the most important first and in double brackets."""
    first, *rest = facts["keywords"]
    return ", ".join([f"(({first}))", *rest, facts.get("style", "")]).strip(", ")


def _talk(facts: dict[str, Any], rng: Random) -> str:
    from vlit.synth.generators.digits import view_of_prompt

    return blocks(embedded.converse(view_of_prompt(facts["prompt"]), rng, turns=3))


TASKS: dict[str, Callable[[dict[str, Any], Random], str]] = {
    "conversation": lambda facts, rng: blocks(embedded.converse(View.of(facts), rng)),
    "detail": _describe,
    "reasoning": _reasoning,
    "caption": _describe,
    "continue": _continue,
    "refine": _refine,
    "domain": _domain,
    "picture": _picture,
    "talk": _talk,
}
