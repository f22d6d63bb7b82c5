"""Quality metrics against faults that were planted, formulas by hand, filters and selection, memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.planted import Planted, plant
from vlit.data.record import Record, Region, read_records, write_records
from vlit.errors import ConfigError, DataError
from vlit.serve.quality import measure_quality
from vlit.synth.digits.world import ensure_world
from vlit.synth.quality.annotations import Annotations, Thing, read_annotations
from vlit.synth.quality.correctness import agreement_of, leaks
from vlit.synth.quality.filters import parse_filters
from vlit.synth.quality.scan import Measured, measure
from vlit.synth.quality.select import select
from vlit.synth.quality.words import root_of
from vlit.types import Turn

CHECKS = {
    "wrong_count": ("wrong_count",), "wrong_colour": ("wrong_colour",), "duplicate": ("exact", "paraphrase"),
    "leaks": ("leak",), "eval_image": ("eval_image",), "eval_text": ("eval_text",),
}  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    root = tmp_path_factory.mktemp("quality")
    world = ensure_world(
        root / "world", train_images=400, validation_images=10, test_images=60, questions_per_kind=2, progress=False
    )
    return plant(world, root / "data")


@pytest.fixture(scope="module")
def found(planted: Planted) -> Measured:
    known = read_annotations([planted.annotations])
    return measure(
        planted.path, images=planted.images, annotations=known, eval_texts=[planted.eval_texts],
        eval_images=[planted.eval_images],
    )  # fmt: skip


@pytest.mark.parametrize("check", CHECKS)
def test_planted_faults_are_found_and_nothing_else(check: str, planted: Planted, found: Measured) -> None:
    wanted = set().union(*(planted.faults[fault] for fault in CHECKS[check]))
    ids = np.array(found.fields["id"])
    flagged = set(ids[found.numbers[check] > 0].tolist())
    precision, recall = len(flagged & wanted) / max(len(flagged), 1), len(flagged & wanted) / len(wanted)
    print(f"{check}: precision {precision:.3f}, recall {recall:.3f}, {len(wanted)} planted among {len(ids)}")
    assert len(wanted) >= 40
    assert precision >= 0.95
    assert recall >= 0.95
    for fault in CHECKS[check]:
        assert len(flagged & planted.faults[fault]) / len(planted.faults[fault]) >= 0.95


def test_two_processes_measure_what_one_does(planted: Planted, found: Measured) -> None:
    again = measure(planted.path, annotations=read_annotations([planted.annotations]), workers=2)
    assert again.fields["id"] == found.fields["id"]
    for name in ("correctness", "complexity", "leaks", "blind"):
        np.testing.assert_array_equal(again.numbers[name], found.numbers[name], err_msg=name)
    assert again.distinct == found.distinct


def test_the_command_writes_card_page_kept_and_removed(planted: Planted, tmp_path: Path) -> None:
    from vlit.cli import main

    words = [
        "synth",
        "quality",
        str(planted.path),
        "--images",
        str(planted.images),
        "--annotations",
        planted.annotations,
    ]
    words += ["--eval-images", str(planted.eval_images), "--eval-texts", str(planted.eval_texts), "--workers", "1"]
    assert main([*words, "--keep", "clean", "--keep", "complexity>=0.05", "--out", str(tmp_path)]) == 0
    card = json.loads((tmp_path / "card.json").read_text())
    removed = [json.loads(line) for line in (tmp_path / "removed.jsonl").read_text().splitlines()]
    kept = list(read_records(tmp_path / "kept.jsonl"))
    assert len(kept) + len(removed) == card["records"] > 1000
    assert len(kept) == card["kept"]["records"]
    faults = set().union(*planted.faults.values())
    assert len({record.id for record in kept} & faults) <= 0.05 * len(faults)
    assert all(entry["reasons"] for entry in removed)
    assert any("wrong" in reason or "correctness is" in reason for entry in removed for reason in entry["reasons"])
    page = (tmp_path / "card.html").read_text()
    assert page.count("data:image/") > 10
    assert page.count("<svg") > 5
    assert "http://" not in page
    assert "https://" not in page
    assert card["provenance"]["licences"] == {"CC BY 4.0": card["records"]}
    assert card["provenance"]["cost_usd"] == pytest.approx(0.001 * card["records"], rel=1e-3)


# --- agreement with annotations ---------------------------------------------------------------------------------------

STREET = (
    Thing("dog", "animal", "brown", (0.1, 0.6, 0.3, 0.9)),
    Thing("dog", "animal", "black", (0.6, 0.6, 0.8, 0.9)),
    Thing("traffic light", "outdoor", "", (0.7, 0.0, 0.8, 0.3)),
    Thing("car", "vehicle", "red", (0.2, 0.1, 0.45, 0.3)),
)


def street(*turns: str) -> tuple[Record, Annotations]:
    known = Annotations({"a.jpg": STREET})
    for kind, names in (
        ("label", ("dog", "traffic light", "car", "cat", "bus", "person")),
        ("group", ("animal", "vehicle")),
    ):
        for name in names:
            known.add_name(kind, name)
    roles = ("user", "assistant")
    said = tuple(Turn(roles[n % 2], text) for n, text in enumerate(turns))
    return Record("r", said, ("a.jpg",)), known


@pytest.mark.parametrize(
    ("question", "answer", "wrong"),
    [
        ("<image>\nDescribe it.", "Two dogs stand near a red car, below a traffic light.", {}),
        ("<image>\nDescribe it.", "There are three dogs in the picture.", {"count": 1}),
        ("<image>\nHow many dogs are there?", "2", {}),
        ("<image>\nHow many dogs are there?", "Three.", {"count": 1}),
        ("<image>\nHow many animals do you see?", "There are two animals.", {}),
        ("<image>\nDescribe it.", "A green car is parked behind a brown dog.", {"colour": 1}),
        ("<image>\nDescribe it.", "The car is blue.", {"colour": 1}),
        ("<image>\nDescribe it.", "A bus passes the dogs.", {"exists": 1}),
        ("<image>\nDescribe it.", "There is no bus, only a car.", {}),
        ("<image>\nDescribe it.", "There is no car.", {"exists": 1}),
        ("<image>\nIs there a cat?", "No.", {}),
        ("<image>\nIs there a cat?", "Yes, there is.", {"yes_no": 1}),
        ("<image>\nIs the car red?", "No.", {"yes_no": 1}),
        ("<image>\nIs the dog asleep?", "No.", {}),
        ("<image>\nWhat color is the car?", "red", {}),
        ("<image>\nWhat color is the car?", "yellow", {"colour": 1}),
        ("<image>\nWhere is the car?", "[0.20, 0.10, 0.45, 0.30]", {}),
        ("<image>\nWhere is the car?", "[0.60, 0.60, 0.80, 0.90]", {"box": 1}),
        ("<image>\nWhere is the traffic light?", "The traffic light is at [0.1, 0.1, 0.2, 0.2].", {"box": 1}),
        ("<image>\nWhat might happen next?", "The driver may stop, because it is getting late.", {}),
    ],
)
def test_claims_are_compared_with_what_the_picture_shows(question: str, answer: str, wrong: dict[str, int]) -> None:
    assert {check: n for check, n in agreement_of(*street(question, answer)).wrong.items() if n} == wrong


def test_sentences_without_a_claim_are_not_measured() -> None:
    assert math.isnan(agreement_of(*street("<image>\nWhy?", "Nobody can tell.")).share)


def test_regions_stand_in_for_annotations_where_they_are_complete(tmp_path: Path) -> None:
    regions = (Region("red car", (0.2, 0.1, 0.45, 0.3)), Region("dog", (0.1, 0.6, 0.3, 0.9)))
    turns = (Turn("user", "<image>\nWhat is there?"), Turn("assistant", "There is a blue car and a dog."))
    write_records(tmp_path / "d.jsonl", [Record("r", turns, ("a.jpg",), regions=regions)])
    found = measure(tmp_path / "d.jsonl", annotations=read_annotations(["regions"]))
    assert found.numbers["wrong_colour"].tolist() == [1]
    assert found.numbers["claims"].tolist() == [2]


@pytest.mark.parametrize(
    ("question", "answer", "leaking"),
    [
        ("The sign says stop. What does the sign say?", "Stop.", True),
        ("What color is the red car?", "The car is red.", True),
        ("What color is the car?", "The car is red.", False),
        ("Is the car red?", "Yes, the car is red.", False),
        ("Is it day or night?", "Night.", False),
        ("Which?\nA. dog\nB. cat", "A", False),
        ("Which animal is it?\nA. dog\nB. cat\n", "dog", False),
        ("Where is the book?", "On the book.", True),
        ("The cup is behind the plate. Where is the cup?", "The cup is behind the plate.", True),
        ("Where is the cup relative to the plate?", "The cup is behind the plate.", False),
        ("What is the relation of man and horse?", "The man is on the horse.", False),
        ("In what direction is the car facing?", "The car is facing left.", False),
        ("How many people are there?", "There are many people.", False),
    ],
)
def test_leaks_are_answers_that_stand_in_their_question(question: str, answer: str, leaking: bool) -> None:
    assert leaks(question, answer) is leaking


@pytest.mark.parametrize(
    ("question", "root"),
    [
        ("<image>\nDescribe the picture in detail.", ("describe", "picture")),
        ("How many dogs do you see?", ("see", "dog")),
        ("What color is the digit?", ("be", "color")),
        ("What is the man holding?", ("hold", "man")),
    ],
)
def test_roots_are_verb_and_noun(question: str, root: tuple[str, str]) -> None:
    assert root_of(question) == root


# --- filters, selection, faults of use ----------------------------------------------------------------------------------


def test_filters_name_what_is_wrong_with_them() -> None:
    assert [str(rule) for rule in parse_filters(["correctness >= 0.5", "no_leaks"])] == ["correctness>=0.5", "leaks==0"]
    with pytest.raises(ConfigError, match='Did you mean "correctness"'):
        parse_filters(["corectness>=0.5"])
    with pytest.raises(ConfigError, match="neither"):
        parse_filters(["correctness is good"])
    with pytest.raises(ConfigError, match="--annotations"):
        parse_filters(["correct"], missing={"correctness"})


def test_selection_prefers_quality_and_then_what_it_has_least_of() -> None:
    quality = np.array([0.9, 0.9, 0.9, 0.5, 0.1])
    groups = [["a", "a", "a", "b", "c"]]
    assert select(quality, groups, 2, weight=1.0).tolist() == [0, 3]
    assert select(quality, groups, 2, weight=0.0).tolist() == [0, 1]
    rng = np.random.default_rng(0)
    quality, names = rng.random(300), [str(n) for n in rng.integers(0, 20, 300)]
    chosen = select(quality, [names], 60)
    assert len(set(chosen.tolist())) == 60
    assert all(a < b for a, b in pairwise(chosen.tolist()))
    assert chosen.tolist() == _greedy(quality, names, 60)


def _greedy(quality: np.ndarray, names: list[str], count: int) -> list[int]:
    taken: dict[str, int] = {}
    left = set(range(len(quality)))
    for _ in range(count):
        best = max(left, key=lambda row: (quality[row] + 1 / (1 + taken.get(names[row], 0)), -row))
        left.remove(best)
        taken[names[best]] = taken.get(names[best], 0) + 1
    return sorted(set(range(len(quality))) - left)


def test_a_selection_has_the_asked_size_no_fault_and_many_pictures(planted: Planted, tmp_path: Path) -> None:
    card = measure_quality(planted.path, annotations=[planted.annotations], out=tmp_path, select=200, workers=1)
    kept = list(read_records(tmp_path / "kept.jsonl"))
    assert len(kept) == card["kept"]["records"] == 200
    measured = set().union(
        *(planted.faults[fault] for fault in ("wrong_count", "wrong_colour", "exact", "paraphrase", "leak"))
    )
    assert not {record.id for record in kept} & measured
    assert len({record.images for record in kept}) > 150
    assert card["kept"]["reasons"] == {"not selected": card["records"] - 200}


def test_unreadable_records_are_counted_and_never_kept(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    good = {"id": "a", "conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello there."}]}
    path.write_text("\n".join([json.dumps(good), '{"id": "b"}', "{broken", json.dumps(good | {"id": "c"})]) + "\n")
    card = measure_quality(path, keep=["unique"], workers=1)
    assert card["bad_records"] == 2
    assert card["kept"] == {
        "records": 1,
        "removed": 3,
        "reasons": {"unreadable": 2, "duplicate==0": 1},
        "filters": ["duplicate==0"],
    }
    assert [record.id for record in read_records(tmp_path / "d.quality" / "kept.jsonl")] == ["a"]


def test_files_that_are_not_what_they_should_be_are_named(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text("")
    with pytest.raises(DataError, match="empty"):
        measure(tmp_path / "d.jsonl")
    (tmp_path / "coco.json").write_text('{"images": []}')
    with pytest.raises(DataError, match="not a COCO"):
        read_annotations([str(tmp_path / "coco.json")])


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    words = ["".join(chr(97 + (n * k) % 26) for k in (3, 5, 7, 11, 13)) for n in range(1, 999)]
    for number in (1, 6):
        with (tmp_path / f"{number}.jsonl").open("w") as file:
            for row in range(600 * number):
                said = " ".join(words[(row * 7 + n * n) % len(words)] for n in range(20)) + " and so on" * 150
                turns = [{"from": "human", "value": said}, {"from": "gpt", "value": f"Answer {row}."}]
                file.write(json.dumps({"id": str(row), "conversations": turns}) + "\n")
    code = (
        "import sys, resource; from pathlib import Path; from vlit.synth.quality.scan import measure; "
        "measure(Path(sys.argv[1])); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    small, large = (
        int(
            subprocess.run(
                [sys.executable, "-c", code, str(tmp_path / f"{n}.jsonl")], capture_output=True, text=True, check=True
            ).stdout
        )
        for n in (1, 6)
    )
    assert (tmp_path / "6.jsonl").stat().st_size - (tmp_path / "1.jsonl").stat().st_size > 4e6
    assert large - small < 8_000  # kB
