"""LLaVA's self-instruct (arXiv:2304.08485 §3): a text-only teacher writes conversations, detailed descriptions and complex
reasoning from captions and boxes, after worked examples.

Beyond the paper, which filters by its prompt alone: replies are checked (form, talk about the source, unsure answers,
coordinates) and rejected with a reason; and each picture gets one type, drawn by the published shares, unless
``types_per_image`` says otherwise.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from vlit.errors import ConfigError
from vlit.registry import RECIPES
from vlit.synth.engine.balance import balance
from vlit.synth.engine.parse import Rejected, check_answer, read_pairs, text_of
from vlit.synth.engine.prompts import read_list, read_prompt
from vlit.synth.engine.recipe import Inputs, RecipeConfig, needs_annotations, random_for, record_item
from vlit.synth.engine.stages import AskEach, Each, Item, Stage, Whole
from vlit.synth.engine.teacher import Ask, Reply
from vlit.synth.engine.views import View

Kind = Literal["conversation", "detail", "reasoning"]
SHARES: dict[Kind, float] = {"conversation": 58.0, "detail": 23.0, "reasoning": 77.0}
"""Thousands of records in LLaVA-Instruct-158K."""
LIKELY_TOKENS = {"conversation": 220, "detail": 180, "reasoning": 160}
PAIRS_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "pairs": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"question": {"type": "string"}, "answer": {"type": "string"}},
                "required": ["question", "answer"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["pairs"],
    "additionalProperties": False,
}


@RECIPES.register("llava")
class LlavaRecipe(RecipeConfig):
    """Conversation, detailed description and complex reasoning from captions and boxes (LLaVA-Instruct)."""

    type: str = "llava"
    shares: dict[Kind, Annotated[float, Field(ge=0)]] = SHARES
    """How often each type is drawn, as weights."""
    types_per_image: Annotated[int, Field(ge=1, le=3)] = 1
    """Different types for each picture."""
    max_tokens: Annotated[int, Field(ge=16)] = 1024
    """Of one reply."""
    image_place: Literal["random", "first"] = "random"
    """Where the picture stands in the first question: before or after it at random, as in the paper, or always before it.
    Records that begin with their picture can share it in training (`data.share_images`)."""
    balance: bool = False
    """Take a set of pictures in which rare concepts are kept and frequent ones are cut, as for CC3M-595K."""
    min_phrase_count: Annotated[int, Field(ge=1)] = 3
    """Noun phrases rarer than this are not concepts."""
    max_per_phrase: Annotated[int, Field(ge=1)] = 100
    """Captions taken for a phrase that is more frequent."""

    def stages(self, inputs: Inputs) -> list[Stage]:
        needs_annotations("llava", inputs)
        if not any(self.shares.values()):
            raise ConfigError("recipe.shares: all are 0. Give at least one type a weight.")
        prompts = {kind: read_prompt(f"llava/{kind}", own=self.prompts) for kind in SHARES}
        questions, questions_version = read_list("llava/detail_questions", own=self.prompts)
        version = self.version(questions_version, *(p.version for p in prompts.values()), str(inputs.seed))

        def draw(item: Item) -> list[Item]:
            rng = random_for(inputs.seed, "type", item["id"])
            weights = dict(self.shares)
            kinds: list[Kind] = []
            while len(kinds) < self.types_per_image and any(weights.values()):
                kind = rng.choices(list(weights), list(weights.values()))[0]
                kinds.append(kind)
                del weights[kind]
            return [item | {"id": f"{item['id']}-{kind}", "view": item["id"], "type": kind} for kind in kinds]

        def prepare(item: Item) -> Ask:
            view = View.of(item)
            filled = prompts[item["type"]].messages(captions=view.captions_text(), boxes=view.boxes_text() or "(none)")
            schema = None if item["type"] == "detail" else PAIRS_SCHEMA
            facts: dict[str, Any] = {
                key: item[key] for key in ("id", "image", "captions", "things", "crowds") if key in item
            }
            return Ask(item["type"], filled, self.max_tokens, facts, schema)

        def finish(item: Item, reply: Reply | None) -> list[Item]:
            assert reply is not None
            kind = item["type"]
            rng = random_for(inputs.seed, "record", item["id"])
            if kind == "detail":
                pairs = [(rng.choice(questions), check_answer(_described(reply)))]
            else:
                pairs = [(check_answer(p.question), check_answer(p.answer)) for p in read_pairs(reply)]
            if kind == "reasoning" and len(pairs) != 1:
                raise Rejected("format", f"{len(pairs)} questions, expected one")
            return [
                record_item(
                    View.of(item | {"id": item["view"]}),
                    pairs,
                    suffix=kind,
                    image_first=rng.random() < 0.5 or self.image_place == "first",
                    kind=kind,
                    instruction_type=kind,
                    provenance={"recipe": "llava", "prompt": prompts[kind].version},
                )
            ]

        def select(items: list[Item]) -> list[Item]:
            kept = balance(
                [" . ".join(item["captions"]) for item in items],
                min_count=self.min_phrase_count,
                max_per_phrase=self.max_per_phrase,
                seed=inputs.seed,
            )
            return [items[n] for n in kept]

        ask = AskEach("ask", version, prepare, finish, likely_tokens_out=round(sum(LIKELY_TOKENS.values()) / 3))
        first: list[Stage] = [Whole("balance", version, select)] if self.balance else []
        return [*first, Each("draw", version, draw), ask]


def _described(reply: Reply) -> str:
    text = text_of(reply)
    if len(text.split()) < 5:
        raise Rejected("short", f"{len(text.split())} words")
    return text
