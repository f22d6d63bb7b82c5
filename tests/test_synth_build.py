"""``vlit synth build``: recipes into one measured and filtered set; and the teacher that speaks the world's language."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
import yaml

from tests.digits_truth import asked_truth, check_record, facts, holds
from tests.small_world import small_world
from tests.teacher_server import running
from vlit.cli import main
from vlit.data.record import read_records
from vlit.errors import ConfigError, DataError
from vlit.registry import TEACHERS
from vlit.serve.build import synth_build
from vlit.synth.digits.world import WorldPaths
from vlit.synth.engine.calls import NANO, BudgetExhausted
from vlit.synth.engine.parse import Pair, Rejected
from vlit.synth.engine.settings import BuildConfig, read_build
from vlit.synth.engine.teacher import Ask
from vlit.synth.recipes.mminstruct import check_pair

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "synth" / "world.yaml"
TYPES = {"conversation", "detail", "reasoning", "judgement", "choice", "short", "long"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> WorldPaths:
    return small_world(tmp_path_factory.mktemp("build"), train=120, test=12)


def words_for(world: WorldPaths, out: Path) -> list[str]:
    files = ", ".join(str(world.root / "annotations" / f"{kind}_train.json") for kind in ("instances", "captions"))
    return [
        "world=null", f"out={out}", f"images={world.images}", f"annotations=[{files}]",
        f"quality.eval_images=[{world.images / 'test'}]",
    ]  # fmt: skip


def settings(world: WorldPaths, out: Path, *more: str) -> BuildConfig:
    return read_build(CONFIG, [*words_for(world, out), *more])


@pytest.fixture(scope="module")
def built(world: WorldPaths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "out"
    assert synth_build(settings(world, out), yes=False) == out / "train.jsonl"
    return out


def test_one_call_makes_all_seven_types_and_every_answer_is_true(world: WorldPaths, built: Path) -> None:
    records, held = list(read_records(built / "dataset.jsonl")), facts(world.root)
    assert {record.instruction_type for record in records} == TYPES
    assert len({record.id for record in records}) == len(records) > 200
    for record in records:
        assert record.turns[0].text.startswith("<image>\n")
        check_record(record, held[record.images[0]])


def test_the_check_of_this_file_finds_a_wrong_answer() -> None:
    things = {("7", "red", "top-left"), ("3", "blue", "bottom-right")}
    assert holds("The digit at the top-left is 7", things)
    assert not holds("The digit at the top-left is 3", things)
    assert not holds("There is no blue digit", things)
    assert asked_truth("Is the blue digit a 3?", things)
    assert not asked_truth("Is there a digit at the top-right?", things)


def test_what_is_kept_is_measured_without_fault_and_the_card_says_so(built: Path) -> None:
    card = json.loads((built / "quality" / "card.json").read_text())
    made = [record.id for record in read_records(built / "dataset.jsonl")]
    kept = [record.id for record in read_records(built / "train.jsonl")]
    removed = [json.loads(line)["id"] for line in (built / "quality" / "removed.jsonl").read_text().splitlines()]
    assert sorted(kept + removed) == sorted(made)
    assert kept == [identity for identity in made if identity in set(kept)]
    assert card["kept"]["records"] == len(kept) > 200
    assert card["correctness"]["mean"] == 1.0
    assert card["correctness"]["records_with_claims"] > 0.9 * len(made)
    assert card["contamination"] == {"eval_text": None, "eval_image": 0}
    assert (built / "quality" / "card.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_the_teacher_balances_judgements_and_letters_and_asks_in_its_domains(built: Path) -> None:
    records = list(read_records(built / "mminstruct" / "dataset.jsonl"))
    assert {record.domain for record in records} == {
        "object_recognition", "attribute_recognition", "object_localization", "object_counting"
    }  # fmt: skip
    answers: dict[str, Counter[str]] = {"judgement": Counter(), "choice": Counter()}
    for record in records:
        if record.kind in answers:
            answers[record.kind].update(turn.text.split()[-1] for turn in record.turns if turn.role == "assistant")
    yes, judged = answers["judgement"]["yes."], answers["judgement"].total()
    assert judged > 40
    assert abs(yes / judged - 0.5) < 3 * (0.25 / judged) ** 0.5
    letters = answers["choice"]
    assert set(letters) == {"A.", "B.", "C.", "D."}
    assert max(letters.values()) / letters.total() < 0.25 + 3 * (0.1875 / letters.total()) ** 0.5


def test_the_same_build_again_asks_nothing_and_gives_the_same_bytes(
    world: WorldPaths, built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("dataset.jsonl", "train.jsonl", "calls.jsonl")
    before = [(built / name).read_bytes() for name in names]
    assert synth_build(settings(world, built), yes=False) == built / "train.jsonl"
    assert [(built / name).read_bytes() for name in names] == before
    said = capsys.readouterr().err
    assert "120 reused" in said
    assert re.search(r"^all +\d+ +\d+ +\d+$", said, flags=re.MULTILINE)


def test_killed_in_the_middle_it_goes_on_and_ends_with_the_same_set(
    world: WorldPaths, built: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "vlit.cli", "synth", "build", "--no-review", "--config", str(CONFIG)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([*command, *words_for(world, out)], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    calls = out / "calls.jsonl"
    while child.poll() is None and not (calls.is_file() and calls.stat().st_size > 40_000):
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (out / "train.jsonl").exists(), "finished before it could be killed"
    assert synth_build(settings(world, out), yes=False) is not None
    assert (out / "train.jsonl").read_bytes() == (built / "train.jsonl").read_bytes()


def test_the_command_builds_and_then_serves_the_review_of_what_is_kept(world: WorldPaths, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vlit.cli", "synth", "build", "--port", "0", "--config", str(CONFIG)]
    words = [*words_for(world, tmp_path / "out"), "max_items=60"]
    child = subprocess.Popen(
        [*command, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert child.stdout is not None
        found = re.search(r"review +(http://127\.0\.0\.1:\d+)/#token=(\S+)", child.stdout.readline())
        assert found is not None
        request = urllib.request.Request(f"{found[1]}/api/rows?reviewer=a", headers={"X-Review-Token": found[2]})
        with urllib.request.urlopen(request, timeout=20) as reply:
            rows = json.loads(reply.read())
        kept = (tmp_path / "out" / "train.jsonl").read_text().count("\n")
        assert kept > 20
        assert rows["records"] == kept
        assert set(rows["type"]["names"]) == TYPES
        assert len(rows["scores"]["quality"]) == kept
        assert set(rows["scores"]["correctness"]) == {1.0, None}
    finally:
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=30) in (0, 130)


def test_two_recipes_share_one_budget_by_the_servers_count(world: WorldPaths, tmp_path: Path) -> None:
    with running(delay_s=0.0) as server:
        prices = {"usd_per_million_in": 1.0, "usd_per_million_out": 4.0}
        teacher = {"type": "openai", "base_url": server.url, "model": "m", "concurrency": 4, **prices}
        files = [str(world.root / "annotations" / f"{kind}_train.json") for kind in ("instances", "captions")]
        raw = {
            "images": str(world.images), "annotations": files, "out": str(tmp_path / "out"), "teacher": teacher,
            "recipes": {"llava": {"type": "llava", "shares": {"conversation": 1}}, "mminstruct": {"type": "mminstruct"}},
            "budget_usd": 0.7, "quality": {"keep": [], "annotations": []},
        }  # fmt: skip
        path = tmp_path / "build.yaml"
        path.write_text(yaml.safe_dump(raw))
        with pytest.raises(ConfigError, match="Add --yes to begin without a question"):
            synth_build(read_build(path), yes=False)
        assert server.accounts.requests == 0
        with pytest.raises(BudgetExhausted):
            synth_build(read_build(path), yes=True)
        assert 0 < server.accounts.charged_nano <= 0.7 * NANO
        assert (tmp_path / "out" / "llava" / "dataset.jsonl").is_file(), "the budget must end in the second recipe"
        assert not (tmp_path / "out" / "dataset.jsonl").exists()
        assert synth_build(read_build(path, ["budget_usd=5"]), yes=True) is not None
        assert set(server.accounts.good.values()) == {1}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["quality.keep=[spotless]"], "spotless"),
        (["quality.keep=[uncontaminated]", "quality.eval_images=[]"], "is not measured"),
        (["recipes=null"], "recipes: Input should be a valid dictionary"),
        (["recipes.quality={type: llava}"], 'recipes: "quality" cannot be the name of a folder here'),
        (["recipe=llava"], "yaml: recipe: unknown key. Known: annotations"),
        (["annotations=[README.md]"], "README.md: not a COCO file"),
        (["annotations=[nowhere.json]"], "nowhere.json: cannot be read"),
        (["recipes.llava.typ=3"], "types_per_image"),
    ],
)
def test_a_mistake_is_found_before_anything_is_asked(
    world: WorldPaths, tmp_path: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["synth", "build", "--no-review", "--config", str(CONFIG), *words_for(world, out), *words]) == 2
    assert expected in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("pair", "kind", "code"),
    [
        (Pair("Is it red?", "Yes."), "judgement", "conclusion"),
        (Pair("Is it red?", "It is, so yes."), "judgement", "conclusion"),
        (Pair("Is it red?", "The ball is red, so B."), "judgement", "conclusion"),
        (Pair("Which?", "The ball is red, so yes.", ("a", "b", "c", "d")), "choice", "conclusion"),
        (Pair("Which?", "The ball is red, so E.", ("a", "b", "c", "d")), "choice", "conclusion"),
        (Pair("Which?", "The ball is red, so A.", ("a", "a", "c", "d")), "choice", "options"),
    ],
)
def test_a_reasoned_answer_gives_its_reason_and_then_its_conclusion(pair: Pair, kind: str, code: str) -> None:
    with pytest.raises(Rejected) as caught:
        check_pair(pair, kind, is_reasoned=True)
    assert caught.value.code == code
    right = Pair("Is it red?", "The ball is red, so yes.")
    assert check_pair(right, "judgement", is_reasoned=True) == right
    letter = Pair("Which?", "The ball is red, so B.", ("a", "b", "c", "d"))
    assert check_pair(letter, "choice", is_reasoned=True) == letter


def test_the_digits_teacher_refuses_pictures_of_another_world() -> None:
    teacher = TEACHERS.get("digits")().build()
    view = {"id": "1", "image": "street.jpg", "captions": [], "things": [{"name": "dog", "box": [0, 0, 1, 1]}]}
    with pytest.raises(DataError, match=r'street\.jpg" shows "dog"; it knows coloured digits only'):
        teacher.send(Ask("detail", (), 100, view))
    with pytest.raises(ConfigError, match='teacher digits: cannot do the task "refine"'):
        teacher.send(Ask("refine", (), 100, view))
