"""A second teacher looks at finished records and says of each answer whether it is right.

After GPT-assisted evaluation (LLaVA-Bench, arXiv:2304.08485 §5.1); prompt and measure are ours. A record keeps its text and
gains ``provenance.judge``: ``agree`` of ``of`` answers, and the reasons against the others. ``vlit synth quality`` reads it
as ``judged``, the share of answers that the judge agrees with.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Field

from vlit.data.record import Record, from_json, read_records
from vlit.errors import ConfigError
from vlit.registry import RECIPES
from vlit.synth.engine.client import PICTURE, picture_files
from vlit.synth.engine.parse import Rejected, shorten, text_of
from vlit.synth.engine.prompts import read_prompt
from vlit.synth.engine.recipe import Inputs, RecipeConfig, items_of
from vlit.synth.engine.stages import AskEach, Item, Stage
from vlit.synth.engine.teacher import Ask, Reply
from vlit.types import IMAGE_PLACEHOLDER

VERDICT = re.compile(r"^\s*(\d+)\s*[:.)]\s*(right|wrong)\b[\s.,:–-]*(.*)$", flags=re.IGNORECASE)


@RECIPES.register("judge")
class JudgeRecipe(RecipeConfig):
    """Finished records, each answer judged by a (vision) teacher other than the one that wrote it."""

    type: str = "judge"
    is_author = False
    max_tokens: Annotated[int, Field(ge=16)] = 600
    """Of one reply."""

    def inputs(self, inputs: Inputs) -> list[Item]:
        """The records."""
        if not inputs.records:
            raise ConfigError("recipe judge: needs finished records. Give --records dataset.jsonl of an earlier run.")
        return inputs.take(items_of(record for path in inputs.records for record in read_records(path)))

    def stages(self, inputs: Inputs) -> list[Stage]:
        prompt = read_prompt("judge/verdicts", own=self.prompts)

        def ask(item: Item) -> Ask | None:
            record = from_json(item)
            pictures, refused = picture_files(record.images, inputs.images)
            if refused:
                return None
            return Ask("judge", prompt.messages(pictures, exchanges=exchanges_text(record)), self.max_tokens, item)

        def finish(item: Item, reply: Reply | None) -> list[Item]:
            record = from_json(item)
            if reply is None:
                raise Rejected(PICTURE, picture_files(record.images, inputs.images)[1])
            reasons = read_verdicts(text_of(reply), answers=sum(turn.role == "assistant" for turn in record.turns))
            against = {str(number): reason for number, reason in reasons.items() if reason is not None}
            judge: dict[str, Any] = {"agree": len(reasons) - len(against), "of": len(reasons), "prompt": prompt.version}
            if against:
                judge["against"] = against
            return [item | {"provenance": record.provenance | {"judge": judge}}]

        return [AskEach("judge", self.version(prompt.version), ask, finish, role="vision", likely_tokens_out=40)]


def exchanges_text(record: Record) -> str:
    """Questions and answers as a numbered list; earlier questions are context for later ones."""
    lines: list[str] = []
    number = 0
    for turn in record.turns:
        text = turn.text.replace(IMAGE_PLACEHOLDER, "").strip()
        if turn.role == "user":
            number += 1
            lines.append(f"{number}. Question: {text}")
        elif turn.role == "assistant":
            lines.append(f"   Answer: {text}")
        else:
            lines.append(f"Instruction: {text}")
    return "\n".join(lines)


def read_verdicts(text: str, *, answers: int) -> dict[int, str | None]:
    """Number of each answer -> None where it is right, else the reason (may be empty).

    Raises:
        Rejected: a line is no verdict, or the numbers are not 1 to ``answers`` in order.
    """
    found: dict[int, str | None] = {}
    for line in filter(str.strip, text.splitlines()):
        match = VERDICT.match(line)
        if match is None:
            raise Rejected("format", f"no verdict: {shorten(line)}")
        found[int(match[1])] = None if match[2].lower() == "right" else match[3].strip()
    if list(found) != list(range(1, answers + 1)):
        raise Rejected("format", f"verdicts for {', '.join(map(str, found)) or 'nothing'}, expected 1 to {answers}")
    return found
