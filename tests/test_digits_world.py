"""The embedded world: honest splits, COCO files that agree with the pixels, balanced questions, a cache that holds."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from vlit.errors import DataError
from vlit.synth.digits import scenes
from vlit.synth.digits.instructions import read_captions, read_things
from vlit.synth.digits.questions import FAMILIES, KINDS, LETTERS, Thing
from vlit.synth.digits.world import WorldPaths, ensure_world

SMALL = {"train_images": 60, "validation_images": 30, "test_images": 30, "questions_per_kind": 12, "progress": False}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> WorldPaths:
    return ensure_world(tmp_path_factory.mktemp("digits") / "world", **SMALL)


def test_no_scan_belongs_to_two_splits_and_none_is_left_out():
    parts = scenes.handwriting()
    together = np.concatenate(list(parts.values()))
    assert len(together) == len(set(together.tolist())) == 1797
    assert len(parts["train"]) > 1300
    assert len(parts["test"]) > 250


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_scenes_use_only_the_handwriting_of_their_split(split):
    layouts = scenes.draw_layouts(split, 2000, rng=np.random.default_rng(0))
    used = set(layouts.sources_NQ[layouts.digits_NQ >= 0].tolist())
    assert len(used) > 0.9 * len(scenes.handwriting()[split])
    assert used <= set(scenes.handwriting()[split].tolist())


def test_an_unknown_split_is_refused_with_the_known_ones():
    with pytest.raises(DataError, match="train, validation, test"):
        scenes.draw_layouts("tset", 1, rng=np.random.default_rng(0))


def test_the_pixels_inside_a_box_have_the_annotated_colour_and_digits_fill_the_box(world):
    data = json.loads((world.root / "annotations/instances_train.json").read_text())
    files = {image["id"]: image["file_name"] for image in data["images"]}
    assert len(data["annotations"]) > 100
    for box in data["annotations"]:
        picture = np.asarray(Image.open(world.images / "train" / files[box["image_id"]]).convert("RGB"), dtype=float)
        x, y, width, height = (int(edge) for edge in box["bbox"])
        inside = picture[y : y + height, x : x + width].reshape(-1, 3)
        brightest = inside[inside.sum(1).argsort()[-max(8, len(inside) // 20) :]].mean(0)
        distance = {name: np.abs(brightest - 0.92 * np.array(rgb)).sum() for name, rgb in scenes.COLOURS.items()}
        assert min(distance, key=distance.__getitem__) == box["attributes"]["color"]
        assert 0 < box["area"] <= width * height
        assert box["iscrowd"] == 0
        assert box["category_id"] in {category["id"] for category in data["categories"]}


def test_captions_name_the_same_things_as_the_instances(world):
    things = read_things(world.root / "annotations/instances_validation.json")
    captions = read_captions(world.root / "annotations/captions_validation.json")
    assert len(things) == len(captions) == SMALL["validation_images"]
    for image, row in things.items():
        for caption in captions[image]:
            found = list(zip(re.findall(r"\d", caption), re.findall(r"(?:top|bottom)-\w+", caption), strict=True))
            assert found == [(thing.digit, thing.position) for thing in row]


def answers_from_scratch(things: list[Thing], question: str) -> str | None:
    """A second, independent reading of some question forms."""
    at = {thing.position: thing for thing in things}
    of = {thing.colour: thing for thing in things}
    place = re.search(r"(top|bottom)-(left|right)", question)
    colour = next((name for name in scenes.COLOUR_NAMES if re.search(rf"\b{name}\b", question)), None)
    if question.startswith(("Which digit is at", "What digit do you see", "Name the digit at")) and place:
        return f"The digit at the {place[0]} is {at[place[0]].digit}."
    if question.startswith(("Where", "Name the place")) and colour:
        return f"The {colour} digit is at the {of[colour].position}."
    if question.startswith(("How many", "Count")):
        return "There is 1 digit." if len(things) == 1 else f"There are {len(things)} digits."
    if "sum of all" in question or "dd up" in question:
        return " + ".join(t.digit for t in things) + f" = {sum(int(t.digit) for t in things)}."
    if question.startswith("Is there a digit that is"):
        return f"There is a {colour} digit, so yes." if colour in of else f"There is no {colour} digit, so no."
    if question.startswith("Is there a digit at") and place:
        fact, verdict = ("a", "yes") if place[0] in at else ("no", "no")
        return f"There is {fact} digit at the {place[0]}, so {verdict}."
    if question.startswith("Is the digit at") and place and colour:
        held = at[place[0]].colour
        return f"The digit at the {place[0]} is {held}, so {'yes' if held == colour else 'no'}."
    return None


def test_answers_agree_with_a_second_reading_of_the_annotations(world):
    things = read_things(world.root / "annotations/instances_train.json")
    checked = 0
    for record in json.loads(world.instruct("train").read_text()):
        talk = record["conversations"]
        assert [turn["from"] for turn in talk] == ["human", "gpt"] * (len(talk) // 2)
        assert [turn["value"].count("<image>") for turn in talk] == [1] + [0] * (len(talk) - 1)
        for question, answer in zip(talk[::2], talk[1::2], strict=True):
            text = question["value"].removeprefix("<image>\n")
            if "Answer with" in text or "Say what you see" in text:
                continue
            expected = answers_from_scratch(list(things[record["image"]]), text)
            if expected is not None:
                assert answer["value"] == expected, text
                checked += 1
    assert checked > 100


def test_held_out_questions_cover_every_kind_equally_and_balance_yes_no_and_letters(world):
    rows = [json.loads(line) for line in world.questions("test").read_text().splitlines()]
    assert Counter(row["kind"] for row in rows) == dict.fromkeys(KINDS, 12)
    endings = {kind: Counter(r["answer"].rsplit(", so ")[-1] for r in rows if r["kind"] == kind) for kind in KINDS}
    assert endings["yes_no"] == {"yes.": 6, "no.": 6}
    assert endings["choice"] == {f"{letter}.": 3 for letter in LETTERS}
    assert len({row["question_id"] for row in rows}) == len(rows)
    assert all((world.images / row["image"]).is_file() for row in rows)
    assert {kind for kinds in FAMILIES.values() for kind in kinds} == set(KINDS)
    for row in rows:
        if row["kind"] == "choice":
            assert len(set(row["choices"])) == 4
            fact, letter = row["answer"].removesuffix(".").rsplit(", so ")
            assert re.search(rf"\b{row['choices'][LETTERS.index(letter)]}\b", fact)


def test_yes_and_no_are_equally_likely_for_every_form_of_a_judgement():
    rng = Random(0)
    things = [Thing("3", "red", "top-left"), Thing("8", "blue", "top-right"), Thing("3", "pink", "bottom-left")]
    seen: dict[str, Counter[str]] = {}
    for _ in range(16000):
        turn = KINDS["yes_no"](things, rng)
        form = re.sub(r"\d|\b(red|green|blue|yellow|pink|white|an?)\b|(top|bottom)-\w+", "_", turn.question)
        seen.setdefault(form, Counter())[turn.answer.rsplit(", so ")[-1]] += 1
    assert len(seen) == 8
    for form, counts in seen.items():
        assert abs(counts["yes."] / counts.total() - 0.5) < 0.05, form


def test_the_chance_level_of_every_kind_is_in_the_manifest(world):
    chance = world.read_manifest()["chance"]
    assert set(chance) == set(KINDS)
    assert chance["yes_no"]["majority"] < 0.5  # the fact before the verdict has to be seen
    assert sum(level["majority"] for level in chance.values()) / len(chance) < 0.25


def test_the_same_settings_give_the_same_bytes_and_another_seed_gives_others(world, tmp_path):
    again = ensure_world(tmp_path / "again", **SMALL)
    other = ensure_world(tmp_path / "other", seed=1, **SMALL)
    names = sorted(str(path.relative_to(world.root)) for path in world.root.rglob("*") if path.is_file())
    assert len(names) == 120 + 6 + 6 + 2 + 1
    assert all((world.root / name).read_bytes() == (again.root / name).read_bytes() for name in names)
    assert (world.instruct("train")).read_bytes() != other.instruct("train").read_bytes()


def test_a_finished_world_is_not_built_again_and_other_settings_replace_it(tmp_path):
    first = ensure_world(tmp_path / "w", **SMALL)
    stamp = first.manifest.stat().st_mtime_ns
    assert ensure_world(tmp_path / "w", **SMALL).manifest.stat().st_mtime_ns == stamp
    changed = ensure_world(tmp_path / "w", **{**SMALL, "train_images": 61})
    assert changed.read_manifest()["images"]["train"] == 61
    assert sorted(path.name for path in tmp_path.iterdir()) == [".w.lock", "w"]


def test_a_killed_build_leaves_nothing_that_looks_finished_and_the_next_call_finishes(tmp_path):
    root = tmp_path / "w"
    code = f"from vlit.synth.digits.world import ensure_world; ensure_world({str(root)!r}, train_images=20000)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".w.building/images/train/*.png")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert (tmp_path / ".w.building").is_dir()
    assert not root.exists()
    assert ensure_world(root, **SMALL).read_manifest()["images"]["train"] == 60
    assert sorted(path.name for path in tmp_path.iterdir()) == [".w.lock", "w"]


def test_a_folder_with_other_files_is_not_touched(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match="holds other files"):
        ensure_world(tmp_path / "mine", **SMALL)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


def test_a_box_without_colour_is_named(world, tmp_path):
    data = json.loads((world.root / "annotations/instances_test.json").read_text())
    del data["annotations"][4]["attributes"]
    broken = Path(tmp_path / "instances_test.json")
    broken.write_text(json.dumps(data))
    with pytest.raises(DataError, match=r"annotation 5 .*attributes\.color"):
        read_things(broken)
