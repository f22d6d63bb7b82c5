"""MMInstruct's engine (arXiv:2407.15838): captions by a teacher that sees, questions of 24 domains from seed questions.

A picture is described at length; then a text teacher writes questions near the seeds of a domain (with wild cards), in one of
four types: judgement, multiple choice, long and short answer. A phrase that says which form of answer is wanted is drawn for
each question. The 24 domains and all seeds are our own selection (``prompts/mminstruct/domains``).
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field

from vlit.errors import ConfigError, did_you_mean
from vlit.registry import RECIPES
from vlit.synth.engine.client import PICTURE, picture_files
from vlit.synth.engine.parse import LETTERS, Pair, Rejected, check_answer, read_pairs, text_of
from vlit.synth.engine.prompts import read_groups, read_list, read_prompt
from vlit.synth.engine.recipe import Inputs, RecipeConfig, random_for, record_item
from vlit.synth.engine.stages import AskEach, Each, Item, Stage
from vlit.synth.engine.teacher import Ask, Reply
from vlit.synth.engine.views import View

QuestionKind = Literal["judgement", "choice", "short", "long"]
KINDS: tuple[QuestionKind, ...] = ("judgement", "choice", "short", "long")
YES_NO = {"yes": "Yes", "no": "No"}
CONCLUSION = re.compile(r"\bso,? (?:the answer is )?(yes|no|[A-D])\.?$")
"""How a reasoned judgement or choice ends."""
LETTERED = re.compile(r"\(?([A-Da-d])(?:[.):]+(.*))?", re.DOTALL)
"""A letter alone, or with the text of its option behind it."""


@RECIPES.register("mminstruct")
class MMInstructRecipe(RecipeConfig):
    """Questions of many domains in four types, from pictures alone (MMInstruct)."""

    type: str = "mminstruct"
    domains: list[str] = []
    """Domains to draw from; empty: all that the teacher can answer in."""
    domains_per_image: Annotated[int, Field(ge=1)] = 2
    questions: Annotated[int, Field(ge=1, le=9)] = 3
    """Questions of a request; those of a picture, domain and type become one conversation."""
    seeds: Annotated[int, Field(ge=1)] = 3
    """Seed questions shown, at most."""
    prior: str = ""
    """What is known of all pictures beforehand, for example a search word; empty: nothing."""
    answers: Literal["bare", "reasoned"] = "bare"
    """Judgements and choices are answered by "Yes" or a letter alone, as in the paper, or `reasoned`: what is seen first, then
    "so yes." or "so B."; a student too small to conclude in silence learns more from these."""
    max_caption_tokens: Annotated[int, Field(ge=16)] = 600
    max_tokens: Annotated[int, Field(ge=16)] = 700

    def stages(self, inputs: Inputs) -> list[Stage]:
        form = "_reasoned" if self.answers == "reasoned" else ""
        describe = read_prompt("mminstruct/caption", own=self.prompts)
        ask_for = read_prompt(f"mminstruct/questions{form}", own=self.prompts)
        groups, groups_version = read_groups("mminstruct/domains", own=self.prompts)
        named = {kind: kind + form if kind in ("judgement", "choice") else kind for kind in KINDS}
        formats = {kind: read_list(f"format/{name}", own=self.prompts) for kind, name in named.items()}
        domains = self._domains(list(groups), inputs)

        def ask_caption(item: Item) -> Ask | None:
            picture, refused = picture_files([item["image"]], inputs.images)
            if refused:
                return None
            return Ask("caption", describe.messages(picture), self.max_caption_tokens, item)

        def captioned(item: Item, reply: Reply | None) -> list[Item]:
            if reply is None:
                raise Rejected(PICTURE, picture_files([item["image"]], inputs.images)[1])
            return [item | {"caption": text_of(reply)}]

        def draw(item: Item) -> list[Item]:
            rng = random_for(inputs.seed, "domains", item["id"])
            drawn = rng.sample(domains, min(self.domains_per_image, len(domains)))
            chosen = [(domain, rng.choice(KINDS)) for domain in drawn]
            return [item | {"id": f"{item['id']}-{d}", "view": item["id"], "domain": d, "asked": k} for d, k in chosen]

        def ask_pairs(item: Item) -> Ask:
            kind, rng = item["asked"], random_for(inputs.seed, "seeds", item["id"])
            own = [line.split(":", 1)[1].strip() for line in groups[item["domain"]] if line.startswith(f"{kind}:")]
            seeds = "\n".join(rng.sample(own, min(self.seeds, len(own))))
            filled = ask_for.messages(
                number=self.questions, kind=kind, domain=item["domain"].replace("_", " "), seeds=seeds,
                prior=self.prior or "nothing", caption=item["caption"],
            )  # fmt: skip
            known = ("image", "captions", "things", "crowds")
            view = {"id": item["view"]} | {key: item[key] for key in known if key in item}
            facts = {"domain": item["domain"], "kind": kind, "questions": self.questions, "view": view}
            return Ask("domain", filled, self.max_tokens, facts)

        def finish(item: Item, reply: Reply | None) -> list[Item]:
            assert reply is not None
            kind, rng = item["asked"], random_for(inputs.seed, "record", item["id"])
            pairs = [check_pair(pair, kind, is_reasoned=bool(form)) for pair in read_pairs(reply)]
            turns = [(shown(pair, rng.choice(formats[kind][0])), pair.answer) for pair in pairs]
            options = pairs[0].options if len(pairs) == 1 else ()
            return [
                record_item(
                    View.of(item | {"id": item["view"]}), turns, suffix=f"{item['domain']}-{kind}", kind=kind,
                    domain=item["domain"], instruction_type=kind, options=options,
                    provenance={"recipe": "mminstruct", "prompts": [describe.version, ask_for.version]}
                    | ({"options": [list(pair.options) for pair in pairs]} if kind == "choice" else {}),
                )
            ]  # fmt: skip

        files = [ask_for.version, groups_version, *(version for _, version in formats.values()), str(inputs.seed)]
        return [
            AskEach(
                "caption", self.version(describe.version), ask_caption, captioned, role="vision", likely_tokens_out=200
            ),
            Each("draw", self.version(*files, *domains), draw),
            AskEach("ask", self.version(*files), ask_pairs, finish, likely_tokens_out=180),
        ]

    def _domains(self, known: list[str], inputs: Inputs) -> list[str]:
        if unknown := [name for name in self.domains if name not in known]:
            raise ConfigError(f'recipe.domains: unknown domain "{unknown[0]}". {did_you_mean(unknown[0], known)}')
        wanted = [name for name in known if name in (self.domains or known)]
        possible = [name for name in wanted if inputs.domains is None or name in inputs.domains]
        if not possible:
            raise ConfigError(
                f"recipe.domains: the teacher answers in none of {', '.join(wanted)}. "
                f"It knows {', '.join(sorted(inputs.domains or ()))}."
            )
        return possible


def shown(pair: Pair, wanted: str) -> str:
    """The question, with its options a line each, and what form of answer is wanted (may be empty)."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, pair.options, strict=False)]
    return "\n".join([pair.question, *lines, *([wanted] if wanted else [])])


def check_pair(pair: Pair, kind: str, *, is_reasoned: bool = False) -> Pair:
    """A pair in the form its type asks for, or Rejected."""
    question, answer = check_answer(pair.question), check_answer(pair.answer)
    if "<" in question and ">" in question:
        raise Rejected("wild_card", question[:80])
    if is_reasoned and kind in ("judgement", "choice"):
        return _check_reasoned(Pair(question, answer, pair.options), kind)
    if kind == "judgement":
        word = answer.split()[0].strip(".,!").lower()
        if word not in YES_NO:
            raise Rejected("judgement", f"{answer[:40]!r} is neither yes nor no")
        return Pair(question, YES_NO[word])
    if kind == "choice":
        _check_options(pair)
        return Pair(question, chosen(answer, pair.options), pair.options)
    if kind == "short" and len(answer.split()) > 12:
        raise Rejected("long", f"{len(answer.split())} words for a short answer")
    if kind == "long" and len(answer.split()) < 5:
        raise Rejected("short", f"{len(answer.split())} words for a long answer")
    return Pair(question, answer)


def chosen(answer: str, options: tuple[str, ...]) -> str:
    """The letter of the one option that an answer names: by its letter, by letter and text, or by its text.

    Raises:
        Rejected: it names none, several, or one by its letter and another by its text.
    """
    texts = [_bare(option) for option in options]
    named = {letter for letter, text in zip(LETTERS, texts, strict=False) if text == _bare(answer)}
    if found := LETTERED.fullmatch(answer.strip()):
        letter, text = found[1].upper(), _bare(found[2] or "")
        if not text or text == texts[LETTERS.index(letter)]:
            named.add(letter)
    if len(named) != 1:
        raise Rejected(
            "options", f"the answer {answer[:40]!r} does not name one of the options {', '.join(options)[:80]}"
        )
    return named.pop()


def _bare(text: str) -> str:
    """For comparing: without case, double spaces and a full stop at the end."""
    return " ".join(text.casefold().split()).rstrip(".")


def _check_options(pair: Pair) -> None:
    if len(pair.options) != 4 or len(set(pair.options)) != 4:
        raise Rejected("options", f"{len(set(pair.options))} different options, expected 4")


def _check_reasoned(pair: Pair, kind: str) -> Pair:
    """An answer that ends in a conclusion of its type, with at least three words before it."""
    found = CONCLUSION.search(pair.answer)
    if found is None or (found[1] in YES_NO) != (kind == "judgement"):
        wanted = '"so yes." or "so no."' if kind == "judgement" else '"so " and a letter from A to D'
        raise Rejected("conclusion", f"the answer does not end in {wanted}: {pair.answer[-40:]!r}")
    if len(pair.answer[: found.start()].split()) < 3:
        raise Rejected("conclusion", f"no reason before it: {pair.answer[:60]!r}")
    if kind == "choice":
        _check_options(pair)
    return pair
