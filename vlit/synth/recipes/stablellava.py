"""StableLLaVA (arXiv:2308.10253 §3): keywords of an ability, an image prompt, a picture, a dialogue from the same prompt.

No picture is needed to begin with. Keyword lists are kept apart by ability so that pictures differ. Beyond the paper, a
dialogue's form is checked and rejected with a reason; whether the picture shows what the prompt says is not (nor is it there).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from vlit.config.component import component
from vlit.registry import RECIPES
from vlit.synth.engine.parse import Rejected, check_answer, read_pairs, text_of
from vlit.synth.engine.prompts import read_groups, read_prompt
from vlit.synth.engine.recipe import Inputs, RecipeConfig, random_for, record_item
from vlit.synth.engine.stages import AskEach, Each, Item, Stage
from vlit.synth.engine.teacher import Ask, Reply, content_hash
from vlit.synth.engine.views import View

MAX_PROMPT_CHARACTERS = 600


@RECIPES.register("stablellava")
class StableLlavaRecipe(RecipeConfig):
    """Generated pictures with dialogues (StableLLaVA)."""

    type: str = "stablellava"
    generator: component("generator") = {"type": "digits"}  # type: ignore[valid-type]
    """Who draws: `digits` offline, `diffusers` with a model of one's own."""
    pictures: Annotated[int, Field(ge=1)] = 100
    """Pictures to make, spread over the abilities."""
    keywords: Annotated[int, Field(ge=1)] = 2
    """Keywords of a picture; the first is of its ability, the others of other abilities."""
    max_tokens: Annotated[int, Field(ge=16)] = 600

    def inputs(self, inputs: Inputs) -> list[Item]:
        """One item a picture: its ability and keywords."""
        generator = self.generator.build()
        groups, _ = read_groups(f"stablellava/abilities_{generator.abilities}", own=self.prompts)
        abilities = list(groups)
        items = []
        for number in range(self.pictures):
            rng = random_for(inputs.seed, "keywords", number)
            ability = abilities[number % len(abilities)]
            others = rng.sample([a for a in abilities if a != ability], min(self.keywords - 1, len(abilities) - 1))
            words = [rng.choice(groups[name]) for name in (ability, *others)]
            items.append({"id": f"{ability}-{number:06d}", "ability": ability, "keywords": words, "number": number})
        return inputs.take(items)

    def stages(self, inputs: Inputs) -> list[Stage]:
        write, talk = (read_prompt(f"stablellava/{name}", own=self.prompts) for name in ("prompt", "dialogue"))
        generator = self.generator.build()
        folder = inputs.out / "images"

        def ask_prompt(item: Item) -> Ask:
            return Ask(
                "picture", write.messages(keywords=", ".join(item["keywords"])), 200, {"keywords": item["keywords"]}
            )

        def prompted(item: Item, reply: Reply | None) -> list[Item]:
            assert reply is not None
            text = text_of(reply)
            if "\n" in text or len(text) > MAX_PROMPT_CHARACTERS:
                raise Rejected("prompt", f"{text.count(chr(10)) + 1} lines, {len(text)} characters")
            return [item | {"prompt": text}]

        def draw(item: Item) -> list[Item]:
            seed = int(content_hash([inputs.seed, item["number"], item["prompt"]])[:12], 16)
            name = f"{item['id']}-{seed:012x}.png"
            generator.write(item["prompt"], folder / name, seed=seed)
            return [item | {"image": name}]

        def ask_talk(item: Item) -> Ask:
            return Ask("talk", talk.messages(prompt=item["prompt"]), self.max_tokens, {"prompt": item["prompt"]})

        def finish(item: Item, reply: Reply | None) -> list[Item]:
            assert reply is not None
            pairs = [(check_answer(p.question), check_answer(p.answer)) for p in read_pairs(reply)]
            if any("prompt" in text.lower().split() for pair in pairs for text in pair):
                raise Rejected("source", "the prompt is mentioned")
            return [
                record_item(
                    View(item["id"], item["image"]), pairs, kind="conversation", domain=item["ability"],
                    instruction_type="conversation",
                    provenance={"recipe": "stablellava", "image_prompt": item["prompt"]}
                    | {"prompts": [write.version, talk.version]},
                )
            ]  # fmt: skip

        return [
            AskEach("prompt", self.version(write.version), ask_prompt, prompted, likely_tokens_out=50),
            Each("draw", self.version(str(inputs.seed)), draw),
            AskEach("talk", self.version(talk.version), ask_talk, finish, likely_tokens_out=150),
        ]
