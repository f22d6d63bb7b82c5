"""The recipes end to end, offline: true by a second reading of the annotations, valid as records, the same each time."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.small_world import small_world
from tests.teacher_server import running
from vlit.data.formats.llava import LlavaFormat
from vlit.data.record import Record, read_records, write_records
from vlit.errors import ConfigError
from vlit.synth.digits.world import WorldPaths
from vlit.synth.engine.estimate import estimate
from vlit.synth.engine.parse import Pair, Rejected
from vlit.synth.engine.pipeline import run
from vlit.synth.engine.prompts import FOLDER, read_groups, read_list
from vlit.synth.engine.report import Report
from vlit.synth.engine.settings import SynthConfig, read_settings
from vlit.synth.generators.digits import DigitsGenerator, digits_of_prompt
from vlit.synth.recipes.minigpt4 import rule_filter
from vlit.synth.recipes.mminstruct import check_pair
from vlit.types import Turn

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> WorldPaths:
    return small_world(tmp_path_factory.mktemp("synth"), train=40)


def settings(world: WorldPaths, out: Path, recipe: str, *overrides: str) -> SynthConfig:
    files = [str(world.root / "annotations" / f"{kind}_train.json") for kind in ("instances", "captions")]
    given = {"recipe": recipe, "annotations": files, "images": str(world.images), "out": str(out)}
    return read_settings(None, given, overrides)


def made(world: WorldPaths, out: Path, recipe: str, *overrides: str) -> tuple[list[Record], Report]:
    report = run(settings(world, out, recipe, *overrides), show=False)
    records = list(read_records(out / "dataset.jsonl"))
    assert report.records == len(records) > 0
    assert len({record.id for record in records}) == len(records)
    assert sum(1 for _ in LlavaFormat().iter_samples(out / "dataset.jsonl", "synth")) == len(records)
    return records, report


def truth(world: WorldPaths) -> dict[str, list[dict[str, Any]]]:
    """Instances by picture, read here again: digit, colour, box in 0..1."""
    data = json.loads((world.root / "annotations" / "instances_train.json").read_text())
    names = {image["id"]: f"train/{image['file_name']}" for image in data["images"]}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names.values()}
    for row in data["annotations"]:
        x, y, w, h = (edge / 64 for edge in row["bbox"])
        found[names[row["image_id"]]].append(
            {"digit": str(row["category_id"] - 1), "color": row["attributes"]["color"], "box": (x, y, x + w, y + h)}
        )
    return found


def turns(record: Record) -> list[tuple[str, str]]:
    texts = [turn.text.replace("<image>", "").strip() for turn in record.turns]
    return list(zip(texts[::2], texts[1::2], strict=True))


def test_llava_writes_the_three_types_and_each_answer_follows_from_the_annotations(
    world: WorldPaths, tmp_path: Path
) -> None:
    records, report = made(world, tmp_path / "out", "llava", "recipe.types_per_image=3")
    held, checked = truth(world), 0
    numbers = ("no", "one", "two", "three", "four")
    for record in records:
        things = held[record.images[0]]
        for question, answer in turns(record):
            if "How many objects" in question:
                assert numbers[len(things)] in answer.split()
            elif found := re.fullmatch(r"How many (\d)s are in the image\?", question):
                count = sum(thing["digit"] == found[1] for thing in things)
                assert answer == f"The number of {found[1]}s in the image is {count}."
            elif "add up" in question:
                assert answer.endswith(f"= {sum(int(thing['digit']) for thing in things)}.")
            elif found := re.fullmatch(r"What color is the (\d) in the image\?", question):
                colors = [thing["color"] for thing in things if thing["digit"] == found[1]]
                assert answer == f"The {found[1]} is {colors[0]}."
                assert len(colors) == 1
            else:
                continue
            checked += 1
    assert checked > 60
    assert set(Counter(record.kind for record in records)) == {"conversation", "detail", "reasoning"}
    assert report.stages[-1].rejected.keys() == {"refused"}  # pictures of one digit leave nothing to reason about
    first = [record.turns[0].text for record in records]
    assert (
        {text.startswith("<image>\n") for text in first}
        == {True, False}
        == {text.endswith("\n<image>") for text in first}
    )
    questions = read_list("llava/detail_questions")[0]
    assert all(turns(record)[0][0] in questions for record in records if record.kind == "detail")


def test_types_are_drawn_by_the_published_shares(world: WorldPaths, tmp_path: Path) -> None:
    found = settings(world, tmp_path, "llava")
    from vlit.synth.engine.recipe import Inputs

    draw = found.recipe.stages(Inputs(annotations=(Path("x"),)))[0]
    kinds = Counter(draw.work({"id": str(n)})[0]["type"] for n in range(4000))
    for kind, thousands in {"conversation": 58, "detail": 23, "reasoning": 77}.items():
        assert kinds[kind] / 4000 == pytest.approx(thousands / 158, abs=0.03)


def test_adaption_fills_templates_with_boxes_counts_and_letters_of_the_annotations(
    world: WorldPaths, tmp_path: Path
) -> None:
    records, _ = made(world, tmp_path / "out", "adapt", "recipe.max_per_task=30")
    held = truth(world)
    kinds = Counter(record.kind for record in records)
    assert set(kinds) == {"caption", "detection", "region_name", "refer", "count", "existence", "classify", "relation"}
    assert max(kinds.values()) == 30
    verdicts: Counter[str] = Counter()
    for record in records:
        things, ((question, answer),) = held[record.images[0]], turns(record)
        if record.kind == "refer":
            region = record.regions[0]
            color, digit = region.label.split()
            (box,) = [thing["box"] for thing in things if (thing["color"], thing["digit"]) == (color, digit)]
            assert answer == "[" + ", ".join(f"{edge:.2f}" for edge in box) + "]"
            assert region.label in question
        elif record.kind == "classify":
            named = record.options["ABCD".index(answer)]
            assert named == record.regions[0].label.split()[-1]
            assert len(set(record.options)) == 4
        elif record.kind == "existence":
            digit = re.search(r'"(\d)"', question)
            assert digit
            assert answer == ("Yes" if digit[1] in {thing["digit"] for thing in things} else "No")
            verdicts[answer] += 1
        elif record.kind == "count":
            assert int(answer) == len(record.regions)
    assert min(verdicts.values()) >= 8
    templates = {record.provenance["template"] for record in records}
    assert len(templates) >= 30  # of 40


def test_mminstruct_asks_in_four_types_of_the_domains_the_teacher_knows(world: WorldPaths, tmp_path: Path) -> None:
    records, _ = made(world, tmp_path / "out", "mminstruct", "recipe.domains_per_image=4")
    held = truth(world)
    assert {record.instruction_type for record in records} == {"judgement", "choice", "short", "long"}
    assert {record.domain for record in records} < set(read_groups("mminstruct/domains")[0])
    counted = 0
    for record in records:
        endings = read_list(f"format/{record.instruction_type}")[0]
        for question, answer in turns(record):
            assert question.splitlines()[-1] in endings
            if record.instruction_type == "judgement":
                assert answer in ("Yes", "No")
            if record.instruction_type == "choice":
                assert answer in "ABCD"
                assert re.findall(r"^([A-D])\. ", question, flags=re.MULTILINE) == list("ABCD")
            if record.instruction_type == "short" and (found := re.match(r"How many (\d)s", question)):
                assert int(answer) == sum(thing["digit"] == found[1] for thing in held[record.images[0]])
                counted += 1
    assert counted > 5
    with pytest.raises(ConfigError, match="answers in none of image_style"):
        run(settings(world, tmp_path / "o", "mminstruct", "recipe.domains=[image_style]"), show=False)


@pytest.mark.parametrize(
    ("pair", "kind", "code"),
    [
        (Pair("Is it?", "Perhaps."), "judgement", "judgement"),
        (Pair("Which?", "A", ("x", "y", "z")), "choice", "options"),
        (Pair("Which?", "Apple", ("x", "y", "z", "w")), "choice", "options"),
        (Pair("Which?", "E", ("x", "y", "z", "w")), "choice", "options"),
        (Pair("Is the <object> red?", "Yes"), "judgement", "wild_card"),
        (Pair("What?", "word " * 20), "short", "long"),
        (Pair("What?", "A dog."), "long", "short"),
    ],
)
def test_a_pair_that_is_not_of_its_type_is_rejected(pair: Pair, kind: str, code: str) -> None:
    with pytest.raises(Rejected) as caught:
        check_pair(pair, kind)
    assert caught.value.code == code
    assert check_pair(Pair("Is it?", "yes, it is."), "judgement").answer == "Yes"
    assert check_pair(Pair("Which?", "(b)", ("x", "y", "z", "w")), "choice").answer == "B"


def test_minigpt4_continues_short_descriptions_only_and_its_rules_drop_what_is_broken(
    world: WorldPaths, tmp_path: Path
) -> None:
    records, report = made(world, tmp_path / "out", "minigpt4", "recipe.min_tokens=40")
    assert report.totals.replies < 3 * 40  # long ones were not asked to go on
    assert all(turns(record)[0][0] in read_list("minigpt4/instructions")[0] for record in records)
    good = "A dog runs over a wide green field in the sun."
    assert rule_filter(good, min_words=8) == good
    for text, code in (
        (f"Sure! {good}", "chatter"),
        (f"{good} {good}", "repeated"),
        (good[:-5], "unfinished"),
        ("Ein Hund läuft über die grüne Wiese, während ßüäö ßüäö ßüäö.", "foreign"),
        ("A dog.", "short"),
    ):
        with pytest.raises(Rejected) as caught:
            rule_filter(text, min_words=8)
        assert caught.value.code == code


def test_stablellava_draws_what_the_prompt_says_and_talks_about_it(world: WorldPaths, tmp_path: Path) -> None:
    out = tmp_path / "out"
    records, _ = made(world, out, "stablellava", "recipe.pictures=24", "recipe.keywords=3")
    assert len(records) == 24
    assert {record.domain for record in records} == {"top_left", "top_right", "bottom_left", "bottom_right"}
    for record in records:
        wanted = digits_of_prompt(record.provenance["image_prompt"])
        assert len(wanted) == 3
        pixels = np.asarray(Image.open(out / "images" / record.images[0]).convert("RGB"), dtype=float)
        bright = {
            place: float(
                np.quantile(
                    pixels[32 * (n // 2) : 32 * (n // 2) + 32, 32 * (n % 2) : 32 * (n % 2) + 32].max(axis=2), 0.97
                )
            )
            for n, place in enumerate(("top-left", "top-right", "bottom-left", "bottom-right"))
        }
        assert {place for place, value in bright.items() if value > 150} == {place for _, _, place in wanted}
        assert "There are three objects in the image." in [answer for _, answer in turns(record)]
    with pytest.raises(Rejected, match="has no such phrase"):
        DigitsGenerator().generate("a castle", tmp_path / "x.png", seed=0)


def test_in_context_sets_put_similar_records_of_other_pictures_first(world: WorldPaths, tmp_path: Path) -> None:
    base, _ = made(world, tmp_path / "base", "llava", "recipe.types_per_image=2")
    by_id = {record.id: record for record in base}
    for by in ("text", "image_hash", "clip"):
        overrides = [f"recipe.by={by}", f"recipe.clip={ROOT / 'vlit/synth/digits/bases/clip'}", "recipe.examples=2"]
        given = {"recipe": "otter", "records": [str(tmp_path / "base/dataset.jsonl")], "images": str(world.images)}
        run(read_settings(None, given | {"out": str(tmp_path / by)}, overrides), show=False)
        records = list(read_records(tmp_path / by / "dataset.jsonl"))
        assert len(records) == len(base)
        for record in records:
            examples = [by_id[name] for name in record.provenance["rel_ins_ids"]]
            own = by_id[record.id.removesuffix("-in-context")]
            assert record.images == (*(e.images[0] for e in examples), own.images[0])
            assert len(set(record.images)) == 3
            assert {e.kind for e in examples} == {own.kind}
            assert record.turns[-len(own.turns) :] == own.turns


def test_in_context_sets_say_which_records_they_cannot_use(
    world: WorldPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, _ = made(world, tmp_path / "base", "llava")
    text = Record("text", (Turn("user", "Two and two?"), Turn("assistant", "Four.")))
    write_records(tmp_path / "mixed.jsonl", [*base, text])
    given = {"recipe": "otter", "records": [str(tmp_path / "mixed.jsonl")], "images": str(world.images)}
    run(read_settings(None, given | {"out": str(tmp_path / "out")}), show=False)
    assert f"1 of {len(base) + 1} records have no picture or several; left out" in capsys.readouterr().err


def test_the_same_run_gives_the_same_bytes_and_more_inputs_keep_those_before(world: WorldPaths, tmp_path: Path) -> None:
    a, _ = made(world, tmp_path / "a", "llava", "max_items=15")
    made(world, tmp_path / "b", "llava", "max_items=15")
    assert (tmp_path / "a/dataset.jsonl").read_bytes() == (tmp_path / "b/dataset.jsonl").read_bytes()
    more, report = made(world, tmp_path / "a", "llava", "max_items=30")
    assert {record.id for record in a} < {record.id for record in more}
    assert [stage.reused for stage in report.stages] == [15, 15]


def test_a_changed_prompt_asks_again_and_a_changed_order_of_work_does_not(world: WorldPaths, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _, first = made(world, out, "minigpt4")
    own = tmp_path / "own"
    shutil.copytree(FOLDER / "minigpt4", own / "minigpt4")
    _, same = made(world, out, "minigpt4")
    assert [stage.reused for stage in same.stages] == [40] * 4
    assert same.totals.replies == first.totals.replies
    edit = own / "minigpt4" / "refine.v1.txt"
    edit.write_text(edit.read_text() + "\nNothing else.")
    _, changed = made(world, out, "minigpt4", f"recipe.prompts={own}")
    assert changed.totals.replies > same.totals.replies


def test_the_estimate_is_what_a_run_asks_for(world: WorldPaths, tmp_path: Path) -> None:
    with running() as server:
        teacher = {
            "type": "openai",
            "base_url": server.url,
            "model": "m",
            "usd_per_million_in": 1,
            "usd_per_million_out": 4,
        }
        found = settings(
            world, tmp_path / "out", "llava", f"teacher={json.dumps(teacher)}", "recipe.shares={conversation: 1}"
        )
        before = estimate(found)
        assert server.accounts.requests == 0
        report = run(found, show=False)
        assert before.stages[0].requests == server.accounts.requests == 40
        assert before.stages[0].tokens_in == pytest.approx(server.accounts.tokens_in, rel=0.05)
        assert before.usd > 0
        assert report.totals.spent / 1e9 <= before.most_usd


def test_a_recipe_without_what_it_needs_says_so(world: WorldPaths, tmp_path: Path) -> None:
    for recipe, words in (
        ("llava", "needs annotations"),
        ("adapt", "needs annotations"),
        ("otter", "needs finished records"),
    ):
        given = {"recipe": recipe, "images": str(world.images), "out": str(tmp_path / recipe)}
        with pytest.raises(ConfigError, match=words):
            run(read_settings(None, given), show=False)


def test_a_model_on_this_machine_is_a_teacher_too(world: WorldPaths, tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    shutil.copytree(ROOT / "vlit/synth/digits/bases/llama", folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    teacher = {"type": "local", "model": str(folder), "device": "cpu", "max_new_tokens": 8}
    overrides = [f"teacher={json.dumps(teacher)}", "recipe.shares={detail: 1}", "max_items=3"]
    own = tmp_path / "own" / "llava"
    own.mkdir(parents=True)
    (own / "detail.v2.txt").write_text("=== user\n$captions")
    report = run(settings(world, tmp_path / "out", "llava", *overrides, f"recipe.prompts={own.parent}"), show=False)
    assert report.totals.replies >= 3
    assert report.stages[-1].items_in == 3


def test_records_say_who_wrote_them_and_under_which_licence_their_picture_is(world: WorldPaths, tmp_path: Path) -> None:
    records, _ = made(world, tmp_path / "run", "llava", "max_items=5")
    assert {(r.provenance["teacher"], r.provenance["license"]) for r in records} == {("annotations", "CC BY 4.0")}
    adapted, _ = made(world, tmp_path / "adapt", "adapt", "max_items=5")
    assert all("teacher" not in record.provenance for record in adapted), "nobody was asked"
    with running() as server:
        words = (f"teacher.base_url={server.url}", "teacher.model=seer", "teacher.type=openai", "max_items=3")
        judged = settings(world, tmp_path / "judge", "judge", f"records=[{tmp_path}/run/dataset.jsonl]", *words)
        run(judged, show=False)
    assert {r.provenance["teacher"] for r in read_records(tmp_path / "judge" / "dataset.jsonl")} == {"annotations"}
