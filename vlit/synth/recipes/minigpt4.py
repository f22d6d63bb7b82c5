"""MiniGPT-4's 3.5 K curation (arXiv:2304.10592 §3.2): caption, continuation, refinement, rules.

A model that sees the pictures (the paper: its own stage-1 model; here ``vision_teacher``) describes each one. Descriptions
under 80 tokens are continued. A text teacher removes repetition and broken sentences. Rules drop what is still wrong. The
paper then checks by hand: ``vlit synth review`` is for that.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field

from vlit.registry import RECIPES
from vlit.synth.engine.client import PICTURE, picture_files
from vlit.synth.engine.parse import Rejected, check_answer, text_of
from vlit.synth.engine.prompts import read_list, read_prompt
from vlit.synth.engine.recipe import Inputs, RecipeConfig, random_for, record_item
from vlit.synth.engine.stages import AskEach, Each, Item, Stage
from vlit.synth.engine.teacher import BYTES_PER_TOKEN, Ask, Reply
from vlit.synth.engine.views import View

CHATTER = re.compile(
    r"^(sure|certainly|of course|here is|here's|the (corrected|edited|revised|cleaned) )|"
    r"\b(i apologi[sz]e|sorry|let me know|corrected (text|description)|no (changes|errors))\b",
    flags=re.IGNORECASE,
)
MAX_FOREIGN = 0.1
"""Share of letters outside of ASCII."""


def rule_filter(text: str, *, min_words: int) -> str:
    """The text, or Rejected: a remark of the editor, foreign letters, repeated sentences, no end, too short."""
    if found := CHATTER.search(text):
        raise Rejected("chatter", repr(found[0]))
    letters = [c for c in text if c.isalpha()]
    if sum(not c.isascii() for c in letters) > MAX_FOREIGN * max(1, len(letters)):
        raise Rejected("foreign", "letters outside of ASCII")
    sentences = [s.strip().lower() for s in re.split(r"(?<=[.!?])\s+", text) if s.strip()]
    if len(set(sentences)) < len(sentences):
        raise Rejected("repeated", f"{len(sentences) - len(set(sentences))} sentences")
    if not re.search(r"[.!?][\"')]?$", text):
        raise Rejected("unfinished", repr(text[-40:]))
    if len(text.split()) < min_words:
        raise Rejected("short", f"{len(text.split())} words, at least {min_words}")
    return check_answer(text)


@RECIPES.register("minigpt4")
class MiniGPT4Recipe(RecipeConfig):
    """Long descriptions from pictures alone: caption, continuation, refinement, rule filter (MiniGPT-4's second stage)."""

    type: str = "minigpt4"
    min_tokens: Annotated[int, Field(ge=0)] = 80
    """A description with fewer tokens (four bytes each) is continued."""
    min_words: Annotated[int, Field(ge=1)] = 8
    """Shorter results are dropped."""
    max_tokens: Annotated[int, Field(ge=16)] = 512

    def stages(self, inputs: Inputs) -> list[Stage]:
        first, more, edit = (read_prompt(f"minigpt4/{n}", own=self.prompts) for n in ("caption", "continue", "refine"))
        instructions, instructions_version = read_list("minigpt4/instructions", own=self.prompts)

        def picture(item: Item) -> tuple[list[str], str]:
            return picture_files([item["image"]], inputs.images)

        def is_short(item: Item) -> bool:
            return len(item["text"].encode()) / BYTES_PER_TOKEN < self.min_tokens

        def ask_caption(item: Item) -> Ask | None:
            files, refused = picture(item)
            return None if refused else Ask("caption", first.messages(files), self.max_tokens, item)

        def captioned(item: Item, reply: Reply | None) -> list[Item]:
            if reply is None:
                raise Rejected(PICTURE, picture(item)[1])
            return said(item, reply)

        def ask_more(item: Item) -> Ask | None:
            files, refused = picture(item)
            if refused or not is_short(item):
                return None
            facts = {key: value for key, value in item.items() if key not in ("text", "license")}
            return Ask("continue", more.messages(files, text=item["text"]), self.max_tokens, facts)

        def join(item: Item, reply: Reply | None) -> list[Item]:
            try:
                added = "" if reply is None else text_of(reply)
            except Rejected:
                added = ""  # nothing more to say
            return [item | {"text": f"{item['text']} {added}".strip()}]

        def ask_edit(item: Item) -> Ask:
            return Ask("refine", edit.messages(text=item["text"]), self.max_tokens, {"text": item["text"]})

        def finish(item: Item) -> list[Item]:
            text = rule_filter(item["text"], min_words=self.min_words)
            question = random_for(inputs.seed, item["id"]).choice(instructions)
            provenance = {"recipe": "minigpt4", "prompts": [first.version, more.version, edit.version]}
            named = record_item(
                View.of(item), [(question, text)], provenance=provenance, kind="detail", instruction_type="detail"
            )
            return [named]

        def said(item: Item, reply: Reply | None) -> list[Item]:
            assert reply is not None
            return [item | {"text": text_of(reply)}]

        rules = self.version(instructions_version, str(inputs.seed))
        return [
            AskEach(
                "caption", self.version(first.version), ask_caption, captioned, role="vision", likely_tokens_out=120
            ),
            AskEach(
                "continue", self.version(more.version), ask_more, join, role="vision", likely_tokens_out=100, draws=1
            ),
            AskEach("refine", self.version(edit.version), ask_edit, said, likely_tokens_out=180),
            Each("rules", rules, finish),
        ]
