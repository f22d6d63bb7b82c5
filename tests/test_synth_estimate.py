"""The estimate against runs: as many requests as a run sends, at least as many dollars at most, and nothing drawn for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import teacher_server
from tests.small_world import small_world
from tests.spoilt_pictures import bare_pictures
from tests.teacher_server import running
from vlit.data.record import Record, write_records
from vlit.registry import RECIPES
from vlit.synth.digits.world import WorldPaths
from vlit.synth.engine import estimate as estimating
from vlit.synth.engine import pipeline
from vlit.synth.engine.estimate import Estimate, estimate
from vlit.synth.engine.parse import Rejected
from vlit.synth.engine.pipeline import run
from vlit.synth.engine.recipe import Inputs, RecipeConfig
from vlit.synth.engine.rehearsal import answered
from vlit.synth.engine.settings import SynthConfig, read_settings
from vlit.synth.engine.stages import AskEach, Item, Stage
from vlit.synth.engine.teacher import Ask, Limits, Message, Reply, Teacher
from vlit.synth.generators.digits import DigitsGenerator
from vlit.types import Turn

PLAIN_TALK = teacher_server.talk
CASES = {
    "llava": (["recipe.types_per_image=3"], ("annotated",)),
    "minigpt4": ([], ("annotated", "bare")),
    "mminstruct": (["recipe.domains_per_image=12"], ("annotated", "bare")),
    "stablellava": (["recipe.pictures=12"], ("bare",)),
    "judge": ([], ("bare",)),
}
"""Recipes that ask, with settings, and the pictures that they take."""
RUNS = [(recipe, pictures) for recipe, (_, kinds) in CASES.items() for pictures in kinds]


def obliging_talk(asked: dict[str, Any], key: str) -> str:
    """The server's answers, in the form of each recipe also where the server gives the same to all."""
    system = str(asked["messages"][0]["content"])
    if system.startswith("You write prompts for a text-to-image"):
        return f"((a red 7 at the top-left)), thing {key[:6]}"
    if system.startswith("You help to build a data set of demanding"):
        return "Question:\nWhy?\n===\nAnswer:\nSomebody has put it there."
    return PLAIN_TALK(asked, key)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> WorldPaths:
    return small_world(tmp_path_factory.mktemp("estimate"), train=4)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """Four pictures of one colour each, and two finished records about them."""
    folder = bare_pictures(tmp_path / "bare", 4)
    said = (Turn("user", "<image>\nWhat colour?"), Turn("assistant", "Red."))
    more = (Turn("user", "Sure?"), Turn("assistant", "Yes."))
    records = [Record("one", said, ("0.png",)), Record("two", said + more, ("1.png",))]
    write_records(tmp_path / "records.jsonl", records)
    return folder


def settings_of(
    recipe: str, pictures: str, world: WorldPaths, bare: Path, teacher: dict[str, Any], *more: str
) -> SynthConfig:
    given: dict[str, Any] = {"recipe": recipe, "out": str(bare.parent / "out"), "teacher": teacher}
    if pictures == "annotated":
        files = [str(world.root / "annotations" / f"{kind}_train.json") for kind in ("instances", "captions")]
        given |= {"images": str(world.images), "annotations": files}
    else:
        given |= {"images": str(bare), "records": [str(bare.parent / "records.jsonl")]}
    return read_settings(None, given, [*CASES.get(recipe, ([], ()))[0], *more])


def endpoint(url: str) -> dict[str, Any]:
    return {"type": "openai", "base_url": url, "model": "m", "usd_per_million_in": 1, "usd_per_million_out": 4}


def test_every_recipe_that_asks_is_compared_with_a_run() -> None:
    shipped = {name for name in RECIPES.names() if RECIPES.get(name).__module__.startswith("vlit.")}
    assert shipped - {"adapt", "expand", "otter"} == set(CASES)


@pytest.mark.parametrize(("recipe", "pictures"), RUNS)
def test_as_many_requests_are_estimated_as_a_run_sends(
    recipe: str, pictures: str, world: WorldPaths, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_server, "talk", obliging_talk)
    with running() as server:
        found = settings_of(recipe, pictures, world, bare, endpoint(server.url))
        before = estimate(found)
        assert server.accounts.requests == 0
        report = run(found, show=False)
        assert report.records
        assert sum(stage.requests for stage in before.stages) == server.accounts.requests > 1
        assert 0 < before.usd < before.most_usd
        assert report.totals.spent / 1e9 <= before.most_usd
        asking = {stage.name: stage.requests for stage in before.stages}
        assert asking == {s.name: s.items_in for s in report.stages if s.name in asking}


def test_a_request_that_only_a_short_reply_causes_is_counted(
    world: WorldPaths, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running() as server:
        found = settings_of("minigpt4", "bare", world, bare, endpoint(server.url))
        requests = {stage.name: stage.requests for stage in estimate(found).stages}
        monkeypatch.setattr(teacher_server, "talk", lambda asked, key: f"A square fills picture {key[:6]}. " * 20)
        report = run(found, show=False)
        assert requests == {"caption": 4, "continue": 4, "refine": 4}
        assert [stage.items_in for stage in report.stages] == [4, 4, 4, 4]
        assert server.accounts.requests == 8


def test_more_pictures_than_are_rehearsed_count_too(
    world: WorldPaths, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = settings_of("mminstruct", "bare", world, bare, endpoint("http://127.0.0.1:9/v1"))
    whole = estimate(found)
    monkeypatch.setattr(estimating, "REHEARSED", 3)
    few = estimate(found)
    assert [stage.requests for stage in few.stages] == [stage.requests for stage in whole.stages] == [4, 48]
    assert few.most_usd == pytest.approx(whole.most_usd, rel=0.02)


class Greedy(Teacher):
    """Rejects itself in every first draw and then says as much as it may; charges a token a byte, and all output tokens."""

    limits = Limits(nano_per_token_in=1000, nano_per_token_out=4000)
    image_tokens = 1700

    def identity(self) -> dict[str, Any]:
        return {"type": "greedy"}

    def send(self, ask: Ask) -> str:
        text, size = f"Thing {self.key(ask)[:6]}. ", 4 * ask.max_tokens
        if ask.task == "picture":
            text, size = f"((a red 7 at the top-left)), {text}", 600
        if ask.task == "caption" and ask.messages[0].text.startswith("Describe this image in detail."):
            size = 319  # of minigpt4: as much as is still continued
        is_cut = ask.sample == 0 and ask.task != "continue"
        charged = {"tokens_in": self.most_tokens_in(ask), "tokens_out": ask.max_tokens}
        return json.dumps({"text": (text + "x" * size)[:size], "cut": is_cut} | charged)

    def read(self, body: str) -> Reply:
        return Reply(**json.loads(body))


@pytest.mark.parametrize(("recipe", "pictures"), RUNS)
def test_the_worst_case_is_not_exceeded_by_the_longest_replies_and_two_draws_of_each(
    recipe: str, pictures: str, world: WorldPaths, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimating, "build_teachers", lambda _: {"text": Greedy(), "vision": Greedy()})
    monkeypatch.setattr(pipeline, "build_teachers", lambda _: {"text": Greedy(), "vision": Greedy()})
    found = settings_of(recipe, pictures, world, bare, {"type": "annotations"})
    most = estimate(found).most_usd
    report = run(found, show=False)
    assert report.totals.replies >= 2 * report.stages[-1].items_in > 0
    assert 0.7 * most < report.totals.spent / 1e9 <= most


def test_the_worst_case_holds_the_longest_earlier_reply_to_the_byte(
    world: WorldPaths, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimating, "build_teachers", lambda _: {"text": Greedy(), "vision": Greedy()})
    monkeypatch.setattr(pipeline, "build_teachers", lambda _: {"text": Greedy(), "vision": Greedy()})
    found = settings_of("mminstruct", "bare", world, bare, {"type": "annotations"})
    before = estimate(found)
    assert run(found, show=False).totals.spent / 1e9 == pytest.approx(before.most_usd, rel=1e-9)


@pytest.mark.parametrize(("recipe", "pictures"), [*RUNS, ("reasoned", "bare")])
def test_each_stage_that_asks_takes_a_stand_in_of_the_expected_length(
    recipe: str, pictures: str, world: WorldPaths, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[str, int, str | None]] = []

    def spy(stage: AskEach, item: Item, ask: Ask, *, tokens: int) -> tuple[str, list[Item]] | None:
        found = answered(stage, item, ask, tokens=tokens)
        taken.append((stage.name, tokens, found and found[0]))
        return found

    monkeypatch.setattr(estimating, "answered", spy)
    more = ["recipe.answers=reasoned", "recipe.domains_per_image=24"] if recipe == "reasoned" else []
    name = "mminstruct" if recipe == "reasoned" else recipe
    estimate(settings_of(name, pictures, world, bare, endpoint("http://127.0.0.1:9/v1"), *more))
    assert len(taken) >= 4
    assert all(text for _, _, text in taken)
    passed_on = [(tokens, text) for stage, tokens, text in taken if stage in ("caption", "prompt", "continue")]
    assert passed_on or recipe in ("llava", "judge")
    assert all(4 * tokens <= len(text or "") < 4 * tokens + 60 for tokens, text in passed_on)


def test_an_estimate_of_generated_pictures_draws_none(
    world: WorldPaths, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    real = DigitsGenerator.generate

    def generate(self: DigitsGenerator, prompt: str, target: Path, *, seed: int) -> None:
        drawn.append(prompt)
        real(self, prompt, target, seed=seed)

    monkeypatch.setattr(DigitsGenerator, "generate", generate)
    found = settings_of("stablellava", "bare", world, bare, {"type": "annotations"})
    assert [stage.requests for stage in estimate(found).stages] == [12, 12]
    assert drawn == []
    assert not Path(found.out).exists()
    run(found, show=False)
    assert len(drawn) == 12


class Riddle(RecipeConfig):
    """Asks twice; the first reply of the pictures in ``hard`` must be a word that no stand-in says."""

    type: str = "riddle"
    hard: list[str]

    def stages(self, inputs: Inputs) -> list[Stage]:
        def ask(item: Item) -> Ask:
            return Ask("riddle", (Message("user", "Say the word."),), 100)

        def finish(item: Item, reply: Reply | None) -> list[Item]:
            if item["id"] in self.hard and reply is not None and reply.text != "xyzzy":
                raise Rejected("word")
            return [item]

        return [AskEach("first", "1", ask, finish), AskEach("second", "1", ask, finish)]


def riddle(world: WorldPaths, bare: Path, hard: list[str]) -> Estimate:
    found = settings_of("minigpt4", "bare", world, bare, endpoint("http://127.0.0.1:9/v1"))
    return estimate(found.model_copy(update={"recipe": Riddle(hard=hard)}))


def test_where_no_stand_in_fits_the_next_stage_is_a_guess_and_says_so(world: WorldPaths, bare: Path) -> None:
    first, second = riddle(world, bare, ["0", "1", "2", "3"]).stages
    assert (first.requests, first.is_guess) == (4, False)
    assert (second.requests, second.is_guess) == (4, True)
    assert second.most_usd == pytest.approx(first.most_usd + 4 * 2 * 400 / 1e6)
    assert "a guess" in second.text()
    assert "a guess" not in first.text()


def test_items_whose_reply_has_no_stand_in_are_counted_by_those_that_have_one(world: WorldPaths, bare: Path) -> None:
    first, second = riddle(world, bare, ["0", "2"]).stages
    assert (first.requests, second.requests, second.is_guess) == (4, 4, False)
